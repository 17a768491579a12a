"""Reads a drawing: which part of each pixel is line and which is paper.

Scans have gray or yellow paper, photographs uneven light, and lines come in any color; the network knows
black lines on white only.
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
"""A drawing whose median pixel is at least this bright in every channel is taken as it is."""
PAPER_GRID_PX = 64
"""The color of uneven paper is estimated on a grid this fine."""
FAINT_LINE = 0.08
"""Less darkness than this is grain of the paper."""
NEARLY_BLACK = 64
"""A picture with a median below this is refused, whatever its lines are."""
DARK_GROUND = 128
"""On ground darker than this, lines may be lighter than the ground."""
SMALL_PX = 256
"""The longer side of the picture in which the kind of the lines is looked for."""


class Drawing(NamedTuple):
    """A sketch, taken apart."""

    pixels: Pixels
    """[H, W, 3], as sent."""
    darkness: Floats
    """[H, W]: 0 on paper, 1 in a black line."""
    paper: Floats
    """[H, W, 3] or [1, 1, 3], above 0 and at most 1: the color of the paper and the light on it."""


def read_drawing(pixels: Pixels) -> Drawing:
    """The lines and the paper of a sketch [H, W, 3]; lines may have any color that is darker than the paper."""
    brightness = np.median(pixels.reshape(-1, 3), axis=0)
    if brightness.min() >= CLEAN_PAPER:
        paper = np.ones((1, 1, 3), np.float32)
        return Drawing(pixels, _stretch(_darkness(pixels, paper)), paper)
    paper = _paper_of(pixels)
    darkness = _darkness(pixels, paper)
    darkness = np.maximum((darkness - FAINT_LINE) / (1 - FAINT_LINE), 0).astype(np.float32)
    return Drawing(pixels, _stretch(darkness), paper)


def looks_inverted(pixels: Pixels) -> bool:
    """True if most of the picture is nearly black, or its ground is dark and its lines are lighter."""
    small = Image.fromarray(pixels).resize(_within(SMALL_PX, *pixels.shape[:2]), Image.Resampling.BOX)
    if np.median(np.asarray(small).max(axis=2)) < NEARLY_BLACK:
        return True
    gray = small.convert("L")
    if np.median(np.asarray(gray)) >= DARK_GROUND:
        return False
    # Lines are the smaller part around any place, so they differ from the mean there more than the ground does.
    around = gray.filter(ImageFilter.GaussianBlur(SMALL_PX / 16))
    difference = np.asarray(gray, np.float64) - np.asarray(around)
    return bool((difference**3).sum() > 0)


def has_lines(drawing: Drawing) -> bool:
    """Whether anything is darker than the paper."""
    return bool((drawing.darkness > FAINT_LINE).any())


def as_gray(drawing: Drawing) -> Pixels:
    """The lines alone, [H, W], black on white: all that coloring needs of a drawing."""
    return np.rint(255 * (1 - drawing.darkness)).astype(np.uint8)


def for_network(gray: Pixels, size: int) -> Pixels:
    """Lines [H, W] letterboxed to [size, size], as the network knows sketches.

    Thin lines fade when a large drawing is made small; they are made dark again.
    """
    small = letterbox(gray, size)[0]
    if max(gray.shape) <= 1.25 * size:
        return small
    darkness = 1 - small.astype(np.float32) / np.float32(255)
    return np.rint(255 * (1 - _stretch(darkness))).astype(np.uint8)


def _darkness(pixels: Pixels, paper: Floats) -> Floats:
    """How much darker than the paper each pixel is, in the channel where that shows best."""
    light = pixels.astype(np.float32) / np.float32(255)
    np.divide(light, paper, out=light)
    darkness: Floats = np.clip(1 - light.min(axis=2), 0, 1)
    return darkness


def _stretch(darkness: Floats) -> Floats:
    """Faint lines made as dark as ink; what is dark already stays."""
    lines = darkness[darkness > FAINT_LINE]
    if lines.size < 8:
        return darkness
    strongest = float(np.quantile(lines[:: max(1, lines.size // 100_000)], 0.95))
    return darkness if strongest > 0.75 else np.minimum(darkness * np.float32(0.85 / max(strongest, 0.15)), 1)


def _within(side: int, height: int, width: int) -> tuple[int, int]:
    """(width, height) of a picture whose longer side is brought to `side`."""
    scale = side / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _paper_of(pixels: Pixels) -> Floats:
    """Color of the paper [H, W, 3], from the brightest pixels around each place."""
    height, width = pixels.shape[:2]
    grid = _within(PAPER_GRID_PX, height, width)
    small = Image.fromarray(pixels).resize(grid, Image.Resampling.BOX)
    for _ in range(2):  # larger than a pen stroke, smaller than the shadow of a hand
        small = small.filter(ImageFilter.MaxFilter(5))
    for _ in range(2):
        small = small.filter(ImageFilter.MinFilter(3))
    smooth = small.filter(ImageFilter.GaussianBlur(2)).resize((width, height), Image.Resampling.BICUBIC)
    paper = np.asarray(smooth).astype(np.float32) / 255
    usual = np.quantile(np.asarray(small).reshape(-1, 3), 0.75, axis=0).astype(np.float32) / 255
    limited: Floats = np.clip(paper, np.maximum(0.5 * usual, 0.05), 1)
    return limited
