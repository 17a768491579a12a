"""Early stopping of the trials of `tune schedule` (ASHA), and the reports on how each trial ended.

pipelines/tuning/schedule_search.py runs the search itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ray import tune
from ray.tune.schedulers import FIFOScheduler

from animediffusion.pipelines.training.trial_report import TrialReport
from animediffusion.pipelines.tuning.optuna_searcher import (
    Point,
    SearchConfig,
    Study,
    TrialEntry,
    Verdict,
    append_json,
    key_of,
    read_json_lines,
)
from animediffusion.platform.cluster.ray_compat import last_line
from animediffusion.platform.tracking.tracking import Run

REDUCTION = 3
"""One in this many trials at a rung continues to the next rung, which has this many times the steps."""


class Rungs:
    """Decides at each rung whether a trial continues, and keeps all results in a file that outlives the search.

    The decisions are those of Ray Tune's AsyncHyperBandScheduler with one bracket, which names trials by an id of the
    process and forgets them with it. Here the settings name a trial. The next search repeats a trial that was running
    when its search was killed; the repeated trial gets the same decisions as before, and counts once.

    Args:
        steps: steps of the rungs, ascending; no trial is stopped at the last one.
        path: file of the results, one JSON object per line.
        entries: trial log, for searches that were begun before this file existed.
    """

    def __init__(self, steps: Sequence[int], path: Path, entries: Iterable[TrialEntry] = ()) -> None:
        self._path = path
        self._results: dict[int, dict[str, float]] = {step: {} for step in steps[:-1]}
        self._stopped: set[tuple[str, int]] = set()
        for line in read_json_lines(path):
            self._add(key_of(line["point"]), line["step"], line["psnr"], bool(line["stopped"]))
        for entry in entries:
            for step, psnr in entry.details.get("history", ()):
                self._add(key_of(entry.point), step, psnr, False)

    def stops(self, point: Point, step: int, psnr: float) -> bool:
        """Add a result and return whether the trial must end, because it is not among the best third of this rung."""
        if step not in self._results:
            return False
        key, others = key_of(point), self._results[step]
        if key not in others:
            stopped = bool(others) and psnr < np.nanpercentile(list(others.values()), 100 * (1 - 1 / REDUCTION))
            append_json(self._path, {"point": point, "step": step, "psnr": psnr, "stopped": bool(stopped)})
            self._add(key, step, psnr, bool(stopped))
        return (key, step) in self._stopped

    def _add(self, key: str, step: int, psnr: float, stopped: bool) -> None:
        if step in self._results and key not in self._results[step]:
            self._results[step][key] = psnr
            if stopped:
                self._stopped.add((key, step))


class AshaScheduler(FIFOScheduler):
    """ASHA scheduler that asks trials to end instead of killing them, and remembers which ones it asked.

    Args:
        rungs: results of all trials, those of earlier searches included.
        last: steps of a trial that is not stopped.
        stops: handle of the actor TrialStops, which passes the requests on.
    """

    def __init__(self, rungs: Rungs, last: int, stops: Any) -> None:
        super().__init__()
        self._rungs, self._last, self._stops = rungs, last, stops
        self._ended: set[str] = set()

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:  # noqa: ARG002
        """Ask a trial to end if it is not among the best third of its rung so far; always return CONTINUE."""
        report = TrialReport.of(result)
        if (
            report is not None
            and trial.trial_id not in self._ended
            and self._rungs.stops(trial.config, report.step, report.psnr)
        ):
            self._ended.add(trial.trial_id)
            self._stops.add.remote(report.mlflow_run_id)
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
        error = trial.get_error()
        found = "no reason given" if error is None else last_line(error)
        self._study.log.write(TrialEntry(trial.config, None, details={"ended": "failed", "reason": found}))
        self._report(f"failed: {found}  {_short(trial.config)}")

    def _report(self, line: str) -> None:
        self._config.progress(f"trial {self._study.num_known}/{self._config.trials}  {line}")


def _short(point: Point) -> str:
    return ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in point.items())
