"""Names the regions of a coloring by part: hair, skin, eyes, clothes or background, where the network is sure.

A small network of two stages gets the position, size and color of each region, of its neighbors, and of all regions
with the same color. The second stage also gets the first stage's probabilities for them, and the positions of hair,
skin and eyes according to the first stage. The weights are in weights.py; benchmarks/parts.py trains and measures the
network.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from animediffusion.platform.images.character_parts import PARTS
from animediffusion.serve.rendering.coloring import Coloring, Labels, Region
from animediffusion.serve.rendering.palette import perceptual
from animediffusion.serve.rendering.parts.weights import STAGES
from animediffusion.serve.rendering.sketch import Floats

WORK_PIXELS = 1 << 16
"""Regions are measured in at most about this many pixels."""
SURE = (math.inf, 0.85, 0.95, 0.7, 0.9, 0.9)
"""Least probability of each part with which a region gets its name: at these, at least four fifths of the area with
each name are right, in faces and in varied drawings."""
MAX_REGIONS = 5_000
"""A drawing with more regions is a pattern, whose regions are not named."""
LAYOUT = (1, 2, 3)
"""Parts whose positions the second stage gets: hair, skin and eyes."""

Rows = NDArray[np.float64]
"""One row for each region."""


class NamingStage(NamedTuple):
    """The weights of a stage: a layer of rectified linear units between the features and the parts."""

    mean: Floats
    deviation: Floats
    hidden: Floats
    hidden_bias: Floats
    out: Floats
    out_bias: Floats

    def __call__(self, features: Rows) -> Rows:
        """Return the probability of each part, [N, len(PARTS)]."""
        units = np.clip((features - self.mean) / self.deviation, -5, 5) @ self.hidden + self.hidden_bias
        scores = np.maximum(units, 0) @ self.out + self.out_bias
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        return np.asarray(shares / shares.sum(axis=1, keepdims=True), np.float64)

    @classmethod
    def read(cls, arrays: list[tuple[tuple[int, ...], str]]) -> NamingStage:
        """Return the stage whose arrays are each given by shape and by 16-bit floats as hexadecimal digits."""
        return cls(
            *(np.frombuffer(bytes.fromhex(digits), "<f2").astype(np.float32).reshape(shape) for shape, digits in arrays)
        )


class RegionFeatures(NamedTuple):
    """The measures of all regions that both stages need."""

    base: Rows
    """[N, F]: the features of the first stage."""
    area: NDArray[np.float64]
    """[N]: share of the picture."""
    center: Rows
    """[N, 2]: x and y."""
    alike: NDArray[np.intp]
    """[N]: number of the region's color."""
    pairs: tuple[NDArray[np.intp], NDArray[np.intp]]
    """Neighbors, each pair in both orders."""
    border: NDArray[np.float64]
    """Length of the border of each pair."""

    def around(self, values: Rows) -> Rows:
        """Return the mean of values [N, K] over each region's neighbors, weighted by the length of the border."""
        one, other = self.pairs
        return _sums(one, values[other] * self.border[:, None], len(values)) / self._length

    def around_pairs(self, *values: NDArray[Any]) -> Rows:
        """Return the same means of values [pairs], [N, number of values]."""
        columns = np.stack(values, axis=1) * self.border[:, None]
        return _sums(self.pairs[0], columns, len(self.area)) / self._length

    def of_color(self, values: Rows) -> Rows:
        """Return the mean of values [N, K] over all regions of each region's color, weighted by area."""
        weighted = np.concatenate([values, np.ones((len(values), 1))], axis=1) * self.area[:, None]
        sums = _sums(self.alike, weighted, int(self.alike.max()) + 1)
        return np.asarray((sums[:, :-1] / np.maximum(sums[:, -1:], 1e-12))[self.alike])

    @property
    def _length(self) -> Rows:
        return np.maximum(_sums(self.pairs[0], self.border[:, None], len(self.area)), 1e-12)


def name_regions(coloring: Coloring) -> Coloring:
    """Return the coloring with regions named by part where the network is sure; the others keep their names."""
    if len(coloring.regions) > MAX_REGIONS:
        return coloring
    first, second = _stages()
    scene = look_at(coloring.labels, coloring.regions, coloring.drawing.darkness)
    shares = second(second_features(scene, first(scene.base)))
    parts = shares.argmax(axis=1)
    sure = (shares.max(axis=1) >= np.array(SURE)[parts]) & (scene.area > 0)
    regions = tuple(
        replace(region, name=PARTS[part]) if is_sure else region
        for region, part, is_sure in zip(coloring.regions, parts.tolist(), sure.tolist(), strict=True)
    )
    return replace(coloring, regions=regions)


@functools.cache
def _stages() -> tuple[NamingStage, ...]:
    return tuple(NamingStage.read(arrays) for arrays in STAGES)


def look_at(labels: Labels, regions: tuple[Region, ...], darkness: Floats) -> RegionFeatures:
    """Measure the regions of a coloring.

    Args:
        labels: [H, W]: ids of the regions.
        regions: the regions, ordered by id.
        darkness: [H, W]: darkness of the lines.
    """
    step = max(1, math.ceil(math.sqrt(labels.size / WORK_PIXELS)))
    small, dark = labels[::step, ::step].astype(np.intp) - 1, darkness[::step, ::step]
    (height, width), count = small.shape, len(regions)
    flat, side = small.ravel(), math.sqrt(small.size)
    y, x = (one.ravel() for one in np.mgrid[:height, :width])
    x, y = (x + 0.5) / width, (y + 0.5) / height
    pixels = np.maximum(np.bincount(flat, minlength=count), 1e-9)

    def means(*planes: NDArray[np.float64] | Floats) -> Rows:
        return np.stack([np.bincount(flat, plane.ravel(), count) / pixels for plane in planes], axis=1)

    moments = means(x, y, x * x, y * y, dark)
    center = moments[:, :2]
    spread = np.sqrt(np.maximum(moments[:, 2:4] - center**2, 0))
    area = np.bincount(flat, minlength=count) / flat.size
    sides = np.stack(
        [
            np.bincount(one, minlength=count) / len(one)
            for one in (small[0], small[-1], small[:, 0], small[:, -1])
        ],
        axis=1,
    )  # fmt: skip
    one, other, border = _neighbors(small, count)
    color = np.asarray(perceptual(np.array([region.color for region in regions], np.uint8)), np.float64) / 20
    codes = np.array([red << 16 | green << 8 | blue for red, green, blue in (region.color for region in regions)])
    alike = np.unique(codes, return_inverse=True)[1].ravel().astype(np.intp)
    box = np.array([region.box for region in regions]) / (*labels.shape[::-1], *labels.shape[::-1])
    extent = np.maximum(np.prod(box[:, 2:] - box[:, :2], axis=1), 1e-9)
    perimeter = np.bincount(one, border, count) / side
    scene = RegionFeatures(np.empty((count, 0)), area, center, alike, (one, other), border)
    log_area = np.log(area + 1e-5)[:, None]
    own = np.concatenate([center, spread, box, sides, color, log_area, moments[:, 4:]], axis=1)
    shape = np.stack([area / extent, np.log(perimeter + 1e-3) - 0.5 * log_area[:, 0]], axis=1)
    of_color = scene.of_color(np.concatenate([center, center**2, sides], axis=1))
    color_spread = np.sqrt(np.maximum(of_color[:, 2:4] - of_color[:, :2] ** 2, 0))
    size_of_color = np.log(np.bincount(alike, area)[alike] + 1e-5)
    number_of_color = np.log(np.bincount(alike)[alike])
    near = scene.around(np.concatenate([color, log_area, center, sides.sum(axis=1, keepdims=True)], axis=1))
    near[:, 4:6] -= center
    contrast = scene.around_pairs(np.linalg.norm(color[one] - color[other], axis=1), alike[one] == alike[other])
    whole = np.broadcast_to(np.array([math.log(count), math.log(width / height)]), (count, 2))
    base = np.concatenate(
        [
            own,
            shape,
            of_color[:, :2],
            of_color[:, 4:],
            color_spread,
            np.stack([size_of_color, number_of_color], axis=1),
            near,
            contrast,
            whole,
        ],
        axis=1,
    )
    return scene._replace(base=base)


def second_features(scene: RegionFeatures, shares: Rows) -> Rows:
    """Return the features of the second stage, [N, F2]; `shares` are the probabilities of the first."""
    mass = shares * scene.area[:, None]
    total = mass.sum(axis=0)
    places = (mass.T @ scene.center) / np.maximum(total, 1e-9)[:, None]
    scale = math.sqrt(max(float(total[2]), 1e-3))
    layout = [(scene.center - places[part]) / scale for part in LAYOUT]
    logs = np.broadcast_to(np.log(total + 1e-4), shares.shape)
    return np.concatenate([scene.base, shares, scene.around(shares), scene.of_color(shares), *layout, logs], axis=1)


def _sums(index: NDArray[np.intp], values: Rows, count: int) -> Rows:
    return np.stack([np.bincount(index, column, count) for column in values.T], axis=1)


def _neighbors(small: NDArray[np.intp], count: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]:
    """Return pairs of neighboring regions, in both orders, and the length of their border in pixels."""
    pairs = [(small[:, :-1], small[:, 1:]), (small[:-1], small[1:])]
    codes = np.concatenate([(one * count + other)[one != other] for one, other in pairs])
    codes = np.concatenate([codes, codes % count * count + codes // count])
    found, lengths = np.unique(codes, return_counts=True)
    return found // count, found % count, lengths.astype(np.float64)
