"""What a run reports to a search on its way: quality at some steps, so that a bad one can be ended there.

Not here: which runs there are and which go on, see pipelines/schedule.py.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import ray.train

from animediffusion.models.augment import Batch
from animediffusion.models.bundle import Bundle, SamplerDefaults
from animediffusion.models.training import TrainState
from animediffusion.pipelines.measure import measure
from animediffusion.pipelines.pareto import Point
from animediffusion.pipelines.recipe import TrainConfig


class Rungs:
    """The reports of one worker.

    Args:
        shared: of train_worker; its `rungs` are steps (when to report) and rows (reference to a Batch).
    """

    def __init__(self, shared: dict[str, Any]) -> None:
        self.steps: list[int] = shared["rungs"]["steps"]
        self.rows: Batch = ray.get(shared["rungs"]["rows"])
        self.run_id = shared["mlflow_run_id"]
        self.config = TrainConfig.check(shared["run"]).bundle_config(shared["image_size"])
        self.history: list[tuple[int, float]] = []

    def after(self, state: TrainState, rank: int) -> None:
        """Report if the step that was just done is a rung; all ranks come here."""
        if state.step in self.steps:
            ray.train.report(self.report(state) if rank == 0 else {})

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
