"""Run a recipe on Ray Train: resolve, name, resume, train, write the bundle.

    result = train(settings, load_recipe("demo", ["data=workspace/data/faces"]))

The folder of a run is WORKSPACE/runs/NAME. NAME is derived from the settings that decide the result, so the same
command finds its own checkpoints and resumes. pipelines/training/plan.py decides what a run does,
pipelines/training/worker.py is one worker, and models/training/loop.py is one step.
"""

from __future__ import annotations

import fcntl
import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.train
import yaml
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor

from animediffusion.models.bundle import load_bundle
from animediffusion.models.network.attention import attention_used
from animediffusion.models.training.loop import MALLOC
from animediffusion.pipelines.data.stream import read_split
from animediffusion.pipelines.evaluation.evaluate import SplitRows
from animediffusion.pipelines.training.checkpoints import best_step, latest_step, read_scores
from animediffusion.pipelines.training.plan import RunPlan, plan, read_json, write_json
from animediffusion.pipelines.training.recipe import TrainConfig, plain
from animediffusion.pipelines.training.reporting import ProgressActor, RunAddress, RunFailure, TrainProgress
from animediffusion.pipelines.training.result import TrainResult, write_bundle
from animediffusion.pipelines.training.scaling import (
    RowsToRead,
    TrainingData,
    no_rows,
    scaling_for,
    unread_rows,
    worker_threads,
)
from animediffusion.pipelines.training.trial_report import TrialContext
from animediffusion.pipelines.training.worker import WorkerContext, train_worker
from animediffusion.platform.cluster import cluster, ray_compat
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import DataError, Interrupted, TrainingError
from animediffusion.platform.tracking.tracking import TRAINING, Run, send_left

TORCH_ADVICE = (
    "Search for `",
    "CUDA kernel errors might be",
    "For debugging consider passing",
    "Compile with `TORCH_USE_CUDA_DSA`",
    "Device-side assertion",
    "Set TORCHDYNAMO_VERBOSE=1",
)
"""Beginnings of the lines that torch appends to every error, whatever its cause."""

LOST_PEER = ("/gloo/", "NCCL error", "Connection closed by peer", "Connection reset by peer")
"""Parts of the errors of a worker that was exchanging gradients with a worker that failed."""

UNSENT = "unsent"
"""Subfolder of a run with the records that MLflow has not received yet."""

Report = Callable[[TrainProgress], None]
"""Callback for the state of a run, which the driver calls when the state has changed."""


def train(settings: Settings, config: TrainConfig, report: Report | None = None) -> TrainResult:
    """Train to the end of the budget.

    The caller must have connected to Ray.

    Raises:
        Interrupted: the process got SIGINT or SIGTERM; a checkpoint is saved.
        ClusterError: the cluster cannot hold the run.
        TrainingError: workers failed more often than max_failures, the loss is not finite, or another process trains
            the run.
    """
    work = plan(settings, config)
    if work.finished:
        result = TrainResult.from_json(read_json(work.folder / "run.json")["result"])
        send_left(settings, result.mlflow_run_id, work.folder / UNSENT)
        return result
    scaling, notes = scaling_for(work.config, *cluster.resources())
    with _only_driver(work):
        return _train(settings, work, scaling, notes, report)


@contextmanager
def _only_driver(work: RunPlan) -> Iterator[None]:
    """Refuse a second process that trains the same run: both would write the same files, and report to one MLflow run.

    The system releases the lock of a process that ends in any way.
    """
    work.folder.mkdir(parents=True, exist_ok=True)
    with (work.folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            advice = "wait until it ends, or choose another name="
            raise TrainingError(f"run {work.run}", "another process trains it now", advice) from error
        except OSError:
            pass  # a file system without locks
        yield


def _train(
    settings: Settings, work: RunPlan, scaling: ray.train.ScalingConfig, notes: Iterable[str], report: Report | None
) -> TrainResult:
    (work.folder / "config.yaml").write_text(yaml.safe_dump(plain(work.config), sort_keys=False))
    previous = read_json(work.folder / "run.json").get("mlflow_run_id")
    params = {**plain(work.config), "data_hash": work.data_hash, "image_size": work.image_size}
    tags, unsent = {"data_hash": work.data_hash}, work.folder / UNSENT
    run = Run.start(settings, TRAINING, work.run, params, run_id=previous, tags=tags, unsent=unsent)
    write_json(work.folder / "run.json", {"run": work.run, "mlflow_run_id": run.run_id, "finished": False})
    progress = _progress_actor()
    for line in notes:
        progress.warn.remote(line)
    begun = time.monotonic()
    try:
        latest = _fit(work, scaling, run, progress, report)
    except BaseException as error:
        run.finish("KILLED" if isinstance(error, KeyboardInterrupt | Interrupted) else "FAILED")
        raise
    finally:
        ray.kill(progress)
    return _finish(work, run, latest, time.monotonic() - begun)


def _fit(
    work: RunPlan, scaling: ray.train.ScalingConfig, run: Run, progress: Any, report: Report | None
) -> TrainProgress:
    weights = None if work.parent_folder is None else ray.put(load_bundle(work.parent_folder).denoiser.state_dict())
    context = worker_context(work, run, progress, init_weights=weights, samples=_samples(work.config))
    while True:
        begun = latest_step(work.checkpoints)
        trainer = build_trainer(work, scaling, context, worker_threads(scaling))
        latest = run_and_watch(trainer, work, progress, report)
        # One Ray Data execution delivers a bounded number of rows; if they run out, continue as a resumed run does.
        complete = latest.max_steps is not None and latest.step >= latest.max_steps
        if complete or latest.step <= begun:
            return latest


def worker_context(
    work: RunPlan,
    run: Run,
    progress: Any,
    *,
    init_weights: ray.ObjectRef[dict[str, Tensor]] | None = None,
    samples: SplitRows | None = None,
    trial: TrialContext | None = None,
) -> WorkerContext:
    """Return what the workers of a run get.

    Args:
        work: plan of the run.
        run: the run in MLflow.
        progress: handle of a ProgressActor.
        init_weights: weights to start from.
        samples: rows on which checkpoints are scored.
        trial: set if the run is a trial of a search.
    """
    return WorkerContext(
        config=work.config,
        run_name=work.run,
        image_size=work.image_size,
        checkpoints=work.checkpoints,
        mlflow=RunAddress(run.tracking_uri, run.run_id, work.folder / UNSENT),
        progress=progress,
        init_weights=init_weights,
        samples=samples,
        trial=trial,
    )


def build_trainer(
    work: RunPlan,
    scaling: ray.train.ScalingConfig,
    context: WorkerContext,
    threads: int,
    callbacks: list[ray.train.UserCallback] | None = None,
) -> TorchTrainer:
    """Build Ray Train's trainer of a run.

    Args:
        work: plan of the run.
        scaling: number of workers and resources of each.
        context: what every worker gets.
        threads: OpenMP threads of each worker.
        callbacks: Ray Train callbacks.
    """
    config, rows = work.config, RowsToRead.of(work.config, work.checkpoints, scaling)
    logging.getLogger("ray.train").setLevel(logging.ERROR)  # Ray's progress lines would hide the run's own
    return TorchTrainer(
        train_worker,
        # Ray Train's controller unpickles this dictionary, but not an object that it refers to: what the context needs
        # takes seconds to import.
        train_loop_config={"context": ray.put(context)},
        torch_config=TorchConfig(backend="nccl" if scaling.use_gpu else "gloo"),
        scaling_config=scaling,
        run_config=ray.train.RunConfig(
            # Ray keeps only its own records of fit() here: pipelines/training/checkpoints.py writes the checkpoints.
            name="ray",
            storage_path=str(work.folder),
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            worker_runtime_env={"env_vars": {**MALLOC, "OMP_NUM_THREADS": str(threads)}},
            callbacks=callbacks,
        ),
        # A placeholder: the rows depend on the number of workers, which Ray knows only when it starts them.
        datasets={"train": no_rows},
        dataset_config=TrainingData(functools.partial(unread_rows, rows)),
    )


def run_and_watch(trainer: TorchTrainer, work: RunPlan, progress: Any, report: Report | None) -> TrainProgress:
    """Run fit(), report progress and handle signals meanwhile, and return the last progress report."""
    latest = TrainProgress()

    def poll(signum: int | None, moved: Callable[[], None]) -> bool:
        nonlocal latest
        now: TrainProgress = ray.get(progress.latest.remote())
        if now.elapsed_s != latest.elapsed_s:
            moved()
        if report is not None and now != latest:
            report(now)
        latest = now
        # Workers that wait for room, at first or after a node was lost, would not receive the signal.
        return signum is None or _has_workers(now)

    signum, error = cluster.run_watched(
        trainer.fit, poll, on_signal=lambda: progress.stop.remote(), report=progress.warn.remote
    )
    if latest.failure is not None:
        raise _recurring(work, latest.failure)
    if signum is not None:
        raise Interrupted(signum, f"run {work.run}", latest_step(work.checkpoints))
    if error is not None:
        raise _explain(error, work)
    return latest


def _has_workers(latest: TrainProgress) -> bool:
    """Return whether the worker that started last still runs; Ray ends all workers if one fails."""
    return latest.worker is not None and ray_compat.is_alive(latest.worker)


def _progress_actor() -> Any:
    """Start a ProgressActor on this node, so that it lives as long as the driver even if other nodes fail."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ProgressActor.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]


def _samples(config: TrainConfig) -> SplitRows | None:
    """Return the rows on which checkpoints are scored; None if scoring is disabled or the dataset has no `val`."""
    if not config.num_samples:
        return None
    try:
        rows = read_split(config.data, "val", limit=config.num_samples)
    except DataError:
        return None
    rows.pop("id")
    return rows


def _finish(work: RunPlan, run: Run, latest: TrainProgress, seconds: float) -> TrainResult:
    """Write the bundle (from the last or the best checkpoint) and run.json."""
    config, steps, scores = work.config, latest_step(work.checkpoints), read_scores(work.checkpoints)
    if not steps:
        raise TrainingError(
            f"run {work.run}",
            f"no checkpoint in {work.checkpoints}",
            "set storage= to a place that all nodes can reach",
        )
    best = best_step(scores)
    chosen = best if config.bundle == "best" and best else steps
    bundle, parameters = write_bundle(work, chosen, latest.attention, seconds)
    metrics = latest.metrics
    kept = {} if metrics is None else {name: getattr(metrics, name) for name in ("loss", "grad_norm", "data_wait")}
    result = TrainResult(
        run=work.run,
        run_dir=str(work.folder),
        bundle=str(bundle),
        steps=steps,
        resumed_from=work.start_step or None,
        seconds=round(seconds, 1),
        images_per_s=round(metrics.images_per_s, 1) if metrics is not None else 0.0,
        num_parameters=parameters,
        device=latest.device,
        attention=latest.attention or attention_used(),
        mlflow_run_id=run.run_id,
        metrics=kept,
        scores=scores,
        best_step=best,
        bundle_step=chosen,
        num_workers=latest.workers,
        peak_memory_mb=round(latest.peak_memory_mb, 1),
    )
    run.log_artifact(work.folder / "config.yaml")
    run.log_artifact(bundle / "card.md")
    run.finish()
    record = {"run": work.run, "mlflow_run_id": run.run_id, "finished": True, "result": result.to_json()}
    budget = {"max_steps": config.max_steps, "max_minutes": config.max_minutes}
    write_json(work.folder / "run.json", {**record, "budget": budget})
    return result


def reason(error: BaseException) -> str:
    """Return in one line why fit() failed: the last line of the error of the worker that failed first."""
    failures: dict[int, BaseException] = getattr(error, "worker_failures", None) or {}
    # Prefer a worker that did not merely lose the connection to another one.
    cause = min(failures.values(), key=lambda failure: any(sign in str(failure) for sign in LOST_PEER), default=error)
    return ray_compat.last_line(cause, advice=TORCH_ADVICE)


def _explain(error: BaseException, work: RunPlan) -> BaseException:
    step = latest_step(work.checkpoints)
    return TrainingError(
        f"run {work.run}", reason(error), f"the last checkpoint is step {step}; run the same command again to resume"
    )


def _recurring(work: RunPlan, failure: RunFailure) -> TrainingError:
    """Return the error for a failure that would recur if the same command resumed the run."""
    kept = f"the checkpoint of step {latest_step(work.checkpoints)} is kept"
    return TrainingError(f"run {work.run}", failure.reason, f"{kept}; {failure.advice}")
