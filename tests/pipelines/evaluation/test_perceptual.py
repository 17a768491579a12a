"""The measures themselves need files of others; here is what is said without them."""

import importlib.machinery
import importlib.util

import numpy as np
import pytest

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
