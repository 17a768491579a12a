"""Separation of a drawing into lines and paper.

Scans have gray or yellow paper, photographs have uneven light, and lines have any color, but the network expects black
lines on white.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from animediffusion.platform.images.codec import letterbox

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]

CLEAN_PAPER = 250
"""If the median of every channel is at least this bright, the paper counts as white and is not estimated."""
PAPER_GRID_PX = 64
"""Longer side of the grid on which the color of uneven paper is estimated."""
FAINT_LINE = 0.08
"""Darkness below this value counts as grain of the paper."""
TINTED_PAPER = 235
"""with_white_paper() cleans paper that is darker than this in any channel, anywhere but at TINTED_SHARE of its area.
Whiter paper stays as it is, so that every pixel of a line does."""
TINTED_SHARE = 0.02
GRAIN = (0.04, 0.16)
"""On cleaned paper, pixels of up to the first darkness become white; from the second on, they keep their darkness."""
INK_AREA = 0.01
"""Share of a picture that dark lines cover at least; faint tones, such as shadows, may cover much more."""
NEARLY_BLACK = 64
"""A picture whose median brightness is below this value is rejected."""
DARK_GROUND = 128
"""On ground darker than this, lines may be lighter than the ground."""
LIGHT_GROUND = 208
"""On ground as light as this, lines that are lighter are too faint to be lines."""
FEW_DARK_LINES = 8
"""Toned paper between the two often has highlights: it is rejected where light lines outweigh dark ones this much."""
SMALL_PX = 256
"""Longer side of the reduced picture in which inverted drawings are detected."""


class Drawing(NamedTuple):
    """A sketch, separated into lines and paper."""

    pixels: Pixels
    """[H, W, 3]: the decoded pixels, unchanged unless with_white_paper() made the drawing."""
    darkness: Floats
    """[H, W]: 0 on paper, 1 in a black line."""
    paper: Floats
    """[H, W, 3] or [1, 1, 3], above 0 and at most 1: the color of the paper in `pixels` times the light on it."""


def read_drawing(pixels: Pixels) -> Drawing:
    """Return the lines and the paper of a sketch [H, W, 3]; lines may have any color that is darker than the paper."""
    brightness = np.median(pixels.reshape(-1, 3), axis=0)
    if brightness.min() >= CLEAN_PAPER:
        paper = np.ones((1, 1, 3), np.float32)
        return Drawing(pixels, _stretch(_darkness(pixels, paper), INK_AREA), paper)
    paper = _paper_of(pixels)
    darkness = _darkness(pixels, paper)
    darkness = np.maximum((darkness - FAINT_LINE) / (1 - FAINT_LINE), 0).astype(np.float32)
    return Drawing(pixels, _stretch(darkness, INK_AREA), paper)


def with_white_paper(drawing: Drawing) -> Drawing:
    """Return the drawing without the tint, the shadows and the grain of its paper, as in a scan or a photograph.

    Colors are multiplied by the pixels of the drawing, so on white paper they are exact.
    """
    pixels, darkness, paper = drawing
    if np.quantile(paper[::8, ::8].min(axis=2), TINTED_SHARE) * 255 >= TINTED_PAPER:
        return drawing
    return Drawing(_cleaned(pixels, paper, _darkness(pixels, paper)), darkness, np.ones((1, 1, 3), np.float32))


def looks_inverted(pixels: Pixels) -> bool:
    """Return whether most of the picture is nearly black, or its ground is dark and its lines are lighter."""
    small = Image.fromarray(pixels).resize(_within(SMALL_PX, *pixels.shape[:2]), Image.Resampling.BOX)
    if np.median(np.asarray(small).max(axis=2)) < NEARLY_BLACK:
        return True
    gray = small.convert("L")
    ground = np.median(np.asarray(gray))
    if ground >= LIGHT_GROUND:
        return False
    # Lines cover less area than the ground, so line pixels differ more from the local mean than ground pixels do. The
    # sign of the summed cubes is therefore the sign of the lines: positive if they are lighter than the ground.
    around = gray.filter(ImageFilter.GaussianBlur(SMALL_PX / 16))
    cubes = (np.asarray(gray, np.float64) - np.asarray(around)) ** 3
    lighter, darker = cubes[cubes > 0].sum(), -cubes[cubes < 0].sum()
    return bool(lighter > darker * (1 if ground < DARK_GROUND else FEW_DARK_LINES))


def has_lines(drawing: Drawing) -> bool:
    """Return whether any pixel is darker than the paper."""
    return bool((drawing.darkness > FAINT_LINE).any())


def as_gray(drawing: Drawing) -> Pixels:
    """Return the lines alone, [H, W], black on white: the input of the network, at full size."""
    return np.rint(255 * (1 - drawing.darkness)).astype(np.uint8)


def for_network(gray: Pixels, size: int) -> Pixels:
    """Return lines [H, W] letterboxed to [size, size], as the network expects a sketch.

    Thin lines become faint when a large drawing is reduced; they are darkened again.
    """
    small = letterbox(gray, size)[0]
    if max(gray.shape) <= 1.25 * size:
        return small
    darkness = 1 - small.astype(np.float32) / np.float32(255)
    return np.rint(255 * (1 - _stretch(darkness))).astype(np.uint8)


def _darkness(pixels: Pixels, paper: Floats) -> Floats:
    """Return how much darker than the paper each pixel is, in the channel with the largest difference."""
    light = pixels.astype(np.float32) / np.float32(255)
    np.divide(light, paper, out=light)
    darkness: Floats = np.clip(1 - light.min(axis=2), 0, 1)
    return darkness


def _cleaned(pixels: Pixels, paper: Floats, darkness: Floats) -> Pixels:
    """Return the lines on white paper, [H, W, 3]: they keep their color relative to the paper.

    Args:
        pixels: the scan, [H, W, 3].
        paper: the color of the paper, [H, W, 3].
        darkness: how much darker than the paper each pixel is, [H, W].
    """
    none, full = (np.float32(value) for value in GRAIN)
    kept = np.clip((darkness - none) * (full / (full - none)), 0, darkness) / np.maximum(darkness, np.float32(1e-6))
    cleaned = np.empty_like(pixels)
    for channel in range(3):
        light = np.minimum(pixels[..., channel] / (255 * paper[..., channel]), 1)
        cleaned[..., channel] = np.rint(255 - 255 * kept * (1 - light))
    return cleaned


def _stretch(darkness: Floats, ink_area: float = 1.0) -> Floats:
    """Scale the darkness so that faint lines become as dark as ink; leave dark lines unchanged.

    Args:
        darkness: [H, W] in [0, 1].
        ink_area: if at least this share of the picture is dark, nothing is scaled; the rest may be a faint tone.
    """
    lines = darkness[darkness > FAINT_LINE]
    if lines.size < 8:
        return darkness
    share = max(0.95, 1 - ink_area * darkness.size / lines.size)
    strongest = float(np.quantile(lines[:: max(1, lines.size // 100_000)], share))
    return darkness if strongest > 0.75 else np.minimum(darkness * np.float32(0.85 / max(strongest, 0.15)), 1)


def _within(side: int, height: int, width: int) -> tuple[int, int]:
    """Return (width, height) of a picture after its longer side is scaled to `side`."""
    scale = side / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _paper_of(pixels: Pixels) -> Floats:
    """Estimate the color of the paper, [H, W, 3], from the brightest pixels around each pixel."""
    height, width = pixels.shape[:2]
    grid = _within(PAPER_GRID_PX, height, width)
    small = Image.fromarray(pixels).resize(grid, Image.Resampling.BOX)
    for _ in range(2):  # The filter is larger than a pen stroke and smaller than the shadow of a hand.
        small = small.filter(ImageFilter.MaxFilter(5))
    for _ in range(2):
        small = small.filter(ImageFilter.MinFilter(3))
    smooth = small.filter(ImageFilter.GaussianBlur(2)).resize((width, height), Image.Resampling.BICUBIC)
    paper = np.asarray(smooth).astype(np.float32) / 255
    usual = np.quantile(np.asarray(small).reshape(-1, 3), 0.75, axis=0).astype(np.float32) / 255
    limited: Floats = np.clip(paper, np.maximum(0.5 * usual, 0.05), 1)
    return limited
