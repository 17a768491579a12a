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
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import ray
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from animediffusion.models.augmentation.augment import Batch
from animediffusion.pipelines.evaluation.measure import load_rows
from animediffusion.pipelines.training.driver import build_trainer, reason
from animediffusion.pipelines.training.plan import RunPlan, plan
from animediffusion.pipelines.training.recipe import TrainConfig, load_recipe, plain
from animediffusion.pipelines.training.scaling import scaling_for, threads_per_worker
from animediffusion.pipelines.training.trial_report import Stops
from animediffusion.pipelines.training.worker import Progress as RunProgress
from animediffusion.pipelines.tuning.asha import REDUCTION, Halving, RungReport
from animediffusion.pipelines.tuning.optuna_searcher import Study, TrialLog, new_study, run_trials
from animediffusion.pipelines.tuning.schedule_space import ScheduleSpace, as_recipe, changed
from animediffusion.platform.cluster import connect as cluster
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import ConfigError, Interrupted, TrainingError
from animediffusion.platform.tracking.run import TUNING, Run

Progress = Callable[[str], None]
"""Callback for one line of text: how a trial ended."""

NUM_RUNGS = 3
CPUS_PER_TRIAL, CPUS_TO_WATCH = 0.4, 0.01
"""CPUs of a trial's worker if the recipe sets none, and of the process that waits for the worker (Ray Tune needs more
than 0). With as many trials as CPUs, half of the CPUs are left for Ray Data."""
NUM_ROWS = 32
"""Number of val rows on which trials are measured."""


@dataclass(frozen=True)
class _ScheduleTask:
    """Inputs that all trials share."""

    work: RunPlan
    base: TrainConfig
    scaling: ray.train.ScalingConfig
    threads: int
    rungs: dict[str, Any]
    settings: Settings
    tracking_uri: str
    parent_run_id: str
    progress: Any


def tune_schedule(
    settings: Settings,
    data: str,
    *,
    recipe: str = "phase1",
    trials: int = 24,
    minutes: float | None = None,
    steps: int = 270,
    out: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Search for a better recipe and write it to a file.

    Args:
        settings: workspace and MLflow.
        data: dataset URI.
        recipe: name or YAML file of the recipe to begin with; the first trial runs it unchanged.
        trials: total number of tried settings, including those of earlier calls of the same search.
        minutes: stop after this many minutes.
        steps: steps of the longest trials; the others end after a third or a ninth of them.
        out: file for the new recipe; recipe.yaml in the search's folder if None.
        progress: called after every trial.

    Returns:
        `{trials, finished, stopped_early, failed, cut, best, base, recipe, front, folder}`. `finished` to `cut` (by the
        time limit) count the trials that ended in this way. `best` and `base` (the recipe to begin with) are settings
        with psnr and steps. `front` has the best PSNR and that of `base` at each rung.

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
        _search(settings, replace(work, folder=folder), base, rows, rungs, record, trials, minutes, progress)
        entries = TrialLog(folder / "trials.jsonl").read()
        result = _result(entries, ScheduleSpace(base).own(), rungs)
        path = out or folder / "recipe.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(as_recipe(recipe, base, result["best"], path.stem, _headline(result, name)))
        record.log_artifact(path)
        record.set_tags({"best": json.dumps(result["best"]), "front": json.dumps(result["front"])})
    except BaseException as error:
        record.finish("KILLED" if isinstance(error, KeyboardInterrupt | Interrupted) else "FAILED")
        raise
    record.finish()
    return {**result, "recipe": str(path), "folder": str(folder)}


def rung_steps(steps: int) -> list[int]:
    """Return the steps at which trials report: about a ninth, a third and all of `steps`."""
    if steps < REDUCTION ** (NUM_RUNGS - 1):
        raise ConfigError("--steps", str(steps), f"at least {REDUCTION ** (NUM_RUNGS - 1)}")
    least = steps // REDUCTION ** (NUM_RUNGS - 1)
    return [least * REDUCTION**i for i in range(NUM_RUNGS)]


def _base(recipe: str, data: str) -> TrainConfig:
    base = load_recipe(recipe, [f"data={data}", "max_steps=1"])
    if base.objective.name != "denoising" or base.objective.strict or base.init_from is not None:
        raise ConfigError(f"recipe {recipe!r}", "is no phase 1 from scratch", "begin with phase1, demo, small, ...")
    return base


def trial_config(base: TrainConfig, point: dict[str, Any], rungs: list[int], name: str) -> TrainConfig:
    """Return the config of one trial's run: one worker, as many steps as the last rung, no checkpoints."""
    values = changed(base, point)
    once = {"max_steps": rungs[-1], "max_minutes": None, "num_workers": 1, "max_failures": 0, "num_samples": 0}
    values["cpus_per_worker"] = values["cpus_per_worker"] or CPUS_PER_TRIAL
    return TrainConfig.check({**values, **once, "checkpoint_every": rungs[-1] + 1, "storage": None, "name": name})


def _search(
    settings: Settings,
    work: RunPlan,
    base: TrainConfig,
    rows: Batch,
    rungs: list[int],
    record: Run,
    trials: int,
    minutes: float | None,
    progress: Progress | None,
) -> None:
    stops = Stops.remote()  # type: ignore[attr-defined]
    space, scheduler = ScheduleSpace(base), Halving(rungs, stops)
    study = Study(
        new_study(optuna.samplers.TPESampler(seed=0), ["maximize"]),
        space.distributions,
        space.point,
        scheduler.judge,
        TrialLog(work.folder / "trials.jsonl"),
        [space.first()],
        "psnr",
    )
    first = trial_config(base, space.own(), rungs, "trial")
    has, may = cluster.resources()
    scaling, _ = scaling_for(first, has, may)
    at_once = trials_at_once(scaling, has)
    task = _ScheduleTask(
        work=work,
        base=base,
        scaling=scaling,
        threads=threads_per_worker(at_once, len(ray.nodes())),
        rungs={"steps": rungs, "rows": ray.put(rows), "stops": stops},
        settings=settings,
        tracking_uri=record.tracking_uri,
        parent_run_id=record.run_id,
        progress=RunProgress.remote(),  # type: ignore[attr-defined]
    )
    try:
        run_trials(
            work.folder.name,
            # The trial's process only waits for its worker; Ray Train requests the worker's resources separately.
            tune.with_resources(tune.with_parameters(_trial, task=task), {"CPU": CPUS_TO_WATCH}),
            study,
            trials=trials,
            at_once=at_once,
            minutes=minutes,
            scheduler=scheduler,
            callback=RungReport(trials, study, record, progress),
            place=work.folder,
            tell=progress,
        )
    finally:
        ray.kill(task.progress)
        ray.kill(stops)
        shutil.rmtree(work.folder / "runs", ignore_errors=True)


def trials_at_once(scaling: ray.train.ScalingConfig, has: Mapping[str, float]) -> int:
    """Return how many trials fit on the cluster now, at least 1; without GPUs, half of the CPUs stay for Ray Data."""
    if scaling.use_gpu:
        return max(1, int(has.get("GPU", 0)))
    return max(1, int(has.get("CPU", 0) / 2 / max((scaling.resources_per_worker or {})["CPU"], 0.5)))


def _trial(point: dict[str, Any], *, task: _ScheduleTask) -> None:
    """Run one trial, in a separate process that starts the run and waits for it."""
    name = f"trial-{tune.get_context().get_trial_id()}"
    os.environ["MLFLOW_TRACKING_URI"] = task.tracking_uri  # the driver's URI replaces a setting of this node
    config = trial_config(task.base, point, task.rungs["steps"], name)
    folder = task.work.folder / "runs" / name
    work = replace(task.work, config=config, run=name, folder=folder, storage=str(folder), start_step=0)
    tags = {"mlflow.parentRunId": task.parent_run_id, "data_hash": task.work.data_hash}
    run = Run.start(task.settings, TUNING, name, plain(config), tags=tags)
    shared = {"init_weights": None, "progress": task.progress, "samples": None, "rungs": task.rungs}
    try:
        build_trainer(work, task.scaling, run, shared, task.threads, [TuneReportCallback()]).fit()
    except Exception as error:
        run.set_tags({"ended": "failed", "reason": reason(error)})
        run.finish("FAILED")
        raise RuntimeError(reason(error)) from None


def _result(entries: list[dict[str, Any]], own: dict[str, Any], rungs: list[int]) -> dict[str, Any]:
    """Summarize the trial log: counts, the best trial, the base recipe and the front."""
    measured = [entry for entry in entries if entry["values"] is not None]
    if not measured:
        why = next((entry["reason"] for entry in entries if "reason" in entry), "the time was too short")
        raise TrainingError("tune schedule", f"no trial came to its first report ({why})", "give more --minutes")
    best = max(measured, key=lambda entry: float(entry["values"][0]))
    mine = max((e for e in measured if e["point"] == own), key=lambda e: int(e["step"]), default=None)
    latest = {json.dumps(entry["point"]): entry["ended"] for entry in entries}
    counts = {key: sum(ended == said for ended in latest.values()) for key, said in ENDS.items()}
    return {
        "trials": len(latest),
        **counts,
        "best": _summary(best),
        "base": _summary(mine) if mine is not None else None,
        "front": _front(measured, mine, rungs),
    }


ENDS = {"finished": "finished", "stopped_early": "stopped early", "failed": "failed", "cut": "cut"}


def _summary(entry: dict[str, Any]) -> dict[str, Any]:
    found = {"psnr": entry["values"][0], "steps": entry["step"], "sampler_steps": entry["sampler_steps"]}
    return {**entry["point"], **found}


def _front(measured: list[dict[str, Any]], mine: dict[str, Any] | None, rungs: list[int]) -> list[dict[str, Any]]:
    front = []
    for rung in rungs:
        there = [psnr for entry in measured for step, psnr in entry["history"] if step == rung]
        base = next((psnr for step, psnr in mine["history"] if step == rung), None) if mine is not None else None
        if there:
            front.append({"steps": rung, "psnr": max(there), "base_psnr": base, "trials": len(there)})
    return front


def _headline(result: dict[str, Any], name: str) -> str:
    best = result["best"]
    return (
        f"Found by `animediffusion tune schedule` ({name}): {best['psnr']:.2f} dB after {best['steps']} steps, the "
        f"best of {result['trials']} trials"
    )


def _search_key(base: TrainConfig, work: RunPlan, rungs: list[int]) -> str:
    facts = [base.identity() | {"data": None}, work.data_hash, rungs, NUM_ROWS]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
