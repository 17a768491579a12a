"""An exported model in a virtual environment that has nothing but what it says it needs."""

import importlib.metadata
import io
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest
from bundles import new_model, write_bundle
from PIL import Image

from animediffusion.cli import app as cli
from animediffusion.pipelines.release import release
from animediffusion.pipelines.release.export import export
from animediffusion.pipelines.synthetic.dataset import make_row
from animediffusion.platform.errors import BundleError, ConfigError, RegistryError, StorageError
from animediffusion.platform.images.codec import encode_png
from animediffusion.platform.registry import code_archive
from animediffusion.serve.standalone import main


def needed(names):
    """Distributions and all that they need themselves, extras left out."""
    found, waiting = set(), list(names)
    while waiting:
        name = re.split(r"[ ;<>=!~\[(]", waiting.pop())[0].lower().replace("_", "-")
        if name in found:
            continue
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform
        found.add(name)
        waiting += [line for line in requires if "extra ==" not in line]
    return found


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """Python of a venv into which only torch, safetensors, numpy and pillow are linked, and what torch itself needs."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    there = Path(sysconfig.get_path("purelib"))
    here = next(folder.glob("lib/python*/site-packages"))
    for name in needed(code_archive.NEEDS):
        files = importlib.metadata.files(name) or []
        for top in {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}:
            if not (here / top).exists() and (there / top).exists():
                (here / top).symlink_to(there / top)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield new_model(tmp_path_factory.mktemp("workspace"))


@pytest.fixture
def bundle(tmp_path):
    return str(write_bundle(tmp_path / "bundle"))


def run(python, *arguments, cwd):
    environment = {"PATH": os.environ["PATH"], "HOME": str(cwd), "OMP_NUM_THREADS": "1"}
    command = [str(python), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)


def test_an_exported_model_makes_the_picture_of_colorize(bare_python, settings, tmp_path, capsys):
    row = make_row(3, 0, 200)
    (tmp_path / "drawing.png").write_bytes(encode_png(row.sketch[:150]))
    (tmp_path / "colors.png").write_bytes(encode_png(row.cross_reference))
    release.register(settings, write_bundle(tmp_path / "bundle", 1, image_size=32))
    found = export(settings, "1", tmp_path / "model")
    assert (tmp_path / "model" / "checksums.json").exists()

    arguments = [tmp_path / "drawing.png", tmp_path / "colors.png", tmp_path / "out.png", "--seed", 7]
    done = run(bare_python, tmp_path / "model" / "colorize.py", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")

    command = ["colorize", str(tmp_path / "drawing.png"), "--reference", str(tmp_path / "colors.png")]
    assert cli.run([*command, "--out", str(tmp_path / "ours"), "--model", str(tmp_path / "bundle"), "--seed", "7"]) == 0
    a, b = (np.asarray(Image.open(io.BytesIO(path.read_bytes()))).astype(int) for path in
            (tmp_path / "out.png", tmp_path / "ours" / "drawing.png"))  # fmt: skip
    assert a.shape == b.shape == (150, 200, 3)
    assert np.abs(a - b).max() <= 1
    assert found.num_files > 10


def test_an_exported_model_colors_by_regions_with_a_palette(bare_python, settings, drawing, tmp_path, capsys):
    export(settings, str(write_bundle(tmp_path / "bundle", 1)), tmp_path / "model")
    Path("two.gpl").write_text("GIMP Palette\n10 20 30 ink\n240 230 220 paper\n")
    words = ["--layer", "layer.png", "--style", "flat", "--background", "reference", "--palette", "two.gpl"]
    script = tmp_path / "model" / "colorize.py"
    done = run(bare_python, script, "s.png", "r.png", "out.png", *words, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    colors = np.asarray(Image.open("layer.png").convert("RGB")).reshape(-1, 3)
    assert {tuple(color) for color in colors.tolist()} <= {(10, 20, 30), (240, 230, 220)}
    by_file = Path("out.png").read_bytes()
    assert main(tmp_path / "model", ["s.png", "r.png", "out.png", *words[:-1], "#0a141e,#f0e6dc"]) == 0
    assert Path("out.png").read_bytes() == by_file
    for wrong, line in (
        (["--style", "flat", "--palette", "#12"], "argument --palette: '#12' is not a color; "),
        (["--style", "flat", "--palette", "no.gpl"], "argument --palette: 'no.gpl': No such file or directory; "),
        (["--style", "painted", "--palette", "#123456"], "error: --palette: '#123456' with style painted; "),
        (["--style", "oil"], "argument --style: invalid choice: 'oil'"),
    ):
        try:
            code = main(tmp_path / "model", ["s.png", "r.png", "out.png", *wrong])
        except SystemExit as left:
            code = left.code
        assert code == 2
        assert line in capsys.readouterr().err.splitlines()[-1]


def test_an_exported_model_takes_hints(bare_python, settings, drawing, tmp_path, capsys):
    export(settings, str(write_bundle(tmp_path / "bundle", 1)), tmp_path / "model")
    script, words = tmp_path / "model" / "colorize.py", ["s.png", "r.png", "out.png", "--style", "flat"]
    for learned in (False, True):
        hint = {"x": 32, "y": 32, "color": "#20c040", "learned": learned}
        Path("hints.json").write_text(json.dumps([hint]))
        done = run(bare_python, script, *words, "--layer", "layer.png", "--hints", "hints.json", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert np.asarray(Image.open("layer.png"))[32, 32].tolist() == [0x20, 0xC0, 0x40, 255]
    for data, line in (
        ('[{"x": 64, "y": 1, "color": "#20c040"}]', "hints: hint 1 at 64, 1 is outside of the drawing; "),
        ("[]", "--hints: contains no hint; "),
        (None, "--hints: 'hints.json': No such file or directory; "),
    ):
        Path("hints.json").unlink()
        if data is not None:
            Path("hints.json").write_text(data)
        assert main(tmp_path / "model", [*words, "--hints", "hints.json"]) == 2
        assert capsys.readouterr().err.startswith(f"error: {line}")
        Path("hints.json").touch()


def test_the_bare_environment_is_bare(bare_python, tmp_path):
    for module in ("scipy", "mlflow", "ray", "animediffusion", "kornia", "pydantic"):
        assert "ModuleNotFoundError" in run(bare_python, "-c", f"import {module}", cwd=tmp_path).stderr


def test_what_the_exported_script_cannot_use_is_one_line(settings, tmp_path):
    (tmp_path / "text.png").write_text("hello")
    export(settings, str(write_bundle(tmp_path / "bundle", 1)), tmp_path / "model")
    script = tmp_path / "model" / "colorize.py"
    done = run(sys.executable, script, tmp_path / "text.png", tmp_path / "text.png", "out.png", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "is not an image" in done.stderr
    done = run(sys.executable, script, tmp_path / "no.png", tmp_path / "no.png", "out.png", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        2, f"error: {tmp_path / 'no.png'}: No such file or directory; give files that can be read or written\n"
    )  # fmt: skip


@pytest.fixture
def drawing(tmp_path, monkeypatch):
    """A working directory with a sketch and a reference."""
    monkeypatch.chdir(tmp_path)
    row = make_row(3, 0, 64)
    Path("s.png").write_bytes(encode_png(row.sketch))
    Path("r.png").write_bytes(encode_png(row.reference))
    Path("r.json").write_text('[{"x": 1, "y": 1, "color": "#20c040"}]')
    Path("x.png").symlink_to("y.png")
    Path("y.png").symlink_to("x.png")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["s.png", "r.png", "s.png"], "OUT.png: s.png is also SKETCH; give another file"),
        (["s.png", "r.png", "./r.png"], "OUT.png: r.png is also REFERENCE; give another file"),
        (["s.png", "r.png", "r.json", "--hints", "r.json"], "OUT.png: r.json is also --hints; give another file"),
        (["s.png", "r.png", "o.png", "--layer", "o.png"], "--layer: o.png is also OUT.png; give another file"),
        (
            ["x.png", "r.png", "o.png"],
            "x.png: Too many levels of symbolic links; give files that can be read or written",
        ),
        (["s.png", "r.png", "/dev/full"], "/dev/full: No space left on device; give files that can be read or written"),
    ],
)
def test_the_exported_script_overwrites_nothing_that_it_reads(bundle, drawing, capsys, words, line):
    before = Path("s.png").read_bytes(), Path("r.png").read_bytes()
    assert main(Path(bundle), words) == 2
    assert capsys.readouterr().err == f"error: {line}\n"
    assert (Path("s.png").read_bytes(), Path("r.png").read_bytes()) == before


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["", "r.png", "o.png"], "'' is not a file name"),
        (["s.png", "r.png", ""], "'' is not a file name"),
        (["s.png", "r.png", "o.png", "--seed", "9" * 30], "is not a whole number from 0 to 4294967295"),
        (["s.png", "r.png", "o.png", "--seed", "1", "--seed", "2"], "argument --seed: given twice"),
        (["s.png", "r.png", "o.png", "--seed", "-1"], "'-1' is not a whole number"),
        (["s.png", "r.png", "o.png", "--steps", "1_0"], "'1_0' is not a whole number from 1 to 1000"),
        (["s.png", "r.png", "o.png", "--guidance-scale", "nan"], "'nan' is not a number from 0 to 20"),
    ],
)
def test_the_exported_script_refuses_odd_arguments(bundle, capsys, words, found):
    with pytest.raises(SystemExit, match="2"):
        main(Path(bundle), words)
    assert found in capsys.readouterr().err


def test_a_folder_in_use_or_an_unknown_model_ends_the_export(settings, tmp_path, bundle):
    release.register(settings, bundle)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(ConfigError, match="exists and is not empty"):
        export(settings, "1", tmp_path / "used")
    with pytest.raises(RegistryError, match=r"models:/.*/99: no such version"):
        export(settings, "99", tmp_path / "new")
    with pytest.raises(BundleError, match="no such folder"):
        export(settings, str(tmp_path / "nothing"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_command_that_is_shown_can_be_pasted_into_a_shell(settings, bundle, tmp_path):
    folder = tmp_path / "it's my model"
    assert shlex.split(export(settings, bundle, folder).command)[1] == str(folder / "colorize.py")


def test_an_empty_folder_is_filled_also_through_a_link(settings, bundle, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    export(settings, bundle, tmp_path / "link")
    assert (tmp_path / "real" / "colorize.py").exists()


def test_a_folder_that_cannot_be_made_is_named(settings, bundle, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"^.*/file/model: "):
        export(settings, bundle, tmp_path / "file" / "model")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ConfigError, match="is the folder in which the command runs"):
        export(settings, bundle, Path())


def test_the_modules_that_travel_need_nothing_else():
    names = set(code_archive.modules())
    assert "animediffusion/models/network/unet.py" in names
    assert names.isdisjoint(
        {"animediffusion/cli.py", "animediffusion/serve/engine/engine.py", "animediffusion/platform/config.py"}
    )


def test_equal_modules_make_equal_zip_files(tmp_path):
    for name in ("a.zip", "b.zip"):
        code_archive.zip_modules(tmp_path / name)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
