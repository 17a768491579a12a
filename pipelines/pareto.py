"""The front of quality against cost, and which of its points to use."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from animediffusion.models.bundle import SamplerDefaults

Prefer = Literal["knee", "fast", "best"]

FAST_LOSS = 0.2
"""dB of PSNR below the defaults that `prefer=fast` may give away, the margin of the promotion gate."""


@dataclass(frozen=True)
class Point:
    """One trial: settings and what they gave."""

    sampler: str
    steps: int
    guidance_scale: float
    psnr: float
    """dB, mean over images of the cross-reference track."""
    sharpness: float
    """High-frequency energy as a share of the truth's; 1 is as sharp as the truth."""
    evaluations: int
    """Network rows per image: guidance other than 1 costs two per evaluation."""
    seconds_per_image: float
    shift: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    ema_length: float | None = None
    """Of the weights' average, a share of the run (models/averages.py); None is the one that training chose."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The point that asdict() was made of, also after JSON."""
        return cls(**{**values, "guidance_interval": tuple(values["guidance_interval"])})

    @property
    def settings(self) -> SamplerDefaults:
        """What a bundle would hold."""
        return SamplerDefaults(
            name=self.sampler,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            shift=self.shift,
            guidance_interval=self.guidance_interval,
        )


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
