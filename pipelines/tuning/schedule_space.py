"""The search space of `tune schedule`: a recipe's changes as Optuna's parameters, points, settings or a recipe file.

A point is a flat dictionary of only those settings that have an effect: `{path, shift, times, time_mean, prediction,
loss_weight, learning_rate, drop_reference}`. pipelines/tuning/schedule_search.py runs the trials.
"""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from animediffusion.models.bundle import SamplerDefaults
from animediffusion.models.diffusion.denoiser import MIN_ALPHA_FOR_EPS
from animediffusion.models.diffusion.path import PathConfig, build_path
from animediffusion.pipelines.training.recipe import TrainConfig, Values
from animediffusion.pipelines.tuning.optuna_searcher import Parameters, Point

PATHS = {
    "flow": {"name": "flow", "zero_terminal": False},
    "cosine": {"name": "cosine", "zero_terminal": False},
    "linear": {"name": "linear", "zero_terminal": False},
    "linear_to_noise": {"name": "linear", "zero_terminal": True},
}
PREDICTIONS = ("x0", "v", "eps")
SHIFTS = (0.3, 5.0)
TIME_MEANS = (-1.0, 3.0)
RATES = (0.1, 4.0)
"""Range of the learning rate, as multiples of the recipe's; Muon's rate is scaled by the same factor."""
DROPS = (0.0, 0.3)
DIGITS = 3


class ScheduleSpace:
    """All points that a search may try, starting from one recipe.

    Args:
        base: the recipe; it is part of the space, even if its values are outside of the usual ranges.
    """

    def __init__(self, base: TrainConfig) -> None:
        self.base = base
        own = self.first()
        rates = [share * base.optimizer.learning_rate for share in RATES]
        self.distributions: dict[str, BaseDistribution] = {
            "path": CategoricalDistribution(list(PATHS)),
            "shift": _range(SHIFTS, own["shift"], log=True),
            "times": CategoricalDistribution(["logit_normal", "uniform"]),
            "time_mean": _range(TIME_MEANS, own["time_mean"]),
            "prediction": CategoricalDistribution(list(dict.fromkeys([*PREDICTIONS, own["prediction"]]))),
            "loss_weight": CategoricalDistribution(["flat", "min_snr"]),
            "learning_rate": _range(rates, own["learning_rate"], log=True),
            "drop_reference": _range(DROPS, own["drop_reference"]),
        }

    def first(self) -> Point:
        """Return the parameters of the unchanged recipe."""
        path, how = self.base.path, self.base.objective.denoising
        linear = "linear_to_noise" if path.zero_terminal else "linear"
        return {
            "path": linear if path.name == "linear" else path.name,
            "shift": path.shift,
            "times": how.time_distribution,
            "time_mean": how.time_mean,
            "prediction": self.base.prediction,
            "loss_weight": how.loss_weight,
            "learning_rate": self.base.optimizer.learning_rate,
            "drop_reference": how.drop_reference,
        }

    def own(self) -> Point:
        """Return the point of the unchanged recipe."""
        return self.point(self.first())

    def point(self, chosen: Parameters) -> Point:
        """Convert Optuna's parameters to a point; v replaces eps on a path whose noise eps cannot start from."""
        point = {key: _short(value) if isinstance(value, float) else value for key, value in chosen.items()}
        if point["path"] != "flow":
            del point["shift"]
        if point["times"] != "logit_normal":
            del point["time_mean"]
        if point["prediction"] == "eps":
            path = build_path(path_of(self.base.path, point))
            if float(path.alpha(torch.tensor(path.t_max))) < MIN_ALPHA_FOR_EPS:
                point["prediction"] = "v"
        return point


def changed(base: TrainConfig, point: Point) -> Values:
    """Return the values of a recipe, with those of a point replaced."""
    values: Values = base.model_dump(mode="json")
    values["path"] = asdict(path_of(base.path, point))
    values["prediction"] = point["prediction"]
    values["objective"]["denoising"].update(_denoising(point))
    values["optimizer"].update(_rates(base, point))
    return values


def as_recipe(recipe: str, base: TrainConfig, best: Point, sampler_steps: int, name: str, headline: str) -> str:
    """Return the text of a recipe file that trains like the best trial; it only overrides the base recipe.

    Args:
        recipe: name or YAML file of the base recipe, with which the search began.
        base: the base recipe, resolved.
        best: the best point.
        sampler_steps: number of steps of the sampler with which it was measured.
        name: name of the new recipe.
        headline: comment at the top of the file, without the period.
    """
    path = path_of(base.path, best)
    sampler = base.sampler or SamplerDefaults()
    if sampler_steps == 1:
        sampler = SamplerDefaults(steps=1)
    values = {
        "base": str(Path(recipe).absolute()) if recipe.endswith((".yaml", ".yml")) else recipe,
        "recipe": name,
        "data": base.data,
        "path": {key: getattr(path, key) for key in ("name", "shift", "sigma_max", "zero_terminal")},
        "prediction": best["prediction"],
        "objective": {"denoising": _denoising(best)},
        "optimizer": _rates(base, best),
        "sampler": {**asdict(sampler), "guidance_scale": 1.0, "guidance_interval": list(sampler.guidance_interval)},
    }
    comment = "\n".join(f"# {line}" for line in textwrap.wrap(f"{headline}.", 118))
    return f"{comment}\n{yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=120)}"


def path_of(base: PathConfig, point: Point) -> PathConfig:
    """Return the path of a point; `base`, the recipe's path, gives the values that the point does not set."""
    flow = point["path"] == "flow"
    values = asdict(base) | PATHS[point["path"]] | {"sigma_max": base.sigma_max if flow else None}
    return PathConfig(**values | ({"shift": point["shift"]} if flow else {}))


def _denoising(point: Point) -> Point:
    mean = {"time_mean": point["time_mean"]} if "time_mean" in point else {}
    return {
        "time_distribution": point["times"],
        **mean,
        "loss_weight": point["loss_weight"],
        "drop_reference": point["drop_reference"],
    }


def _rates(base: TrainConfig, point: Point) -> dict[str, float]:
    rate, muon = point["learning_rate"], base.optimizer.muon_learning_rate
    if muon is None:
        return {"learning_rate": rate}
    return {"learning_rate": rate, "muon_learning_rate": _short(muon * rate / base.optimizer.learning_rate)}


def _range(usual: tuple[float, ...] | list[float], own: float, *, log: bool = False) -> FloatDistribution:
    return FloatDistribution(min(*usual, own), max(*usual, own), log=log)


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
