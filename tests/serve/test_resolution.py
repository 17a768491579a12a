import time

import numpy as np
import pytest

from animediffusion.platform.images import letterbox
from animediffusion.serve.lines import as_gray, for_network, looks_inverted, read_drawing
from animediffusion.serve.resolution import color_layer, over_white, place_in_square, to_picture, to_rgba

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
