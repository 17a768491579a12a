"""Hints as JSON and as a PNG of strokes, and what they change in a coloring."""

import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from animediffusion.platform.errors import ConfigError, ImageError
from animediffusion.platform.images.codec import encode_png
from animediffusion.serve.rendering.coloring import Coloring, Region
from animediffusion.serve.rendering.hints import MAX_HINTS, Hint, apply_hints, read_hints
from animediffusion.serve.rendering.sketch import read_drawing

WIDTH, HEIGHT = 120, 90
RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture
def coloring() -> Coloring:
    """Three gray regions, each 40 px wide, with a soft shading."""
    drawing = read_drawing(np.full((HEIGHT, WIDTH, 3), 255, np.uint8))
    labels = np.repeat(np.arange(WIDTH)[None] // 40 + 1, HEIGHT, 0).astype(np.int32)
    regions = tuple(
        Region(id=n, name="clothes", color=(100 + n,) * 3, area=40 * HEIGHT, box=(40 * n - 40, 0, 40 * n, HEIGHT))
        for n in (1, 2, 3)
    )
    shading = np.linspace(0.8, 1, HEIGHT, dtype=np.float32)[:, None, None].repeat(WIDTH, 1)
    return Coloring(drawing=drawing, labels=labels, regions=regions, shading=shading)


def read(data) -> tuple[Hint, ...]:
    return read_hints(data, width=WIDTH, height=HEIGHT)


def strokes(draw, *, size=(WIDTH, HEIGHT), mode="RGBA") -> bytes:
    """A transparent PNG on which `draw(pen)` has drawn."""
    image = Image.new(mode, size, (0, 0, 0, 0))
    draw(ImageDraw.Draw(image))
    return encode_png(np.array(image))


def colors(coloring: Coloring) -> list[tuple[int, int, int]]:
    return [region.color for region in coloring.regions]


def test_a_hint_gives_its_region_the_exact_color_and_keeps_everything_else(coloring):
    hints = read('[{"x": 50, "y": 3, "color": "#Ff0000"}]')
    assert hints == (Hint(50, 3, RED, learned=False),)
    colored = apply_hints(coloring, hints)
    assert colors(colored) == [(101,) * 3, RED, (103,) * 3]
    assert (colored.flats[:, 40:80] == RED).all()
    assert colored.shading is coloring.shading
    assert colored.labels is coloring.labels
    assert colored.regions[1].name == "clothes"


def test_the_last_hint_of_a_region_counts(coloring):
    hints = read('[{"x": 0, "y": 0, "color": "#ff0000"}, {"x": 39, "y": 89, "color": "#0000ff", "learned": true}]')
    assert [hint.learned for hint in hints] == [False, True]
    assert colors(apply_hints(coloring, hints))[0] == BLUE


def test_a_place_between_pixels_is_in_the_pixel_that_contains_it():
    [hint] = read('[{"x": 119.9, "y": 0.2, "color": "#ff0000"}]')
    assert (hint.x, hint.y) == (119, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("red", "is not JSON"),
        (b"\xff\xd8\xff", "is neither JSON nor a PNG"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "contains no hint"),
        ('{"x": 1}', 'is {"x": 1}, not a list'),
        ("[7]", "hint 1 is 7"),
        ('[{"x": 1, "y": 1}]', "hint 1 lacks color"),
        ('[{"x": 1, "y": 1, "color": "red"}]', 'hint 1 has the color "red"; a color is #RRGGBB'),
        ('[{"x": 1, "y": 1, "color": "#12345"}]', 'the color "#12345"'),
        ('[{"x": 1, "y": 1, "color": 3}]', "the color 3"),
        ('[{"x": "1", "y": 1, "color": "#ff0000"}]', 'hint 1 has x "1"'),
        ('[{"x": 1, "y": true, "color": "#ff0000"}]', "hint 1 has y true"),
        ('[{"x": NaN, "y": 1, "color": "#ff0000"}]', "hint 1 has x NaN"),
        ('[{"x": 1, "y": 1, "color": "#ff0000", "learned": 1}]', "hint 1 has learned 1"),
        ('[{"x": 1, "y": 1, "colour": "#ff0000"}]', 'hint 1 has the unknown key "colour"'),
        ('[{"x": 120, "y": 1, "color": "#ff0000"}]', "hint 1 at 120, 1 is outside of the drawing; x is from 0 to 119"),
        ('[{"x": 1, "y": -1, "color": "#ff0000"}]', "hint 1 at 1, -1 is outside"),
        ('[{"x": 1e300, "y": 1, "color": "#ff0000"}]', "is outside"),
    ],
)
def test_bad_json_is_one_line(text, message):
    with pytest.raises(ConfigError) as error:
        read(text)
    assert str(error.value).startswith("hints: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_too_many_hints_are_an_error():
    entry = {"x": 1, "y": 1, "color": "#ff0000"}
    assert len(read(json.dumps([entry] * MAX_HINTS))) == MAX_HINTS
    with pytest.raises(ConfigError, match=f"contains {MAX_HINTS + 1} hints; at most {MAX_HINTS}"):
        read(json.dumps([entry] * (MAX_HINTS + 1)))


def test_each_connected_stroke_colors_the_regions_it_crosses(coloring):
    def draw(pen):
        pen.line((10, 10, 60, 40), RED, width=3)
        pen.ellipse((100, 50, 106, 56), BLUE)

    hints = read(strokes(draw))
    assert sorted(hint.color for hint in hints) == [BLUE, RED]
    assert all((hint.x, hint.y) in hint.stroke for hint in hints)
    assert colors(apply_hints(coloring, hints)) == [RED, RED, BLUE]


def test_a_stroke_that_slips_over_a_line_does_not_color_the_other_side(coloring):
    hints = read(strokes(lambda pen: pen.rectangle((4, 10, 40, 20), RED)))
    assert colors(apply_hints(coloring, hints)) == [RED, (102,) * 3, (103,) * 3]


def test_two_strokes_of_one_color_are_two_hints_and_soft_edges_are_none():
    large = Image.new("RGBA", (4 * WIDTH, 4 * HEIGHT), (255, 0, 0, 0))
    pen = ImageDraw.Draw(large)
    pen.line((20, 20, 180, 200), RED, width=14)
    pen.line((300, 20, 320, 300), RED, width=14)
    hints = read(encode_png(np.array(large.resize((WIDTH, HEIGHT), Image.Resampling.BOX))))
    assert [hint.color for hint in hints] == [RED, RED]


def test_the_larger_of_two_strokes_in_a_region_wins(coloring):
    def draw(pen):
        pen.rectangle((2, 2, 30, 12), RED)
        pen.rectangle((2, 40, 8, 46), BLUE)

    assert colors(apply_hints(coloring, read(strokes(draw))))[0] == RED


def test_a_stroke_of_any_shape_is_one_hint():
    def spiral(pen):
        corners = [
            (x, y) for d in range(2, 40, 6) for x, y in [(d, d), (118 - d, d), (118 - d, 88 - d), (d + 6, 88 - d)]
        ]
        pen.line(corners, RED, width=2)

    assert len(read(strokes(spiral))) == 1


def test_bad_strokes_are_one_line():
    with pytest.raises(ConfigError, match="is 60 x 90 pixels; a PNG of strokes has the size of the drawing, 120 x 90"):
        read(strokes(lambda pen: pen.rectangle((0, 0, 9, 9), RED), size=(60, 90)))
    with pytest.raises(ConfigError, match="is 600 x 900 pixels; a PNG of strokes has the size"):
        read(strokes(lambda pen: pen.rectangle((0, 0, 9, 9), RED), size=(600, 900)))
    with pytest.raises(ConfigError, match="contains no hint"):
        read(strokes(lambda _: None))
    with pytest.raises(ConfigError, match="has no transparent part"):
        read(encode_png(np.full((HEIGHT, WIDTH, 3), 200, np.uint8)))
    noise = np.random.default_rng(1).integers(0, 256, (HEIGHT // 2, WIDTH // 2, 4), np.uint8)
    with pytest.raises(ConfigError, match="colors; strokes have at most 256 plain colors"):
        read(encode_png(noise.repeat(2, 0).repeat(2, 1)))
    with pytest.raises(ImageError, match="hints: "):
        read(strokes(lambda pen: pen.rectangle((0, 0, 9, 9), RED))[:60])
