"""The Pareto front of quality against cost, and the choice of one of its points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from animediffusion.pipelines.evaluation.measure import Measurement

Prefer = Literal["knee", "fast", "best"]

FAST_LOSS = 0.2
"""PSNR in dB that `prefer=fast` may lose compared with the defaults: as many as a new champion may lose."""


def pareto_front(points: Sequence[Measurement]) -> list[Measurement]:
    """Return the points that no other point beats in both quality and cost, by rising cost."""
    front: list[Measurement] = []
    for point in sorted(points, key=lambda p: (p.evaluations, -p.psnr)):
        if not front or point.psnr > front[-1].psnr:
            front.append(point)
    return front


def knee(front: Sequence[Measurement]) -> Measurement:
    """Return the point of a front that lies farthest above the line from its cheapest to its best point.

    The cost axis is logarithmic: from 1 to 2 evaluations is as far as from 4 to 8.
    """
    first, last = front[0], front[-1]
    span_cost = math.log(last.evaluations / first.evaluations) or 1.0
    span_psnr = (last.psnr - first.psnr) or 1.0

    def height(point: Measurement) -> float:
        return (point.psnr - first.psnr) / span_psnr - math.log(point.evaluations / first.evaluations) / span_cost

    return max(front, key=height)


def floor(defaults: float, prefer: Prefer) -> float:
    """Return the lowest PSNR that a chosen point may have, where `defaults` is the PSNR of the defaults."""
    return defaults - (FAST_LOSS if prefer == "fast" else 0.0)


def choose(points: Sequence[Measurement], prefer: Prefer) -> Measurement:
    """Choose a point from all trials; `points[0]` are the defaults.

    The PSNR for `best` and `knee` is never below that of the defaults, for `fast` at most FAST_LOSS below. If the knee
    itself is below, the cheapest allowed point is chosen. Thus a choice that has become the defaults is chosen again.
    """
    front = pareto_front(points)
    allowed = [point for point in front if point.psnr >= floor(points[0].psnr, prefer)]
    if prefer == "best":
        return allowed[-1]
    return knee(front) if prefer == "knee" and knee(front) in allowed else allowed[0]


def describe(point: Measurement) -> str:
    """Describe a point in one line."""
    average = "" if point.ema_length is None else f", average over {100 * point.ema_length:.3g}% of the run"
    return (
        f"{point.settings.describe()}{average}: {point.psnr:.2f} dB, sharpness {point.sharpness:.2f}, "
        f"{point.evaluations} evaluation{'s' if point.evaluations > 1 else ''}"
    )
