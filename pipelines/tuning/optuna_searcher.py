"""Run Optuna's suggestions as Ray Tune trials: no point is measured twice, and a signal loses no finished trial.

    study = Study(new_study(...), distributions, meaning, judge, TrialLog(path))
    run_trials("search-1234abcd", trainable, study, trials=50, at_once=2, place=folder)     # resumes when repeated

Every result is in the trial log, a file of JSON lines that outlives the search. A later search with the same log reads
it first and gives its results to Optuna, without measuring them again. pipelines/tuning/sampler_search.py and
pipelines/tuning/schedule_search.py define what a point is and how it is measured.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import TrialState
from ray import tune
from ray.tune.search import Searcher

from animediffusion.platform.cluster import connect as cluster
from animediffusion.platform.errors import Interrupted
from animediffusion.platform.signals import StopSignals

REPEATS, MOST_REPEATS = 20, 200
"""Number of known suggestions in a row after which points are drawn at random, and after which the search ends."""
POLL_S = 0.5
Direction = Literal["maximize", "minimize"]

Point = dict[str, Any]
"""The settings that one trial measures, as plain values. Equal points give equal results."""
Meaning = Callable[[Mapping[str, Any]], Point]
"""Function that converts Optuna's parameters to a point; different parameters may give the same point."""
Judge = Callable[[str, Point, dict[str, Any]], tuple[list[float], dict[str, Any]] | None]
"""Function (trial, point, last report) -> (values for Optuna, further values for the trial log); None if the trial was
cut short."""


class TrialLog:
    """File of a search's finished trials, one JSON object per line: `params` (Optuna's), `point`, `values` and more."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """Return all entries, the oldest first, without a line that a kill cut short."""
        if not self.path.exists():
            return []
        entries = []
        for line in self.path.read_text().splitlines():
            try:
                entries.append(json.loads(line))
            except ValueError:
                continue
        return entries

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append an entry with a single write."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            # If a kill cut the last line short, this entry must start a new line, or it would be unreadable, too.
            if file.tell():
                file.seek(-1, os.SEEK_END)
            whole = not file.tell() or file.read(1) == b"\n"
            file.write((b"" if whole else b"\n") + json.dumps(entry).encode() + b"\n")


@dataclass
class _Asked:
    """A trial that is running."""

    trial: optuna.Trial
    point: Point


def new_study(sampler: optuna.samplers.BaseSampler, directions: Sequence[Direction]) -> optuna.Study:
    """Return an Optuna study that is kept in memory and logs only warnings."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(sampler=sampler, directions=list(directions))


class _Live:
    """Base of objects that Ray Tune must not copy or pickle for its restarts: a search resumes from the trial log."""

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Study(_Live, Searcher):
    """Ray Tune searcher that suggests what Optuna chooses, skipping points that are known or being measured.

    Args:
        study: Optuna's study, with its sampler and directions; it should hold no trials yet.
        distributions: Optuna's parameters.
        meaning: converts parameters to a point.
        judge: converts the last report of a trial to its values.
        journal: trial log with the known results; new results are appended.
        first: parameters of the points to begin with.
        metric: name of a value in every report of a trial; Ray Tune requires one.
    """

    def __init__(
        self,
        study: optuna.Study,
        distributions: Mapping[str, BaseDistribution],
        meaning: Meaning,
        judge: Judge,
        journal: TrialLog,
        first: Sequence[Mapping[str, Any]] = (),
        metric: str | None = None,
    ) -> None:
        super().__init__(metric=metric, mode="max")
        self.study, self.journal = study, journal
        self._distributions, self._meaning, self._judge = dict(distributions), meaning, judge
        self._known: dict[str, list[float] | None] = {}
        self._asked: dict[str, _Asked] = {}
        for entry in journal.read():
            self._remember(entry)
        for params in first:
            study.enqueue_trial(dict(params))

    @property
    def num_known(self) -> int:
        """Number of points that have a result or have failed."""
        return len(self._known)

    def suggest(self, trial_id: str) -> Any:
        """Return the next point, or FINISHED if MOST_REPEATS suggestions in a row were not new."""
        sampler = self.study.sampler
        try:
            for attempt in range(MOST_REPEATS):
                if attempt == REPEATS:
                    self.study.sampler = optuna.samplers.RandomSampler(seed=len(self._known))
                trial = self.study.ask(fixed_distributions=self._distributions)
                point = self._meaning(trial.params)
                key = _key(point)
                if key not in self._known and all(key != _key(asked.point) for asked in self._asked.values()):
                    self._asked[trial_id] = _Asked(trial, point)
                    return point
                self._tell(trial, self._known.get(key))
            return Searcher.FINISHED
        finally:
            self.study.sampler = sampler

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Pass the result of a trial to Optuna and the trial log."""
        asked = self._asked.pop(trial_id, None)
        if asked is None:
            return
        verdict = None if error else self._judge(trial_id, asked.point, result or {})
        if error or verdict is not None:
            self._known[_key(asked.point)] = verdict[0] if verdict else None
        self._tell(asked.trial, verdict[0] if verdict else None)
        if verdict is not None:
            values, more = verdict
            self.journal.write({"params": asked.trial.params, "point": asked.point, "values": values, **more})

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the trial log has everything."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: the trial log is read when a Study is made."""

    def _tell(self, trial: optuna.Trial, values: list[float] | None) -> None:
        if values is None:
            self.study.tell(trial, state=TrialState.FAIL)
        else:
            self.study.tell(trial, values)

    def _remember(self, entry: Mapping[str, Any]) -> None:
        values, params = entry["values"], entry.get("params", {})
        if entry.get("open"):
            self.study.enqueue_trial(params)
            return
        self._known[_key(entry["point"])] = values
        if values is not None and params.keys() == self._distributions.keys():
            with contextlib.suppress(ValueError):  # out of range: an earlier search had a different space
                done = optuna.create_trial(values=values, params=params, distributions=self._distributions)
                self.study.add_trial(done)


def run_trials(
    name: str,
    trainable: Any,
    study: Study,
    *,
    trials: int,
    at_once: int,
    minutes: float | None = None,
    scheduler: Any = None,
    callback: tune.Callback | None = None,
    reuse: bool = False,
    place: Path,
    tell: Callable[[str], None] | None = None,
) -> None:
    """Run trials until the study knows `trials` points, the time is over, or a signal arrives.

    Args:
        name: name of the search, for messages.
        trainable: Ray Tune's trainable with its resources; it gets a point.
        study: chooses the points.
        trials: number of known points at which the search ends.
        at_once: number of trials in parallel; a new one starts when another ends.
        minutes: stop all trials after this many minutes.
        scheduler: Ray Tune scheduler, which may stop a trial early.
        callback: Ray Tune callback, called with every result.
        reuse: use the process of a finished trial for the next one.
        place: folder for Ray Tune's own files, which are deleted at the end.
        tell: called with one line when the cluster has no room for a trial.

    Raises:
        Interrupted: the process got SIGINT or SIGTERM; finished trials are in the trial log.
    """
    missing = trials - study.num_known
    if missing <= 0:
        return
    _be_quiet()
    notes = place / f"ray-{uuid.uuid4().hex[:8]}"
    stop = threading.Event()
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=study,
            scheduler=scheduler,
            num_samples=missing,
            max_concurrent_trials=at_once,
            time_budget_s=minutes * 60 if minutes else None,
            reuse_actors=reuse,
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=str(notes),
            verbose=0,
            stop=_Stop(stop),
            callbacks=[callback] if callback else [],
        ),
    )
    try:
        signum = _watch(tuner, stop, study, tell or (lambda _: None))
    finally:
        shutil.rmtree(notes, ignore_errors=True)
    if signum is not None:
        raise Interrupted(signum, name, study.num_known, unit="trial")


def _watch(tuner: tune.Tuner, stop: threading.Event, study: Study, tell: Callable[[str], None]) -> int | None:
    """Run fit() in a thread, handle signals meanwhile, and return the number of the first signal, if any."""
    failed: list[BaseException] = []

    def body() -> None:
        try:
            tuner.fit()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=body, name="tune", daemon=True)
    known = study.num_known
    with StopSignals(stop.set) as signals, cluster.waits(tell) as moved:
        thread.start()
        while thread.is_alive():
            thread.join(POLL_S)
            if study.num_known != known:
                known = study.num_known
                moved()
    if failed and signals.number is None:
        raise failed[0]
    return signals.number


class _Stop(_Live, tune.Stopper):
    """Tune stopper that ends all trials once its event is set."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:  # noqa: ARG002
        return False

    def stop_all(self) -> bool:
        return self._event.is_set()


def _key(point: Point) -> str:
    return json.dumps(point, sort_keys=True)


def _be_quiet() -> None:
    # Only Tune's old output obeys verbose=0; the new one prints tables.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
