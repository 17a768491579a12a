"""The graph of hills, the pieces of a drawing between its lines, and the rules by which hills become regions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from animediffusion.serve.rendering.morphology import NEIGHBORS, Labels
from animediffusion.serve.rendering.sketch import Floats

NECK = 0.7
"""Two hills are one region if the neck between them is at least this share of the lower hill's height."""
WIDEST = 1.5
"""The widest opening that may be a gap in a line, relative to the usual widest gap..."""
OPENING = 0.06
"""... if it is shorter than this share of the outline of the smaller hill."""
OPEN = 0.4
"""Two hills are one region if at least this share of their common border is open."""
BANKS = 2.0
"""A border also runs under the lines on both sides of a neck; this multiple of their thickness is not counted."""
WALL = 0.5
"""A border under a line that is lighter than this counts less, down to..."""
FAINT_WALL = 0.2
"""... this share of its length: hatching is lighter than contours."""
GROUND = 0.25
"""A hill with at least this share of the picture's border may be the sheet, which slivers of a figure do not join."""
GROUND_LENGTH = 0.1
"""Borders under lines with such a hill count less by this factor when a sliver looks for its neighbor."""
OPENNESS = 4.0
"""A sliver belongs to the neighbor with the longest border, in which open pixels count this much more."""


@dataclass(slots=True)
class Border:
    """The common border of two hills."""

    neck: float
    """The largest height on the border: half the width of the widest opening, 0 if lines close the border."""
    opened: float
    """Length on paper, in pixels."""
    covered: float
    """Length under lines, in pixels; faint lines count less."""
    length: float
    """Whole length, in pixels."""


class RegionGraph:
    """Hills, their borders, and which hills have been merged (a union-find structure).

    Args:
        hills: the hill 0..count-1 of each pixel, [H, W]; pixels of lines belong to the nearest hill.
        height: distance of each pixel to the nearest line, 0 on lines, [H, W]. In solid dark areas, which are closed on
            all sides, half their width, negative.
        darkness: darkness of each pixel, [H, W].
        count: number of hills.
        thickness: usual thickness of the lines, in pixels.
    """

    def __init__(self, hills: Labels, height: Floats, darkness: Floats, count: int, thickness: float) -> None:
        self._banks = BANKS * thickness
        self._parent = list(range(count))
        peak = np.zeros(count, np.float32)
        np.maximum.at(peak, hills.ravel(), np.abs(height).ravel())
        frame = np.concatenate([hills[0], hills[-1], hills[:, 0], hills[:, -1]])
        self._frame: list[float] = (np.bincount(frame, minlength=count) / len(frame)).tolist()
        self._area: list[int] = np.bincount(hills.ravel(), minlength=count).tolist()
        self._peak: list[float] = peak.tolist()
        self._borders: list[dict[int, Border]] = [{} for _ in range(count)]
        self._outline: list[float] = [0.0] * count
        for low, high, border in _borders(hills, height, darkness, count):
            self._borders[low][high] = self._borders[high][low] = border
            self._outline[low] += border.length
            self._outline[high] += border.length

    def regions(self) -> Labels:
        """Return the region 1..N of each hill, [count]."""
        roots = np.array([self._root(hill) for hill in range(len(self._parent))])
        return (np.unique(roots, return_inverse=True)[1] + 1).astype(np.int32)

    def merge_wide_necks(self, gap: float) -> None:
        """Merge hills whose neck is wider than a gap, or not much narrower than the smaller hill; widest neck first.

        An opening that is short compared with the outline of the smaller hill is a gap all the same, up to WIDEST times
        the usual width.
        """
        necks = [(-border.neck, low, high) for low, near in enumerate(self._borders) for high, border in near.items()
                 if low < high and border.opened]  # fmt: skip
        for neck, low, high in sorted(necks):
            one, other = self._root(low), self._root(high)
            if one == other or -neck < min(gap, NECK * min(self._peak[one], self._peak[other])):
                continue
            outline = min(self._outline[one], self._outline[other])
            if -neck >= WIDEST * gap or self._borders[one][other].opened >= OPENING * outline:
                self._join(one, other)

    def merge_open_borders(self) -> None:
        """Merge neighbors whose common border is mostly open, smallest first."""
        for hill in self._smallest_first():
            one = hill if self._parent[hill] == hill else None
            while one is not None:
                share, near = max(((self._openness(border), near) for near, border in self._borders[one].items()),
                                  default=(0.0, -1))  # fmt: skip
                if share < OPEN:
                    break
                one = self._join(one, near)

    def merge_slivers(self, width: float, area: float) -> None:
        """Merge narrow regions, and small ones with an open border, with the neighbor of the longest border.

        Args:
            width: half the width up to which a region is narrow.
            area: area below which a region is small.
        """
        for hill in self._smallest_first():
            near = self._borders[hill]
            if self._parent[hill] != hill or not near:
                continue
            small = self._area[hill] < area and any(border.opened for border in near.values())
            if small or self._peak[hill] <= width:
                lengths = ((self._length(other, border), -other) for other, border in near.items())
                self._join(hill, -max(lengths)[1])

    def _smallest_first(self) -> list[int]:
        """Return the roots in the order of their present area."""
        roots = [hill for hill, parent in enumerate(self._parent) if hill == parent]
        return sorted(roots, key=lambda hill: (self._area[hill], hill))

    def _openness(self, border: Border) -> float:
        """Return the open share of a border, 0..1."""
        return border.opened and border.opened / (border.opened + max(0.0, border.covered - self._banks))

    def _length(self, other: int, border: Border) -> float:
        """Return the length of a sliver's border with a root, weighted by how likely the sliver belongs to it."""
        weight = GROUND_LENGTH if self._frame[other] >= GROUND else 1.0
        return OPENNESS * border.opened + weight * border.covered

    def _root(self, hill: int) -> int:
        while self._parent[hill] != hill:
            self._parent[hill] = self._parent[self._parent[hill]]
            hill = self._parent[hill]
        return hill

    def _join(self, one: int, other: int) -> int:
        """Merge two roots, and return the remaining root: the one with more neighbors."""
        if len(self._borders[one]) < len(self._borders[other]):
            one, other = other, one
        self._parent[other] = one
        self._area[one] += self._area[other]
        self._frame[one] += self._frame[other]
        self._outline[one] += self._outline[other] - 2 * self._borders[one][other].length
        self._peak[one] = max(self._peak[one], self._peak[other])
        mine = self._borders[one]
        del mine[other]
        for near, border in self._borders[other].items():
            if near == one:
                continue
            del self._borders[near][other]
            if (known := mine.get(near)) is None:
                mine[near] = self._borders[near][one] = border
            else:
                known.neck = max(known.neck, border.neck)
                known.opened += border.opened
                known.covered += border.covered
                known.length += border.length
        self._borders[other] = {}
        return one


def _borders(hills: Labels, height: Floats, darkness: Floats, count: int) -> list[tuple[int, int, Border]]:
    """Return (lower hill, higher hill, border) of all hills that touch."""
    keys, lowest, darkest = [], [], []
    for one, other in NEIGHBORS:
        differ = hills[one] != hills[other]
        a, b = hills[one][differ].astype(np.int64), hills[other][differ].astype(np.int64)
        keys.append(np.minimum(a, b) * count + np.maximum(a, b))
        lowest.append(np.minimum(height[one][differ], height[other][differ]))
        darkest.append(np.maximum(darkness[one][differ], darkness[other][differ]))
    pairs, place = np.unique(np.concatenate(keys), return_inverse=True)
    heights, walls = np.concatenate(lowest), np.clip(np.concatenate(darkest) / WALL, FAINT_WALL, 1)
    neck = np.zeros(len(pairs), np.float32)
    np.maximum.at(neck, place, heights)
    opened = np.bincount(place, heights > 0, minlength=len(pairs))
    covered = np.bincount(place, np.where(heights > 0, 0, walls), minlength=len(pairs))
    length = np.bincount(place, minlength=len(pairs))
    borders = map(Border, neck.tolist(), opened.tolist(), covered.tolist(), length.tolist())
    return list(zip((pairs // count).tolist(), (pairs % count).tolist(), borders, strict=True))
