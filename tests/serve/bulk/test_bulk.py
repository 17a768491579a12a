"""Coloring of many drawings: which drawings and references, the same bytes as `colorize`, resumed, and on Ray."""

import json
from pathlib import Path

import numpy as np
import pytest

from animediffusion.cli.app import run
from animediffusion.models.bundle import load_bundle
from animediffusion.models.sampler_options import SamplerOptions
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import ConfigError, DataError, StoreFailedError, UnreachableError
from animediffusion.platform.images.codec import decode_rgb, encode_png
from animediffusion.platform.storage import storage
from animediffusion.serve.bulk import worker
from animediffusion.serve.bulk.batched import BatchedColorizer
from animediffusion.serve.bulk.bulk import Pace, color_here
from animediffusion.serve.bulk.drawings import BulkDrawing, References, list_drawings, read_references
from animediffusion.serve.bulk.worker import layer_of
from animediffusion.serve.client.local import LocalColorizer
from animediffusion.serve.rendering.render import DEFAULTS, RenderOptions

OPTIONS = SamplerOptions(seed=3, steps=2)


@pytest.fixture
def folder(tmp_path: Path, sketch: np.ndarray, reference: np.ndarray) -> Path:
    """Drawings a to e, of which c is not a picture, and two references."""
    (tmp_path / "in").mkdir()
    for name in "abde":
        (tmp_path / "in" / f"{name}.png").write_bytes(encode_png(sketch))
    (tmp_path / "in" / "c.png").write_bytes(b"not a picture")
    (tmp_path / "in" / "notes.txt").write_text("not a drawing")
    (tmp_path / "hero.png").write_bytes(encode_png(reference))
    (tmp_path / "other.png").write_bytes(encode_png(reference[:, ::-1]))
    return tmp_path


def command(bundle_folder: Path, folder: Path, *words: object, out: object = "out") -> list[str]:
    out = str(out) if str(out).startswith("s3:") else str(folder / str(out))
    given = ["--model", bundle_folder, "--seed", 3, "--steps", 2, "--out", out, "--json"]
    return ["colorize", *map(str, [*words, *given])]


def test_a_csv_or_a_folder_gives_each_drawing_its_references(folder):
    (folder / "refs.csv").write_text("sketch,reference,reference2\na.png,hero.png,\nb,hero.png,s3://bucket/x.png\n")
    found = read_references([str(folder / "other.png")], str(folder / "refs.csv"))
    hero, other = str(folder / "hero.png"), str(folder / "other.png")
    assert found.find("s3://in/a.png") == (hero,)
    assert found.find("s3://in/b.webp?region=x") == (hero, "s3://bucket/x.png")
    assert found.find("/in/c.png") == (other,)
    by_name = read_references([], str(folder / "in"))
    assert by_name.find("/elsewhere/a.jpg") == (str(folder / "in" / "a.png"),)
    assert by_name.find("/elsewhere/hero.png") == ()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("drawing,reference\n", "its columns are drawing, reference"),
        ("sketch,reference\na,\n", "line 2: lacks a sketch or a reference"),
        ("sketch,reference\na,x\na,y\n", "line 3: 'a' is given twice"),
        ("", "its columns are none"),
    ],
)
def test_a_wrong_csv_is_an_error_of_one_line(text, found, tmp_path):
    (tmp_path / "refs.csv").write_text(text)
    with pytest.raises(DataError, match=found):
        read_references([], str(tmp_path / "refs.csv"))


def test_drawings_without_a_reference_or_with_one_output_are_faults(folder):
    (folder / "in" / "a.jpg").write_bytes(b"")
    drawings, faults = list_drawings(
        [str(folder / "in")], "s3://out/x", "png", References((), {"b": ("r",), "a": ("r",)})
    )
    assert drawings == [BulkDrawing(str(folder / "in" / "b.png"), ("r",), "s3://out/x/b.png")]
    assert ["another drawing would become" in error for _, error in faults] == [True, True, False, False, False]
    assert "has no reference" in faults[-1][1]
    with pytest.raises(ConfigError, match="would be overwritten"):
        list_drawings([str(folder / "in")], str(folder / "in"), "png", References(("r",)))
    with pytest.raises(DataError, match="no such file or folder"):
        list_drawings([str(folder / "none")], "out", "png", References(("r",)))


def test_pictures_are_those_of_colorize_byte_by_byte_and_are_made_once(folder, bundle_folder, capsys):
    words = [folder / "in", "--reference", folder / "hero.png"]
    assert run(command(bundle_folder, folder, *words, out="calm")) == 1
    capsys.readouterr()
    (folder / "refs.csv").write_text("sketch,reference\nd.png,other.png\n")
    some = command(bundle_folder, folder, *words, "--references", folder / "refs.csv", out="out")
    assert run(some) == 1  # c.png is not a picture
    outcomes = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [Path(one["sketch"]).stem for one in outcomes if "error" in one] == ["c"]
    for name in ("a", "a.color", "b", "b.color", "e", "e.color"):
        assert (folder / "out" / f"{name}.png").read_bytes() == (folder / "calm" / f"{name}.png").read_bytes()
    assert (folder / "out" / "d.png").read_bytes() != (folder / "calm" / "d.png").read_bytes()
    (folder / "out" / "b.png").unlink()
    kept = (folder / "out" / "a.png").stat().st_mtime_ns
    assert run(some) == 1
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [Path(one["sketch"]).stem for one in again if one.get("skipped")] == ["a", "d", "e"]
    assert (folder / "out" / "a.png").stat().st_mtime_ns == kept


def test_a_store_that_is_lost_ends_the_command(folder, bundle_folder, monkeypatch):
    def lost(uri: str) -> bytes:
        raise UnreachableError(uri, "does not answer", "check the network")

    monkeypatch.setattr(worker, "read_file", lost)
    drawing = BulkDrawing(str(folder / "in" / "a.png"), (str(folder / "hero.png"),), str(folder / "out" / "a.png"))
    with pytest.raises(StoreFailedError, match="does not answer"):
        list(color_here(Settings(workspace=folder), str(bundle_folder), [drawing], OPTIONS, DEFAULTS, "png"))


@pytest.mark.parametrize("learned", [None, False, True])
def test_a_batch_of_an_engine_changes_a_level_by_one_at_most(folder, bundle_folder, learned):
    drawing, colors = (folder / "in" / "a.png").read_bytes(), [(folder / "hero.png").read_bytes()]
    batched = BatchedColorizer(load_bundle(bundle_folder, "cpu"), "v", 4)
    single = LocalColorizer(Settings(workspace=folder), str(bundle_folder))
    hints = None if learned is None else json.dumps([{"x": 9, "y": 9, "color": "#20c040", "learned": learned}])
    rendering = RenderOptions(hints=hints)
    ours, theirs = (one.colorize(drawing, colors, OPTIONS, rendering, name="a").picture for one in (batched, single))
    assert np.abs(decode_rgb(ours).astype(int) - decode_rgb(theirs)).max() <= 1


def test_the_pace_says_how_long_it_will_take():
    now = [0.0]
    pace = Pace(1001, lambda: now[0])
    assert str(pace) == "colored 0 of 1,001"
    pace.add()
    now[0] = 10.0
    for _ in range(50):
        pace.add()
    assert str(pace) == "colored 51 of 1,001, 5.00 pictures/s, 4 min left"


def test_the_layer_of_an_address_keeps_its_options():
    assert layer_of("s3://b/a.png?region=x") == "s3://b/a.color.png?region=x"
    assert layer_of("/b/a?b.png") == "/b/a?b.color.png"


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--url", "http://127.0.0.1:1", "--reference", "r.png", "--on-cluster"], "error: --url: "),
        ([], "error: --reference: is missing; "),
    ],
)
def test_options_that_do_not_fit_are_errors_of_one_line(words, found, folder, capsys):
    assert run(["colorize", str(folder / "in"), "--out", str(folder / "out"), *words]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(found)


@pytest.mark.ray
def test_a_cluster_makes_the_same_bytes_from_store_to_store_and_resumes(ray_cluster, folder, bundle_folder, capsys):
    store = f"s3://bucket/{folder.name}"
    for path in sorted((folder / "in").glob("*.png")):
        storage.write_bytes(storage.join(store, "in", path.name), path.read_bytes())
    words = ["--reference", folder / "hero.png"]
    assert run(command(bundle_folder, folder, folder / "in", *words, out="calm")) == 1
    capsys.readouterr()
    made = storage.join(store, "out", "a.png")
    for expected in (None, {"b", "d", "e"}):
        line = command(bundle_folder, folder, store + "/in", *words, "--on-cluster", out=store + "/out")
        assert run(line) == 1
        captured = capsys.readouterr()
        outcomes = json.loads(captured.out.splitlines()[-1])
        assert [one["sketch"] for one in outcomes if "error" in one] == [store + "/in/c.png"]
        assert "c.png" in captured.err
        if expected is not None:
            assert {one["sketch"][-5] for one in outcomes if one.get("skipped")} == expected
        for name in ("a", "a.color", "e", "e.color"):
            data = storage.read_bytes(storage.join(store, "out", f"{name}.png"))
            assert data == (folder / "calm" / f"{name}.png").read_bytes()
        storage.delete(made)
