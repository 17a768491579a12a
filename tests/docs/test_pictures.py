"""docs/pictures.py draws every picture of docs/method.md, with any bundle."""

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from animediffusion.models.bundle import BundleConfig, SamplerDefaults, save_bundle
from animediffusion.models.network.unet import UNetConfig
from animediffusion.platform.images.codec import decode_rgb

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def pictures():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """An untrained bundle for 32 px that samples in two steps."""
    torch.manual_seed(0)
    network = UNetConfig(base_channels=32, channel_multipliers=(1,), num_res_blocks=1, head_channels=32, patch_size=4)
    config = BundleConfig(network=network, image_size=32, sampler=SamplerDefaults(steps=2))
    folder = tmp_path_factory.mktemp("model") / "bundle"
    save_bundle(folder, config.build(), config)
    return folder


@pytest.mark.parametrize("with_data", [False, True], ids=["drawn", "data"])
def test_every_picture_of_the_text_is_drawn(pictures, bundle, faces_dataset, tmp_path, monkeypatch, with_data):
    arguments = ["--model", str(bundle), "--out", str(tmp_path)] + (["--data", faces_dataset] if with_data else [])
    monkeypatch.setattr(sys, "argv", ["pictures.py", *arguments])
    monkeypatch.setattr(pictures, "LIMIT", 2**21)  # an untrained model draws noise, and fewer colors take minutes
    pictures.main()
    linked = set(re.findall(r"images/(method-\w+\.png)", (DOCS / "method.md").read_text()))
    drawn = {path.name for path in tmp_path.iterdir()}
    assert len(drawn) == 5
    assert linked >= drawn
    for name in drawn:
        red, green, blue = np.moveaxis(decode_rgb((tmp_path / name).read_bytes()).astype(np.uint32), -1, 0)
        assert len(np.unique(red << 16 | green << 8 | blue)) > 100


def test_the_picture_of_a_demo_becomes_that_of_the_readme(pictures, tmp_path, monkeypatch):
    made, out = DOCS / "images" / "batching.png", tmp_path / "images"
    monkeypatch.setattr(sys, "argv", ["pictures.py", "--demo", str(made), "--out", str(out)])
    pictures.main()
    assert (decode_rgb((out / "demo.png").read_bytes()) == decode_rgb(made.read_bytes())).all()
    assert "images/demo.png" in (DOCS.parent / "README.md").read_text()


def test_the_pictures_of_the_text_are_small(pictures):
    drawn = list((DOCS / "images").glob("method-*.png"))
    assert len(drawn) >= 5
    assert [path.name for path in drawn if path.stat().st_size > pictures.LIMIT] == []


def test_a_picture_too_large_gets_fewer_colors_and_then_raises_value_error(pictures, tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (100, 100, 3), np.uint8)
    monkeypatch.setattr(pictures, "LIMIT", 17_000)
    pictures.save(noise, tmp_path / "noise.png")
    kept = decode_rgb((tmp_path / "noise.png").read_bytes())
    assert kept.shape == noise.shape
    assert len(np.unique(kept.reshape(-1, 3), axis=0)) <= 256
    monkeypatch.setattr(pictures, "LIMIT", 1_000)
    with pytest.raises(ValueError, match="at most 1000"):
        pictures.save(noise, tmp_path / "noise.png")
