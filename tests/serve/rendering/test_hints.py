"""Hints as JSON and as a PNG of strokes, and what they change in a coloring."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from animediffusion.platform.errors import ConfigError, ImageError
from animediffusion.platform.images.codec import decode_rgb, encode_png
from animediffusion.serve.rendering.coloring import Coloring, Region
from animediffusion.serve.rendering.hints import MAX_HINTS, Hint, apply_hints, read_hints, shaded_like, wholes_of
from animediffusion.serve.rendering.render import RenderOptions, render
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
        ('[{"x": 1, "y": 1, "color": "#ff0000", "scope": []}]', "hint 1 has scope []; scope is piece, whole or color"),
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


SKIN, SHADOW, LIGHT, CLOTH = (240, 200, 180), (192, 150, 130), (250, 235, 225), (40, 60, 160)


@pytest.fixture
def pieces(coloring) -> tuple[Coloring, np.ndarray]:
    """Regions 1 to 4 are skin, its shadow, its light and a blot of another color in one region of the drawing; 5 and 6
    are skin and a shadow in another one. With the drawing's region of each."""
    labels = np.repeat(np.arange(WIDTH)[None] // 20 + 1, HEIGHT, 0).astype(np.int32)
    found = tuple(
        Region(id=n, name="", color=color, area=20 * HEIGHT, box=(20 * n - 20, 0, 20 * n, HEIGHT))
        for n, color in enumerate((SKIN, SHADOW, LIGHT, CLOTH, SKIN, SHADOW), start=1)
    )
    one = replace(coloring, labels=labels, regions=found)
    return one, wholes_of(one, np.where(labels < 5, 7, 9))


def test_a_hint_for_the_whole_region_keeps_its_shadows_and_lights(pieces):
    coloring, wholes = pieces
    assert wholes.tolist() == [0, 7, 7, 7, 7, 9, 9]
    found = colors(apply_hints(coloring, read('[{"x": 5, "y": 5, "color": "#3264c8", "scope": "whole"}]'), wholes))
    blue = (0x32, 0x64, 0xC8)
    assert found[0] == found[3] == blue
    assert found[1] == tuple(round(level * sum(SHADOW) / sum(SKIN)) for level in blue)
    assert found[2] == tuple(round(level * sum(LIGHT) / sum(SKIN)) for level in blue)
    assert found[4:] == [SKIN, SHADOW]


def test_a_hint_for_a_color_reaches_every_region_of_it_and_no_other_color(pieces):
    coloring, wholes = pieces
    found = colors(apply_hints(coloring, read('[{"x": 5, "y": 5, "color": "#3264c8", "scope": "color"}]'), wholes))
    assert found[0] == found[4] == (0x32, 0x64, 0xC8)
    assert found[1] == found[5] != SHADOW
    assert found[3] == CLOTH


def test_a_later_hint_of_a_piece_wins_over_that_of_the_whole(pieces):
    coloring, wholes = pieces
    hints = read('[{"x": 5, "y": 5, "color": "#3264c8", "scope": "whole"}, {"x": 25, "y": 5, "color": "#ff0000"}]')
    assert colors(apply_hints(coloring, hints, wholes))[1] == RED


@pytest.mark.parametrize(("shade", "base"), [((255, 255, 255), (255, 250, 238)), ((0, 0, 0), (4, 4, 4))])
def test_a_faint_shade_of_an_extreme_color_stays_faint(shade, base):
    assert max(abs(a - b) for a, b in zip(shaded_like(CLOTH, shade, base), CLOTH, strict=True)) < 8


def test_a_light_on_a_dark_color_is_a_light_on_the_new_one():
    lit = shaded_like(CLOTH, (180, 140, 120), (60, 40, 30))
    assert all(a > b for a, b in zip(lit, CLOTH, strict=True))
    assert max(lit) < 255


@pytest.mark.parametrize("base", [(0, 0, 0), (255, 255, 255), SKIN])
@pytest.mark.parametrize("shade", [(0, 0, 0), (255, 255, 255), SHADOW, LIGHT])
def test_shades_are_colors_and_the_same_shade_changes_nothing(shade, base):
    assert shaded_like(CLOTH, base, base) == CLOTH
    assert all(0 <= level <= 255 for level in shaded_like(CLOTH, shade, base))


@pytest.mark.parametrize("background", [None, "white"])
def test_a_hint_beside_the_figure_that_is_as_painted_changes_nothing(background):
    sheet, figure = (90, 160, 220), (220, 150, 120)
    sketch, painted = Image.new("L", (256, 256), 255), Image.new("RGB", (64, 64), sheet)
    ImageDraw.Draw(sketch).ellipse([60, 60, 196, 196], outline=0, width=3)
    ImageDraw.Draw(painted).ellipse([15, 15, 49, 49], fill=figure)
    drawing, colors = read_drawing(np.asarray(sketch.convert("RGB"))), np.asarray(painted)
    options = RenderOptions(style="painted", background=background)
    plain, hinted = (
        decode_rgb(render(colors, drawing, [colors], hints, options=options).files["image"]).astype(int)
        for hints in ((), (Hint(20, 20, sheet), Hint(128, 128, figure)))
    )
    for x, y, color in ((20, 20, sheet), (240, 200, sheet), (128, 128, figure)):
        assert np.abs(plain[y, x] - color).max() <= 3
        assert np.abs(hinted[y, x] - color).max() <= 3
