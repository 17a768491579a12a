"""Early stopping of the trials of `tune schedule` (ASHA), and the reports on how each trial ended.

pipelines/tuning/schedule_search.py runs the search itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler

from animediffusion.pipelines.training.trial_report import TrialReport
from animediffusion.pipelines.tuning.optuna_searcher import Point, SearchConfig, Study, TrialEntry, Verdict
from animediffusion.platform.tracking.tracking import Run

REDUCTION = 3
"""One in this many trials at a rung continues to the next rung, which has this many times the steps."""


class AshaScheduler(AsyncHyperBandScheduler):
    """ASHA scheduler that asks trials to end instead of killing them, and remembers which ones it asked.

    Args:
        rungs: steps at which trials report.
        stops: handle of the actor TrialStops, which passes the requests on.
    """

    def __init__(self, rungs: tuple[int, ...], stops: Any) -> None:
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

    def judge(self, trial_id: str, result: Mapping[str, Any]) -> Verdict | None:
        """Return the PSNR of a trial that ended, or None if it never reported.

        A trial that the time limit cut off is marked as open: the next search tries it again.
        """
        report = TrialReport.of(result)
        if report is None:
            return None
        early = "stopped early" if trial_id in self._ended else "cut"
        ended = "finished" if report.step >= self._last else early
        details = {
            "step": report.step,
            "sampler_steps": report.sampler_steps,
            "mlflow_run_id": report.mlflow_run_id,
            "history": report.history,
            "ended": ended,
            "open": ended == "cut",
        }
        return Verdict([report.psnr], details)


class TrialOutcomes(tune.Callback):
    """Tune callback that reports each trial's outcome to the caller and MLflow, and logs failures in the trial log."""

    def __init__(self, config: SearchConfig, study: Study, record: Run) -> None:
        self._config, self._study = config, study
        self._tracking_uri = record.tracking_uri

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        report = TrialReport.of(trial.last_result)
        if report is None:
            return
        entries = self._study.log.read()
        [details] = [e.details for e in entries if e.details.get("mlflow_run_id") == report.mlflow_run_id]
        ended = details["ended"]
        run = Run.attach(self._tracking_uri, report.mlflow_run_id)
        run.log({"psnr": report.psnr}, report.step)
        run.set_tags({"ended": ended})
        run.finish("KILLED" if ended == "cut" else "FINISHED")
        self._report(f"{ended} at step {report.step}: {report.psnr:.2f} dB  {_short(trial.config)}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        lines = str(trial.get_error() or "").strip().splitlines() or ["no reason given"]
        self._study.log.write(TrialEntry(trial.config, None, details={"ended": "failed", "reason": lines[-1]}))
        self._report(f"failed: {lines[-1]}  {_short(trial.config)}")

    def _report(self, line: str) -> None:
        self._config.progress(f"trial {self._study.num_known}/{self._config.trials}  {line}")


def _short(point: Point) -> str:
    return ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in point.items())
