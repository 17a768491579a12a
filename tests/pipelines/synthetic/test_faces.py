"""Drawn faces: the same geometry in color and in line, colors only from the palette."""

from dataclasses import replace

import numpy as np
import pytest

from animediffusion.pipelines.synthetic import clothes, hair
from animediffusion.pipelines.synthetic.background import BACKGROUNDS
from animediffusion.pipelines.synthetic.canvas import Canvas, Frame, Pen, blob, curve, ellipse
from animediffusion.pipelines.synthetic.faces import EYES, MOUTHS, draw, draw_regions, random_character, random_geometry
from animediffusion.pipelines.synthetic.palette import Tone, random_palette

SIZE = 64


def drawing(seed, size=SIZE, **changes):
    rng = np.random.default_rng(seed)
    character, geometry = random_character(rng), random_geometry(rng)
    for name, value in changes.items():
        owner = character if hasattr(character, name) else geometry
        object.__setattr__(owner, name, value)
    return (*draw(character, geometry, size), character, geometry)


@pytest.mark.parametrize("size", [16, 64, 100, 320])
def test_a_drawing_is_a_color_picture_and_its_lines(size):
    target, sketch, _, _ = drawing(1, size)
    assert target.shape == (size, size, 3)
    assert sketch.shape == (size, size)
    assert target.dtype == sketch.dtype == np.uint8
    assert sketch.max() == 255
    assert sketch.min() < 80
    assert 0.4 < (sketch > 200).mean() < 0.97


def test_the_same_seed_draws_the_same_picture():
    assert np.array_equal(drawing(3)[0], drawing(3)[0])
    assert not np.array_equal(drawing(3)[0], drawing(4)[0])


def test_dark_lines_of_the_sketch_are_dark_in_the_picture():
    for seed in range(8):
        target, sketch, _, _ = drawing(seed, 128)
        assert target[sketch < 30].max(axis=-1).mean() < 90


def test_colors_do_not_change_the_lines():
    rng = np.random.default_rng(0)
    _, sketch, character, geometry = drawing(5)
    other = replace(character, palette=random_palette(rng))
    assert np.array_equal(draw(other, geometry, SIZE)[1], sketch)


@pytest.mark.parametrize(
    ("part", "names"),
    [
        ("back", hair.BACKS),
        ("front", hair.FRONTS),
        ("eyes", EYES),
        ("mouth", MOUTHS),
        ("clothes", clothes.CLOTHES),
        ("background", tuple(dict.fromkeys(BACKGROUNDS))),
        ("accessory", clothes.ACCESSORIES),
    ],
)
def test_every_kind_of_a_part_looks_different(part, names):
    fixed = {"accessory": "none", "background": "flat", "front": "locks", "back": "short"}
    fixed.pop(part, None)
    pictures = [drawing(7, 96, **fixed, **{part: name})[0].astype(int) for name in names]
    for i, one in enumerate(pictures):
        for other in pictures[i + 1 :]:
            assert (np.abs(one - other).max(axis=-1) > 24).mean() > 0.0005


def test_a_second_drawing_has_the_colors_of_the_first():
    """Nearly every flat color of the target is found in another drawing of the same character."""
    found = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        character = random_character(rng)
        target, sketch = draw(character, random_geometry(rng), 96)
        other, _ = draw(character, random_geometry(rng), 96)
        seen = other.reshape(-1, 3).astype(int)
        flat = target[sketch > 250].astype(int)[::17]
        found += [np.abs(seen - color).max(axis=1).min() <= 12 for color in flat]
    assert np.mean(found) > 0.985


def test_regions_of_palettes_vary_independently():
    palettes = [random_palette(np.random.default_rng(seed)) for seed in range(300)]
    colors = np.array([[p.hair.base, p.skin.base, p.eyes.base, p.clothes.base, p.upper] for p in palettes], float)
    assert (colors.std(axis=0).max(axis=1) > (40, 15, 40, 40, 30)).all()
    correlation = np.corrcoef(colors.mean(axis=2).T)
    assert np.abs(correlation - np.eye(5)).max() < 0.45


def test_hair_differs_from_skin_and_background():
    for seed in range(100):
        p = random_palette(np.random.default_rng(seed))
        hair_color = np.array(p.hair.base)
        assert np.abs(hair_color - p.skin.base).max() > 20
        assert np.abs(hair_color - p.upper).max() > 20


def test_a_curve_goes_through_its_points():
    points = np.array([(0.0, 0.0), (1.0, 2.0), (3.0, 1.0), (4.0, 4.0)])
    assert np.allclose(curve(points, 5)[::5], points)
    assert np.allclose(blob(points, 5)[::5][:4], points)
    assert np.allclose(blob(points)[0], blob(points)[-1])


def test_a_frame_turns_clockwise_and_moves_in_its_own_units():
    frame = Frame(scale=0.5, x=0.25, y=0.75, angle=np.pi / 2)
    assert np.allclose(frame([(1, 0)]), [(0.25, 1.25)])
    assert np.allclose(frame.moved(1, 0)([(0, 0)]), frame([(1, 0)]))


def test_a_filled_shape_hides_lines_and_a_tint_does_not():
    canvas = Canvas(32, (255, 255, 255))
    pen = Pen(canvas, Frame(1.0, 0.0, 0.0))
    pen.stroke([(0.1, 0.5), (0.9, 0.5)], 3)
    pen.tint([(0, 0), (0.5, 0), (0.5, 1), (0, 1)], (255, 0, 0))
    pen.fill(ellipse(0.75, 0.5, 0.2, 0.2), (0, 255, 0))
    target, sketch = canvas.finish()
    assert sketch[16, 10] < 60
    assert sketch[16, 24] == 255
    assert target[4, 4].tolist() == [255, 0, 0]
    assert target[16, 24].tolist() == [0, 255, 0]


def test_a_region_is_an_area_of_one_material_within_lines():
    red, dark_red, blue, white = (255, 0, 0), (150, 0, 0), (0, 0, 255), (255, 255, 255)
    canvas = Canvas(64, white, keep_fills=True)
    pen = Pen(canvas, Frame(1.0, 0.0, 0.0))
    pen.fill([(0.1, 0.1), (0.9, 0.1), (0.9, 0.9), (0.1, 0.9)], red)
    pen.fill([(0.1, 0.1), (0.5, 0.1), (0.5, 0.9), (0.1, 0.9)], dark_red)  # the same material, and no line between
    pen.tint(ellipse(0.7, 0.7, 0.1, 0.1), (90, 90, 90))
    pen.stroke([(0.0, 0.5), (1.0, 0.5)])
    pen.fill(ellipse(0.5, 0.25, 0.1, 0.1), blue)
    labels, colors = canvas.regions([Tone(red, dark_red, (90, 0, 0), (255, 90, 90))])
    assert labels.shape == (64, 64)
    assert len(colors) == labels.max() == 5
    assert labels.min() == 1
    upper, lower, inside = labels[10, 10], labels[50, 10], labels[16, 32]
    assert labels[10, 50] == upper
    assert labels[50, 50] == labels[45, 45] == lower
    assert len({upper, lower, inside, labels[2, 2], labels[60, 60]}) == 5
    assert tuple(colors[inside - 1]) == blue
    assert tuple(colors[upper - 1]) in (red, dark_red)
    with pytest.raises(ValueError, match="keep its fills"):
        Canvas(8, white).regions([])


@pytest.mark.parametrize("size", [16, 100, 320])
def test_the_regions_of_a_face_have_the_colors_of_the_picture(size):
    target, sketch, character, geometry = drawing(7, size, background="flat")
    labels, colors = draw_regions(character, geometry, size)
    assert labels.shape == sketch.shape
    assert set(np.unique(labels)) == set(range(1, len(colors) + 1))
    same = (np.abs(colors[labels - 1].astype(int) - target).max(axis=2) <= 2)[sketch == 255]
    assert same.mean() > 0.6  # the rest is shadow and light
    assert labels[0, 0] == labels[0, -1] or size < 100
    assert tuple(colors[labels[0, 0] - 1]) == character.palette.upper
