"""The settings that a finished model can be sampled with, as Optuna's parameters and as points.

Several settings can mean the same: with one step all samplers and shifts do, without guidance all its intervals. A
point is the simplest of them, so that what is the same is measured once. Where the model's run kept averages of its
weights, their length is a setting, too. Not here: measuring, see pipelines/evaluation/measure.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from animediffusion.models.bundle import SamplerDefaults
from animediffusion.models.colorize import guided_evaluations
from animediffusion.models.diffusion.guidance import EVERYWHERE
from animediffusion.models.diffusion.path import Path
from animediffusion.models.diffusion.sampler import SAMPLERS

MOST_STEPS = 8
SCALES = (1.1, 4.0)
SHIFTS = (0.25, 6.0)
INTERVALS = (EVERYWHERE, (0.0, 0.5), (0.0, 0.8), (0.2, 0.8), (0.5, 1.0))
LENGTH_STEP = 0.01
"""Between two lengths of an average that are tried, shares of the run; what lies closer cannot be told apart."""
LADDER = (1, 2, 4, 3, 6, 8)
"""Steps of euler without guidance that are tried first: the plain front, from which the search looks for more."""
GUIDED_LADDER, GUIDED_SCALE = (2, 1, 4, 3), 2.0
"""Then with it. It doubles the cost, and a search that meets it late, with a bad shift, keeps to what is plain: some
ended 1.2 dB below a grid (benchmarks/results/tune.md)."""


class SamplerSpace:
    """All settings of one model.

    Args:
        path: the model's.
        defaults: its own settings, which are part of the space wherever they lie.
        lengths: the shortest and the longest average of its weights to try, shares of the run; None: it has one only.
        length: of its own average; None where that is the one that training chose.
    """

    def __init__(
        self,
        path: Path,
        defaults: SamplerDefaults,
        lengths: tuple[float, float] | None = None,
        length: float | None = None,
    ) -> None:
        self.path = path
        self.defaults = defaults
        self.lengths, self.length = lengths, length
        self.intervals = {_name(interval): interval for interval in (*INTERVALS, defaults.guidance_interval)}
        scales = SCALES if defaults.guidance_scale == 1 else (*SCALES, defaults.guidance_scale)
        shifts = (*SHIFTS, defaults.shift)
        self.distributions: dict[str, BaseDistribution] = {
            "sampler": CategoricalDistribution(SAMPLERS),
            "steps": IntDistribution(1, max(MOST_STEPS, defaults.steps), log=True),
            "shift": FloatDistribution(min(shifts), max(shifts), log=True),
            "guided": CategoricalDistribution([False, True]),
            "guidance_scale": FloatDistribution(min(scales), max(scales)),
            "guidance_interval": CategoricalDistribution(list(self.intervals)),
        }
        if lengths is not None:
            self.distributions["averaged"] = CategoricalDistribution(["as trained", "over ema_length"])
            self.distributions["ema_length"] = FloatDistribution(*lengths, step=LENGTH_STEP)

    def point(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """The point that Optuna's parameters mean."""
        settings = SamplerDefaults(
            name=chosen["sampler"],
            steps=chosen["steps"],
            shift=round(chosen["shift"], 2),
            guidance_scale=round(chosen["guidance_scale"], 2) if chosen["guided"] else 1.0,
            guidance_interval=self.intervals[chosen["guidance_interval"]],
        )
        length = round(chosen["ema_length"], 4) if chosen.get("averaged") == "over ema_length" else None
        return to_point(self.simplest(settings), length)

    def first(self) -> list[dict[str, Any]]:
        """Parameters of the points to begin with: the model's own settings, then the ladders."""
        plain = [SamplerDefaults(name="euler", steps=steps, guidance_scale=1.0) for steps in LADDER]
        guided = [SamplerDefaults(name="euler", steps=steps, guidance_scale=GUIDED_SCALE) for steps in GUIDED_LADDER]
        own = self.parameters(self.defaults, self.length)
        return [own, *map(self.parameters, [*plain, *guided])]

    def parameters(self, settings: SamplerDefaults, length: float | None = None) -> dict[str, Any]:
        """Optuna's parameters of these settings with the average of this length."""
        guided = settings.guidance_scale != 1
        return {
            "sampler": settings.name,
            "steps": settings.steps,
            "shift": settings.shift,
            "guided": guided,
            "guidance_scale": settings.guidance_scale if guided else 1.5,
            "guidance_interval": _name(settings.guidance_interval),
            **self._average(length),
        }

    def _average(self, length: float | None) -> dict[str, Any]:
        if self.lengths is None:
            return {}
        if length is None:
            return {"averaged": "as trained", "ema_length": self.lengths[0]}
        return {"averaged": "over ema_length", "ema_length": length}

    def simplest(self, settings: SamplerDefaults) -> SamplerDefaults:
        """The first of all settings that give the same images as these."""
        if settings.steps == 1:
            settings = replace(settings, name="euler", shift=1.0)
        if settings.name == "dpmpp_2m" and settings.steps == 2:
            settings = replace(settings, name="euler")  # its first and last step are euler's
        guided = guided_evaluations(self.path, settings)
        if not any(guided):
            return replace(settings, guidance_scale=1.0, guidance_interval=EVERYWHERE)
        for interval in INTERVALS:
            same = replace(settings, guidance_interval=interval)
            if guided_evaluations(self.path, same) == guided:
                return same
        return settings


def to_point(settings: SamplerDefaults, length: float | None = None) -> dict[str, Any]:
    """Settings, and the length of the average where it is not the trained one, as plain values."""
    point = {**asdict(settings), "guidance_interval": list(settings.guidance_interval)}
    return point if length is None else {**point, "ema_length": length}


def _name(interval: tuple[float, float]) -> str:
    return "{:g} to {:g}".format(*interval)
