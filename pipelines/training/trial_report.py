"""Reports of a training run to a search: the quality at some steps, so that the search can end a bad run early.

pipelines/tuning/schedule_search.py starts the runs, and pipelines/tuning/asha.py decides which of them continue.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import ray
import ray.train

from animediffusion.models.augmentation.augment import Batch
from animediffusion.models.bundle import Bundle, BundleConfig, SamplerDefaults
from animediffusion.models.training.loop import TrainState
from animediffusion.pipelines.evaluation.measure import Measurement, measure


@ray.remote(num_cpus=0)
class TrialStops:
    """Actor with the runs of a search that must end before their last step.

    Each run polls this actor and ends itself: after a kill, Ray would keep the run's CPUs reserved for minutes.
    """

    def __init__(self) -> None:
        self._runs: set[str] = set()

    def add(self, run_id: str) -> None:
        """Request the end of a run."""
        self._runs.add(run_id)

    def has(self, run_id: str) -> bool:
        """Return whether the end of a run was requested."""
        return run_id in self._runs


@dataclass(frozen=True, slots=True)
class TrialContext:
    """What a search hands to the workers of its runs."""

    steps: tuple[int, ...]
    """Steps at which a run reports, ascending."""
    rows: Batch | ray.ObjectRef[Batch]
    """Rows on which its quality is measured."""
    stops: Any
    """Handle of the actor TrialStops; None if no run ends early."""


@dataclass(frozen=True, slots=True)
class TrialReport:
    """Report of a run at one of the steps of its search."""

    step: int
    psnr: float
    """PSNR in dB of the averaged weights, with the better of two samplers (best_of)."""
    sampler_steps: int
    """Number of steps of that sampler."""
    history: tuple[tuple[int, float], ...]
    """(step, psnr) of all reports so far, this one included."""
    mlflow_run_id: str

    def to_metrics(self) -> dict[str, Any]:
        """Return the dictionary that ray.train.report() takes."""
        return {
            "step": self.step,
            "psnr": self.psnr,
            "sampler_steps": self.sampler_steps,
            "history": json.dumps(self.history),
            "mlflow_run_id": self.mlflow_run_id,
        }

    @classmethod
    def of(cls, metrics: Mapping[str, Any]) -> Self | None:
        """Return the report from the metrics of a Ray Tune trial; None if the trial has not reported yet."""
        if "psnr" not in metrics:
            return None
        return cls(
            step=metrics["step"],
            psnr=metrics["psnr"],
            sampler_steps=metrics["sampler_steps"],
            history=tuple((step, psnr) for step, psnr in json.loads(metrics["history"])),
            mlflow_run_id=metrics["mlflow_run_id"],
        )


class TrialReporter:
    """Reports of one worker to a search.

    Args:
        context: when and on what to report.
        config: configuration of the bundle that the run would produce.
        mlflow_run_id: id of the run in MLflow.
    """

    def __init__(self, context: TrialContext, config: BundleConfig, mlflow_run_id: str) -> None:
        self._steps, self._stops, self._answer = context.steps, context.stops, None
        self._rows: Batch = ray.get(context.rows) if isinstance(context.rows, ray.ObjectRef) else context.rows
        self._config, self._run_id = config, mlflow_run_id
        self._history: list[tuple[int, float]] = []

    def after_step(self, state: TrainState, rank: int) -> None:
        """Report if the search asks for a report at this step; all ranks must call this."""
        if state.step in self._steps:
            ray.train.report(self.report(state).to_metrics() if rank == 0 else {})

    def stop_requested(self) -> bool:
        """Return whether the search has ended this run, as far as is known without waiting for the actor."""
        if self._stops is None:
            return False
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            if ray.get(self._answer):
                return True
            self._answer = None
        if self._answer is None:
            self._answer = self._stops.has.remote(self._run_id)
        return False

    def report(self, state: TrainState) -> TrialReport:
        """Measure the averaged weights."""
        found = best_of(Bundle(self._config, state.averaged(), {}, "", Path()), self._rows)
        self._history.append((state.step, found.psnr))
        return TrialReport(state.step, found.psnr, found.steps, tuple(self._history), self._run_id)


def best_of(bundle: Bundle, rows: Batch) -> Measurement:
    """Return the better measurement of two samplers without guidance: the recipe's, and a single step.

    Both are tried because predictions differ in how many steps they need; `tune sampler` searches further afterwards.
    """
    own = replace(bundle.config.sampler, guidance_scale=1.0)
    choices = dict.fromkeys([own, SamplerDefaults(steps=1)])
    return max((measure(bundle, rows, settings) for settings in choices), key=lambda one: one.psnr)
