"""The sampler settings of a finished model, as Optuna's parameters and as points.

Different settings can give the same images: with one step, all samplers and shifts do; without guidance, all guidance
intervals do. A point is the simplest of such settings, so that it is measured only once. If the model's run kept
averages of its weights, the length of the average is a setting, too. pipelines/evaluation/measure.py measures a point.
"""

from __future__ import annotations

from dataclasses import asdict, replace

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from animediffusion.models.bundle import SamplerDefaults
from animediffusion.models.colorize import guided_evaluations
from animediffusion.models.diffusion.guidance import EVERYWHERE
from animediffusion.models.diffusion.path import Path
from animediffusion.models.diffusion.sampler import SAMPLERS
from animediffusion.pipelines.tuning.optuna_searcher import Parameters, Point

MOST_STEPS = 8
SCALES = (1.1, 4.0)
SHIFTS = (0.25, 6.0)
INTERVALS = (EVERYWHERE, (0.0, 0.5), (0.0, 0.8), (0.2, 0.8), (0.5, 1.0))
LENGTH_STEP = 0.01
"""Step between the tried lengths of an average, as a share of the run; closer lengths cannot be told apart."""
LADDER = (1, 2, 4, 3, 6, 8)
"""Numbers of steps of euler without guidance that are tried first; they give the front that the search improves."""
GUIDED_LADDER, GUIDED_SCALE = (2, 1, 4, 3), 2.0
"""Numbers of steps of euler with guidance that are tried next, and their scale. Guidance doubles the cost, and a search
that first tries it late, with a bad shift, avoids it from then on: some such searches ended 1.2 dB below a grid search
(benchmarks/results/tune.md)."""


class SamplerSpace:
    """All sampler settings of one model.

    Args:
        path: the model's path.
        defaults: the model's own settings; they are part of the space, even outside of the usual ranges.
        lengths: the shortest and the longest average of the weights to try, as shares of the run; None if the model has
            only one average.
        length: length of the model's own average; None if it is the average that training chose.
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
        self.intervals = {_interval_name(interval): interval for interval in (*INTERVALS, defaults.guidance_interval)}
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

    def point(self, chosen: Parameters) -> Point:
        """Convert Optuna's parameters to a point."""
        settings = SamplerDefaults(
            name=chosen["sampler"],
            steps=chosen["steps"],
            shift=round(chosen["shift"], 2),
            guidance_scale=round(chosen["guidance_scale"], 2) if chosen["guided"] else 1.0,
            guidance_interval=self.intervals[chosen["guidance_interval"]],
        )
        length = round(chosen["ema_length"], 4) if chosen.get("averaged") == "over ema_length" else None
        return to_point(self.simplest(settings), length)

    def first(self) -> list[Parameters]:
        """Return the parameters of the points to begin with: the model's own settings, then the ladders."""
        plain = [SamplerDefaults(name="euler", steps=steps, guidance_scale=1.0) for steps in LADDER]
        guided = [SamplerDefaults(name="euler", steps=steps, guidance_scale=GUIDED_SCALE) for steps in GUIDED_LADDER]
        own = self.parameters(self.defaults, self.length)
        return [own, *map(self.parameters, [*plain, *guided])]

    def parameters(self, settings: SamplerDefaults, length: float | None = None) -> Parameters:
        """Convert settings and the length of an average to Optuna's parameters."""
        guided = settings.guidance_scale != 1
        return {
            "sampler": settings.name,
            "steps": settings.steps,
            "shift": settings.shift,
            "guided": guided,
            "guidance_scale": settings.guidance_scale if guided else 1.5,
            "guidance_interval": _interval_name(settings.guidance_interval),
            **self._average(length),
        }

    def _average(self, length: float | None) -> Parameters:
        if self.lengths is None:
            return {}
        if length is None:
            return {"averaged": "as trained", "ema_length": self.lengths[0]}
        return {"averaged": "over ema_length", "ema_length": length}

    def simplest(self, settings: SamplerDefaults) -> SamplerDefaults:
        """Return the simplest settings that give the same images as these."""
        if settings.steps == 1:
            settings = replace(settings, name="euler", shift=1.0)
        if settings.name == "dpmpp_2m" and settings.steps == 2:
            settings = replace(settings, name="euler")  # the first and the last step of dpmpp_2m are euler steps
        guided = guided_evaluations(self.path, settings)
        if not any(guided):
            return replace(settings, guidance_scale=1.0, guidance_interval=EVERYWHERE)
        for interval in INTERVALS:
            same = replace(settings, guidance_interval=interval)
            if guided_evaluations(self.path, same) == guided:
                return same
        return settings


def to_point(settings: SamplerDefaults, length: float | None = None) -> Point:
    """Return settings as plain values, with the length of the average unless it is the one that training chose."""
    point = {**asdict(settings), "guidance_interval": list(settings.guidance_interval)}
    return point if length is None else {**point, "ema_length": length}


def _interval_name(interval: tuple[float, float]) -> str:
    return "{:g} to {:g}".format(*interval)
