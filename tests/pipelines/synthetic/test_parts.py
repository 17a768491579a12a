"""The parts of drawings: exact labels, and the names that regions get from them."""

from dataclasses import replace

import numpy as np
import pytest

from animediffusion.pipelines.synthetic.dataset import make_regions, make_row
from animediffusion.pipelines.synthetic.parts import draw_parts
from animediffusion.pipelines.synthetic.variety import FACES, PRESETS
from animediffusion.platform.images.character_parts import PARTS
from animediffusion.platform.images.codec import letterbox
from animediffusion.serve.rendering.coloring import color_regions
from animediffusion.serve.rendering.parts import naming
from animediffusion.serve.rendering.parts.naming import name_regions
from animediffusion.serve.rendering.regions import find_regions
from animediffusion.serve.rendering.sketch import read_drawing


@pytest.mark.parametrize("variety", [FACES, replace(PRESETS["diverse"], shapes=0.0)])
def test_parts_have_the_colors_of_the_drawing(variety):
    parts, regions = draw_parts(3, 1, 128, variety), make_regions(3, 1, 128, variety)[0]
    assert {"hair", "skin", "eyes", "clothes", "background"} <= {PARTS[part] for part in np.unique(parts)}
    # A region of one flat color shows one part, but for the pixels under its lines.
    shares = [np.bincount(parts[regions.labels == one]).max() / (regions.labels == one).sum()
              for one in range(1, regions.labels.max() + 1) if (regions.labels == one).sum() > 200]  # fmt: skip
    assert np.mean(shares) > 0.9


def colored(row, size=256):
    drawn = make_row(77, row, size)
    drawing = read_drawing(np.repeat(drawn.sketch[..., None], 3, axis=2))
    painted = letterbox(drawn.target, 64)[0]
    return color_regions(painted, drawing, find_regions(drawing), references=[drawn.cross_reference])


def test_names_of_drawn_faces_are_right():
    right = named = 0
    found = set()
    for row in range(3):
        coloring, parts = name_regions(colored(row)), draw_parts(77, row, 256)
        numbers = np.array([0, *(PARTS.index(one.name) if one.name in PARTS else 0 for one in coloring.regions)])
        names = np.where(coloring.drawing.darkness < 0.3, numbers[coloring.labels], 0)
        right, named = right + (names == parts)[names > 0].sum(), named + (names > 0).sum()
        found |= {one.name for one in coloring.regions}
    assert right > 0.9 * named > 0.9 * 0.4 * 3 * 256**2
    assert found >= {"hair", "skin", "background", "clothes"}


def test_a_drawing_of_a_pattern_keeps_its_numbers(monkeypatch):
    coloring = colored(0)
    monkeypatch.setattr(naming, "MAX_REGIONS", len(coloring.regions) - 1)
    assert name_regions(coloring) is coloring
