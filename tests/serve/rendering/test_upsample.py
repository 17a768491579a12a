import io
import time

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from animediffusion.platform.errors import ImageError
from animediffusion.platform.images.codec import decode_rgb, letterbox, place_in_square
from animediffusion.serve.rendering import upsample
from animediffusion.serve.rendering.render import MAX_ASPECT, MIN_SIDE_PX, RenderOptions, read_sketch, render
from animediffusion.serve.rendering.sketch import (
    as_gray,
    for_network,
    has_lines,
    looks_inverted,
    read_drawing,
    with_white_paper,
)
from animediffusion.serve.rendering.upsample import (
    color_layer,
    layer_of,
    over_white,
    to_picture,
    to_rgba,
)

RED, BLUE = (210, 60, 50), (60, 90, 220)


def two_halves(height: int, width: int, line: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """A drawing of one vertical line, and the colors that belong left and right of it."""
    sketch = np.full((height, width, 3), 255, np.uint8)
    sketch[:, width // 2 - line // 2 : width // 2 + line - line // 2] = 0
    colors = np.empty_like(sketch)
    colors[:, : width // 2], colors[:, width // 2 :] = RED, BLUE
    return sketch, colors


def paint(sketch: np.ndarray, colors: np.ndarray, size: int) -> np.ndarray:
    """What a perfect network of that size would make."""
    product = (sketch.astype(int) * colors // 255).astype(np.uint8)
    return letterbox(product, size)[0]


@pytest.mark.parametrize(("height", "width"), [(400, 400), (300, 500), (700, 260), (64, 64), (33, 47)])
def test_the_place_in_the_square_is_that_of_the_letterbox(height: int, width: int):
    assert place_in_square(height, width, 64) == letterbox(np.zeros((height, width), np.uint8), 64)[1]


@pytest.mark.parametrize(("height", "width"), [(400, 400), (300, 500), (600, 320), (64, 64)])
def test_no_color_crosses_a_line(height: int, width: int):
    sketch, colors = two_halves(height, width)
    layer = color_layer(paint(sketch, colors, 64), read_drawing(sketch)) * 255
    away = np.abs(np.arange(width) - width // 2) > 2
    assert np.abs(layer[:, away] - colors[:, away]).max() < 6  # the halo that a small picture has around lines


def test_the_layer_has_no_lines():
    sketch, colors = two_halves(320, 320, line=5)
    layer = color_layer(paint(sketch, colors, 64), read_drawing(sketch)) * 255
    under_the_line = layer[:, 157:163]
    assert (under_the_line > np.minimum(RED, BLUE) - 12).all()
    assert (under_the_line < np.maximum(RED, BLUE) + 12).all()


def test_lines_are_kept_exactly():
    sketch, colors = two_halves(300, 300)
    drawing = read_drawing(sketch)
    picture = to_picture(to_rgba(color_layer(paint(sketch, colors, 64), drawing)), drawing)
    assert (picture[sketch == 0] == 0).all()


def test_the_layer_survives_transparency():
    values = np.random.default_rng(0).uniform(0, 1, (64, 64, 3)).astype(np.float32)
    values[:16] = 1 - 0.1 * values[:16]
    values[0] = 1
    layer = to_rgba(values)
    assert np.abs(over_white(layer) - 255 * values).max() <= 1.01
    assert (layer[0, :, 3] == 0).all()
    assert (layer[20:, :, 3] > 0).all()


def test_color_hardly_leaves_through_a_gap_in_a_line():
    sketch, colors = two_halves(600, 600)
    sketch[290:302] = 255  # as wide as one pixel of the network's picture, and a little more
    layer = color_layer(paint(sketch, colors, 64), read_drawing(sketch)) * 255
    away = np.abs(np.arange(600) - 300) > 18
    assert np.abs(layer[:, away] - colors[:, away]).mean() < 1
    assert np.abs(layer[296, away] - colors[296, away]).max() < 12


def test_grain_of_the_networks_picture_does_not_become_blots():
    sketch, colors = two_halves(512, 512)
    grain = np.random.default_rng(0).normal(0, 4, (64, 64, 3))
    painted = np.clip(paint(sketch, colors, 64) + grain, 0, 255).astype(np.uint8)
    layer = color_layer(painted, read_drawing(sketch)) * 255
    assert (layer - colors)[64:448, 64:192].std() < 0.6 * grain.std()


def test_a_large_drawing_is_worked_on_at_a_fraction_of_its_size(monkeypatch):
    sketch, colors = two_halves(500, 700, line=6)
    painted, drawing = paint(sketch, colors, 64), read_drawing(sketch)
    whole = over_white(layer_of(painted, drawing)).astype(int)
    monkeypatch.setattr(upsample, "WORK_PIXELS", 60_000)
    layer = layer_of(painted, drawing)
    assert layer.shape == (500, 700, 4)
    off_the_line = np.abs(np.arange(700) - 350) > 6
    assert np.abs(over_white(layer) - whole)[:, off_the_line].max() <= 4
    assert (to_picture(layer, drawing)[sketch == 0] == 0).all()


def test_half_a_megapixel_takes_a_quarter_of_a_second_or_so():
    sketch, colors = two_halves(720, 720)
    painted, drawing = paint(sketch, colors, 64), read_drawing(sketch)
    times = []
    for _ in range(3):
        start = time.process_time()
        to_picture(to_rgba(color_layer(painted, drawing)), drawing)
        times.append(time.process_time() - start)
    assert min(times) / 0.5184 < 1.0  # seconds a megapixel; 0.3 on a machine that does nothing else


def test_a_clean_drawing_of_the_networks_size_reaches_it_unchanged():
    gray = np.full((64, 64), 255, np.uint8)
    gray[10:20, 30] = 0
    gray[40, 5:50] = 90
    drawing = read_drawing(np.repeat(gray[..., None], 3, 2))
    assert (for_network(as_gray(drawing), 64) == gray).all()


@pytest.mark.parametrize("ink", [(255, 150, 200), (60, 60, 200), (150, 150, 150)])
@pytest.mark.parametrize("ground", [(255, 255, 255), (240, 255, 245), (235, 225, 190)])
def test_lines_of_any_color_on_any_paper_are_found(ink: tuple, ground: tuple):
    pixels = np.empty((200, 200, 3), np.uint8)
    pixels[:] = ground
    pixels[50:52, 20:180] = np.minimum(ink, ground)
    drawing = read_drawing(pixels)
    assert drawing.darkness[51, 100] > 0.6
    assert drawing.darkness[100, 100] < 0.05


def test_uneven_light_on_a_photograph_is_not_taken_for_lines():
    light = np.linspace(120, 250, 300)[None, :, None] * np.array([1.0, 0.97, 0.85])
    pixels = np.broadcast_to(light, (300, 300, 3)).astype(np.uint8).copy()
    pixels[150:153] = (pixels[150:153] * 0.3).astype(np.uint8)
    drawing = read_drawing(pixels)
    assert drawing.darkness[:130].mean() < 0.05
    assert drawing.darkness[151].mean() > 0.5


def test_thin_lines_of_a_large_drawing_stay_dark_for_the_network():
    gray = np.full((600, 600), 255, np.uint8)
    gray[300:302] = 0
    small = for_network(gray, 64)
    assert small.min() < 60


def test_light_lines_on_black_look_inverted():
    assert looks_inverted(np.zeros((50, 50, 3), np.uint8))
    assert not looks_inverted(np.full((50, 50, 3), 200, np.uint8))


@pytest.mark.parametrize("paper", [(240, 225, 180), (200, 216, 240), (150, 150, 150)])
def test_a_scan_on_tinted_paper_becomes_lines_on_white(paper: tuple):
    light = np.linspace(0.8, 1, 96)[:, None] * np.array(paper)
    sketch = np.full((96, 96, 3), 255.0)
    sketch[30:33], sketch[60:63] = (60, 20, 120), (150, 150, 150)
    scan = np.rint(sketch / 255 * light + np.random.default_rng(0).normal(0, 2, (96, 96, 1))).astype(np.uint8)
    assert (read_drawing(scan).pixels == scan).all()
    drawing = with_white_paper(read_drawing(scan))
    white = sketch.min(axis=2) == 255
    assert drawing.pixels[white].mean() > 252
    assert np.abs(drawing.pixels.astype(float) - sketch)[~white].mean() <= 12
    assert (drawing.paper == 1).all()


@pytest.mark.parametrize("paper", [(255, 255, 255), (246, 253, 246), (247, 247, 247)])
def test_a_drawing_on_nearly_white_paper_stays_as_it_is(paper: tuple):
    sketch = np.random.default_rng(0).integers(-4, 1, (96, 96, 3)) + np.array(paper)
    sketch[30:33], sketch[60:63] = (60, 20, 120), (230, 235, 240)
    assert (with_white_paper(read_drawing(sketch.astype(np.uint8))).pixels == sketch).all()


@pytest.mark.parametrize("style", ["flat", "painted"])
def test_white_paper_is_asked_for_and_makes_colors_exact(style):
    scan = encoded(
        Image.fromarray((np.asarray(drawn(120, 120).convert("RGB")) / 255 * (240, 225, 180)).astype(np.uint8))
    )
    drawing, painted = read_sketch(scan), np.full((64, 64, 3), (90, 160, 220), np.uint8)
    pictures = {}
    for background in ("reference", "white"):
        options = RenderOptions(style=style, background=background, palette="reference")
        options.check()
        made = render(painted, drawing, [painted], options=options).files["image"]
        pictures[background] = decode_rgb(made)[60, 60]
    assert np.abs(pictures["white"].astype(int) - (90, 160, 220)).max() <= 4
    assert np.abs(pictures["reference"].astype(int) - (90, 160, 220)).max() > 5


# Drawings of every kind: closed shapes on paper, then what people do to them.

SHAPES = {"wide": (70, 300), "tall": (260, 90), "tiny": (MIN_SIDE_PX, MIN_SIDE_PX), "thread": (MAX_ASPECT * 9, 9),
          "square": (150, 150), "small": (40, 33), "networks": (64, 64)}  # fmt: skip


def drawn(height: int, width: int, seed: int = 0) -> Image.Image:
    """Ellipses and strokes, black on white."""
    rng = np.random.default_rng([seed, height, width])
    image = Image.new("L", (width, height), 255)
    draw = ImageDraw.Draw(image)
    shapes, thickest = (4, 3) if min(height, width) > MIN_SIDE_PX else (1, 1)
    for _ in range(shapes):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        a, b = rng.uniform(2, width / 2), rng.uniform(2, height / 2)
        draw.ellipse((x - a, y - b, x + a, y + b), outline=0, width=int(rng.integers(1, thickest + 1)))
    draw.line([tuple(point) for point in rng.uniform(0, 1, (5, 2)) * (width, height)], fill=40, width=1)
    return image


def on_paper(image: Image.Image, paper: np.ndarray, ink: tuple[int, int, int] = (0, 0, 0)) -> Image.Image:
    dark = 1 - np.asarray(image, np.float32)[..., None] / 255
    return Image.fromarray(np.uint8(paper * (1 - dark) + np.array(ink) * dark))


def photographed(image: Image.Image) -> Image.Image:
    y, x = np.mgrid[0 : image.height, 0 : image.width]
    light = 235 - 90 * (x / image.width) - 30 * (y / image.height)
    grain = np.random.default_rng(0).normal(0, 3, light.shape)
    return on_paper(image, np.clip((light + grain)[..., None] * [1.0, 0.96, 0.8], 0, 255), (50, 45, 40))


def transparent(image: Image.Image) -> Image.Image:
    clear = Image.new("RGBA", image.size, (0, 0, 0, 0))
    clear.putalpha(image.point(lambda value: 255 - value))
    return clear


KINDS = {
    "black": lambda image: image,
    "colored lines": lambda image: on_paper(image, np.full(3, 255.0), (230, 90, 160)),
    "faint pencil": lambda image: on_paper(image, np.full(3, 250.0), (170, 170, 170)),
    "yellow paper": lambda image: on_paper(image, np.array([240.0, 225.0, 180.0]), (30, 20, 60)),
    "photograph": photographed,
    "transparent": transparent,
    "two levels": lambda image: image.convert("1"),
    "sixteen bits": lambda image: Image.fromarray(np.asarray(image).astype(np.uint16) * 257),
}


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_whatever_the_drawing_the_layer_times_it_is_the_picture(kind, shape):
    data = encoded(KINDS[kind](drawn(*SHAPES[shape])))
    drawing = read_sketch(data)
    painted = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    made = render(painted, drawing, [painted], output="both").files
    picture, layer = decode_rgb(made["image"]).astype(int), Image.open(io.BytesIO(made["color_layer"]))
    assert picture.shape[:2] == (layer.height, layer.width) == SHAPES[shape]
    assert layer.mode == "RGBA"
    white = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    product = np.asarray(white) / 255 * decode_rgb(data)
    assert np.abs(product - picture).max() <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_lines_of_every_kind_of_drawing_are_found_and_its_paper_is_not(kind):
    plain = drawn(240, 200)
    gray = as_gray(read_sketch(encoded(KINDS[kind](plain))))
    lines = np.asarray(plain) < 60
    assert np.median(gray[lines]) < 90
    assert np.median(gray[~lines]) > 240


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (ImageOps.invert(drawn(200, 200)), "mostly black"),
        (Image.new("L", (MIN_SIDE_PX - 1, 50), 255), "7 x 50 pixels"),
        (Image.new("L", (20, 20 * MAX_ASPECT + 1), 255), "20 x 321 pixels"),
        (Image.new("1", (6000, 5000), 1), "6,000 x 5,000 pixels"),
    ],
    ids=["inverted", "too small", "a thread", "too large"],
)
def test_what_cannot_be_colored_is_said_in_one_line(image, found):
    with pytest.raises(ImageError, match=found) as refused:
        read_sketch(encoded(image))
    assert refused.value.thing == "sketch"
    assert refused.value.allowed


def on_ground(ground: tuple[int, ...], lines: tuple[int, ...], width: int = 3) -> Image.Image:
    image = Image.new("RGB", (200, 240), ground)
    draw = ImageDraw.Draw(image)
    draw.ellipse((40, 30, 160, 170), outline=lines, width=width)
    for left in (70, 115):
        draw.ellipse((left, 80, left + 18, 104), outline=lines, width=width)
    draw.line((60, 160, 20, 235), fill=lines, width=width)
    return image


@pytest.mark.parametrize("ground", range(0, 121, 15))
@pytest.mark.parametrize(("lighter", "width"), [(30, 3), (135, 1), (135, 12)])
def test_lines_lighter_than_a_dark_ground_raise_image_error(ground, lighter, width):
    with pytest.raises(ImageError, match="light lines on a dark ground; invert it"):
        read_sketch(encoded(on_ground((ground,) * 3, (ground + lighter,) * 3, width)))


@pytest.mark.parametrize("ground", [(128,) * 3, (160,) * 3, (190,) * 3, (130, 170, 230), (196, 164, 120)])
@pytest.mark.parametrize("width", [1, 12])
def test_white_lines_on_toned_paper_raise_image_error(ground, width):
    with pytest.raises(ImageError, match="light lines on a dark ground; invert it"):
        read_sketch(encoded(on_ground(ground, (255, 255, 255), width)))


@pytest.mark.parametrize("ground", [(140,) * 3, (190,) * 3, (196, 164, 120)])
def test_dark_lines_on_toned_paper_may_have_highlights(ground):
    image = on_ground(ground, (20, 20, 20))
    ImageDraw.Draw(image).ellipse((80, 120, 100, 135), fill=(255, 255, 255))
    assert has_lines(read_sketch(encoded(image)))


@pytest.mark.parametrize("paper", [(255, 255, 255), (250, 240, 180), (170, 170, 170), (100, 100, 100), (0, 60, 150)])
@pytest.mark.parametrize("width", [1, 12])
def test_dark_lines_are_read_on_paper_of_any_color(paper, width):
    assert has_lines(read_sketch(encoded(on_ground(paper, tuple(value // 4 for value in paper), width))))


def white_lines_on_transparency() -> Image.Image:
    white = Image.new("L", (200, 200), 255)
    return Image.merge("RGBA", (white, white, white, ImageOps.invert(drawn(200, 200))))


@pytest.mark.parametrize(
    ("image", "hint"),
    [
        (Image.new("L", (120, 90), 255), "give dark lines"),
        (Image.new("RGB", (120, 90), (200, 190, 150)), "give dark lines"),
        (Image.new("RGBA", (120, 90), (0, 0, 0, 0)), "give dark lines"),
        (white_lines_on_transparency(), "light lines on transparency: make them dark"),
    ],
    ids=["white", "yellow", "transparent", "light lines on transparency"],
)
def test_a_sketch_without_lines_raises_image_error(image, hint):
    with pytest.raises(ImageError, match=f"has no lines; {hint}"):
        read_sketch(encoded(image))
