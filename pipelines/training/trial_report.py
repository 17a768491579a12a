"""Intermediate reports of a run to a search: the quality at some steps (rungs), so that a bad run can end early.

pipelines/tuning/schedule_search.py starts the runs, and pipelines/tuning/asha.py decides which of them continue.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import ray.train

from animediffusion.models.augmentation.augment import Batch
from animediffusion.models.bundle import Bundle, SamplerDefaults
from animediffusion.models.training.loop import TrainState
from animediffusion.pipelines.evaluation.measure import measure
from animediffusion.pipelines.evaluation.point import Point
from animediffusion.pipelines.training.recipe import TrainConfig


@ray.remote(num_cpus=0)
class Stops:
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


class Rungs:
    """Reports of one worker to a search.

    Args:
        shared: the config of train_worker. Its `rungs` hold steps (the steps at which to report), rows (a Batch or an
            object reference to one) and stops (the actor Stops, or None).
    """

    def __init__(self, shared: dict[str, Any]) -> None:
        self.steps: list[int] = shared["rungs"]["steps"]
        rows = shared["rungs"]["rows"]
        self.rows: Batch = ray.get(rows) if isinstance(rows, ray.ObjectRef) else rows
        self.stops, self.answer = shared["rungs"].get("stops"), None
        self.run_id = shared["mlflow_run_id"]
        self.config = TrainConfig.check(shared["run"]).bundle_config(shared["image_size"])
        self.history: list[tuple[int, float]] = []

    def after(self, state: TrainState, rank: int) -> None:
        """Report if the last step is a rung; all ranks must call this."""
        if state.step in self.steps:
            ray.train.report(self.report(state) if rank == 0 else {})

    def stopped(self) -> bool:
        """Return whether the search has ended this run, as far as is known without waiting for the actor."""
        if self.stops is None:
            return False
        if self.answer is not None and ray.wait([self.answer], timeout=0)[0]:
            if ray.get(self.answer):
                return True
            self.answer = None
        if self.answer is None:
            self.answer = self.stops.has.remote(self.run_id)
        return False

    def report(self, state: TrainState) -> dict[str, Any]:
        """Return step, psnr, sampler_steps, history (JSON: [step, psnr] of all rungs so far) and mlflow_run_id."""
        bundle = Bundle(self.config, state.averaged(), {}, "", Path())
        found = best_of(bundle, self.rows)
        self.history.append((state.step, found.psnr))
        return {
            "step": state.step,
            "psnr": found.psnr,
            "sampler_steps": found.steps,
            "history": json.dumps(self.history),
            "mlflow_run_id": self.run_id,
        }


def best_of(bundle: Bundle, rows: Batch) -> Point:
    """Return the better measurement of two samplers without guidance: the recipe's, and a single step.

    Both are tried because predictions differ in how many steps they need; `tune sampler` searches further afterwards.
    """
    own = replace(bundle.config.sampler, guidance_scale=1.0)
    choices = dict.fromkeys([own, SamplerDefaults(steps=1)])
    return max((measure(bundle, rows, settings) for settings in choices), key=lambda point: point.psnr)
