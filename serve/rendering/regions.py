"""Division of a drawing into the regions that its lines enclose, closed over gaps in the lines.

Trapped balls are the classical method: a region is what a ball can reach without crossing a line, the largest ball
first, so a gap narrower than the ball is closed. Here one distance transform replaces the balls. The distance to the
nearest line is a landscape whose hills are the wide places and whose saddles are the necks between them. Every pixel
belongs to the hill that it climbs to; hills are then merged where the neck between them is not much narrower than the
smaller hill, because such a neck is no gap in a line but a narrow place of one region.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from animediffusion.serve.rendering.sketch import Drawing, Floats

Labels = NDArray[np.int32]
Mask = NDArray[np.bool_]
Indices = NDArray[np.intp]

WORK_PIXELS = 2_000_000
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
BANKS = 2.0
"""The border of two hills runs under the lines on both sides of the neck; this multiple of the lines' thickness is not
counted."""
SLIVER_PX = 2.0
"""A region whose largest ball has at most this radius is a sliver, unless it is larger than SLIVER_AREA."""
SLIVER_AREA = 1e-4
"""Share of the drawing's area below which a region is a sliver."""


class Regions(NamedTuple):
    """A division of a drawing into regions."""

    labels: Labels
    """[H, W]: 1..count; every pixel, those under lines included, belongs to one region."""
    count: int  # type: ignore[assignment]  # tuples have a method of this name, which nobody needs here


def find_regions(drawing: Drawing) -> Regions:
    """Return the regions of a drawing; the result depends only on the darkness of its lines."""
    height, width = drawing.darkness.shape
    step = math.ceil(math.sqrt(height * width / WORK_PIXELS))
    small = _reduced(drawing.darkness, step)
    lines = _without_specks(find_lines(small))
    if lines.all():
        return Regions(np.ones((height, width), np.int32), 1)
    labels = _merged(lines)
    if step > 1:
        labels = labels.repeat(step, axis=0).repeat(step, axis=1)[:height, :width]
    return Regions(np.ascontiguousarray(labels), int(labels.max()))


def _reduced(darkness: Floats, step: int) -> Floats:
    """Return the darkness at 1 / step of its size; lines keep their maximum, so that they remain closed."""
    height, width = (-(-side // step) for side in darkness.shape)
    margins = ((0, height * step - darkness.shape[0]), (0, width * step - darkness.shape[1]))
    blocks = np.pad(darkness, margins).reshape(height, step, width, step)
    reduced: Floats = blocks.max(axis=(1, 3))
    return reduced


def find_lines(darkness: Floats) -> Mask:
    """Return the pixels of lines, faint lines included, but not the dark side of soft shadows. [H, W]."""
    radius = max(MIN_LINE_PX, round(THICK_LINE * math.sqrt(darkness.size)))
    ground = _greatest(-_greatest(-darkness, radius), radius)
    relief = darkness - ground
    edge = np.maximum(_greatest(relief, 2) * np.float32(EDGE), np.float32(FAINT))
    found: Mask = (relief >= edge) | (darkness >= INK)
    return found


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


def _merged(lines: Mask) -> Labels:
    """Return labels 1..count of the merged hills, [H, W]."""
    gap = max(MIN_GAP_PX, GAP * math.sqrt(lines.size))
    height = distances(lines, REACH * gap)
    hills, count = _hills(height)
    graph = _Graph(hills, height, count, BANKS * _thickness(lines))
    graph.merge_wide_necks(gap)
    graph.merge_open_borders()
    graph.merge_slivers(SLIVER_AREA * lines.size)
    roots = np.array([graph.root(hill) for hill in range(count)])
    _, inverse = np.unique(roots[hills], return_inverse=True)
    return (inverse.reshape(hills.shape) + 1).astype(np.int32)


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
    """Return the hill 0..count-1 of each pixel, [H, W]: the one that steepest ascent reaches.

    Pixels of lines (height 0) belong to the hill whose foot is nearest.
    """
    rows, columns = height.shape
    stride = columns + 2
    flat = np.full((rows + 2, stride), -1, np.float32)
    flat[1:-1, 1:-1] = height
    flat = flat.ravel()
    target = np.arange(flat.size)
    best = flat.copy()
    for offset in (-stride, -1, 1, stride):
        neighbor = np.roll(flat, -offset)
        higher = neighbor > best
        best[higher] = neighbor[higher]
        target[higher] = np.flatnonzero(higher) + offset
    target[flat < 0] = np.flatnonzero(flat < 0)
    settled = best > flat
    settled &= flat > 0
    # On level ground, follow the neighbor from which a way up is shortest.
    ground = (flat > 0) & ~settled
    _follow(np.flatnonzero(ground), flat, settled, target, stride)
    tops = (flat > 0) & ~settled
    labels, count = components(tops.reshape(rows + 2, stride))
    target[tops] = np.flatnonzero(tops)
    while True:
        higher_target = target[target]
        if np.array_equal(higher_target, target):
            break
        target = higher_target
    hills = labels.ravel()[target].reshape(rows + 2, stride)[1:-1, 1:-1] - 1
    return _filled(hills), count


def _follow(waiting: Indices, flat: Floats, settled: Mask, target: Indices, stride: int) -> None:
    """Let pixels without a higher neighbor follow a settled neighbor of the same height, nearest first, in place."""
    while len(waiting):
        found = np.zeros(len(waiting), np.bool_)
        for offset in (-stride, -1, 1, stride):
            beside = waiting + offset
            follows = ~found & settled[beside] & (flat[beside] == flat[waiting])
            target[waiting[follows]] = beside[follows]
            found |= follows
        if not found.any():
            break
        settled[waiting[found]] = True
        waiting = waiting[~found]


def _filled(hills: Labels) -> Labels:
    """Give pixels with label -1 the label of the nearest labeled pixel."""
    rows, columns = hills.shape
    stride = columns + 2
    padded = np.full((rows + 2, stride), -2, np.int32)
    padded[1:-1, 1:-1] = hills
    flat = padded.ravel()
    waiting = np.flatnonzero(flat == -1)
    turn = 0
    while len(waiting):
        offsets = [-stride, -1, 1, stride]
        if turn % 2:  # Alternating 4 and 8 neighbors makes circles octagons.
            offsets += [-stride - 1, -stride + 1, stride - 1, stride + 1]
        labels = np.full(len(waiting), -1, np.int32)
        for offset in offsets:
            beside = flat[waiting + offset]
            labels = np.where((labels < 0) & (beside >= 0), beside, labels)
        flat[waiting] = labels
        waiting = waiting[labels < 0]
        turn += 1
    return np.ascontiguousarray(padded[1:-1, 1:-1])


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

    def merge_slivers(self, small: float) -> None:
        """Merge narrow or small regions with the neighbor of the longest open border, else of the longest border."""
        waiting = [hill for hill in range(len(self.parent)) if self.parent[hill] == hill]
        waiting.sort(key=lambda hill: (self.area[hill], hill))
        for hill in waiting:
            if self.parent[hill] != hill or (self.peak[hill] > SLIVER_PX and self.area[hill] > small):
                continue
            if self.borders[hill]:
                best = max((border[1], border[2], -near) for near, border in self.borders[hill].items())
                self.join(hill, -best[2])


def _borders(hills: Labels, height: Floats, count: int) -> list[tuple[int, int, float, float, float]]:
    """Return (lower hill, higher hill, neck, open length, length under lines) of each border."""
    keys, necks = [], []
    for one, other in (
        ((slice(None), slice(None, -1)), (slice(None), slice(1, None))),
        ((slice(None, -1), slice(None)), (slice(1, None), slice(None))),
    ):
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
