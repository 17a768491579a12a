"""Coloring of many drawings: which drawings and references, the same bytes as `colorize`, resumed, and on Ray."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray

from animediffusion.cli.app import run
from animediffusion.models.bundle import load_bundle
from animediffusion.models.sampler_options import SamplerOptions
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import ConfigError, DataError, StoreFailedError, UnreachableError
from animediffusion.platform.images.codec import decode_rgb, encode_png
from animediffusion.platform.storage import storage
from animediffusion.serve.bulk import worker
from animediffusion.serve.bulk.bulk import Pace, color_here
from animediffusion.serve.bulk.drawings import BulkDrawing, Drawings, References, list_drawings, read_references
from animediffusion.serve.bulk.on_gpus import BatchedColorizer
from animediffusion.serve.bulk.worker import layer_of
from animediffusion.serve.client.file_metadata import read_metadata
from animediffusion.serve.client.local import STARTER_COLORS, LocalColorizer
from animediffusion.serve.rendering.render import DEFAULTS, RenderOptions
from animediffusion.serve.replica import model_source

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


def command(bundle_folder: Path, folder: Path, *words: object, out: object = "out", steps: int = 2) -> list[str]:
    out = str(out) if str(out).startswith("s3:") else str(folder / str(out))
    given = ["--model", bundle_folder, "--seed", 3, "--steps", steps, "--out", out, "--json"]
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
    assert list(drawings) == [BulkDrawing(str(folder / "in" / "b.png"), ("r",), "s3://out/x/b.png")]
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
        list(color_here(Settings(workspace=folder), str(bundle_folder), [drawing], OPTIONS, DEFAULTS, "png", print))


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


def wait_until(condition, process=None, seconds=180):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        assert process is None or process.poll() is None, process.stderr.read()
        time.sleep(0.02)


def made_files(out):
    """Time of the last change of each finished picture."""
    return {path: path.stat().st_mtime_ns for path in out.glob("*.png") if ".color." not in path.name}


@pytest.fixture
def many(folder, sketch):
    """A folder of 80 files: 79 drawings, and one that is not an image."""
    (folder / "many").mkdir()
    for number in range(80):
        (folder / "many" / f"{number:03d}.png").write_bytes(encode_png(sketch))
    (folder / "many" / "040.png").write_bytes(b"not a picture")
    return folder


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_with_a_line_and_the_same_command_goes_on(many, bundle_folder, capsys, signum):
    (many / "refs.csv").write_text("sketch,reference\n000.png,other.png\n")
    line = command(bundle_folder, many, many / "many", "--reference", many / "hero.png", "--references")
    line.insert(line.index("--references") + 1, str(many / "refs.csv"))

    def stop() -> None:
        wait_until(lambda: len(made_files(many / "out")) >= 5)
        os.kill(os.getpid(), signum)

    thread = threading.Thread(target=stop)
    thread.start()
    assert run(line) == 128 + signum
    thread.join()
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"colorize: stopped at drawing \d+ of 80; run the same command again to resume", last)
    before = made_files(many / "out")
    assert 5 <= len(before) < 79
    assert run(line) == 1
    outcomes = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {one["output"] for one in outcomes if one.get("skipped")} == {str(path) for path in before}
    assert len(made_files(many / "out")) == 79


def color_actors():
    """Processes of the actors that color, by the name that Ray gives them."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended
            if any("ColorDrawings" in word for word in process.cmdline()):
                found.append(process)
    return found


@pytest.mark.ray
def test_a_driver_that_is_killed_or_stopped_goes_on_where_it_was_and_a_killed_actor_costs_no_picture(
    ray_cluster, many, bundle_folder, capsys
):
    words = [many / "many", "--reference", many / "hero.png", "--on-cluster"]
    line = command(bundle_folder, many, *words, steps=40)
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    before = {}
    for number, signum in ((10, signal.SIGKILL), (30, signal.SIGTERM)):
        process = subprocess.Popen(
            [sys.executable, "-m", "animediffusion", *line], env=environment, stderr=subprocess.PIPE, text=True
        )
        least = max(number, len(before) + 1)  # Actors finish their blocks after the first kill.
        wait_until(lambda least=least: len(made_files(many / "out")) >= least, process)
        process.send_signal(signum)
        _, printed = process.communicate(timeout=60)
        if signum == signal.SIGTERM:
            assert process.returncode == 143
            said = r"^colorize: stopped at drawing \d+ of 80; run the same command again to resume$"
            assert re.search(said, printed, re.MULTILINE), printed
        wait_until(lambda: not color_actors())
        now = made_files(many / "out")
        assert {path: now[path] for path in before} == before
        before = now
    killed, left = [], {}

    def kill() -> None:
        wait_until(lambda: len(made_files(many / "out")) > len(before))
        left.update(made_files(many / "out"))
        victim = color_actors()[0]
        killed.append(victim.pid)
        victim.kill()

    thread = threading.Thread(target=kill)
    thread.start()
    assert run(line) == 1
    thread.join()
    assert killed
    outcomes = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert sorted(Path(one["sketch"]).name for one in outcomes) == [f"{number:03d}.png" for number in range(80)]
    assert [Path(one["sketch"]).name for one in outcomes if "error" in one] == ["040.png"]
    # Ray repeats the block of the killed actor, of which some drawings are done then.
    assert {one["output"] for one in outcomes if one.get("skipped")} >= {str(path) for path in before}
    after = made_files(many / "out")
    assert len(after) == 79
    assert {path: after[path] for path in left} == left


LOGICAL_GPUS = """
import collections, json, sys
import ray
from animediffusion.models.sampler_options import SamplerOptions
from animediffusion.platform.config import Settings
from animediffusion.serve.bulk import bulk
from animediffusion.serve.bulk.drawings import References, list_drawings
from animediffusion.serve.rendering.render import DEFAULTS

folder, model = sys.argv[1:]
ray.init(address="local", num_cpus=1, num_gpus=3, include_dashboard=False, log_to_driver=False)
bulk.BLOCK_ROWS["GPU"] = 4
drawings, _ = list_drawings([f"{folder}/many"], f"{folder}/out", "png", References((f"{folder}/hero.png",)))
options = SamplerOptions(steps=100)
settings = Settings(workspace=folder)
for some in (drawings, list(drawings)[40:44]):
    made = list(bulk.color_on_cluster(settings, model, some, options, DEFAULTS, "png", print))
    shares = collections.Counter(one.actor for one in made)
    errors = [one.sketch for one in made if one.error]
    print(json.dumps([sorted(shares.values()), errors, sum(one.skipped for one in made)]))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_each_gpu_of_a_cluster_has_an_actor_with_an_even_share_and_cpus_finish_the_pictures(many, bundle_folder):
    environment = {**os.environ, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    done = subprocess.run(
        [sys.executable, "-c", LOGICAL_GPUS, str(many), str(bundle_folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (shares, errors, skipped), (_, again, done_before) = map(json.loads, done.stdout.splitlines()[-2:])
    assert (len(shares), sum(shares)) == (3, 80)
    assert shares[0] >= 16
    assert errors == again == [str(many / "many" / "040.png")]
    assert (skipped, done_before) == (0, 3)
    single = LocalColorizer(Settings(workspace=many), str(bundle_folder))
    drawing, colors = (many / "many" / "000.png").read_bytes(), [(many / "hero.png").read_bytes()]
    alone = single.colorize(drawing, colors, SamplerOptions(steps=100), name="a")
    pixels = decode_rgb((many / "out" / "000.png").read_bytes())
    assert np.abs(pixels.astype(int) - decode_rgb(alone.picture)).max() <= 1


def test_a_bulk_run_says_that_the_starter_colors_and_an_updated_starter_colors_again(
    folder, bundle_folder, capsys, monkeypatch
):
    monkeypatch.setenv("ANIMEDIFFUSION_WORKSPACE", str(folder / "workspace"))
    (folder / "refs.csv").write_text("sketch,reference\na.png,other.png\n")
    words = ["colorize", folder / "in" / "a.png", "--references", folder / "refs.csv", "--out", folder / "out"]
    assert run([str(word) for word in words]) == 0
    assert STARTER_COLORS in capsys.readouterr().err.splitlines()
    made = read_metadata(folder / "out" / "a.png")["model_version"]
    assert re.fullmatch("starter:[0-9a-f]{12}", made)
    assert run([str(word) for word in words]) == 0
    assert "1 done before" in capsys.readouterr().out
    # As after an update of the package with another starter model.
    monkeypatch.setattr(model_source, "STARTER_FOLDER", bundle_folder)
    assert run([str(word) for word in words]) == 0
    assert "done before" not in capsys.readouterr().out
    assert read_metadata(folder / "out" / "a.png")["model_version"] != made


def test_ten_thousand_drawings_take_few_bytes_each_and_keep_their_order():
    names = [f"{number:06d}.png" for number in range(10_000)]
    drawings = Drawings(BulkDrawing(f"s3://in/{name}", ("s3://r.png",), f"s3://out/{name}") for name in names)
    assert len(drawings) == 10_000
    assert [one.output for one in drawings] == [f"s3://out/{name}" for name in names]
    assert len(pickle.dumps(drawings)) < 20 * 10_000
