"""Coloring by regions: flat colors that artists can edit, from the network's small picture and the drawing's regions.

Every region takes the color of a palette that costs its pixels least, a robust vote: a pixel's cost is its distance to
the color, bounded, and weighted by the trust in the pixel (rendering/upsample.py). A region whose pixels have two clear
colors, such as a shadow or a light, is split in two, along a smooth border. The palette is usually that of the
reference, so colors are exact although the network's are not. benchmarks/rendering.py measures the benefit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from animediffusion.serve.rendering.morphology import components, distances, pooled
from animediffusion.serve.rendering.palette import Color, Palette, dominant_colors, perceptual
from animediffusion.serve.rendering.regions import Regions
from animediffusion.serve.rendering.sketch import Drawing, Floats, Pixels
from animediffusion.serve.rendering.upsample import LITTLE_TRUST, REACH_PX, Flow, box_mean, enlarge, flow_of, reduced

Style = Literal["flat", "shaded", "painted"]
Background = Literal["paper", "white", "reference"]
Labels = NDArray[np.int32]

WORK_PIXELS = 100_000
"""Votes are counted in at most about this many pixels; the network's picture has fewer."""
LONELY = 4.0
"""A pixel between lines keeps its own color if fewer than 1 / LONELY of the pixels around it are trusted."""
DARK = 0.02
"""Added to colors in [0, 1] by which shading is divided."""
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
CLEAR = 0.9
"""A split lowers the mean cost of the smaller part's pixels by at least this much."""
UNSURE = 2.0
"""Where the costs of two colors differ by less, the network does not tell which is right..."""
SEAM = 0.7
"""... and a region is split only if such pixels, between the parts, are fewer than this share of the smaller part."""
FAIR = 0.1
"""The pixels of a part are trusted at least this much, relative to the whole region: they are not a seam at a line."""
DISTRUST = 0.02
"""Weight of pixels next to lines, relative to upsample.py's: they decide only where no other pixel is."""
RAMP = 0.7
"""A region is a gradient, and not split, if its distances to a linear gradient are at most this share of those to one
color, and smaller than those to two colors."""
EXACT = (0.8, 0.95)
"""Flatness of a reference's color: from the first value on, the color gets less shading, from the second on, none."""
EXACT_NETWORK = (3.0, 5.0)
"""Median distance of the network's colors to those chosen: up to the first value, the network is exact, and what it
shades in a region is shading. At the second value, most of it is error..."""
LEAST_SHADING = 0.2
"""... and only this share of it is kept."""
ISLAND = 0.5
"""A part has no islands smaller than this share of SMALLEST_PART."""
INK = 0.3
"""Pixels darker than this are lines, whose color is not seen."""
PAPER_BORDER = 0.5
"""A region that covers this share of the border of the picture is the sheet around a figure. On six sketches of figures
the sheet has 0.57 to 1.0 of the border, and in crops of faces no region has more than 0.38."""
HALF_SIDE = (0.8, 0.5)
"""A figure that reaches the upper and the lower side divides the sheet in halves. A half has an upper corner and at
least the first share of the left or right side; where part of the sheet is known, the second share is enough..."""
HALF_BORDER = 0.35
"""... and so is this share of the border without an upper corner."""
EMPTY = 0.6
"""At least this share of a half of the sheet is far from lines: hair at the side of a portrait has many lines."""
FAR = 0.02
"""Distance from lines, as a share of the drawing's side, from which a pixel is far."""
FAINT = 0.2
"""Pixels at least this dark are lines, from which that distance is measured."""
LOOSE = 0.002
"""What is surrounded by the sheet and has at most this share of the area is paper: letters, for example."""


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
    references: Sequence[Pixels],
    palette: Palette | Literal["reference"] | None = "reference",
    background: Background = "paper",
    style: Literal["flat", "shaded"] = "flat",
    learned: Sequence[Color] = (),
) -> Coloring:
    """Color the regions of a drawing.

    Args:
        painted: the network's picture [S, S, 3] of the letterboxed sketch.
        drawing: the sketch at its original size.
        regions: the regions of the drawing.
        references: the references, each [h, w, 3].
        palette: colors of the regions. `reference`: the references' dominant colors where the network's are near them;
            a Palette: only its colors; None: the network's colors.
        background: what is outside of the figure: `paper` and `white` leave it paper, `reference` colors it.
        style: `shaded` also returns a shading.
        learned: colors of learned hints, which are added to those of the references.
    """
    height, width = drawing.darkness.shape
    step = math.ceil(math.sqrt(height * width / WORK_PIXELS))
    flow = flow_of(painted, drawing if step == 1 else reduced(drawing, step))
    evidence = _evidence(flow)
    choice = _choice(evidence.pixels, references, palette, learned)
    cost = _distances(evidence.places, choice.colors, BOUND) + choice.penalty
    weighted = cost * evidence.weight[..., None]
    visible = drawing.darkness[::step, ::step] < INK
    labels = regions.labels
    groups = _Groups(labels[::step, ::step], int(labels.max()) + 1)
    for _ in range(NUM_SPLITS):
        field, parts = _parts(groups, evidence, cost, weighted, visible, choice.softness)
        if not parts.any():
            break
        labels = _divided(labels, field, parts)
        groups = _Groups(labels[::step, ::step], int(labels.max()) + 1)
    chosen = groups.sums(weighted).argmin(axis=1)
    unseen, places = _unseen(labels, groups.count, step)
    chosen[unseen] = cost[places].argmin(axis=1)
    colors = choice.colors[chosen]
    if palette is None:
        colors = _means(groups, evidence, colors)
    softness = choice.softness[chosen]
    flats = colors.copy()
    if background != "reference":
        outside = _outside(regions.labels, labels, drawing.darkness, step)
        flats[outside], softness[outside] = 255, 0
    shading = None
    if style == "shaded":
        small = groups.labels
        # Paper is not what the network painted outside of the figure, so its colors are compared with the chosen ones.
        small_shading = _shading(evidence, colors[small], softness[small])
        shading = 2 * enlarge(np.float32(0.5) * small_shading, width, height)
    return Coloring(drawing, *_listed(labels, flats), shading)


class _Choice(NamedTuple):
    """The colors that a region may have."""

    colors: Pixels
    """[K, 3]"""
    penalty: Floats
    """[K]: cost in addition to the distance."""
    softness: Floats
    """[K]: share of the network's shading that is kept: 0 for a color that is flat in the reference."""


def _choice(
    pixels: Floats, references: Sequence[Pixels], palette: Palette | str | None, learned: Sequence[Color]
) -> _Choice:
    """Return the colors that a region may have."""
    if isinstance(palette, Palette):
        count = len(palette.colors)
        return _Choice(np.array(palette.colors, np.uint8), np.zeros(count, np.float32), np.ones(count, np.float32))
    own = dominant_colors(np.rint(255 * pixels).astype(np.uint8)).colors
    if palette is None:
        return _Choice(own.astype(np.uint8), np.zeros(len(own), np.float32), np.ones(len(own), np.float32))
    given, exact = dominant_colors(*references), np.array(learned, np.uint8).reshape(-1, 3)
    far = own[_distances(perceptual(own), given.colors, BOUND).min(axis=1) > SNAP]
    return _Choice(
        np.concatenate([exact, given.colors, far]).astype(np.uint8),
        np.concatenate(
            [np.zeros(len(exact)), -np.float32(COMMON) * np.log(given.share), np.full(len(far), SNAP)]
        ).astype(np.float32),
        np.concatenate([np.ones(len(exact)), np.interp(given.flatness, EXACT, (1, 0)), np.ones(len(far))]).astype(
            np.float32
        ),
    )


class _Evidence(NamedTuple):
    """The pixels that vote."""

    pixels: Floats
    """[H, W, 3]: their colors in [0, 1]."""
    places: Floats
    """[H, W, 3]: these colors in the space of `perceptual`."""
    weight: Floats
    """[H, W]: their weights."""
    scale: float
    """Pixels for a pixel of the network's picture, in one direction."""


class _Groups:
    """The pixels of each of the labels 0 to count - 1."""

    def __init__(self, labels: Labels, count: int) -> None:
        self.labels, self.count = labels, count
        # Numpy sorts 16-bit numbers ten times as fast.
        keys = labels.astype(np.uint16) if count <= np.iinfo(np.uint16).max else labels
        self._order = np.argsort(keys, axis=None, kind="stable")
        self._ends = np.searchsorted(labels.ravel()[self._order], np.arange(count + 1))

    def sums(self, values: Floats) -> NDArray[np.float64]:
        """Return the sums of values [H, W, K] over the pixels of each label, [count, K]."""
        ordered = values.reshape(-1, values.shape[-1])[self._order]  # np.bincount of planes takes five times as long.
        return np.stack([ordered[start:end].sum(axis=0) for start, end in pairwise(self._ends.tolist())]).astype(
            np.float64
        )


def _evidence(flow: Flow) -> _Evidence:
    """Return the colors that vote and their weights.

    Colors that flow are smooth, so a pixel keeps its own color where it is trusted, and also where no pixel around it
    is trusted, as in eyes.
    """
    around = box_mean(flow.trust, 2 * round(REACH_PX * flow.scale) + 1)
    own = np.maximum(flow.trust, flow.little / LITTLE_TRUST * (1 - np.minimum(LONELY * around, 1)))[..., None]
    pixels: Floats = flow.color + own * (flow.clear - flow.color)
    weight = flow.trust + np.float32(DISTRUST) * flow.little + np.float32(1e-6)
    return _Evidence(pixels, perceptual(255 * pixels), weight, flow.scale)


def _distances(places: Floats, colors: NDArray[Any], bound: float) -> Floats:
    """Return the distances, at most `bound`, of places [..., 3] in the space of `perceptual` to colors [K, 3]."""
    entries = perceptual(colors)
    distances: Floats = (places**2).sum(axis=-1)[..., None] + (entries**2).sum(axis=1)
    distances -= 2 * places @ entries.T
    np.maximum(distances, 0, out=distances)
    np.sqrt(distances, out=distances)
    return np.minimum(distances, np.float32(bound), out=distances)


def _unseen(labels: Labels, count: int, step: int) -> tuple[NDArray[np.intp], tuple[NDArray[np.intp], ...]]:
    """Return the labels that no step-th pixel has, and the row and column of a pixel of each, divided by step."""
    unseen = np.bincount(labels.ravel(), minlength=count) > 0
    unseen &= np.bincount(labels[::step, ::step].ravel(), minlength=count) == 0
    pixels = np.flatnonzero(unseen[labels])
    ids, first = np.unique(labels.ravel()[pixels], return_index=True)
    rows, columns = np.unravel_index(pixels[first], labels.shape)
    return ids.astype(np.intp), (rows // step, columns // step)


def _ramp_cost(groups: _Groups, evidence: _Evidence) -> NDArray[np.float64]:
    """Fit a linear gradient to each label's pixels; return their summed distances to it, [count]."""
    height, width = groups.labels.shape
    rows, columns = np.mgrid[:height, :width].astype(np.float32) / max(height, width)
    basis = np.stack([np.ones_like(rows), columns, rows], axis=2)
    products = (basis[..., None] * np.concatenate([basis, evidence.pixels], axis=2)[:, :, None]).reshape(
        height, width, 18
    )
    sums = groups.sums(products * evidence.weight[..., None]).reshape(-1, 3, 6)
    ridge = 1e-4 * np.eye(3) * (sums[:, :1, :1] + 1e-6)
    planes = np.linalg.solve(sums[..., :3] + ridge, sums[..., 3:]).astype(np.float32)
    ramp = np.clip(np.einsum("hwi,hwic->hwc", basis, planes[groups.labels]), 0, 1)
    distance = np.minimum(np.linalg.norm(perceptual(255 * ramp) - evidence.places, axis=2), BOUND)
    return groups.sums((evidence.weight * distance)[..., None])[:, 0]


def _parts(
    groups: _Groups,
    evidence: _Evidence,
    cost: Floats,
    weighted: Floats,
    visible: NDArray[np.bool_],
    softness: Floats,
) -> tuple[Floats, NDArray[np.bool_]]:
    """Find the regions whose pixels have two clear colors.

    The second color of a region is the one that saves the most where it is cheaper than the first.

    Args:
        groups: the regions.
        evidence: the pixels that vote.
        cost: [H, W, K]: cost of each color.
        weighted: the same times the weight of the pixel.
        visible: [H, W]: pixels off the lines.
        softness: [K]: as in _Choice.

    Returns:
        A smooth field [H, W], above 0 where a pixel has its region's second color; which labels to split.
    """
    small, weight = groups.labels, evidence.weight
    first = groups.sums(weighted).argmin(axis=1)
    one = np.take_along_axis(cost, first[small][..., None], axis=2)
    saved = one - cost
    np.maximum(saved, 0, out=saved)
    saved *= weight[..., None]
    second = groups.sums(saved).argmax(axis=1)
    other = np.take_along_axis(cost, second[small][..., None], axis=2)[..., 0]
    one = one[..., 0]
    field = box_mean(one - other, 2 * round(evidence.scale / 2) + 1)
    part = field > 0
    split = np.where(part, other, one)
    unsure = weight * (np.abs(field) < UNSURE)
    planes = (
        visible, part & visible, weight, part * weight, part * weight * field, weight * one, weight * split, unsure
    )  # fmt: skip
    area, part_area, trust, part_trust, gain, single, double, unsure_trust = groups.sums(np.stack(planes, axis=2)).T
    enough = SMALLEST_PART * evidence.scale**2
    parts = (part_area > enough) & (area - part_area > enough) & (gain > CLEAR * part_trust)
    parts &= part_trust * area > FAIR * trust * part_area
    parts &= unsure_trust < SEAM * np.minimum(part_trust, trust - part_trust)
    if parts.any():
        parts &= ~((_ramp_cost(groups, evidence) < np.minimum(RAMP * single, double)) & (softness[first] > 0.5))
    field = np.where(parts[small], field, -1).astype(np.float32)
    islands, number = components(field > 0)
    size = np.bincount(islands.ravel(), visible.ravel(), minlength=number + 1)
    return np.where((size < ISLAND * enough)[islands], -np.abs(field), field), parts


def _divided(labels: Labels, field: Floats, parts: NDArray[np.bool_]) -> Labels:
    """Return labels [H, W] where a part of each label to split has a new label."""
    if not parts.any():
        return labels
    number = np.where(parts, labels.max() + np.cumsum(parts), np.arange(len(parts))).astype(np.int32)
    inside = Image.fromarray(field).resize(labels.shape[::-1], Image.Resampling.BILINEAR)
    return np.where(np.asarray(inside) > 0, number[labels], labels)


def _means(groups: _Groups, evidence: _Evidence, chosen: Pixels) -> Pixels:
    """Return the mean color of each label's pixels that are near its chosen color, [count, 3]."""
    near = np.linalg.norm(evidence.places - perceptual(chosen)[groups.labels], axis=2) < BOUND / 2
    color = evidence.pixels
    counted = np.concatenate([color, np.ones_like(color[..., :1])], axis=2) * (evidence.weight * near)[..., None]
    sums = groups.sums(counted)
    means = np.rint(255 * sums[:, :3] / np.maximum(sums[:, 3:], 1e-9)).astype(np.uint8)
    return np.where(sums[:, 3:] > 0, means, chosen)


def _outside(regions: Labels, labels: Labels, darkness: Floats, step: int) -> NDArray[np.intp]:
    """Return the ids in `labels` of the sheet around the figure; `regions` are the labels before splits."""
    small = regions[::step, ::step]
    sheet = _sheet(regions, small, pooled(darkness, step, np.max))
    if not sheet.any():
        return np.empty(0, np.intp)
    found, count = components(~sheet[small])
    size = np.bincount(found.ravel(), minlength=count + 1)
    loose = (size <= LOOSE * found.size) & (np.arange(count + 1) > 0)
    sheet[np.setdiff1d(small[loose[found]], small[~loose[found]])] = True
    return np.unique(labels[sheet[regions]])


def _sheet(regions: Labels, small: Labels, darkness: Floats) -> NDArray[np.bool_]:
    """Return which labels are the sheet or, if the figure divides it, a part of it.

    Args:
        regions: labels of the regions, [H, W].
        small: the same, at a reduced size.
        darkness: darkness at that size.
    """
    count = int(regions.max()) + 1
    sides = [regions[0], regions[-1], regions[:, 0], regions[:, -1]]
    lengths = np.stack([np.bincount(side, minlength=count) for side in sides])
    border = lengths.sum(axis=0) / lengths.sum()
    side = (lengths[2:] / len(regions)).max(axis=0)
    sheet: NDArray[np.bool_] = border > PAPER_BORDER
    corner = np.zeros(count, bool)
    corner[regions[0, [0, -1]]] = True
    candidates = (corner & (side >= min(HALF_SIDE))) | (border >= HALF_BORDER)
    if not (candidates & ~sheet).any():
        return sheet
    far = FAR * math.sqrt(darkness.size)
    is_far = distances(darkness >= FAINT, math.ceil(far)) >= far
    candidates &= np.bincount(small[is_far], minlength=count) >= EMPTY * np.bincount(small.ravel(), minlength=count)
    sheet |= candidates & corner & (side >= max(HALF_SIDE))
    return sheet | candidates if sheet.any() else sheet


def _shading(evidence: _Evidence, flats: Pixels, softness: Floats) -> Floats:
    """Return the low frequencies of the colors that voted, relative to the flat colors [H, W, 3]; 1 is no shading.

    The farther the median of these colors is from the flat ones, the less shading is kept.
    """
    flat = flats.astype(np.float32) / np.float32(255)
    side = 2 * round(evidence.scale) + 1
    seen = evidence.weight > evidence.weight.max() / 2
    away = np.linalg.norm(evidence.places - perceptual(flats), axis=2)
    error = float(np.median(away[seen]))
    alike = away < BOUND
    weight = evidence.weight * alike * (softness > 0)  # What differs much is another color, not shading.
    known = np.maximum(box_mean(weight, side), 1e-9)
    strength = np.float32(np.interp(error, EXACT_NETWORK, (1, LEAST_SHADING)))
    change = np.stack(
        [box_mean(weight * plane, side) / known for plane in np.moveaxis(evidence.pixels - flat, 2, 0)], axis=2
    )
    shading: Floats = np.clip(1 + (strength * softness)[..., None] * change / (flat + DARK), 0, 2).astype(np.float32)
    return shading


def _listed(labels: Labels, colors: Pixels) -> tuple[Labels, tuple[Region, ...]]:
    """Number the regions 1..N without gaps; return the labels and the regions."""
    area = np.bincount(labels.ravel(), minlength=len(colors))
    ids = np.flatnonzero(area)
    number = np.zeros(len(colors), np.int32)
    number[ids] = np.arange(1, len(ids) + 1)
    boxes = _boxes(labels, len(colors))
    return number[labels], tuple(
        Region(index, f"region {index}", _color(colors[one]), int(area[one]), _box(boxes[one]))
        for index, one in enumerate(ids.tolist(), 1)
    )


def _boxes(labels: Labels, count: int) -> NDArray[np.intp]:
    """Return left, top, right, bottom of the labels 0 to count - 1, [count, 4]."""
    height, width = labels.shape
    change = np.ones((height, width + 1), np.bool_)  # Only the ends of the runs of a row matter.
    change[:, 1:-1] = labels[:, 1:] != labels[:, :-1]
    rows, lefts = np.nonzero(change[:, :-1])
    rights = np.nonzero(change[:, 1:])[1] + 1
    found = labels[rows, lefts]
    boxes = np.tile(np.array([width, height, 0, 0], np.intp), (count, 1))
    np.minimum.at(boxes[:, 0], found, lefts)
    np.minimum.at(boxes[:, 1], found, rows)
    np.maximum.at(boxes[:, 2], found, rights)
    np.maximum.at(boxes[:, 3], found, rows + 1)
    return boxes


def _box(numbers: NDArray[np.intp]) -> tuple[int, int, int, int]:
    left, top, right, bottom = numbers.tolist()
    return left, top, right, bottom


def _color(rgb: Pixels) -> Color:
    return int(rgb[0]), int(rgb[1]), int(rgb[2])
