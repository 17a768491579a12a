"""What a run reports to a search on its way: quality at some steps, so that a bad one can be ended there.

Not here: which runs there are and which go on, see pipelines/tuning/schedule_search.py.
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
    """The runs of a search that are to end before their last step.

    They end by themselves: of one that is killed, Ray keeps the CPUs reserved for minutes.
    """

    def __init__(self) -> None:
        self._runs: set[str] = set()

    def add(self, run_id: str) -> None:
        """This run is to end."""
        self._runs.add(run_id)

    def has(self, run_id: str) -> bool:
        """Whether it is."""
        return run_id in self._runs


class Rungs:
    """The reports of one worker.

    Args:
        shared: of train_worker; its `rungs` are steps (when to report), rows (a Batch or a reference to one) and stops
            (the actor Stops, or None).
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
        """Report if the step that was just done is a rung; all ranks come here."""
        if state.step in self.steps:
            ray.train.report(self.report(state) if rank == 0 else {})

    def stopped(self) -> bool:
        """Whether the search has ended this run, as far as is known without waiting."""
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
        """step, psnr, sampler_steps, history (JSON: [step, psnr] of all rungs so far), mlflow_run_id."""
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
    """What the weights can do: the better of the recipe's sampler and of one step, without guidance.

    Predictions differ in how many steps they need; which are best is for `tune sampler` to find afterwards.
    """
    own = replace(bundle.config.sampler, guidance_scale=1.0)
    choices = dict.fromkeys([own, SamplerDefaults(steps=1)])
    return max((measure(bundle, rows, settings) for settings in choices), key=lambda point: point.psnr)
