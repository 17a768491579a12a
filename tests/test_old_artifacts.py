"""What version 0.1.0 wrote is read, continued and used by this version; tests/data/README.md says what there is."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest

from animediffusion.cli import app as cli
from animediffusion.models.bundle import load_bundle
from animediffusion.pipelines.data.stream import read_split
from animediffusion.platform.api_keys import Keyring
from animediffusion.platform.images.codec import decode_rgb, encode_lossless

ARCHIVE = Path(__file__).parent / "data" / "workspace-0.1.0.tar.xz"
KEY = "ad_8Hx2OInk5GDjJuvyneBE0WhcbWjNffarzMV8ouk78U4"
"""The API key that was made; keys.json has its hash."""
EMA_LENGTHS = "optimizer.ema_lengths=[0.04,0.08,0.16]"
"""The default of version 0.1.0."""
TRIALS = 5
"""Trials that the search for sampler settings had finished when it was killed."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The unpacked folder, another one than it was made in: `recipe.yaml` and `workspace`."""
    folder = tmp_path_factory.mktemp("old")
    shutil.unpack_archive(ARCHIVE, folder)  # tarfile's filters came with Python 3.11.4
    return folder


@pytest.fixture
def command(folder, capsys, monkeypatch):
    """A function that runs a command in the folder and returns its exit code, its JSON and the lines of stderr."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ANIMEDIFFUSION_WORKSPACE", str(folder / "workspace"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def run(*words):
        code = cli.run([*map(str, words), "--json"])
        captured = capsys.readouterr()
        lines = captured.out.splitlines()
        return code, json.loads(lines[-1]) if lines else None, captured.err.splitlines()

    return run


@pytest.fixture
def pictures(folder, tmp_path):
    """Paths of a sketch and a reference of the dataset, both 32 px."""
    rows = read_split(str(folder / "workspace/data/faces"), "val")
    for name in ("sketch", "reference"):
        (tmp_path / f"{name}.png").write_bytes(encode_lossless(rows[name][0]))
    return tmp_path / "sketch.png", tmp_path / "reference.png"


def test_the_dataset_is_read(command, folder):
    code, shown, _ = command("data", "show", "workspace/data/faces")
    assert code == 0
    assert shown["splits"] == {"train": 18, "val": 2}
    rows = read_split(str(folder / "workspace/data/faces"), "train")
    assert rows["target"].shape == (18, 32, 32, 3)
    assert rows["has_cross"].all()


def test_the_registry_lists_versions_aliases_and_history(command):
    _, versions, _ = command("models", "list")
    assert [(v["version"], v["aliases"], v["parent"]) for v in versions] == [
        (2, ["challenger"], 1),
        (1, ["champion"], None),
    ]
    _, history, _ = command("models", "history")
    found = [(event["action"], event["alias"], event["to"], event["percent"]) for event in history[:5]]
    assert found == [
        ("promote", "champion", 1, None),
        ("promote", "champion", 2, None),
        ("rollback", "champion", 1, None),
        ("promote", "challenger", 2, None),
        ("canary", "challenger", 2, 25),
    ]
    assert {event["user"] for event in history} == {"studio"}
    code, shown, _ = command("models", "show", "challenger")
    assert (code, shown["version"]) == (0, 2)


def test_versions_still_move(command):
    assert command("models", "canary", "0")[0] == 0
    assert command("models", "promote", "2", "--force", "--why", "of today")[0] == 0
    assert command("models", "rollback")[0] == 0
    _, versions, _ = command("models", "list")
    assert [v["aliases"] for v in versions] == [["challenger"], ["champion"]]


@pytest.mark.parametrize(
    "model", ["models:/animediffusion@champion", "models:/animediffusion/2", "workspace/runs/finished/bundle"]
)
def test_a_bundle_loads_and_colors(command, pictures, tmp_path, model):
    sketch, reference = pictures
    code, [made], _ = command("colorize", sketch, "--reference", reference, "--out", tmp_path / "out", "--model", model)
    assert code == 0
    assert decode_rgb(Path(made["output"]).read_bytes()).shape == (32, 32, 3)


def test_an_exported_version_works_alone(command, pictures, tmp_path):
    assert command("models", "export", "2", tmp_path / "model")[0] == 0
    script = [sys.executable, tmp_path / "model" / "colorize.py", *pictures, tmp_path / "colored.png"]
    subprocess.run(script, check=True, capture_output=True, timeout=120)
    assert decode_rgb((tmp_path / "colored.png").read_bytes()).shape == (32, 32, 3)


def test_a_version_loads_as_an_mlflow_model(command, folder, pictures, monkeypatch):
    sketch, reference = pictures
    assert command("models", "list")[0] == 0  # corrects the paths of the moved workspace
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/workspace/mlflow.db")
    model = mlflow.pyfunc.load_model("models:/animediffusion@champion")
    colored = model.predict({"sketch": sketch.read_bytes(), "reference": reference.read_bytes()})
    assert decode_rgb(colored["image"][0]).shape == (32, 32, 3)


def test_a_run_whose_settings_have_other_defaults_now_ends_with_2_and_their_name(command):
    for run in ("finished", "unfinished"):
        code, _, [line] = command("train", "recipe.yaml", f"name={run}", "max_steps=4", "--dry-run", "--no-estimate")
        assert code == 2
        assert line.startswith(f"error: run {run}: already exists with a different optimizer.ema_lengths; ")


def test_a_finished_run_says_so(command):
    code, result, [line] = command("train", "recipe.yaml", "name=finished", EMA_LENGTHS)
    assert (code, line, result["steps"]) == (0, "finished is finished", 1)


@pytest.mark.ray
def test_an_unfinished_run_resumes(ray_cluster, command, folder):
    code, result, errors = command("train", "recipe.yaml", "name=unfinished", "max_steps=2", EMA_LENGTHS)
    assert code == 0, errors
    assert (result["resumed_from"], result["steps"]) == (1, 2)
    assert "resuming unfinished at step 1" in errors
    before = load_bundle(folder / "workspace/runs/finished/bundle")
    assert load_bundle(result["bundle"]).config.network == before.config.network


@pytest.mark.ray
def test_an_unfinished_search_counts_its_trials(ray_cluster, command):
    words = ("tune", "sampler", "models:/animediffusion/1", "workspace/data/faces", "--no-register")
    code, result, errors = command(*words, "--trials", TRIALS + 1)
    assert code == 0, errors
    assert (result["trials"], result["measured"]) == (TRIALS + 1, 1)


@pytest.mark.ray
def test_an_unfinished_search_for_a_schedule_counts_its_trials(ray_cluster, command):
    words = ("tune", "schedule", "workspace/data/faces", "--recipe", "recipe.yaml", "--steps", "9")
    code, result, errors = command(*words, "--trials", "1")
    assert code == 0, errors
    assert (result["trials"], result["finished"]) == (1, 1)


def test_the_api_key_is_accepted(folder):
    keyring = Keyring(str(folder / "workspace/keys.json"))
    assert keyring.name_of(KEY) == "studio"
    assert keyring.name_of(KEY[:-1]) is None
