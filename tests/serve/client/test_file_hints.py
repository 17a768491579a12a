"""`colorize --hints`: exact colors in the files of the command, here and with a server."""

import json
from pathlib import Path

import numpy as np
import pytest

from animediffusion.cli import app as cli
from animediffusion.platform.images.codec import decode_rgb, encode_png

GREEN, FACE = (0x20, 0xC0, 0x40), (60, 60)


@pytest.fixture
def folder(tmp_path: Path, sketch: np.ndarray, reference: np.ndarray) -> Path:
    """Two drawings, the second too small for the hint, a reference, and hints."""
    (tmp_path / "drawings").mkdir()
    (tmp_path / "drawings" / "a.png").write_bytes(encode_png(sketch))
    (tmp_path / "drawings" / "b.png").write_bytes(encode_png(sketch[:50, :50]))
    (tmp_path / "reference.png").write_bytes(encode_png(reference))
    (tmp_path / "hints.json").write_text(json.dumps([{"x": FACE[0], "y": FACE[1], "color": "#20c040"}]))
    return tmp_path


def run(folder: Path, *options: str, hints: str = "hints.json") -> int:
    files = [str(folder / "drawings"), "--reference", str(folder / "reference.png"), "--out", str(folder / "out")]
    return cli.run(["colorize", *files, "--style", "flat", "--hints", str(folder / hints), *options])


@pytest.mark.parametrize("place", ["here", "on a server"])
def test_hints_color_the_drawings_that_they_fit(folder, place, bundle_folder, url, capsys):
    where = ["--model", str(bundle_folder)] if place == "here" else ["--url", url]
    assert run(folder, *where) == 1
    shown = capsys.readouterr()
    assert "b.png: " in shown.err + shown.out
    assert "hint 1 at 60, 60 is outside of the drawing" in shown.err + shown.out
    assert not (folder / "out" / "b.png").exists()
    picture = decode_rgb((folder / "out" / "a.png").read_bytes())
    assert tuple(picture[FACE[1], FACE[0]]) == GREEN
    before = (folder / "out" / "a.png").stat().st_mtime_ns
    run(folder, *where)
    assert (folder / "out" / "a.png").stat().st_mtime_ns == before
    (folder / "hints.json").write_text('[{"x": 60, "y": 60, "color": "#102030"}]')
    run(folder, *where)
    picture = decode_rgb((folder / "out" / "a.png").read_bytes())
    assert tuple(picture[FACE[1], FACE[0]]) == (0x10, 0x20, 0x30)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "--hints: '"),
        ("", "--hints: is empty"),
        ("[]", "--hints: contains no hint"),
        ('[{"x": 1, "y": 1, "color": "red"}]', '--hints: hint 1 has the color "red"'),
    ],
)
def test_hints_that_fit_no_drawing_end_the_command(folder, data, message, bundle_folder, capsys):
    if data is not None:
        (folder / "bad.json").write_text(data)
    assert run(folder, "--model", str(bundle_folder), hints="bad.json") == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {message}")
