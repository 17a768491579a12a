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

from animediffusion.serve.rendering.morphology import (
    MAX_REACH_PX,
    NEIGHBORS,
    Labels,
    Mask,
    components,
    distances,
    greatest,
    hills_of,
    pooled,
    smoothed,
    spread,
)
from animediffusion.serve.rendering.region_graph import RegionGraph
from animediffusion.serve.rendering.sketch import Drawing, Floats

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
SHADE = 0.5
"""In a shaded area the difference must be larger by this share of the shade's darkness."""
BLOCK_PX = 16
"""Side of the blocks in which the grain of the paper is measured."""
PLAIN_BLOCKS = 0.2
"""At least this share of the blocks is assumed to be paper without lines."""
GRAIN = 3.5
"""Grain rarely exceeds its mean by more than this many standard deviations."""
MOST_GRAIN = 0.25
"""Lines that are darker than the paper by this value are seen in any grain."""
SPECKLED = 0.03
"""A drawing has grain only if at least this share of the pixels that look like lines are in specks."""
SPECK_PX = 6
"""Dots of at most this many pixels are not lines."""
GAP = 0.016
"""Half the width of the widest gap that is closed, as a share of the drawing's side (the root of its area)..."""
MIN_GAP_PX = 3.0
"""... but at least this many pixels."""
REACH = 2.0
"""Distances to lines are limited to this multiple of that half width."""
SOLID = 2.0
"""A dark area is not a line but a region if it is wider than this multiple of twice the lines' thickness, and than a
gap."""
SLIVER = 0.002
"""Half the width up to which a region is a sliver, as a share of the drawing's side..."""
MIN_SLIVER_PX = 2.0
"""... but at least this many pixels."""
SLIVER_AREA = 1e-4
"""Share of the drawing's area below which a region with an open border is a sliver."""


class Regions(NamedTuple):
    """A division of a drawing into regions."""

    labels: Labels
    """[H, W]: 1..count; every pixel, those under lines included, belongs to one region."""
    count: int  # type: ignore[assignment]  # tuples have a method of this name, which nobody needs here


def find_regions(drawing: Drawing) -> Regions:
    """Return the regions of a drawing; the result depends only on the darkness of its lines."""
    darkness = drawing.darkness
    step = math.ceil(math.sqrt(darkness.size / WORK_PIXELS))
    small = pooled(darkness, step, np.mean)
    lines = find_lines(small)
    if lines.all():
        return Regions(np.ones(darkness.shape, np.int32), 1)
    labels, count = _merged(lines, small)
    return Regions(_enlarged(labels, count, darkness, step) if step > 1 else labels, count)


def find_lines(darkness: Floats) -> Mask:
    """Return the pixels of lines, faint lines included, but not the grain of paper or the dark side of soft shadows."""
    relief = _relief(darkness)
    found = _darker(relief, FAINT) | (darkness >= INK)
    lines = _without_specks(found)
    # A drawing that is densely hatched everywhere has no plain blocks either, but its lines are not specks.
    if _grain(relief) <= FAINT or found.sum() - lines.sum() < SPECKLED * found.sum():
        return lines
    darkness = smoothed(darkness)
    relief = _relief(darkness)
    faint = min(max(_grain(relief), FAINT), MOST_GRAIN)
    return _without_specks(_darker(relief, faint) | (darkness >= INK))


def _darker(relief: Floats, faint: float) -> Mask:
    """Return the pixels whose relief is at least `faint` and at least a share of that of the pixels next to them."""
    darker: Mask = relief >= np.maximum(greatest(relief, 2) * np.float32(EDGE), np.float32(faint))
    return darker


def _relief(darkness: Floats) -> Floats:
    """Return how much darker each pixel is than the lightest ground of the size of a thick line around it, [H, W]."""
    radius = max(MIN_LINE_PX, round(THICK_LINE * math.sqrt(darkness.size)))
    ground = greatest(-greatest(-darkness, radius), radius)
    relief: Floats = darkness - np.float32(1 + SHADE) * ground
    return relief


def _grain(relief: Floats) -> float:
    """Return the darkness that the grain of the paper rarely exceeds, measured where contrast is least."""
    rows, columns = (side // BLOCK_PX for side in relief.shape)
    if not rows * columns:
        return 0.0
    blocks = relief[: rows * BLOCK_PX, : columns * BLOCK_PX].reshape(rows, BLOCK_PX, columns, BLOCK_PX)
    mean, deviation = blocks.mean(axis=(1, 3)).ravel(), blocks.std(axis=(1, 3)).ravel()
    return float(np.quantile(mean + GRAIN * deviation, PLAIN_BLOCKS))


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
    for one, other in NEIGHBORS:
        same = small[one] == small[other]
        inside[one] &= same
        inside[other] &= same
    for one, other in NEIGHBORS:  # The border may lie one pixel beside the line.
        inner = inside[one] & inside[other]
        inside[one] &= inner
        inside[other] &= inner
    lost = np.bincount(small[inside], minlength=count + 1) == 0  # these regions have no pixel off their border
    known = np.where(inside | lost[small], small, 0)
    return spread(known.repeat(step, axis=0).repeat(step, axis=1)[:height, :width], darkness)


def _merged(lines: Mask, darkness: Floats) -> tuple[Labels, int]:
    """Return the region 1..count of each pixel, [H, W], and the count."""
    gap = max(MIN_GAP_PX, GAP * math.sqrt(lines.size))
    height = distances(lines, min(REACH * gap, MAX_REACH_PX))
    hills, count = hills_of(height)
    thickness = _thickness(lines)
    solid = _solid(lines, min(max(SOLID * thickness, gap), MAX_REACH_PX))
    areas, number = components(solid)
    hills[solid] = areas[solid] + count
    height[solid] = -gap
    hills = spread(hills, darkness) - 1
    graph = RegionGraph(hills, height, darkness, count + number, thickness)
    graph.merge_wide_necks(gap)
    graph.merge_open_borders()
    graph.merge_slivers(max(MIN_SLIVER_PX, SLIVER * math.sqrt(lines.size)), SLIVER_AREA * lines.size)
    regions = graph.regions()
    return regions[hills], int(regions.max())


def _solid(lines: Mask, radius: float) -> Mask:
    """Return the solid areas among the lines, for example black hair: what a disc of this radius fits into, [H, W]."""
    centers = distances(~lines, radius) >= radius
    return lines & (distances(centers, radius) < radius) if centers.any() else centers


def _thickness(lines: Mask) -> float:
    """Return the usual thickness of the lines: the median length of their runs in rows and columns."""
    lengths = []
    for one in (lines, lines.T):
        ends = np.flatnonzero(np.diff(np.pad(one, ((0, 0), (1, 1))).astype(np.int8).ravel()))
        lengths.append(ends[1::2] - ends[::2])
    return float(np.median(np.concatenate(lengths))) if len(lengths[0]) else 0.0
