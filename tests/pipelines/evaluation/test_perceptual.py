"""What is said without the files of others, and what is computed with them.

Here the files hold random weights of networks of the same layers, because theirs cannot be downloaded.
"""

import importlib.machinery
import importlib.util
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from animediffusion.pipelines.evaluation import perceptual
from animediffusion.platform.errors import ConfigError

IMAGES = np.zeros((1, 64, 64, 3), np.uint8)


def pretend_installed(monkeypatch, installed):
    spec = importlib.machinery.ModuleSpec("there", None) if installed else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)


def test_without_the_extra_the_error_is_the_line_that_installs_it(monkeypatch, tmp_path):
    pretend_installed(monkeypatch, installed=False)
    with pytest.raises(ConfigError, match=r"missing; pip install animediffusion\[perceptual\]") as caught:
        perceptual.perceptual(IMAGES, IMAGES, tmp_path)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("missing", [perceptual.ALEXNET, perceptual.INCEPTION])
def test_a_missing_file_of_weights_is_named(monkeypatch, tmp_path, missing):
    pretend_installed(monkeypatch, installed=True)
    for name in {perceptual.ALEXNET, perceptual.INCEPTION} - {missing}:
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=f"has no {missing}"):
        perceptual.perceptual(IMAGES, IMAGES, tmp_path)


class AlexNet(nn.Module):
    """The convolutions of torchvision's network, with its layer numbers."""

    def __init__(self, weights=None):
        super().__init__()
        assert weights is None  # no download
        pool = nn.MaxPool2d(3, 2)
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), pool, nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), pool,
            nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), pool,
        )  # fmt: skip


class MeanColor(nn.Module):
    """Features of an image [B, 3, S, S] for FID: its mean color in three parts."""

    def forward(self, images):
        return images.double().mean((2, 3)) / 255


@pytest.fixture
def weights(monkeypatch, tmp_path):
    """A folder with weight files, where both packages are installed."""
    # Imported here because they take a second, which each of the tests' processes would spend.
    import torchmetrics.functional.image.lpips as lpips
    import torchmetrics.image.fid as fid

    pretend_installed(monkeypatch, installed=True)
    torchvision, models = ModuleType("torchvision"), ModuleType("torchvision.models")
    torchvision.models, models.alexnet = models, AlexNet
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    monkeypatch.setattr(lpips, "_TORCHVISION_AVAILABLE", True)
    distance = fid.FrechetInceptionDistance

    def new_distance(feature, feature_extractor_weights_path):
        assert (feature, feature_extractor_weights_path) == (2048, str(tmp_path / perceptual.INCEPTION))
        return distance(feature=MeanColor())

    monkeypatch.setattr(fid, "FrechetInceptionDistance", new_distance)
    torch.manual_seed(0)
    torch.save(AlexNet().state_dict(), tmp_path / perceptual.ALEXNET)
    (tmp_path / perceptual.INCEPTION).touch()
    return tmp_path


def test_equal_images_have_no_distance_and_others_have_more_the_more_they_differ(weights):
    images = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8)
    near, far = images // 4 * 3, images // 4
    found = [perceptual.perceptual(other, images, weights) for other in (images, near, far)]
    assert found[0]["lpips"] == 0
    assert found[0]["fid"] == pytest.approx(0, abs=1e-3)
    for name in ("lpips", "fid"):
        assert found[0][name] < found[1][name] < found[2][name]


def test_distances_do_not_depend_on_how_many_images_a_network_gets_at_once(weights, monkeypatch):
    images, others = np.random.default_rng(0).integers(0, 256, (2, 7, 64, 64, 3), np.uint8)
    whole = perceptual.perceptual(images, others, weights)
    monkeypatch.setattr(perceptual, "CHUNK", 3)
    assert perceptual.perceptual(images, others, weights) == pytest.approx(whole, abs=1e-3)
