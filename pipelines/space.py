"""The settings that a finished model can be sampled with, as Optuna's parameters and as points.

Several settings can mean the same: with one step all samplers and shifts do, without guidance all its intervals. A
point is the simplest of them, so that what is the same is measured once. Not searched is the length of the weights'
average: a bundle holds one set of weights. Not here: measuring, see pipelines/measure.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from animediffusion.models.bundle import SamplerDefaults
from animediffusion.models.colorize import guided_evaluations
from animediffusion.models.guidance import EVERYWHERE
from animediffusion.models.path import Path
from animediffusion.models.sampler import SAMPLERS

MOST_STEPS = 8
SCALES = (1.1, 4.0)
SHIFTS = (0.25, 6.0)
INTERVALS = (EVERYWHERE, (0.0, 0.5), (0.0, 0.8), (0.2, 0.8), (0.5, 1.0))
LADDER = (1, 2, 4, 3, 6, 8)
"""Steps of euler without guidance that are tried first: the plain front, from which the search looks for more."""


class SamplerSpace:
    """All settings of one model.

    Args:
        path: the model's.
        defaults: its own settings, which are part of the space wherever they lie.
    """

    def __init__(self, path: Path, defaults: SamplerDefaults) -> None:
        self.path = path
        self.defaults = defaults
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

    def point(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """The point that Optuna's parameters mean."""
        settings = SamplerDefaults(
            name=chosen["sampler"],
            steps=chosen["steps"],
            shift=round(chosen["shift"], 2),
            guidance_scale=round(chosen["guidance_scale"], 2) if chosen["guided"] else 1.0,
            guidance_interval=self.intervals[chosen["guidance_interval"]],
        )
        return to_point(self.simplest(settings))

    def first(self) -> list[dict[str, Any]]:
        """Parameters of the points to begin with: the model's own settings, then the ladder."""
        plain = SamplerDefaults(name="euler", guidance_scale=1.0)
        return [self.parameters(self.defaults), *(self.parameters(replace(plain, steps=steps)) for steps in LADDER)]

    def parameters(self, settings: SamplerDefaults) -> dict[str, Any]:
        """Optuna's parameters of these settings."""
        guided = settings.guidance_scale != 1
        return {
            "sampler": settings.name,
            "steps": settings.steps,
            "shift": settings.shift,
            "guided": guided,
            "guidance_scale": settings.guidance_scale if guided else 1.5,
            "guidance_interval": _name(settings.guidance_interval),
        }

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


def to_point(settings: SamplerDefaults) -> dict[str, Any]:
    """Settings as plain values."""
    return {**asdict(settings), "guidance_interval": list(settings.guidance_interval)}


def _name(interval: tuple[float, float]) -> str:
    return "{:g} to {:g}".format(*interval)
