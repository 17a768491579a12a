"""`tune schedule`: search for a better training recipe with short phase 1 runs, of which the worse ones end early.

The search changes path, shift, time distribution, prediction, loss weight, learning rate and condition dropout of a
recipe. A trial is a run of `train`'s own workers inside Ray Tune. At each rung it reports its PSNR on fixed rows, and
asynchronous successive halving (ASHA, Li et al. 2020) ends the worse two thirds of the trials that reached the rung; no
trial waits for another. The best trial becomes a recipe file for `train`. pipelines/tuning/schedule_space.py defines
what may change, and pipelines/tuning/sampler_search.py tunes a finished model.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import ray
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from animediffusion.models.augmentation.augment import Batch
from animediffusion.pipelines.evaluation.measure import load_rows
from animediffusion.pipelines.training.driver import build_trainer, reason, worker_context
from animediffusion.pipelines.training.plan import RunPlan, plan
from animediffusion.pipelines.training.recipe import TrainConfig, load_recipe, plain
from animediffusion.pipelines.training.reporting import ProgressActor
from animediffusion.pipelines.training.scaling import scaling_for, threads_per_worker
from animediffusion.pipelines.training.trial_report import TrialContext, TrialStops
from animediffusion.pipelines.tuning.asha import REDUCTION, AshaScheduler, Rungs, TrialOutcomes
from animediffusion.pipelines.tuning.optuna_searcher import (
    STARTED,
    Point,
    SearchConfig,
    Study,
    TrialEntry,
    TrialLog,
    new_study,
    run_trials,
)
from animediffusion.pipelines.tuning.schedule_space import ScheduleSpace, as_recipe, changed
from animediffusion.platform.cluster import cluster
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import ConfigError, Interrupted, TrainingError
from animediffusion.platform.tracking.tracking import TUNING, Run

NUM_RUNGS = 3
CPUS_PER_TRIAL, CPUS_TO_WATCH = 0.4, 0.01
"""CPUs of a trial's worker if the recipe sets none, and of the process that waits for the worker (Ray Tune needs more
than 0). With as many trials as CPUs, half of the CPUs are left for Ray Data."""
NUM_ROWS = 32
"""Number of val rows on which trials are measured."""


@dataclass(frozen=True, slots=True)
class TrialSummary:
    """Settings and result of one trial."""

    point: Point
    psnr: float
    """PSNR in dB at its last step."""
    steps: int
    """Number of training steps."""
    sampler_steps: int
    """Number of steps of the sampler with which it was measured."""

    def to_json(self) -> Mapping[str, object]:
        """Return the settings and the result as one JSON object."""
        return {**self.point, "psnr": self.psnr, "steps": self.steps, "sampler_steps": self.sampler_steps}


@dataclass(frozen=True, slots=True)
class RungSummary:
    """The trials that reached one rung."""

    steps: int
    """Training steps of the rung."""
    psnr: float
    """Best PSNR in dB at this rung."""
    base_psnr: float | None
    """PSNR in dB of the recipe with which the search began; None if that trial ended before this rung."""
    trials: int
    """Number of trials."""


@dataclass(frozen=True, slots=True)
class ScheduleResult:
    """Result of `tune schedule`; the field order is that of its JSON."""

    trials: int
    """Number of tried settings, those of earlier searches included."""
    finished: int
    """Number of trials that trained all steps."""
    stopped_early: int
    failed: int
    cut: int
    """Number of trials that the time limit ended."""
    best: TrialSummary
    base: TrialSummary | None
    """The recipe with which the search began; None if it has not been measured."""
    front: tuple[RungSummary, ...]
    recipe: str
    """Path of the new recipe."""
    folder: str
    """Folder of the search."""

    def to_json(self) -> Mapping[str, object]:
        """Return the JSON object that `tune schedule` prints."""
        base = self.base.to_json() if self.base is not None else None
        return {**asdict(self), "best": self.best.to_json(), "base": base}


@dataclass(frozen=True)
class _ScheduleTask:
    """Inputs that all trials share."""

    work: RunPlan
    """Plan of a run; a trial changes its config, name and folder."""
    base: TrainConfig
    scaling: ray.train.ScalingConfig
    threads: int
    """OpenMP threads of each worker."""
    trial: TrialContext
    settings: Settings
    tracking_uri: str
    parent_run_id: str
    progress: Any
    """Handle of a ProgressActor; all trials report to it, but the reports are not read."""


def tune_schedule(
    settings: Settings,
    data: str,
    *,
    recipe: str = "phase1",
    trials: int = 24,
    minutes: float | None = None,
    steps: int = 270,
    out: Path | None = None,
    progress: Callable[[str], None] = lambda _line: None,
) -> ScheduleResult:
    """Search for a better recipe and write it to a file.

    Args:
        settings: workspace and MLflow.
        data: dataset URI.
        recipe: name or YAML file of the recipe to begin with; the first trial runs it unchanged.
        trials: total number of tried settings, including those of earlier calls of the same search.
        minutes: stop after this many minutes.
        steps: steps of the longest trials; the others end after a third or a ninth of them.
        out: file for the new recipe; recipe.yaml in the search's folder if None.
        progress: called with one line after every trial.

    Raises:
        ConfigError: the recipe is not a phase 1 recipe from scratch, or an argument is out of range.
        TrainingError: no trial reached a rung.
        Interrupted: a signal arrived; the same call resumes.
    """
    rungs = rung_steps(steps)
    work = plan(settings, _base(recipe, data))
    base = work.config
    rows = load_rows(data, "val", NUM_ROWS).searched
    name = f"schedule-{_search_key(base, work, rungs)}"
    folder = settings.workspace / "tune" / name
    cluster.connect(settings)
    params = {"recipe": recipe, "data": data, "trials": trials, "steps": steps}
    record = Run.start(settings, TUNING, name, params, tags={"data_hash": work.data_hash})
    try:
        search = SearchConfig(trials, minutes, progress)
        _search(settings, replace(work, folder=folder), rows, rungs, record, search)
        path = out or folder / "recipe.yaml"
        result = summarize(TrialLog(folder / "trials.jsonl").read(), ScheduleSpace(base).own(), rungs, path, folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        best, headline = result.best, _headline(result, name)
        path.write_text(as_recipe(recipe, base, best.point, best.sampler_steps, path.stem, headline))
        record.log_artifact(path)
        values = result.to_json()
        record.set_tags({"best": json.dumps(values["best"]), "front": json.dumps(values["front"])})
    except BaseException as error:
        record.finish("KILLED" if isinstance(error, KeyboardInterrupt | Interrupted) else "FAILED")
        raise
    record.finish()
    return result


def rung_steps(steps: int) -> tuple[int, ...]:
    """Return the steps at which trials report: about a ninth, a third and all of `steps`."""
    if steps < REDUCTION ** (NUM_RUNGS - 1):
        raise ConfigError("--steps", str(steps), f"at least {REDUCTION ** (NUM_RUNGS - 1)}")
    least = steps // REDUCTION ** (NUM_RUNGS - 1)
    return tuple(least * REDUCTION**i for i in range(NUM_RUNGS))


def _base(recipe: str, data: str) -> TrainConfig:
    base = load_recipe(recipe, [f"data={data}", "max_steps=1"])
    if base.objective.name != "denoising" or base.objective.strict or base.init_from is not None:
        raise ConfigError(
            f"recipe {recipe!r}", "is not a phase 1 recipe from scratch", "start from phase1, demo, small, ..."
        )
    return base


def trial_config(base: TrainConfig, point: Point, rungs: Sequence[int], name: str) -> TrainConfig:
    """Return the config of one trial's run: one worker, as many steps as the last rung, no checkpoints."""
    values = changed(base, point)
    once = {"max_steps": rungs[-1], "max_minutes": None, "num_workers": 1, "max_failures": 0, "num_samples": 0}
    values["cpus_per_worker"] = values["cpus_per_worker"] or CPUS_PER_TRIAL
    return TrainConfig.check({**values, **once, "checkpoint_every": rungs[-1] + 1, "storage": None, "name": name})


def _search(
    settings: Settings, work: RunPlan, rows: Batch, rungs: tuple[int, ...], record: Run, search: SearchConfig
) -> None:
    """Run the trials of a search in the folder of `work`, whose config is the recipe to begin with."""
    base = work.config
    stops = TrialStops.remote()  # type: ignore[attr-defined]
    space, log = ScheduleSpace(base), TrialLog(work.folder / "trials.jsonl")
    scheduler = AshaScheduler(Rungs(rungs, work.folder / "rungs.jsonl", log.read()), rungs[-1], stops)
    study = Study(
        new_study(_optuna_sampler(0), ["maximize"]),
        space.distributions,
        space.point,
        scheduler.judge,
        log,
        [space.first()],
        "psnr",
        _optuna_sampler,
    )
    first = trial_config(base, space.own(), rungs, "trial")
    available, limits = cluster.resources()
    scaling, _ = scaling_for(first, available, limits)
    at_once = trials_at_once(scaling, available)
    task = _ScheduleTask(
        work=work,
        base=base,
        scaling=scaling,
        threads=threads_per_worker(at_once, len(ray.nodes())),
        trial=TrialContext(rungs, ray.put(rows), stops),
        settings=settings,
        tracking_uri=record.tracking_uri,
        parent_run_id=record.run_id,
        progress=ProgressActor.remote(),  # type: ignore[attr-defined]
    )
    try:
        run_trials(
            work.folder.name,
            # The trial's process only waits for its worker; Ray Train requests the worker's resources separately.
            tune.with_resources(tune.with_parameters(_trial, task=task), {"CPU": CPUS_TO_WATCH}),
            study,
            search,
            at_once=at_once,
            folder=work.folder,
            scheduler=scheduler,
            callback=TrialOutcomes(search, study, record),
        )
    finally:
        ray.kill(task.progress)
        ray.kill(stops)
        shutil.rmtree(work.folder / "runs", ignore_errors=True)


def _optuna_sampler(seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.TPESampler(seed=seed)


def trials_at_once(scaling: ray.train.ScalingConfig, available: Mapping[str, float]) -> int:
    """Return how many trials fit on the cluster now, at least 1; without GPUs, half of the CPUs stay for Ray Data."""
    if scaling.use_gpu:
        return max(1, int(available.get("GPU", 0)))
    return max(1, int(available.get("CPU", 0) / 2 / max((scaling.resources_per_worker or {})["CPU"], 0.5)))


def _trial(point: Point, *, task: _ScheduleTask) -> None:
    """Run one trial, in a separate process that starts the run and waits for it."""
    name = f"trial-{tune.get_context().get_trial_id()}"
    os.environ["MLFLOW_TRACKING_URI"] = task.tracking_uri  # the driver's URI replaces a setting of this node
    config = trial_config(task.base, point, task.trial.steps, name)
    folder = task.work.folder / "runs" / name
    work = replace(task.work, config=config, run=name, folder=folder, storage=str(folder), start_step=0)
    tags = {"mlflow.parentRunId": task.parent_run_id, "data_hash": task.work.data_hash}
    run = Run.start(task.settings, TUNING, name, plain(config), tags=tags)
    context = worker_context(work, run, task.progress, trial=task.trial)
    try:
        build_trainer(work, task.scaling, context, task.threads, [TuneReportCallback()]).fit()
    except Exception as error:
        run.set_tags({"ended": "failed", "reason": reason(error)})
        run.finish("FAILED")
        raise RuntimeError(reason(error)) from None


def summarize(
    entries: Sequence[TrialEntry], own: Point, rungs: Sequence[int], recipe: Path, folder: Path
) -> ScheduleResult:
    """Summarize the trial log of a search.

    Args:
        entries: entries of the trial log.
        own: point of the recipe with which the search began.
        rungs: steps at which trials report.
        recipe: file of the new recipe.
        folder: folder of the search.

    Raises:
        TrainingError: no trial reached a rung.
    """
    measured = [entry for entry in entries if entry.values is not None]
    if not measured:
        reasons = (str(entry.details["reason"]) for entry in entries if "reason" in entry.details)
        why = next(reasons, "the time was too short")
        raise TrainingError("tune schedule", f"no trial reached its first report ({why})", "raise --minutes")
    best = max(measured, key=lambda entry: _summary(entry).psnr)
    base = max((e for e in measured if e.point == own), key=lambda e: _summary(e).steps, default=None)
    over = [entry for entry in entries if entry.details["ended"] != STARTED]
    ended = Counter({json.dumps(entry.point): str(entry.details["ended"]) for entry in over}.values())
    return ScheduleResult(
        trials=ended.total(),
        finished=ended["finished"],
        stopped_early=ended["stopped early"],
        failed=ended["failed"],
        cut=ended["cut"],
        best=_summary(best),
        base=_summary(base) if base is not None else None,
        front=tuple(_front(measured, base, rungs)),
        recipe=str(recipe),
        folder=str(folder),
    )


def _summary(entry: TrialEntry) -> TrialSummary:
    [psnr] = entry.values or [math.nan]
    return TrialSummary(entry.point, psnr, entry.details["step"], entry.details["sampler_steps"])


def _front(measured: Sequence[TrialEntry], base: TrialEntry | None, rungs: Sequence[int]) -> Iterator[RungSummary]:
    histories = [dict(entry.details["history"]) for entry in measured]
    own = dict(base.details["history"]) if base is not None else {}
    for rung in rungs:
        reached = [history[rung] for history in histories if rung in history]
        if reached:
            yield RungSummary(rung, max(reached), own.get(rung), len(reached))


def _headline(result: ScheduleResult, name: str) -> str:
    best = result.best
    return (
        f"Found by `animediffusion tune schedule` ({name}): {best.psnr:.2f} dB after {best.steps} steps, the "
        f"best of {result.trials} trials"
    )


def _search_key(base: TrainConfig, work: RunPlan, rungs: Sequence[int]) -> str:
    """Return 12 hex digits that identify what decides a trial's result: recipe, data, rungs and measured rows."""
    settings = base.identity() | {"data": None}
    # Trials keep no averages. These lengths were the default of 0.1.0, so that its searches resume.
    settings["optimizer"] |= {"ema_lengths": [0.04, 0.08, 0.16]}
    facts = [settings, work.data_hash, list(rungs), NUM_ROWS]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
