"""Brings colors from the network's size back to the drawing's own, without crossing its lines.

The network paints a small square. Its grain, which would become blots as large as a hand, is taken out by total
variation. Its pixels near lines mix both sides and the line itself, so only pixels away from lines are trusted; from
there color flows over the full-size drawing, and a line is a wall. The flow is the recursive filter of the domain
transform (Gastal and Oliveira, "Domain Transform for Edge-Aware Image and Video Processing", SIGGRAPH 2011), with the
darkness of the lines as distance. The picture is that color layer times the drawing. benchmarks/resolution.py measures
what that gains, and costs.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from animediffusion.platform.images.codec import Box
from animediffusion.serve.rendering.sketch import Drawing, Floats, Pixels, as_gray, for_network
from animediffusion.serve.rendering.tv_denoise import without_grain

REACH_PX = 3.0
"""How far color flows, in pixels of the network's picture."""
WALL = 6.0
"""Crossing a black line one pixel wide costs as much as this many REACH."""
NUM_PASSES = 2
LITTLE_TRUST = 0.2
"""Weight of a pixel that is not trusted but lies beside a line: it decides where none is trusted, such as in eyes."""
GRAIN = 0.02
"""Strength of the total variation: contrasts of about 5 levels of 255 are grain."""
WORK_PIXELS = 4_000_000
"""The layer of a larger drawing is made at a whole fraction of its size: color is smooth, and memory is not endless."""
BLACKEST = 0.3
"""Lines count as this light at least when their darkness is taken out of a color."""
SMALL_SCALE = 1.5
"""From here on the network's picture is too coarse to be taken as it is."""
BLUR = 1.3
"""How many of its own pixels beyond a line the network's picture is still blurred by it."""
MOSTLY_PAPER = 0.04
"""Share of line in a pixel of the network's picture beyond which its color is not trusted."""


def layer_of(painted: Pixels, drawing: Drawing) -> Pixels:
    """The color layer at the drawing's size, RGBA [H, W, 4]; arguments as color_layer."""
    height, width = drawing.darkness.shape
    step = math.ceil(math.sqrt(height * width / WORK_PIXELS))
    if step == 1:
        return to_rgba(color_layer(painted, drawing))
    small = Image.fromarray(to_rgba(color_layer(painted, _reduced(drawing, step))))
    return np.asarray(small.resize((width, height), Image.Resampling.BILINEAR))


def color_layer(painted: Pixels, drawing: Drawing) -> Floats:
    """The colors of `painted` [S, S, 3] at the drawing's size, without lines: [H, W, 3] in [0, 1].

    Args:
        painted: what the network made of the letterboxed sketch.
        drawing: the sketch at its own size.
    """
    height, width = drawing.darkness.shape
    box = place_in_square(height, width, len(painted))
    scale = max(height / box.height, width / box.width, 1.0)
    seen = _inside(for_network(as_gray(drawing), len(painted)), box)
    small = _inside(painted, box)
    clear = _enlarged(_without_lines(small, seen, GRAIN if scale >= SMALL_SCALE else 0), width, height)
    trust = _trust(drawing.darkness, scale)
    little = np.float32(LITTLE_TRUST) * _enlarged(seen**4, width, height) * (drawing.darkness < BLACKEST)
    flowed = _flow(clear, trust + little, drawing.darkness, REACH_PX * scale)
    layer = flowed + trust[..., None] * (clear - flowed)
    # Yellow paper would tint the picture a second time: lighten the layer by it, as far as white allows.
    layer = np.clip(layer / drawing.paper, 0, 1)
    return layer if scale >= SMALL_SCALE else _keep_detail(layer, _enlarged(small, width, height), drawing, scale)


def place_in_square(height: int, width: int, size: int) -> Box:
    """Where letterbox() puts a picture of that size."""
    scale = size / max(height, width)
    inner_height, inner_width = max(1, round(height * scale)), max(1, round(width * scale))
    return Box((size - inner_width) // 2, (size - inner_height) // 2, inner_width, inner_height, width, height)


def to_picture(layer: Pixels, drawing: Drawing) -> Pixels:
    """The layer [H, W, 4] over white times the drawing: [H, W, 3]."""
    product = over_white(layer).astype(np.uint16) * drawing.pixels
    return ((product + 127) // 255).astype(np.uint8)


def to_rgba(layer: Floats) -> Pixels:
    """A layer [H, W, 3] in [0, 1] as [H, W, 4]; bare paper becomes transparent, softly."""
    white = 1 - layer.min(axis=2, keepdims=True)
    alpha = np.rint(255 * np.clip(8 * white, 0, 1))
    opaque = np.maximum(alpha, 1) / 255
    rgb = np.clip(1 - (1 - layer) / opaque, 0, 1)
    return np.concatenate([np.rint(255 * rgb), alpha], axis=2).astype(np.uint8)


def over_white(rgba: Pixels) -> Pixels:
    """[H, W, 4] laid over white paper: [H, W, 3]."""
    alpha = rgba[..., 3:].astype(np.uint16)
    mixed = rgba[..., :3] * alpha + 255 * (255 - alpha)
    return ((mixed + 127) // 255).astype(np.uint8)


def _reduced(drawing: Drawing, step: int) -> Drawing:
    """The drawing at 1 / step of its size; a line stays as dark as it is, so that it remains a wall."""
    height, width = (-(-side // step) for side in drawing.darkness.shape)
    margins = ((0, height * step - drawing.darkness.shape[0]), (0, width * step - drawing.darkness.shape[1]))
    darkness = np.pad(drawing.darkness, margins).reshape(height, step, width, step).max(axis=(1, 3))
    paper = drawing.paper if drawing.paper.shape[0] == 1 else drawing.paper[::step, ::step]
    return Drawing(drawing.pixels[::step, ::step], darkness, paper)


def _without_lines(small: Floats, seen: Floats, grain: float) -> Floats:
    """Colors [h, w, 3] lightened by as much as the lines that the network saw, `seen` [h, w], darkened them.

    Rough, and used where lines are so dense that no pixel is free of them.
    """
    # The square root: networks draw lines softer than they see them, and too dark looks better than too light.
    light: Floats = np.clip(small / np.sqrt(np.maximum(seen, BLACKEST))[..., None], 0, 1)
    return without_grain(light, grain) if grain else light


def _keep_detail(layer: Floats, color: Floats, drawing: Drawing, scale: float) -> Floats:
    """The layer of a drawing not much larger than the network's picture, which then has every detail already.

    Where no dark line is, the layer times the drawing becomes `color`.
    """
    light = drawing.pixels.astype(np.float32) / np.float32(255)
    exact = np.clip(color / np.maximum(light, BLACKEST), 0, 1)
    share = (SMALL_SCALE - scale) / (SMALL_SCALE - 1) * (drawing.darkness < 1 - BLACKEST)[..., None]
    kept: Floats = (layer + share * (exact - layer)).astype(np.float32)
    return kept


def _inside(square: Pixels, box: Box) -> Floats:
    """The part of a square inside the margins, which play no part: in [0, 1]."""
    inside = square[box.top : box.top + box.height, box.left : box.left + box.width]
    return inside.astype(np.float32) / np.float32(255)


def _enlarged(small: Floats, width: int, height: int) -> Floats:
    """A small picture [h, w] or [h, w, 3] at another size, within [0, 1]."""
    if small.ndim == 3:
        return np.stack([_enlarged(plane, width, height) for plane in np.moveaxis(small, 2, 0)], axis=2)
    plane = Image.fromarray(np.ascontiguousarray(small)).resize((width, height), Image.Resampling.BICUBIC)
    enlarged: Floats = np.clip(np.asarray(plane), 0, 1)
    return enlarged


def _trust(darkness: Floats, scale: float) -> Floats:
    """1 where a pixel of the network saw no line, 0 where lines are: [H, W]."""
    side = 2 * round(BLUR * (scale - 1)) + 1
    coverage = _box_mean(_box_mean(darkness, side), side) if side > 1 else darkness
    trust = np.exp(-((coverage / MOSTLY_PAPER) ** 2)) * (1 - darkness) ** 2
    return np.where(trust < 1e-3, 0, trust).astype(np.float32)


def _box_mean(plane: Floats, side: int) -> Floats:
    """Means over squares of an odd side, edges repeated: [H, W]. scipy has it, too; an exported model does not."""
    means = plane.astype(np.float64)
    for _ in range(2):
        padded = np.pad(means, ((side // 2 + 1, side // 2), (0, 0)), mode="edge")
        total = np.cumsum(padded, axis=0)
        means = ((total[side:] - total[:-side]) / side).T
    return means.astype(np.float32)


def _flow(color: Floats, weight: Floats, darkness: Floats, reach: float) -> Floats:
    """Colors carried, by their weight, everywhere that no line cuts off: [H, W, 3].

    A pixel that nothing of weight reaches keeps its own color.
    """
    planes = np.concatenate([color * weight[..., None], weight[..., None]], axis=2)
    cost = 1 + (WALL * reach) * darkness
    for number in range(NUM_PASSES):
        sigma = reach * np.sqrt(3) * 2.0 ** (NUM_PASSES - number - 1) / np.sqrt(4.0**NUM_PASSES - 1)
        keep = np.exp(-np.sqrt(2) / sigma * cost).astype(np.float32)
        planes = _sweep(planes, keep)
        planes = _sweep(planes.transpose(1, 0, 2), keep.T).transpose(1, 0, 2)
    arrived = planes[..., 3:]
    carried: Floats = np.where(arrived > 1e-30, planes[..., :3] / np.maximum(arrived, 1e-30), color)
    return carried


def _sweep(planes: Floats, keep: Floats) -> Floats:
    """First-order recursive filter down and up along axis 0; `keep` [H, W] is what survives a step into a pixel."""
    planes = np.ascontiguousarray(planes)
    keep = np.ascontiguousarray(keep)[..., None]
    for row in range(1, len(planes)):
        planes[row] += keep[row] * (planes[row - 1] - planes[row])
    for row in range(len(planes) - 2, -1, -1):
        planes[row] += keep[row + 1] * (planes[row + 1] - planes[row])
    return planes
