"""Run Optuna's suggestions as Ray Tune trials: no point is measured twice, and a signal loses no finished trial.

    study = Study(new_study(...), distributions, to_point, judge, TrialLog(path))
    run_trials("search-1234abcd", trainable, study, SearchConfig(trials=50), at_once=2, folder=folder)

The same call resumes a search that was interrupted.

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import TrialState
from ray import tune
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from animediffusion.platform.cluster import cluster
from animediffusion.platform.errors import Interrupted

REPEATS, MOST_REPEATS = 20, 200
"""Number of known suggestions in a row after which points are drawn at random, and after which the search ends."""
STARTED = "started"
"""How a trial in the log ended that is running, or was running when its search was killed."""
Direction = Literal["maximize", "minimize"]

Point = dict[str, Any]
"""The settings that one trial measures, as plain values. Equal points give equal results."""
Parameters = Mapping[str, Any]
"""Values that Optuna chose, by the names of its distributions."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How good a trial was."""

    values: list[float]
    """Objective values for Optuna."""
    details: Mapping[str, Any]
    """Further JSON values for the trial log."""


Judge = Callable[[str, Mapping[str, Any]], Verdict | None]
"""Function (id of a trial, its last report) -> verdict; None if the trial was cut short."""


@dataclass(frozen=True, slots=True)
class SearchConfig:
    """How long a search runs, and whom it informs."""

    trials: int
    """Number of known points at which the search ends, those of earlier searches included."""
    minutes: float | None = None
    """Time limit; None means no limit."""
    progress: Callable[[str], None] = lambda _line: None
    """Callback for one line of text: the result of a trial, or that the cluster has no room for a trial."""


@dataclass(frozen=True, slots=True)
class TrialEntry:
    """A trial in a trial log."""

    point: Point
    values: list[float] | None
    """Objective values; None if the trial failed."""
    params: Parameters = field(default_factory=dict)
    """Optuna's parameters; empty if the trial failed."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Further JSON values, which depend on the kind of search."""

    @property
    def open(self) -> bool:
        """Whether the trial was cut short, so that the next search tries the point again."""
        return bool(self.details.get("open"))

    def to_json(self) -> Mapping[str, object]:
        """Return the JSON object of the trial's line."""
        params = {"params": dict(self.params)} if self.params else {}
        return {**params, "point": self.point, "values": self.values, **self.details}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Return the entry from its JSON object."""
        details = {key: item for key, item in value.items() if key not in ("params", "point", "values")}
        return cls(value["point"], value["values"], value.get("params", {}), details)


class TrialLog:
    """File of a search's finished trials, one JSON object per line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[TrialEntry]:
        """Return all entries, the oldest first."""
        return [TrialEntry.from_json(value) for value in read_json_lines(self.path)]

    def write(self, entry: TrialEntry) -> None:
        """Append an entry with a single write."""
        append_json(self.path, entry.to_json())


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects of a file with one on each line; an empty list if the file does not exist.

    A line that is not valid JSON is skipped: a process that is killed may leave part of a line.
    """
    values = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            values.append(json.loads(line))
    return values


def append_json(path: Path, value: Mapping[str, object]) -> None:
    """Append a JSON object as one line to a file, with a single write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        # The last line may be incomplete because its process was killed; then the new object must start a new line.
        if file.tell():
            file.seek(-1, os.SEEK_END)
        whole = not file.tell() or file.read(1) == b"\n"
        file.write((b"" if whole else b"\n") + json.dumps(value).encode() + b"\n")


@dataclass
class _RunningTrial:
    """A trial that is running, and its point."""

    trial: optuna.Trial
    point: Point


def new_study(sampler: optuna.samplers.BaseSampler, directions: Sequence[Direction]) -> optuna.Study:
    """Return an Optuna study that is kept in memory and logs only warnings."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(sampler=sampler, directions=list(directions))


class _NotCopied:
    """Base of objects that Ray Tune must not copy or pickle for its restarts: a search resumes from the trial log."""

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __getstate__(self) -> dict[str, object]:
        return {}


class Study(_NotCopied, Searcher):
    """Ray Tune searcher that suggests what Optuna chooses, skipping points that are known or being measured.

    Args:
        study: Optuna's study, with its sampler and directions; it should hold no trials yet.
        distributions: Optuna's parameters.
        to_point: converts parameters to a point; different parameters may give the same point.
        judge: converts the last report of a trial to a verdict.
        log: trial log with the known results; new results are appended.
        first: parameters of the points to begin with.
        metric: name of a value in every report of a trial; Ray Tune requires one.
        sampler_for: returns the sampler for the suggestion with this number. With it, a search that was killed makes
            the suggestions that it would have made: every suggestion has its own random numbers and follows from the
            known results, and the log names the trials that are running, which the next search begins with.
    """

    def __init__(
        self,
        study: optuna.Study,
        distributions: Mapping[str, BaseDistribution],
        to_point: Callable[[Parameters], Point],
        judge: Judge,
        log: TrialLog,
        first: Sequence[Parameters] = (),
        metric: str | None = None,
        sampler_for: Callable[[int], optuna.samplers.BaseSampler] | None = None,
    ) -> None:
        super().__init__(metric=metric, mode="max")
        self.study, self.log, self._sampler_for = study, log, sampler_for
        self._distributions, self._to_point, self._judge = dict(distributions), to_point, judge
        self._known: dict[str, list[float] | None] = {}
        self._running: dict[str, _RunningTrial] = {}
        last = {key_of(entry.point): entry for entry in log.read()}
        for entry in last.values():
            self._add_known(entry)
        for params in first:
            if key_of(to_point(params)) not in last:
                study.enqueue_trial(dict(params))

    @property
    def num_known(self) -> int:
        """Number of points that have a result or have failed."""
        return len(self._known)

    def suggest(self, trial_id: str) -> Any:
        """Return the next point, or FINISHED if MOST_REPEATS suggestions in a row were not new."""
        sampler = self.study.sampler
        number = len(self._known) + len(self._running)
        try:
            for attempt in range(MOST_REPEATS):
                if self._sampler_for is not None:
                    random = optuna.samplers.RandomSampler if attempt >= REPEATS else self._sampler_for
                    self.study.sampler = random(number * MOST_REPEATS + attempt)
                elif attempt == REPEATS:
                    self.study.sampler = optuna.samplers.RandomSampler(seed=len(self._known))
                trial = self.study.ask(fixed_distributions=self._distributions)
                point = self._to_point(trial.params)
                key = key_of(point)
                if key not in self._known and all(key != key_of(other.point) for other in self._running.values()):
                    self._running[trial_id] = _RunningTrial(trial, point)
                    if self._sampler_for is not None:
                        self.log.write(TrialEntry(point, None, trial.params, {"ended": STARTED, "open": True}))
                    return point
                # A later search does not know how often a point was suggested again.
                self._tell(trial, self._known.get(key) if self._sampler_for is None else None)
            return Searcher.FINISHED
        finally:
            self.study.sampler = sampler

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Pass the result of a trial to Optuna and the trial log."""
        ended = self._running.pop(trial_id, None)
        if ended is None:
            return
        verdict = None if error else self._judge(trial_id, result or {})
        values = verdict.values if verdict is not None else None
        if error or verdict is not None:
            self._known[key_of(ended.point)] = values
        self._tell(ended.trial, values)
        if verdict is not None:
            self.log.write(TrialEntry(ended.point, values, ended.trial.params, verdict.details))

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the trial log has everything."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: the trial log is read when a Study is made."""

    def _tell(self, trial: optuna.Trial, values: list[float] | None) -> None:
        if values is None:
            self.study.tell(trial, state=TrialState.FAIL)
        else:
            self.study.tell(trial, values)

    def _add_known(self, entry: TrialEntry) -> None:
        """Give a result of an earlier search to Optuna, or enqueue the trial if it was cut short."""
        values, params = entry.values, dict(entry.params)
        if entry.open:
            self.study.enqueue_trial(params)
            return
        self._known[key_of(entry.point)] = values
        if values is not None and params.keys() == self._distributions.keys():
            with contextlib.suppress(ValueError):  # out of range: an earlier search had a different space
                done = optuna.create_trial(values=values, params=params, distributions=self._distributions)
                self.study.add_trial(done)


def run_trials(
    name: str,
    trainable: Any,
    study: Study,
    config: SearchConfig,
    *,
    at_once: int,
    folder: Path,
    scheduler: TrialScheduler | None = None,
    callback: tune.Callback | None = None,
    reuse: bool = False,
) -> None:
    """Run trials until the study knows enough points, the time is over, or a signal arrives.

    Args:
        name: name of the search, for messages.
        trainable: Ray Tune's trainable with its resources; it gets a point.
        study: chooses the points.
        config: when the search ends, and whom it informs.
        at_once: number of trials in parallel; a new one starts when another ends.
        folder: folder for Ray Tune's own files, which are deleted at the end.
        scheduler: Ray Tune scheduler, which may stop a trial early.
        callback: Ray Tune callback, called with every result.
        reuse: use the process of a finished trial for the next one.

    Raises:
        Interrupted: the process got SIGINT or SIGTERM; finished trials are in the trial log.
    """
    missing = config.trials - study.num_known
    if missing <= 0:
        return
    _silence_tune()
    ray_folder = folder / f"ray-{uuid.uuid4().hex[:8]}"
    stop = threading.Event()
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=study,
            scheduler=scheduler,
            num_samples=missing,
            max_concurrent_trials=at_once,
            time_budget_s=config.minutes * 60 if config.minutes else None,
            reuse_actors=reuse,
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=str(ray_folder),
            verbose=0,
            stop=_Stop(stop),
            callbacks=[callback] if callback else [],
        ),
    )
    try:
        signum = _watch(tuner, stop, study, config.progress)
    finally:
        shutil.rmtree(ray_folder, ignore_errors=True)
    if signum is not None:
        raise Interrupted(signum, f"run {name}", study.num_known, unit="trial")


def _watch(tuner: tune.Tuner, stop: threading.Event, study: Study, warn: Callable[[str], None]) -> int | None:
    """Run fit(), handle signals meanwhile, and return the number of the first signal, if any."""
    known = study.num_known

    def poll(_signum: int | None, moved: Callable[[], None]) -> bool:
        nonlocal known
        if study.num_known != known:
            known = study.num_known
            moved()
        return True

    signum, error = cluster.run_watched(tuner.fit, poll, on_signal=stop.set, report=warn)
    if error is not None and signum is None:
        raise error
    return signum


class _Stop(_NotCopied, tune.Stopper):
    """Tune stopper that ends all trials once its event is set."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:  # noqa: ARG002
        return False

    def stop_all(self) -> bool:
        return self._event.is_set()


def key_of(point: Point) -> str:
    """Return the text that names a point."""
    return json.dumps(point, sort_keys=True)


def _silence_tune() -> None:
    # Only Tune's old output obeys verbose=0; the new one prints tables.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
