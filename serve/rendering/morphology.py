"""Operations on pictures [H, W] that the search for regions needs: distances, components, growth, watersheds.

scipy, scikit-image and OpenCV have such functions, but an exported model has only numpy, and these are fast enough.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from animediffusion.serve.rendering.sketch import Floats

Labels = NDArray[np.int32]
Mask = NDArray[np.bool_]
Indices = NDArray[np.intp]

SPREAD_LEVELS = (0.1, 0.2, 0.35, 0.5, 0.7, 0.85)
"""Labels spread over pixels that are lighter than each of these values in turn, then over all."""
MAX_REACH_PX = 120
"""Squares of larger distances do not fit into 16 bits."""
NEIGHBORS = (
    ((slice(None), slice(None, -1)), (slice(None), slice(1, None))),
    ((slice(None, -1), slice(None)), (slice(1, None), slice(None))),
)
"""Index pairs of a picture [H, W]: pixels and their right neighbors, pixels and their lower neighbors."""


def pooled(values: Floats, step: int, reduce: Callable[..., Floats]) -> Floats:
    """Return `reduce` (np.mean or np.max) of squares of side `step` [H / step, W / step], rounded up; edges repeat."""
    if step == 1:
        return values
    height, width = (-(-side // step) for side in values.shape)
    margins = ((0, height * step - values.shape[0]), (0, width * step - values.shape[1]))
    return reduce(np.pad(values, margins, mode="edge").reshape(height, step, width, step), axis=(1, 3))


def greatest(values: Floats, radius: int) -> Floats:
    """Return the greatest value in a square of side 2 radius + 1 around each pixel."""
    for axis in (0, 1):
        padded = np.pad(values, [(radius, radius) if axis == one else (0, 0) for one in (0, 1)], mode="edge")
        padded, width = np.moveaxis(padded, axis, 0), 1
        while width < 2 * radius + 1:  # the maximum of `width` pixels, doubled as often as possible
            step = min(width, 2 * radius + 1 - width)
            padded, width = np.maximum(padded[:-step], padded[step:]), width + step
        values = np.moveaxis(padded, 0, axis)
    return values


def smoothed(values: Floats) -> Floats:
    """Return the values weighted 1 2 1 in both directions, [H, W]; edges are repeated."""
    padded = np.pad(values, 1, mode="edge")
    rows = (padded[:-2] + np.float32(2) * padded[1:-1] + padded[2:]) / np.float32(4)
    smoothed: Floats = (rows[:, :-2] + np.float32(2) * rows[:, 1:-1] + rows[:, 2:]) / np.float32(4)
    return smoothed


def distances(lines: Mask, reach: float) -> Floats:
    """Return the Euclidean distance of each pixel to the nearest line, at most `reach`; 0 on lines. [H, W].

    Args:
        lines: the pixels of lines.
        reach: at most MAX_REACH_PX.
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
    roots = joined(len(starts), upper, lower)
    _, numbers = np.unique(roots, return_inverse=True)
    labels = np.zeros(height * stride, np.int32)
    lengths = ends - starts
    places = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths) + np.repeat(starts, lengths)
    labels[places] = np.repeat(numbers + 1, lengths)
    return np.ascontiguousarray(labels.reshape(height, stride)[:, 1:-1]), int(numbers.max(initial=-1)) + 1


def joined(count: int, left: Indices, right: Indices) -> Indices:
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


def hills_of(height: Floats) -> tuple[Labels, int]:
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
