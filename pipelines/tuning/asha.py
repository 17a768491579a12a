"""Early stopping of the trials of `tune schedule` (ASHA), and the reports on how each trial ended.

pipelines/tuning/schedule_search.py runs the search itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler

from animediffusion.pipelines.tuning.optuna_searcher import Study
from animediffusion.platform.tracking.run import Run

REDUCTION = 3
"""One in this many trials at a rung continues to the next rung, which has this many times the steps."""


class Halving(AsyncHyperBandScheduler):
    """ASHA scheduler that asks trials to end instead of killing them, and remembers which ones it asked.

    Args:
        rungs: steps at which trials report.
        stops: the actor Stops, which passes the requests on.
    """

    def __init__(self, rungs: list[int], stops: Any) -> None:
        super().__init__(
            time_attr="step",
            metric="psnr",
            mode="max",
            grace_period=rungs[0],
            max_t=rungs[-1],
            reduction_factor=REDUCTION,
        )
        self._last = rungs[-1]
        self._stops = stops
        self._ended: set[str] = set()

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Ask a trial to end if it is not among the best third of its rung so far; always return CONTINUE."""
        if trial.trial_id not in self._ended and result["step"] < self._last:
            decision = super().on_trial_result(tune_controller, trial, result)
            if decision == self.STOP:
                self._ended.add(trial.trial_id)
                self._stops.add.remote(result["mlflow_run_id"])
        return str(self.CONTINUE)

    def judge(
        self,
        trial_id: str,
        point: dict[str, Any],  # noqa: ARG002
        result: dict[str, Any],
    ) -> tuple[list[float], dict[str, Any]] | None:
        """Return the PSNR and the trial log's further values for a trial that ended, or None if it never reported.

        A trial that the time limit cut off is marked as open: the next search tries it again.
        """
        if "psnr" not in result:
            return None
        kept = {key: result[key] for key in ("step", "sampler_steps", "mlflow_run_id")}
        kept["history"] = json.loads(result["history"])
        early = "stopped early" if trial_id in self._ended else "cut"
        ended = "finished" if result["step"] >= self._last else early
        return [result["psnr"]], {**kept, "ended": ended, "open": ended == "cut"}


class RungReport(tune.Callback):
    """Tune callback that reports each trial's outcome to the caller and MLflow, and logs failures in the trial log."""

    def __init__(self, total: int, study: Study, record: Run, progress: Callable[[str], None] | None) -> None:
        self._total, self._study, self._progress = total, study, progress
        self._tracking_uri = record.tracking_uri

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        result = trial.last_result
        if "psnr" not in result:
            return
        [entry] = [e for e in self._study.journal.read() if e.get("mlflow_run_id") == result["mlflow_run_id"]]
        run = Run.attach(self._tracking_uri, result["mlflow_run_id"])
        run.log({"psnr": result["psnr"]}, result["step"])
        run.set_tags({"ended": entry["ended"]})
        run.finish("KILLED" if entry["ended"] == "cut" else "FINISHED")
        self._say(f"{entry['ended']} at step {result['step']}: {result['psnr']:.2f} dB  {_short(trial.config)}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        said = str(trial.get_error() or "").strip().splitlines() or ["no reason given"]
        self._study.journal.write({"point": trial.config, "values": None, "ended": "failed", "reason": said[-1]})
        self._say(f"failed: {said[-1]}  {_short(trial.config)}")

    def _say(self, line: str) -> None:
        if self._progress is not None:
            self._progress(f"trial {self._study.num_known}/{self._total}  {line}")


def _short(point: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in point.items())
