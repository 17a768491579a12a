"""Edge-aware upsampling of the network's colors to the size of the drawing, without crossing its lines.

The network paints a small square. Total variation denoising removes its grain, which would become large blots after
upsampling. Near a line, a pixel of the network mixes the colors of both sides and of the line itself, so only pixels
far enough from lines are trusted. From these pixels, color flows over the full-size drawing, and lines act as walls.
The flow is the recursive filter of the domain transform (Gastal and Oliveira, "Domain Transform for Edge-Aware Image
and Video Processing", SIGGRAPH 2011) with the darkness of the lines as distance. The result is a color layer; the
finished picture is this layer times the drawing. benchmarks/resolution.py measures the benefit and the cost.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from animediffusion.platform.images.codec import Box, place_in_square
from animediffusion.serve.rendering.morphology import pooled
from animediffusion.serve.rendering.sketch import Drawing, Floats, Pixels, as_gray, for_network
from animediffusion.serve.rendering.tv_denoise import without_grain

REACH_PX = 3.0
"""Distance over which color flows, in pixels of the network's picture."""
WALL = 6.0
"""Crossing a black line one pixel wide costs as much distance as WALL times the reach."""
NUM_PASSES = 2
LITTLE_TRUST = 0.2
"""Weight of an untrusted pixel next to a line: it matters only where no pixel is trusted, for example in eyes."""
GRAIN = 0.02
"""Strength of the total variation denoising: contrasts of about 5 levels of 255 count as grain."""
WORK_PIXELS = 4_000_000
"""Largest number of pixels of a computed layer. The layer of a larger drawing is computed at 1/2, 1/3, ... of its size
to limit memory; color is smooth enough for this."""
BLACKEST = 0.3
"""Lower bound for the lightness of a line by which a color is divided to remove the line."""
SMALL_SCALE = 1.5
"""From this enlargement on, the network's picture is too coarse to be used directly."""
BLUR = 1.3
"""Distance from a line within which the line blurs the network's picture, in pixels of that picture."""
MOSTLY_PAPER = 0.04
"""Share of line in a pixel of the network's picture above which its color is not trusted."""


class Flow(NamedTuple):
    """Colors of the network at the drawing's size, in [0, 1]."""

    clear: Floats
    """[H, W, 3]: the network's picture without grain and lines, enlarged."""
    color: Floats
    """[H, W, 3]: colors that flowed from trusted pixels, with lines as walls."""
    trust: Floats
    """[H, W]: trust in `clear`, 0 where the network's pixel contains a line."""
    little: Floats
    """[H, W]: the weight of untrusted pixels next to lines."""
    scale: float
    """Pixels of the drawing for a pixel of the network's picture, in one direction; at least 1."""


def layer_of(painted: Pixels, drawing: Drawing) -> Pixels:
    """Return the color layer at the drawing's size, RGBA [H, W, 4]; the arguments are those of color_layer."""
    height, width = drawing.darkness.shape
    step = math.ceil(math.sqrt(height * width / WORK_PIXELS))
    if step == 1:
        return to_rgba(color_layer(painted, drawing))
    small = Image.fromarray(to_rgba(color_layer(painted, reduced(drawing, step))))
    return np.asarray(small.resize((width, height), Image.Resampling.BILINEAR))


def color_layer(painted: Pixels, drawing: Drawing) -> Floats:
    """Return the colors of `painted` [S, S, 3] at the drawing's size, without lines: [H, W, 3] in [0, 1].

    Args:
        painted: the network's picture of the letterboxed sketch.
        drawing: the sketch at its original size.
    """
    height, width = drawing.darkness.shape
    flow = flow_of(painted, drawing)
    layer: Floats = flow.color + flow.trust[..., None] * (flow.clear - flow.color)
    # The picture is layer times drawing, so colored paper would tint it twice: divide the layer by the paper.
    layer = np.clip(layer / drawing.paper, 0, 1)
    if flow.scale >= SMALL_SCALE:
        return layer
    small = _inside(painted, place_in_square(height, width, len(painted)))
    return _keep_detail(layer, enlarge(small, width, height), drawing, flow.scale)


def flow_of(painted: Pixels, drawing: Drawing) -> Flow:
    """Return the colors of `painted` at the drawing's size before and after they flow; arguments as in color_layer."""
    height, width = drawing.darkness.shape
    box = place_in_square(height, width, len(painted))
    scale = max(height / box.height, width / box.width, 1.0)
    seen = _inside(for_network(as_gray(drawing), len(painted)), box)
    small = _inside(painted, box)
    clear = enlarge(_without_lines(small, seen, GRAIN if scale >= SMALL_SCALE else 0), width, height)
    trust = _trust(drawing.darkness, scale)
    little = np.float32(LITTLE_TRUST) * enlarge(seen**4, width, height) * (drawing.darkness < BLACKEST)
    color = _flow(clear, trust + little, drawing.darkness, REACH_PX * scale)
    return Flow(clear, color, trust, little, scale)


def to_picture(layer: Pixels, drawing: Drawing) -> Pixels:
    """Return the layer [H, W, 4] over white, times the drawing: [H, W, 3]."""
    return multiplied(over_white(layer), drawing.pixels)


def multiplied(below: Pixels, above: Pixels) -> Pixels:
    """Return below x above / 255, rounded."""
    product = below.astype(np.uint16)
    product *= above
    product += 127
    product //= 255
    return product.astype(np.uint8)


def to_rgba(layer: Floats) -> Pixels:
    """Convert a layer [H, W, 3] in [0, 1] to RGBA [H, W, 4]; white becomes transparent, with a soft transition."""
    white = 1 - layer.min(axis=2, keepdims=True)
    alpha = np.rint(255 * np.clip(8 * white, 0, 1))
    opaque = np.maximum(alpha, 1) / 255
    rgb = np.clip(1 - (1 - layer) / opaque, 0, 1)
    return np.concatenate([np.rint(255 * rgb), alpha], axis=2).astype(np.uint8)


def over_white(rgba: Pixels) -> Pixels:
    """Composite RGBA [H, W, 4] over white: [H, W, 3]."""
    alpha = rgba[..., 3:].astype(np.uint16)
    mixed = rgba[..., :3] * alpha + 255 * (255 - alpha)
    return ((mixed + 127) // 255).astype(np.uint8)


def reduced(drawing: Drawing, step: int) -> Drawing:
    """Return the drawing at 1 / step of its size; lines keep their maximum darkness, so that they remain walls."""
    paper = drawing.paper if drawing.paper.shape[0] == 1 else drawing.paper[::step, ::step]
    return Drawing(drawing.pixels[::step, ::step], pooled(drawing.darkness, step, np.max), paper)


def _without_lines(small: Floats, seen: Floats, grain: float) -> Floats:
    """Lighten colors [h, w, 3] by as much as the lines in the network's sketch, `seen` [h, w], darkened them.

    The estimate is rough. It matters where lines are so dense that no pixel is free of them.
    """
    # The square root is there because networks draw lines softer than in the sketch, and too dark looks better than too
    # light.
    light: Floats = np.clip(small / np.sqrt(np.maximum(seen, BLACKEST))[..., None], 0, 1)
    return without_grain(light, grain) if grain else light


def _keep_detail(layer: Floats, color: Floats, drawing: Drawing, scale: float) -> Floats:
    """Restore details of the network's picture in the layer of a drawing that is not much larger than that picture.

    Outside dark lines, the layer is mixed with `color` divided by the drawing, which makes the finished picture equal
    to `color`. The share of this second layer falls from 1 at scale 1 to 0 at SMALL_SCALE.
    """
    light = drawing.pixels.astype(np.float32) / np.float32(255)
    exact = np.clip(color / np.maximum(light, BLACKEST), 0, 1)
    share = (SMALL_SCALE - scale) / (SMALL_SCALE - 1) * (drawing.darkness < 1 - BLACKEST)[..., None]
    kept: Floats = (layer + share * (exact - layer)).astype(np.float32)
    return kept


def _inside(square: Pixels, box: Box) -> Floats:
    """Return the part of a square without the margins of the letterbox, in [0, 1]."""
    inside = square[box.top : box.top + box.height, box.left : box.left + box.width]
    return inside.astype(np.float32) / np.float32(255)


def enlarge(small: Floats, width: int, height: int) -> Floats:
    """Resize a picture [h, w] or [h, w, 3] and clip it to [0, 1]."""
    if small.ndim == 3:
        return np.stack([enlarge(plane, width, height) for plane in np.moveaxis(small, 2, 0)], axis=2)
    plane = Image.fromarray(np.ascontiguousarray(small)).resize((width, height), Image.Resampling.BICUBIC)
    enlarged: Floats = np.clip(np.asarray(plane), 0, 1)
    return enlarged


def _trust(darkness: Floats, scale: float) -> Floats:
    """Return the trust in each color, [H, W]: 1 if the network's pixel contains no line, 0 on lines."""
    side = 2 * round(BLUR * (scale - 1)) + 1
    coverage = box_mean(box_mean(darkness, side), side) if side > 1 else darkness
    trust = np.exp(-((coverage / MOSTLY_PAPER) ** 2)) * (1 - darkness) ** 2
    return np.where(trust < 1e-3, 0, trust).astype(np.float32)


def box_mean(plane: Floats, side: int) -> Floats:
    """Return means over squares of an odd side, edges repeated: [H, W].

    scipy has a function for this, but an exported model does not have scipy.
    """
    means = plane.astype(np.float64)
    for _ in range(2):
        padded = np.pad(means, ((side // 2 + 1, side // 2), (0, 0)), mode="edge")
        total = np.cumsum(padded, axis=0)
        means = ((total[side:] - total[:-side]) / side).T
    return means.astype(np.float32)


def _flow(color: Floats, weight: Floats, darkness: Floats, reach: float) -> Floats:
    """Spread colors, by their weight, to all pixels that no line cuts off: [H, W, 3].

    A pixel that no weighted color reaches keeps its color.
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
    """Apply a first-order recursive filter along axis 0, in both directions.

    `keep` [H, W] is the feedback coefficient of a step between a pixel and the one before it.
    """
    planes = np.ascontiguousarray(planes)
    keep = np.ascontiguousarray(keep)[..., None]
    for row in range(1, len(planes)):
        planes[row] += keep[row] * (planes[row - 1] - planes[row])
    for row in range(len(planes) - 2, -1, -1):
        planes[row] += keep[row + 1] * (planes[row + 1] - planes[row])
    return planes
