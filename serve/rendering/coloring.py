"""Coloring by regions: flat colors that artists can edit, from the network's small picture and the drawing's regions.

Every region takes the color of a palette that costs its pixels least, a robust vote: a pixel's cost is its distance to
the color, bounded, and weighted by the trust in the pixel (rendering/upsample.py). A region whose pixels have two clear
colors, such as a shadow or a light, is split in two, along a smooth border. The palette is usually that of the
reference, so colors are exact although the network's are not. benchmarks/rendering.py measures the benefit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from animediffusion.serve.rendering.palette import Color, Palette, dominant_colors, perceptual
from animediffusion.serve.rendering.regions import Regions
from animediffusion.serve.rendering.sketch import Drawing, Floats, Pixels
from animediffusion.serve.rendering.upsample import Flow, box_mean, enlarge, flow_of, reduced

Style = Literal["flat", "shaded", "painted"]
Background = Literal["paper", "reference"]
Labels = NDArray[np.int32]

WORK_PIXELS = 100_000
"""Votes are counted in at most about this many pixels; the network's picture has fewer."""
BOUND = 20.0
"""Largest cost of a pixel: colors farther away than this cost the same."""
SNAP = 8.0
"""A color of the network that is not in the reference costs this much more than one that is."""
COMMON = 0.5
"""A color of a smaller share of the reference costs more: this times the negative logarithm of the share."""
NUM_SPLITS = 3
"""Rounds of splits, so a region has at most 2 ** NUM_SPLITS colors."""
SMALLEST_PART = 1.0
"""Each part of a split region covers at least this many pixels of the network's picture."""
CLEAR = 1.5
"""A split lowers the mean cost of the smaller part's pixels by at least this much."""
DISTRUST = 0.02
"""Weight of pixels next to lines, relative to upsample.py's: they decide only where no other pixel is."""
PAPER_BORDER = 0.25
"""Regions that cover this share of the border of the picture together are outside of the figure."""


@dataclass(frozen=True)
class Region:
    """One region of a coloring."""

    id: int
    name: str
    color: Color
    area: int
    """Number of pixels."""
    box: tuple[int, int, int, int]
    """left, top, right, bottom; right and bottom are outside."""


@dataclass(frozen=True)
class Coloring:
    """A drawing with one color for each region."""

    drawing: Drawing
    labels: Labels
    """[H, W]: ids of the regions, 1 to the number of regions."""
    regions: tuple[Region, ...]
    """Ordered by id."""
    shading: Floats | None
    """[H, W, 3]: low-frequency factor on the flat colors, 1 = none; None for the style `flat`."""

    @property
    def flats(self) -> Pixels:
        """The color of each pixel's region, [H, W, 3]."""
        colors = np.array([(0, 0, 0), *(region.color for region in self.regions)], np.uint8)
        return colors[self.labels]


def color_regions(
    painted: Pixels,
    drawing: Drawing,
    regions: Regions,
    *,
    reference: Pixels,
    palette: Palette | Literal["reference"] | None = "reference",
    background: Background = "paper",
    style: Literal["flat", "shaded"] = "flat",
) -> Coloring:
    """Color the regions of a drawing.

    Args:
        painted: the network's picture [S, S, 3] of the letterboxed sketch.
        drawing: the sketch at its original size.
        regions: the regions of the drawing.
        reference: the reference [h, w, 3].
        palette: colors of the regions. `reference`: the reference's dominant colors where the network's are near them;
            a Palette: only its colors; None: the network's colors.
        background: `paper`: what is outside of the figure keeps the color of the paper; `reference`: the network's.
        style: `shaded` also returns a shading.
    """
    height, width = drawing.darkness.shape
    step = math.ceil(math.sqrt(height * width / WORK_PIXELS))
    flow = flow_of(painted, drawing if step == 1 else reduced(drawing, step))
    weight = flow.trust + np.float32(DISTRUST) * flow.little + np.float32(1e-6)
    pixels = flow.color + flow.trust[..., None] * (flow.clear - flow.color)
    colors, penalty = _candidates(pixels, reference, palette)
    cost = _costs(pixels, colors, penalty)
    labels = regions.labels.copy()
    for _ in range(NUM_SPLITS):
        small = _sampled(labels, step)
        labels = _split(labels, small, cost, weight, flow.scale)
    small = _sampled(labels, step)
    chosen = _votes(small, cost * weight[..., None]).argmin(axis=1)
    found = colors[chosen]
    if palette is None:
        found = _means(small, flow.color, weight, found)
    if background == "paper":
        found[_outside(regions.labels, labels)] = 255
    shading = _shading(flow, found[small], labels.shape) if style == "shaded" else None
    return Coloring(drawing, *_listed(labels, found), shading)


def _candidates(pixels: Floats, reference: Pixels, palette: Palette | str | None) -> tuple[Pixels, Floats]:
    """Return the colors [K, 3] that a region may have, and what each costs more than its distance, [K]."""
    if isinstance(palette, Palette):
        return np.array(palette.colors, np.uint8), np.zeros(len(palette.colors), np.float32)
    own = dominant_colors(np.rint(255 * pixels).astype(np.uint8)).colors
    if palette is None:
        return own.astype(np.uint8), np.zeros(len(own), np.float32)
    given = dominant_colors(reference)
    penalty = -np.float32(COMMON) * np.log(given.share)
    far = _distances(perceptual(own), given.colors).min(axis=1) > SNAP
    colors = np.concatenate([given.colors, own[far]]).astype(np.uint8)
    return colors, np.concatenate([penalty, np.repeat(np.float32(SNAP), far.sum())])


def _costs(pixels: Floats, colors: Pixels, penalty: Floats) -> Floats:
    """Return the cost of each color for each pixel, [H, W, K]."""
    cost: Floats = np.minimum(_distances(perceptual(255 * pixels), colors), np.float32(BOUND)) + penalty
    return cost


def _distances(places: Floats, colors: NDArray[Any]) -> Floats:
    """Return the distances of places [..., 3] in the space of `perceptual` to colors [K, 3], [..., K]."""
    entries = perceptual(colors)
    squared = (places**2).sum(axis=-1)[..., None] + (entries**2).sum(axis=1) - 2 * places @ entries.T
    distances: Floats = np.sqrt(np.maximum(squared, 0))
    return distances


def _sampled(labels: Labels, step: int) -> Labels:
    """Return every step-th label in both directions; a label that this would lose replaces that of its pixel."""
    small = labels[::step, ::step].copy()
    if step > 1:
        every, first = np.unique(labels, return_index=True)
        lost = first[~np.isin(every, small)]
        small[lost // labels.shape[1] // step, lost % labels.shape[1] // step] = labels.ravel()[lost]
    return small


def _votes(labels: Labels, values: Floats) -> Floats:
    """Return the sums of values [H, W, K] over each label, [1 + largest label, K]."""
    count = int(labels.max()) + 1
    planes = values.reshape(-1, values.shape[-1]).T
    return np.stack([np.bincount(labels.ravel(), plane, minlength=count) for plane in planes], axis=1)


def _split(labels: Labels, small: Labels, cost: Floats, weight: Floats, scale: float) -> Labels:
    """Split each region whose pixels have two clear colors; return new labels [H, W].

    The second color of a region is the one that saves the most where it is cheaper than the first.
    """
    first = _votes(small, cost * weight[..., None]).argmin(axis=1)[small][..., None]
    paid = np.take_along_axis(cost, first, axis=2)
    second = _votes(small, np.maximum(paid - cost, 0) * weight[..., None]).argmax(axis=1)[small][..., None]
    saved = box_mean((paid - np.take_along_axis(cost, second, axis=2))[..., 0], 2 * round(scale / 2) + 1)
    part = saved > 0
    planes = (part, np.ones_like(part), part * weight, part * weight * saved)
    area, whole, trusted, gain = _votes(small, np.stack(planes, axis=2)).T
    enough = SMALLEST_PART * scale**2
    clear = (area > enough) & (whole - area > enough) & (gain > CLEAR * trusted)
    if not clear.any():
        return labels
    number = np.where(clear, int(labels.max()) + np.cumsum(clear), 0).astype(np.int32)
    number, clear = (np.pad(one, (0, max(0, int(labels.max()) + 1 - len(one)))) for one in (number, clear))
    field = Image.fromarray(saved).resize(labels.shape[::-1], Image.Resampling.BILINEAR)
    return np.where(clear[labels] & (np.asarray(field) > 0), number[labels], labels)


def _means(labels: Labels, color: Floats, weight: Floats, chosen: Pixels) -> Pixels:
    """Return the mean color of each label's pixels that are near its chosen color, [1 + largest label, 3]."""
    near = np.linalg.norm(perceptual(255 * color) - perceptual(chosen)[labels], axis=2) < BOUND / 2
    sums = _votes(labels, np.concatenate([color, np.ones_like(color[..., :1])], axis=2) * (weight * near)[..., None])
    means = np.rint(255 * sums[:, :3] / np.maximum(sums[:, 3:], 1e-9)).astype(np.uint8)
    return np.where(sums[:, 3:] > 0, means, chosen)


def _outside(before: Labels, labels: Labels) -> NDArray[np.intp]:
    """Return the ids in `labels` of the regions outside of the figure; `before` are the labels before splits."""
    border = np.concatenate([before[0], before[-1], before[1:-1, 0], before[1:-1, -1]])
    share = np.bincount(border, minlength=int(before.max()) + 1) / len(border)
    return np.unique(labels[(share > PAPER_BORDER)[before]])


def _shading(flow: Flow, flats: Pixels, shape: tuple[int, int]) -> Floats:
    """Return the low frequencies of the network's colors divided by the flat colors, [H, W, 3]."""
    ratio: Floats = np.clip((flow.color + 0.05) / (flats.astype(np.float32) / 255 + 0.05), 0.5, 2).astype(np.float32)
    side = 2 * round(flow.scale) + 1
    smooth = np.stack([box_mean(plane, side) for plane in np.moveaxis(ratio, 2, 0)], axis=2)
    shading: Floats = 2 * enlarge(np.float32(0.5) * smooth.astype(np.float32), shape[1], shape[0])
    return shading


def _listed(labels: Labels, colors: Pixels) -> tuple[Labels, tuple[Region, ...]]:
    """Number the regions 1..N without gaps; return the labels and the regions."""
    ids, inverse = np.unique(labels, return_inverse=True)
    dense: Labels = (inverse.reshape(labels.shape) + 1).astype(np.int32)
    area = np.bincount(dense.ravel())[1:]
    boxes = _boxes(dense, len(ids))
    return dense, tuple(
        Region(number + 1, f"region {number + 1}", _color(colors[ids[number]]), int(area[number]), boxes[number])
        for number in range(len(ids))
    )


def _boxes(labels: Labels, count: int) -> list[tuple[int, int, int, int]]:
    """Return left, top, right, bottom of the labels 1..count."""
    low, high = np.full((2, count + 1), 1 << 30), np.zeros((2, count + 1), np.int64)
    rows, columns = np.ogrid[: labels.shape[0], : labels.shape[1]]
    for axis, places in enumerate((rows, columns)):
        every = np.broadcast_to(places, labels.shape).ravel()
        np.minimum.at(low[axis], labels.ravel(), every)
        np.maximum.at(high[axis], labels.ravel(), every + 1)
    return [(int(low[1, i]), int(low[0, i]), int(high[1, i]), int(high[0, i])) for i in range(1, count + 1)]


def _color(rgb: Pixels) -> Color:
    return int(rgb[0]), int(rgb[1]), int(rgb[2])
