"""Give the color of a hint to what looks like the place of the hint, with any model, trained with hints or not.

A hint on one lock of hair should color all of the hair. Two positions count as alike if the network gave them similar
colors, if the matcher searches the reference for similar things there (its queries, which depend on the sketch alone),
and if they are near to each other. The correction of a hint, its color minus the network's, is added to each position
in proportion to their likeness, so a color that was right stays as it is.

How far a correction goes depends on the other hints. If each of them could have been foretold from the others, the
network is wrong about whole parts, as with the reference of another character, and corrections go far. If not, or if
there is only one hint, the network is wrong at single places, and only what is very much alike is corrected: otherwise
hints in a picture that is mostly right would make it worse.

The weights were chosen on real faces with the reference of another character; benchmarks/hints.py measures them.

Shapes: B rows, S pixels per side, N points.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from animediffusion.models.diffusion.denoiser import Denoiser
from animediffusion.models.network.hints import RADIUS_PX

COLOR_WEIGHT, QUERY_WEIGHT, PLACE_WEIGHT = 3.0, 2.0, 1.0
"""Weights of the squared distances: of colors in [-1, 1], of standardized queries, of places in pictures' sides."""
RESERVE = 0.1
"""Likeness to a hint at which a position takes half of its correction."""
CLOSE = 3.0
"""Factor of the squared distances if the hints do not foretell each other; it falls to 1 where they do."""
PRIOR = 1.0
"""Squared distance of colors up to which the agreement of hints may be chance, summed over the hints."""
MOST_POINTS = 1024
"""Of more hinted pixels, as many are used, at equal distances in reading order."""
SMOOTHING_PX = 3
"""The network's color at a hint is the mean of a square of this side, because single pixels may be line or noise."""


def spread_hints(denoiser: Denoiser, sketch: Tensor, image: Tensor, hints: Tensor) -> Tensor:
    """Return the images [B, 3, S, S] with the corrections of the hints.

    Args:
        denoiser: the model; without a matcher, color and place alone decide what is alike.
        sketch: [B, 1, S, S] in [-1, 1].
        image: the network's images [B, 3, S, S] in [-1, 1], finished.
        hints: planes [B, 4, S, S] from hint_planes(). A row without hints stays as it is.
    """
    image = image.float()
    features = _features(denoiser, sketch, image)
    smooth = F.avg_pool2d(image, SMOOTHING_PX, 1, SMOOTHING_PX // 2, count_include_pad=False)
    light = (1 + sketch.float()) / 2
    rows = zip(image, features, smooth, light, hints.float(), strict=True)
    return torch.stack([_spread_in_row(*row) for row in rows])


def _features(denoiser: Denoiser, sketch: Tensor, image: Tensor) -> Tensor:
    """Return weighted features [B, C, S, S], whose squared distances are the unlikeness of two positions."""
    size = image.shape[-1]
    steps = torch.arange(size, device=image.device) / size
    places = torch.stack(torch.meshgrid(steps, steps, indexing="ij")).expand(len(image), -1, -1, -1)
    found = [COLOR_WEIGHT**0.5 * image, PLACE_WEIGHT**0.5 * places]
    queries = denoiser.queries(sketch)
    if queries is not None:
        queries = F.instance_norm(queries.float()) / queries.shape[1] ** 0.5
        queries = F.interpolate(queries, size=(size, size), mode="bilinear", align_corners=False)
        found.append(QUERY_WEIGHT**0.5 * queries)
    return torch.cat(found, 1)


def _spread_in_row(image: Tensor, features: Tensor, smooth: Tensor, light: Tensor, hints: Tensor) -> Tensor:
    """Return the image [3, S, S] of one row; `light` [1, S, S] is 0 on lines, whose color a hint does not mean."""
    # A hint is a square, see hint_planes(); only its center, whose neighbors are all hinted, counts.
    side = 2 * RADIUS_PX + 1
    centers = F.avg_pool2d(hints[:1], side, 1, RADIUS_PX, count_include_pad=False) > 1 - 0.5 / side**2
    points = centers.flatten().nonzero()[:, 0]
    if not len(points):
        return image
    points = points[torch.linspace(0, len(points) - 1, min(len(points), MOST_POINTS)).long().to(points.device)]
    flat = features.flatten(1).T
    unlikeness = torch.cdist(flat, flat[points]).square()
    corrections = hints[1:].flatten(1)[:, points] - smooth.flatten(1)[:, points]
    on_paper = light.flatten()[points]
    factor = CLOSE - (CLOSE - 1) * _agreement(unlikeness[points], on_paper, corrections)
    shares = _shares(unlikeness, on_paper, factor)
    return image + (corrections @ shares.T).reshape_as(image)


def _agreement(unlikeness: Tensor, on_paper: Tensor, corrections: Tensor) -> Tensor:
    """Return how well the corrections [3, N] of hints are foretold by those of the other hints, a scalar in [0, 1].

    It is the factor by which the foretold corrections would have to be multiplied to be nearest to the real ones.
    """
    others = on_paper * (1 - torch.eye(len(on_paper), device=on_paper.device))
    foretold = corrections @ _shares(unlikeness, others, 1.0).T
    counted = on_paper * foretold
    return ((counted * corrections).sum() / ((counted * foretold).sum() + PRIOR)).clamp(0, 1)


def _shares(unlikeness: Tensor, weights: Tensor, factor: Tensor | float) -> Tensor:
    """Return the share [P, N] of each hint's correction that positions get, from unlikeness [P, N] and weights."""
    likeness = torch.exp(-factor * unlikeness) * weights
    return likeness / (likeness.sum(1, keepdim=True) + RESERVE)
