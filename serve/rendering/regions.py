"""Division of a drawing into the regions that its lines enclose, closed over gaps in the lines.

Trapped balls are the classical method: a region is what a ball can reach without crossing a line, the largest ball
first, so a gap narrower than the ball is closed. Here one distance transform replaces the balls. The distance to the
nearest line is a landscape whose hills are the wide places and whose saddles are the necks between them. Every pixel
belongs to the hill that it climbs to; hills are then merged where the neck between them is not much narrower than the
smaller hill, because such a neck is no gap in a line but a narrow place of one region.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from animediffusion.serve.rendering.sketch import Drawing, Floats

Labels = NDArray[np.int32]
Mask = NDArray[np.bool_]
Indices = NDArray[np.intp]

WORK_PIXELS = 4_000_000
"""Regions of a larger drawing are found at 1/2, 1/3, ... of its size and continued to the lines at full size."""
INK = 0.35
"""A pixel at least this dark is part of a line..."""
FAINT = 0.06
"""... and so is one that is darker by this value than the lightest pixels around it,"""
EDGE = 0.4
"""and by this share of the same difference of the pixels next to it: the soft edge of a line is paper."""
THICK_LINE = 0.01
"""Half the width of the thickest faint line, as a share of the drawing's side..."""
MIN_LINE_PX = 3
"""... but at least this many pixels."""
BLOCK_PX = 16
"""Side of the blocks in which the grain of the paper is measured."""
PLAIN_BLOCKS = 0.2
"""At least this share of the blocks is assumed to be paper without lines."""
GRAIN = 3.5
"""Grain rarely exceeds its mean by more than this many standard deviations."""
SPECK_PX = 6
"""Dots of at most this many pixels are not lines."""
GAP = 0.016
"""Half the width of the widest gap that is closed, as a share of the drawing's side (the root of its area)..."""
MIN_GAP_PX = 3.0
"""... but at least this many pixels."""
REACH = 2.0
"""Distances to lines are limited to this multiple of that half width."""
NECK = 0.5
"""Two hills are one region if the neck between them is at least this share of the lower hill's width."""
OPEN = 0.4
"""Two hills are one region if at least this share of their common border is open."""
SPREAD_LEVELS = (0.1, 0.2, 0.35, 0.5, 0.7, 0.85)
"""Under the lines, regions grow over pixels that are lighter than each of these values in turn, then over all."""
BANKS = 2.0
"""The border of two hills runs under the lines on both sides of the neck; this multiple of the lines' thickness is not
counted."""
SLIVER = 0.002
"""Half the width up to which a region is a sliver, as a share of the drawing's side..."""
MIN_SLIVER_PX = 2.0
"""... but at least this many pixels."""
SLIVER_AREA = 1e-4
"""Share of the drawing's area below which a region with an open border is a sliver."""
OPENNESS = 4.0
"""A sliver belongs to the neighbor with the longest border, in which open pixels count this much more."""

_NEIGHBORS = (
    ((slice(None), slice(None, -1)), (slice(None), slice(1, None))),
    ((slice(None, -1), slice(None)), (slice(1, None), slice(None))),
)
"""Index pairs of a picture [H, W]: pixels and their right neighbors, pixels and their lower neighbors."""


class Regions(NamedTuple):
    """A division of a drawing into regions."""

    labels: Labels
    """[H, W]: 1..count; every pixel, those under lines included, belongs to one region."""
    count: int  # type: ignore[assignment]  # tuples have a method of this name, which nobody needs here


def find_regions(drawing: Drawing) -> Regions:
    """Return the regions of a drawing; the result depends only on the darkness of its lines."""
    darkness = drawing.darkness
    step = math.ceil(math.sqrt(darkness.size / WORK_PIXELS))
    small = _reduced(darkness, step) if step > 1 else darkness
    lines = _without_specks(find_lines(small))
    if lines.all():
        return Regions(np.ones(darkness.shape, np.int32), 1)
    labels, count = _merged(lines, small)
    return Regions(_enlarged(labels, count, darkness, step) if step > 1 else labels, count)


def _reduced(darkness: Floats, step: int) -> Floats:
    """Return the mean darkness of squares of side `step`."""
    height, width = (-(-side // step) for side in darkness.shape)
    margins = ((0, height * step - darkness.shape[0]), (0, width * step - darkness.shape[1]))
    reduced: Floats = np.pad(darkness, margins, mode="edge").reshape(height, step, width, step).mean(axis=(1, 3))
    return reduced


def find_lines(darkness: Floats) -> Mask:
    """Return the pixels of lines, faint lines included, but not the grain of paper or the dark side of soft shadows."""
    relief = _relief(darkness)
    if (faint := _grain(relief)) > FAINT:
        darkness = _smoothed(darkness)
        relief = _relief(darkness)
        faint = _grain(relief)
    edge = np.maximum(_greatest(relief, 2) * np.float32(EDGE), np.float32(max(faint, FAINT)))
    found: Mask = (relief >= edge) | (darkness >= INK)
    return found


def _relief(darkness: Floats) -> Floats:
    """Return how much darker each pixel is than the lightest ground of the size of a thick line around it, [H, W]."""
    radius = max(MIN_LINE_PX, round(THICK_LINE * math.sqrt(darkness.size)))
    relief: Floats = darkness - _greatest(-_greatest(-darkness, radius), radius)
    return relief


def _grain(relief: Floats) -> float:
    """Return the darkness that the grain of the paper rarely exceeds, measured where contrast is least."""
    rows, columns = (side // BLOCK_PX for side in relief.shape)
    if not rows * columns:
        return 0.0
    blocks = relief[: rows * BLOCK_PX, : columns * BLOCK_PX].reshape(rows, BLOCK_PX, columns, BLOCK_PX)
    mean, deviation = blocks.mean(axis=(1, 3)).ravel(), blocks.std(axis=(1, 3)).ravel()
    return float(np.quantile(mean + GRAIN * deviation, PLAIN_BLOCKS))


def _smoothed(values: Floats) -> Floats:
    """Return the values weighted 1 2 1 in both directions, [H, W]; edges are repeated."""
    padded = np.pad(values, 1, mode="edge")
    rows = (padded[:-2] + np.float32(2) * padded[1:-1] + padded[2:]) / np.float32(4)
    smoothed: Floats = (rows[:, :-2] + np.float32(2) * rows[:, 1:-1] + rows[:, 2:]) / np.float32(4)
    return smoothed


def _greatest(values: Floats, radius: int) -> Floats:
    """Return the greatest value in a square of side 2 radius + 1 around each pixel."""
    for axis in (0, 1):
        padded = np.pad(values, [(radius, radius) if axis == one else (0, 0) for one in (0, 1)], mode="edge")
        padded, width = np.moveaxis(padded, axis, 0), 1
        while width < 2 * radius + 1:  # the maximum of `width` pixels, doubled as often as possible
            step = min(width, 2 * radius + 1 - width)
            padded, width = np.maximum(padded[:-step], padded[step:]), width + step
        values = np.moveaxis(padded, 0, axis)
    return values


def _without_specks(lines: Mask) -> Mask:
    """Return lines without dots of at most SPECK_PX pixels."""
    labels, count = components(lines, diagonal=True)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    sizes[0] = 0
    return (sizes > SPECK_PX)[labels]


def _enlarged(small: Labels, count: int, darkness: Floats, step: int) -> Labels:
    """Return labels at `step` times their size; their borders move to the lines of the full-size drawing."""
    height, width = darkness.shape
    inside = np.ones(small.shape, bool)
    for one, other in _NEIGHBORS:
        same = small[one] == small[other]
        inside[one] &= same
        inside[other] &= same
    for one, other in _NEIGHBORS:  # The border may lie one pixel beside the line.
        inner = inside[one] & inside[other]
        inside[one] &= inner
        inside[other] &= inner
    lost = np.bincount(small[inside], minlength=count + 1) == 0  # these regions have no pixel off their border
    known = np.where(inside | lost[small], small, 0)
    return spread(known.repeat(step, axis=0).repeat(step, axis=1)[:height, :width], darkness)


def spread(labels: Labels, darkness: Floats) -> Labels:
    """Give pixels with label 0 the label of the nearest labeled pixel, light pixels first. [H, W].

    So labels meet on the darkest pixels of a line, and do not cross it where it is dark.
    """
    rows, columns = labels.shape
    stride = columns + 2
    padded = np.full((rows + 2, stride), -1, np.int32)
    padded[1:-1, 1:-1] = labels
    flat = padded.ravel()
    waiting = np.flatnonzero(flat == 0)
    level = darkness.ravel()[waiting - stride - 1 - 2 * (waiting // stride - 1)]
    for limit in (*SPREAD_LEVELS, np.inf):
        allowed = level < limit
        rest = _spread_over(flat, waiting[allowed], stride)
        waiting, level = (
            np.concatenate([waiting[~allowed], rest]),
            np.concatenate([level[~allowed], np.zeros(len(rest))]),
        )
    return np.ascontiguousarray(padded[1:-1, 1:-1])


def _spread_over(flat: Labels, waiting: Indices, stride: int) -> Indices:
    """Spread labels over the waiting pixels of a padded picture, in place; return the pixels that none reached."""
    straight = (-stride, -1, 1, stride)
    round_about = (*straight, -stride - 1, -stride + 1, stride - 1, stride + 1)
    misses = 0
    for turn in itertools.count():  # Alternating 4 and 8 neighbors makes circles octagons.
        labels = np.zeros(len(waiting), np.int32)
        for offset in round_about if turn % 2 else straight:
            beside = flat[waiting + offset]
            labels = np.where((labels <= 0) & (beside > 0), beside, labels)
        reached = labels > 0
        flat[waiting[reached]] = labels[reached]
        waiting = waiting[~reached]
        misses = 0 if reached.any() else misses + 1
        if misses == 2 or not len(waiting):
            break
    return waiting


def _merged(lines: Mask, darkness: Floats) -> tuple[Labels, int]:
    """Return the region 1..count of each pixel, [H, W], and the count."""
    gap = max(MIN_GAP_PX, GAP * math.sqrt(lines.size))
    height = distances(lines, REACH * gap)
    hills, count = _hills(height)
    hills = spread(hills, darkness) - 1
    graph = _Graph(hills, height, count, BANKS * _thickness(lines))
    graph.merge_wide_necks(gap)
    graph.merge_open_borders()
    graph.merge_slivers(max(MIN_SLIVER_PX, SLIVER * math.sqrt(lines.size)), SLIVER_AREA * lines.size)
    roots = np.array([graph.root(hill) for hill in range(count)])
    numbers = np.unique(roots, return_inverse=True)[1]
    return (numbers + 1).astype(np.int32)[hills], int(numbers.max()) + 1


def _thickness(lines: Mask) -> float:
    """Return the usual thickness of the lines: the median length of their runs in rows and columns."""
    lengths = []
    for one in (lines, lines.T):
        ends = np.flatnonzero(np.diff(np.pad(one, ((0, 0), (1, 1))).astype(np.int8).ravel()))
        lengths.append(ends[1::2] - ends[::2])
    return float(np.median(np.concatenate(lengths))) if len(lengths[0]) else 0.0


def distances(lines: Mask, reach: float) -> Floats:
    """Return the Euclidean distance of each pixel to the nearest line, at most `reach`; 0 on lines. [H, W].

    Args:
        lines: the pixels of lines.
        reach: at most 120; the squares are 16-bit numbers.
    """
    radius = math.ceil(reach)
    nearest = _distance_in_rows(lines, radius) ** 2
    squares = nearest.copy()
    for shift in range(1, min(radius, len(lines) - 1) + 1):
        np.minimum(nearest[shift:], squares[:-shift] + np.int16(shift**2), out=nearest[shift:])
        np.minimum(nearest[:-shift], squares[shift:] + np.int16(shift**2), out=nearest[:-shift])
    found: Floats = np.minimum(np.sqrt(nearest, dtype=np.float32), np.float32(reach))
    return found


def _distance_in_rows(lines: Mask, radius: int) -> NDArray[np.int16]:
    """Return the distance of each pixel to the nearest line in its row, at most radius + 1."""
    columns = np.arange(lines.shape[1], dtype=np.int32)
    before = np.maximum.accumulate(np.where(lines, columns, -radius - 1), axis=1)
    after = np.where(lines, columns, len(columns) + radius)[:, ::-1]
    after = np.minimum.accumulate(after, axis=1)[:, ::-1]
    nearest = np.minimum(columns - before, after - columns)
    return np.minimum(nearest, radius + 1).astype(np.int16)


def components(mask: Mask, *, diagonal: bool = False) -> tuple[Labels, int]:
    """Label the connected parts of a mask [H, W] with 1..count; 0 elsewhere.

    scipy has a function for this, but an exported model does not have scipy.

    Args:
        mask: the pixels to label.
        diagonal: whether pixels that touch only at a corner are connected.
    """
    height, width = mask.shape
    stride = width + 2  # A border on both sides ends runs at the ends of rows, even when they are widened by one pixel.
    padded = np.zeros((height, stride), np.int8)
    padded[:, 1:-1] = mask
    change = np.diff(padded.ravel(), prepend=np.int8(0))
    starts, ends = np.flatnonzero(change == 1), np.flatnonzero(change == -1)
    reach = int(diagonal)
    first = np.searchsorted(ends, starts + stride - reach, side="right")
    last = np.searchsorted(starts, ends + stride + reach, side="left")
    upper = np.repeat(np.arange(len(starts)), last - first)
    lower = np.arange(len(upper)) - np.repeat(np.cumsum(last - first) - (last - first), last - first) + first[upper]
    roots = _joined(len(starts), upper, lower)
    _, numbers = np.unique(roots, return_inverse=True)
    labels = np.zeros(height * stride, np.int32)
    lengths = ends - starts
    places = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths) + np.repeat(starts, lengths)
    labels[places] = np.repeat(numbers + 1, lengths)
    return np.ascontiguousarray(labels.reshape(height, stride)[:, 1:-1]), int(numbers.max(initial=-1)) + 1


def _joined(count: int, left: Indices, right: Indices) -> Indices:
    """Return for each of `count` items the smallest item that is connected with it by pairs (left, right)."""
    roots = np.arange(count)
    while len(left):
        a, b = roots[left], roots[right]
        differ = a != b
        left, right, a, b = left[differ], right[differ], a[differ], b[differ]
        np.minimum.at(roots, np.maximum(a, b), np.minimum(a, b))
        while True:
            higher = roots[roots]
            if np.array_equal(higher, roots):
                break
            roots = higher
    return roots


def _hills(height: Floats) -> tuple[Labels, int]:
    """Return the hill 1..count of each pixel, [H, W]: the one that steepest ascent reaches; 0 on lines (height 0)."""
    rows, columns = height.shape
    stride = columns + 2
    padded = np.zeros((rows + 2, stride), np.float32)
    padded[1:-1, 1:-1] = height
    flat = padded.ravel()
    target = np.arange(flat.size, dtype=np.int32)
    best = flat.copy()
    inner = slice(stride, -stride)
    for offset in (-stride, -1, 1, stride):
        neighbor = flat[stride + offset : len(flat) - stride + offset]
        higher = np.flatnonzero(neighbor > best[inner])
        best[inner][higher] = neighbor[higher]
        target[inner][higher] = higher + (stride + offset)
    level = (flat > 0) & (best == flat)
    tops = level.copy()
    _follow(flat, level & (flat < flat.max()), tops, target, stride)
    hills, count = components(tops.reshape(padded.shape))
    while True:
        higher_target = target[target]
        if np.array_equal(higher_target, target):
            break
        target = higher_target
    target[flat == 0] = 0
    return np.ascontiguousarray(hills.ravel()[target].reshape(padded.shape)[1:-1, 1:-1]), count


def _follow(flat: Floats, level: Mask, tops: Mask, target: NDArray[np.int32], stride: int) -> None:
    """Let pixels on level ground follow the neighbor from which a way up is shortest, in place.

    Args:
        flat: heights.
        level: pixels that have no higher neighbor.
        tops: the same pixels; those from which a way up is found are removed.
        target: the neighbor that each pixel follows.
        stride: distance of rows.
    """
    offsets = (-stride, -1, 1, stride)
    waiting = np.flatnonzero(level)
    front = [(waiting, waiting + offset) for offset in offsets]
    front = [(pixels[one], beside[one]) for pixels, beside in front
             for one in [(flat[beside] == flat[pixels]) & ~level[beside]]]  # fmt: skip
    while True:
        for pixels, beside in front:
            new = tops[pixels]
            target[pixels[new]] = beside[new]
        settled = np.unique(np.concatenate([pixels for pixels, _ in front]))
        settled = settled[tops[settled]]
        if not len(settled):
            return
        tops[settled] = False
        front = [(settled + offset, settled) for offset in offsets]
        front = [(pixels[one], beside[one]) for pixels, beside in front
                 for one in [tops[pixels] & level[pixels] & (flat[pixels] == flat[beside])]]  # fmt: skip


class _Graph:
    """Hills and the borders between them; hills are merged with a union-find structure."""

    def __init__(self, hills: Labels, height: Floats, count: int, banks: float) -> None:
        self.banks = banks
        self.parent = list(range(count))
        self.area: list[float] = np.bincount(hills.ravel(), minlength=count).tolist()
        peak = np.zeros(count, np.float32)
        np.maximum.at(peak, hills.ravel(), height.ravel())
        self.peak: list[float] = peak.tolist()
        self.borders: list[dict[int, list[float]]] = [{} for _ in range(count)]
        """Of each root: neighbor -> [neck, open length, length under lines]."""
        for low, high, neck, opening, covered in _borders(hills, height, count):
            border = [neck, opening, covered]
            self.borders[low][high] = border
            self.borders[high][low] = border

    def root(self, hill: int) -> int:
        while self.parent[hill] != hill:
            self.parent[hill] = self.parent[self.parent[hill]]
            hill = self.parent[hill]
        return hill

    def join(self, one: int, other: int) -> int:
        """Merge two roots and return the remaining root."""
        if len(self.borders[one]) < len(self.borders[other]):
            one, other = other, one
        self.parent[other] = one
        self.area[one] += self.area[other]
        self.peak[one] = max(self.peak[one], self.peak[other])
        mine = self.borders[one]
        for neighbor, border in self.borders[other].items():
            if neighbor == one:
                continue
            theirs = self.borders[neighbor]
            del theirs[other]
            if neighbor in mine:
                known = mine[neighbor]
                known[0] = max(known[0], border[0])
                known[1] += border[1]
                known[2] += border[2]
            else:
                mine[neighbor] = border
                theirs[one] = border
        mine.pop(other, None)
        self.borders[other] = {}
        return one

    def merge_wide_necks(self, gap: float) -> None:
        """Merge hills whose neck is wider than a gap, or not much narrower than the lower hill; widest neck first."""
        edges = sorted(
            ((border[0], low, high) for low, near in enumerate(self.borders) for high, border in near.items()
             if low < high and border[1]),
            key=lambda edge: (-edge[0], edge[1], edge[2]),
        )  # fmt: skip
        for neck, low, high in edges:
            one, other = self.root(low), self.root(high)
            if one != other and neck >= min(gap, NECK * min(self.peak[one], self.peak[other])):
                self.join(one, other)

    def merge_open_borders(self) -> None:
        """Merge neighbors whose common border is mostly open."""
        waiting = [hill for hill in range(len(self.parent)) if self.parent[hill] == hill]
        waiting.sort(key=lambda hill: (self.area[hill], hill))
        for hill in waiting:
            one = self.root(hill)
            while True:
                shares = [
                    (border[1] / (border[1] + max(0.0, border[2] - self.banks)), near)
                    for near, border in self.borders[one].items()
                    if border[1]
                ]
                best = max(shares, default=(0.0, -1))
                if best[0] < OPEN:
                    break
                one = self.join(one, best[1])

    def merge_slivers(self, width: float, area: float) -> None:
        """Merge narrow regions, and small ones with an open border, with the neighbor of the longest border.

        Args:
            width: half the width up to which a region is narrow.
            area: area below which a region is small.
        """
        waiting = [hill for hill in range(len(self.parent)) if self.parent[hill] == hill]
        waiting.sort(key=lambda hill: (self.area[hill], hill))
        for hill in waiting:
            near = self.borders[hill]
            if self.parent[hill] != hill or not near:
                continue
            if self.peak[hill] <= width or (self.area[hill] < area and any(border[1] for border in near.values())):
                best = max((OPENNESS * border[1] + border[2], -other) for other, border in near.items())
                self.join(hill, -best[1])


def _borders(hills: Labels, height: Floats, count: int) -> list[tuple[int, int, float, float, float]]:
    """Return (lower hill, higher hill, neck, open length, length under lines) of each border."""
    keys, necks = [], []
    for one, other in _NEIGHBORS:
        differ = hills[one] != hills[other]
        a, b = hills[one][differ].astype(np.int64), hills[other][differ].astype(np.int64)
        keys.append(np.minimum(a, b) * count + np.maximum(a, b))
        necks.append(np.minimum(height[one][differ], height[other][differ]))
    key, neck = np.concatenate(keys), np.concatenate(necks)
    pairs, place = np.unique(key, return_inverse=True)
    widest = np.zeros(len(pairs), np.float32)
    np.maximum.at(widest, place, neck)
    opened = np.bincount(place, neck > 0, minlength=len(pairs))
    covered = np.bincount(place, neck <= 0, minlength=len(pairs))
    lows, highs = pairs // count, pairs % count
    return list(zip(lows.tolist(), highs.tolist(), widest.tolist(), opened.tolist(), covered.tolist(), strict=True))
