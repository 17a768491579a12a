"""The front of quality against cost, and which of its points to use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from animediffusion.pipelines.evaluation.point import Point

Prefer = Literal["knee", "fast", "best"]

FAST_LOSS = 0.2
"""dB of PSNR below the defaults that `prefer=fast` may give away, the margin of the promotion gate."""


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both quality and cost, by rising cost."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.evaluations, -p.psnr)):
        if not front or point.psnr > front[-1].psnr:
            front.append(point)
    return front


def knee(front: Sequence[Point]) -> Point:
    """The point of a front that lies farthest above the line from its cheapest to its best point.

    Cost counts by its logarithm: from 1 to 2 evaluations is as far as from 4 to 8.
    """
    first, last = front[0], front[-1]
    span_cost = math.log(last.evaluations / first.evaluations) or 1.0
    span_psnr = (last.psnr - first.psnr) or 1.0

    def height(point: Point) -> float:
        return (point.psnr - first.psnr) / span_psnr - math.log(point.evaluations / first.evaluations) / span_cost

    return max(front, key=height)


def floor(defaults: float, prefer: Prefer) -> float:
    """The least PSNR of a point to use, for that of the defaults."""
    return defaults - (FAST_LOSS if prefer == "fast" else 0.0)


def choose(points: Sequence[Point], prefer: Prefer) -> Point:
    """The point to use, out of all trials; `points[0]` are the defaults.

    `best` and `knee` never fall below the PSNR of the defaults, `fast` not by more than FAST_LOSS. Where the knee does,
    the cheapest point that does not is used: what was chosen once is chosen again when it is the defaults.
    """
    front = pareto_front(points)
    allowed = [point for point in front if point.psnr >= floor(points[0].psnr, prefer)]
    if prefer == "best":
        return allowed[-1]
    return knee(front) if prefer == "knee" and knee(front) in allowed else allowed[0]


def describe(point: Point) -> str:
    """One line about a point."""
    average = "" if point.ema_length is None else f", average over {100 * point.ema_length:.3g}% of the run"
    return (
        f"{point.settings.describe()}{average}: {point.psnr:.2f} dB, sharpness {point.sharpness:.2f}, "
        f"{point.evaluations} evaluation{'s' if point.evaluations > 1 else ''}"
    )
