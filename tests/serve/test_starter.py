"""The starter model: the file that comes with the package, and when it answers."""

import io
import json

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from safetensors.torch import load_file

from animediffusion.cli import app as cli
from animediffusion.models.bundle import FILES, identity, load_bundle, smoke_sample, verify
from animediffusion.pipelines.training.plan import plan
from animediffusion.pipelines.training.recipe import load_recipe
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import RegistryError
from animediffusion.platform.registry.client import Registry
from animediffusion.platform.registry.downloads import STARTER, STARTER_FOLDER, fetch_folder
from animediffusion.serve.api.app import create_app
from animediffusion.serve.client.local import LocalColorizer
from animediffusion.serve.replica.follower import Follower
from animediffusion.serve.replica.model_source import ModelSource
from animediffusion.serve.replica.replica import Replica
from animediffusion.serve.server import check_model

MOST_BYTES = 15_000_000


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A workspace without any registry; the embedded MLflow needs seconds to make one, so it is shared."""
    return Settings(workspace=tmp_path_factory.mktemp("fresh") / "workspace")


@pytest.fixture(scope="module")
def registry(settings, bundle_folder):
    """Version 1 is no champion."""
    registry = Registry(settings)
    registry.register(bundle_folder, sha256=identity(bundle_folder))
    return registry


def test_the_file_is_whole_small_and_works():
    files = {path.name for path in STARTER_FOLDER.iterdir()}
    assert files == {*FILES, "checksums.json"}
    assert sum(path.stat().st_size for path in STARTER_FOLDER.iterdir()) < MOST_BYTES
    bundle = load_bundle(STARTER_FOLDER, sha256=verify(STARTER_FOLDER))
    assert {tensor.dtype for tensor in load_file(STARTER_FOLDER / "model.safetensors").values()} == {torch.float16}
    assert {parameter.dtype for parameter in bundle.denoiser.parameters()} == {torch.float32}
    smoke_sample(bundle)


def test_the_card_says_how_the_model_was_made_and_nothing_about_a_machine():
    provenance = json.loads((STARTER_FOLDER / "config.json").read_text())["provenance"]
    assert provenance["recipe"].startswith("starter")
    assert not any("/" in str(value) for value in provenance.values())
    card = (STARTER_FOLDER / "card.md").read_text()
    assert f"{provenance['steps']:,} steps" in card
    assert "## What it cannot do" in card


def test_a_fresh_workspace_has_the_starter_model(settings):
    source = ModelSource(settings)
    assert source.resolve() == STARTER
    shares = source.plan()
    assert (shares.main, shares.shares) == (STARTER, {STARTER: 1.0})
    assert shares.desired == {"champion": None, "challenger": None}
    assert source.fetch(STARTER) == STARTER_FOLDER
    assert source.sha256(STARTER) is None
    source.forget(STARTER)
    assert verify(STARTER_FOLDER)
    assert check_model(settings, None) == STARTER


def test_the_champion_by_name_is_not_the_starter_model(settings):
    with pytest.raises(RegistryError, match="champion"):
        ModelSource(settings, f"models:/{settings.model_name}@champion").resolve()


def test_a_model_may_be_called_by_its_name(settings, tmp_path):
    assert fetch_folder(STARTER, tmp_path) == STARTER_FOLDER
    assert check_model(settings, STARTER) == STARTER
    assert ModelSource(settings, STARTER).plan().shares == {STARTER: 1.0}
    assert LocalColorizer(settings, STARTER, "cpu").version == STARTER


def test_a_promotion_replaces_it_without_a_restart(registry, settings, files):
    replica = Replica(max_batch=2, max_queue=2)
    follower = Follower(replica, ModelSource(settings), period_s=3)
    assert follower.step()
    with TestClient(create_app(replica)) as client:

        def version() -> str:
            answer = client.post("/v1/colorize", files=files, data={"num_inference_steps": "1"})
            assert answer.status_code == 200
            return answer.headers["x-model-version"]

        assert version() == STARTER
        registry.set_alias("champion", 1)
        follower.step()
        assert version() == "1"
        registry.client.delete_registered_model_alias(registry.name, "champion")
    replica.close()


def test_colorize_uses_it_and_says_so(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ANIMEDIFFUSION_WORKSPACE", str(settings.workspace))
    lines, colors = np.full((96, 96), 255, np.uint8), np.full((96, 96, 3), (200, 80, 60), np.uint8)
    lines[20:76, 20] = lines[20:76, 76] = lines[20, 20:76] = lines[76, 20:76] = 0
    for name, picture in (("sketch", lines), ("reference", colors)):
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    words = ["colorize", tmp_path / "sketch.png", "--reference", tmp_path / "reference.png", "--out", tmp_path / "out"]
    assert cli.run([*map(str, words), "--json"]) == 0
    captured = capsys.readouterr()
    assert [line for line in captured.err.splitlines() if "starter model" in line] == [
        "no version was promoted, so the starter model colors"
    ]
    [result] = json.loads(captured.out.splitlines()[-1])
    assert result["model_version"] == STARTER
    made = Image.open(io.BytesIO((tmp_path / "out" / "sketch.png").read_bytes()))
    assert made.size == (96, 96)


def test_a_run_begins_with_it(settings, faces_dataset):
    recipe = load_recipe("phase2", [f"data={faces_dataset}", "init_from=starter", "max_steps=1"])
    work = plan(settings, recipe.model_copy(update={"image_size": None}))
    assert work.parent_folder == STARTER_FOLDER
    assert work.parent is not None
    assert work.config.network == work.parent.network
    assert work.config.sampler == work.parent.sampler


def test_doctor_names_it(settings, monkeypatch, capsys):
    monkeypatch.setenv("ANIMEDIFFUSION_WORKSPACE", str(settings.workspace))
    cli.run(["doctor"])
    assert f"sha256 {identity(STARTER_FOLDER)[:12]}, answers while no version was promoted" in capsys.readouterr().out
