"""Optuna's suggestions as trials of Ray Tune: none asked twice, every result on disk, stopped by a signal in one piece.

    study = Study(new_study(...), distributions, meaning, judge, TrialLog(path))
    run_trials("search-1234abcd", trainable, study, trials=50, at_once=2, place=folder)     # again: continues

What was measured is in the journal, a file of JSON lines that outlives the search. A later one of the same things reads
it first: what stands there is told to Optuna and costs nothing. Not here: what a point is and how it is measured, see
pipelines/tuning/sampler_search.py and pipelines/tuning/schedule_search.py.
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

from animediffusion.pipelines.training.driver import Signals
from animediffusion.platform.cluster import connect as cluster
from animediffusion.platform.errors import Interrupted

REPEATS, MOST_REPEATS = 20, 200
"""Known suggestions in a row: after so many they are drawn at random, and then the search ends."""
POLL_S = 0.5
Direction = Literal["maximize", "minimize"]

Point = dict[str, Any]
"""What one trial is to measure: plain values. Equal points give equal results."""
Meaning = Callable[[Mapping[str, Any]], Point]
"""The point that Optuna's parameters mean; several sets of them may mean the same."""
Judge = Callable[[str, Point, dict[str, Any]], tuple[list[float], dict[str, Any]] | None]
"""(trial, point, last report) -> what Optuna is told, and what else the journal keeps; None if it was cut short."""


class TrialLog:
    """The finished trials of a search, one JSON object a line: `params` (Optuna's), `point`, `values`, and more."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """All entries, the oldest first; a line that a kill cut short is left out."""
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
        """Add an entry, in one piece."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            # A line that a kill cut short must not swallow this one.
            if file.tell():
                file.seek(-1, os.SEEK_END)
            whole = not file.tell() or file.read(1) == b"\n"
            file.write((b"" if whole else b"\n") + json.dumps(entry).encode() + b"\n")


@dataclass
class _Asked:
    """A trial under way."""

    trial: optuna.Trial
    point: Point


def new_study(sampler: optuna.samplers.BaseSampler, directions: Sequence[Direction]) -> optuna.Study:
    """Optuna's study in memory, without its remarks."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(sampler=sampler, directions=list(directions))


class _Live:
    """Ray Tune copies and pickles what it is given, for a restart of its own; ours reads the journal."""

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Study(_Live, Searcher):
    """Ray Tune's searcher: Optuna's choice among the points that are neither known nor under way.

    Args:
        study: Optuna's, with its sampler and directions; it should hold no trials yet.
        distributions: Optuna's parameters.
        meaning: from parameters to a point.
        judge: what became of a trial.
        journal: what is known already, and where results go.
        first: parameters of the points to begin with.
        metric: what every report of a trial holds; Ray Tune insists on it.
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
        """Points with a result, or that failed."""
        return len(self._known)

    def suggest(self, trial_id: str) -> Any:
        """The next point, or FINISHED when nothing new comes to mind."""
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
        """Tell Optuna and the journal what became of a trial."""
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
        """Nothing: the journal has everything."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see `save`."""

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
            with contextlib.suppress(ValueError):  # out of range: found in an earlier, other space
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
    """Run trials until the study knows `trials` points, the time is over, or a signal comes.

    Args:
        name: of the search, for messages.
        trainable: Ray Tune's, with its resources; gets a point.
        study: chooses the points.
        trials: known points to have in the end.
        at_once: trials side by side; each starts when another ends.
        minutes: stop all trials after so long.
        scheduler: may stop a trial early.
        callback: told of every result.
        reuse: a process that has done one trial does the next.
        place: an existing folder for Ray Tune's own notes, which are deleted at the end.
        tell: gets a line where the cluster has no room for a trial.

    Raises:
        Interrupted: SIGINT or SIGTERM came; what is finished is in the journal.
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
        heard = _watch(tuner, stop, study, tell or (lambda _: None))
    finally:
        shutil.rmtree(notes, ignore_errors=True)
    if heard:
        raise Interrupted(heard[0], name, study.num_known, unit="trial")


def _watch(tuner: tune.Tuner, stop: threading.Event, study: Study, tell: Callable[[str], None]) -> list[int]:
    """fit() in a thread, so that this one can hear signals; returns those that it heard."""
    failed: list[BaseException] = []

    def body() -> None:
        try:
            tuner.fit()
        except BaseException as error:
            failed.append(error)

    heard: list[int] = []
    thread = threading.Thread(target=body, name="tune", daemon=True)
    known = study.num_known
    with Signals(heard, stop.set), cluster.waits(tell) as moved:
        thread.start()
        while thread.is_alive():
            thread.join(POLL_S)
            if study.num_known != known:
                known = study.num_known
                moved()
    if failed and not heard:
        raise failed[0]
    return heard


class _Stop(_Live, tune.Stopper):
    """Ends all trials when it is told to."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:  # noqa: ARG002
        return False

    def stop_all(self) -> bool:
        return self._event.is_set()


def _key(point: Point) -> str:
    return json.dumps(point, sort_keys=True)


def _be_quiet() -> None:
    # Tune prints tables unless it is told to use its old output, which obeys verbose=0.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
