"""benchmarks/strip.py: the last picture of a row shows the hints."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageColor

from animediffusion.platform.images.codec import letterbox


@pytest.fixture(scope="module")
def benchmark():
    folder = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.insert(0, folder)
    yield importlib.import_module("strip")
    sys.path.remove(folder)


def test_only_the_last_picture_of_a_row_has_the_colors_of_the_hints(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, "paint", lambda _bundle, _drawing, reference: letterbox(reference, 64)[0])
    ((lines, reference),) = benchmark.drawn(1)
    pixels = np.asarray(benchmark.row(None, lines, reference)).astype(int)
    side = benchmark.HEIGHT_PX + benchmark.MARGIN_PX
    for color in benchmark.HINTS:
        hinted = np.abs(pixels - ImageColor.getrgb(color)).max(axis=2) <= 1
        areas = [hinted[:, start : start + side].mean() for start in range(0, hinted.shape[1], side)]
        assert len(areas) == 6
        assert areas[-1] > 0.01
        assert max(areas[:-1]) < 0.001
