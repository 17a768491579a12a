"""Run a recipe on Ray Train: resolve, name, resume, train, write the bundle.

    result = train(settings, load_recipe("demo", ["data=workspace/data/faces"]))

A run lives in WORKSPACE/runs/NAME. Its name follows from what decides the result, so the same command finds its own
checkpoints and goes on. Not here: what is to be done (pipelines/plan.py), one worker (pipelines/worker.py), one step
(models/training.py).
"""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import yaml
from ray.train.torch import TorchConfig, TorchTrainer

from animediffusion.models.attention import attention_used
from animediffusion.models.bundle import identity, load_bundle, save_bundle
from animediffusion.models.training import TrainState
from animediffusion.pipelines.card import model_card
from animediffusion.pipelines.dataset import read_split, train_data_config, training_dataset
from animediffusion.pipelines.plan import Plan, latest_step, plan, read_json, write_json
from animediffusion.pipelines.recipe import TrainConfig, plain
from animediffusion.pipelines.worker import Progress, train_worker
from animediffusion.platform import storage
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import ClusterError, DataError, Interrupted, TrainingError
from animediffusion.platform.tracking import TRAINING, Run

MOST_IMAGES_PER_S = {"cpu": 400, "gpu": 6000}
"""Of one worker: how many rows a run of max_minutes may need at most, before its speed is known."""
POLL_S = 0.5

Report = Callable[[dict[str, Any]], None]
"""Called with the latest of: step, max_steps, elapsed, loss, images_per_s, data_wait, ..."""


def train(settings: Settings, config: TrainConfig, report: Report | None = None) -> dict[str, Any]:
    """Train to the end of the budget and return what the contract's `train --json` prints.

    The caller has connected to Ray.

    Raises:
        Interrupted: SIGINT or SIGTERM came; the checkpoint is saved.
        ClusterError: the cluster cannot hold the run.
        TrainingError: workers failed more often than max_failures, or the loss is not finite.
    """
    work = plan(settings, config)
    if work.finished:
        summary: dict[str, Any] = read_json(work.folder / "run.json")["result"]
        return summary
    scaling = _scaling(work.config)
    work.folder.mkdir(parents=True, exist_ok=True)
    (work.folder / "config.yaml").write_text(yaml.safe_dump(plain(work.config), sort_keys=False))
    previous = read_json(work.folder / "run.json").get("mlflow_run_id")
    params = {**plain(work.config), "data_hash": work.data_hash, "image_size": work.image_size}
    run = Run.start(settings, TRAINING, work.run, params, run_id=previous, tags={"data_hash": work.data_hash})
    write_json(work.folder / "run.json", {"run": work.run, "mlflow_run_id": run.run_id, "finished": False})
    progress = Progress.remote()  # type: ignore[attr-defined]
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
    work: Plan, scaling: ray.train.ScalingConfig, run: Run, progress: Any, report: Report | None
) -> dict[str, Any]:
    config = work.config
    weights = None if work.parent_folder is None else ray.put(load_bundle(work.parent_folder).denoiser.state_dict())
    samples = _samples(config)
    files, path = storage.filesystem(work.storage)
    remote = storage.is_remote(work.storage)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "run": config.model_dump(mode="json"),
            "image_size": work.image_size,
            "init_weights": weights,
            "tracking_uri": run.tracking_uri,
            "mlflow_run_id": run.run_id,
            "progress": progress,
            "samples": samples,
        },
        torch_config=TorchConfig(backend="nccl" if scaling.use_gpu else "gloo"),
        scaling_config=scaling,
        run_config=ray.train.RunConfig(
            name="checkpoints",
            storage_path=path if remote else work.storage,
            storage_filesystem=files if remote else None,
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.keep_checkpoints),
            worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": str(_threads(scaling))}},
        ),
        datasets={"train": lambda: _dataset(work, bool(scaling.use_gpu))},
        dataset_config=train_data_config(),
    )
    return _run_and_watch(trainer, work, progress, report)


def _run_and_watch(trainer: TorchTrainer, work: Plan, progress: Any, report: Report | None) -> dict[str, Any]:
    """fit() in a thread, so that this one can show progress and hear signals."""
    outcome: list[BaseException | None] = []

    def body() -> None:
        try:
            trainer.fit()
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    heard: list[int] = []
    thread = threading.Thread(target=body, name="fit", daemon=True)
    latest: dict[str, Any] = {}
    with _signals(heard, lambda: progress.stop.remote()):
        thread.start()
        while thread.is_alive():
            thread.join(POLL_S)
            now = ray.get(progress.look.remote())
            if report is not None and now and now != latest:
                report(now)
            latest = now
    if heard:
        raise Interrupted(heard[0], work.run, latest_step(work.storage))
    error = outcome[0]
    if error is not None:
        raise _explain(error, work)
    return latest


class _signals:  # noqa: N801 - reads as a context manager
    """SIGINT and SIGTERM ask for a stop, in the main thread; the second one is Python's own business."""

    def __init__(self, heard: list[int], stop: Callable[[], object]) -> None:
        self.heard, self.stop = heard, stop
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._hear)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _hear(self, signum: int, _frame: object) -> None:
        if self.heard:
            raise KeyboardInterrupt
        self.heard.append(signum)
        self.stop()


def _dataset(work: Plan, gpu: bool) -> Any:
    """Rows from the newest checkpoint on; Ray calls this for every group of workers it starts."""
    config, start = work.config, latest_step(work.storage)
    if config.max_steps is not None:
        steps = config.max_steps - start
    else:
        rate = MOST_IMAGES_PER_S["gpu" if gpu else "cpu"] / config.rows_per_worker
        steps = int((config.max_minutes or 0) * 60 * rate)
    return training_dataset(
        config.data,
        seed=config.seed,
        world_size=config.num_workers,
        num_rows=max(1, steps) * config.rows_per_worker,
        start_rows=start * config.rows_per_worker,
    )


def _scaling(config: TrainConfig) -> ray.train.ScalingConfig:
    total = ray.cluster_resources()
    cpus, gpus = total.get("CPU", 0.0), total.get("GPU", 0.0)
    gpu = config.use_gpu if config.use_gpu is not None else gpus >= config.num_workers
    if gpu and gpus < config.num_workers:
        raise ClusterError("num_workers", f"{config.num_workers} need as many GPUs", f"the cluster has {gpus:g}")
    per_worker = config.cpus_per_worker or (1.0 if gpu else min(0.5, cpus / (2 * config.num_workers)))
    if per_worker * config.num_workers >= cpus:
        found = f"{config.num_workers} workers take {per_worker * config.num_workers:g} of {cpus:g} CPUs"
        raise ClusterError("num_workers", found, "leave some for Ray Data: set num_workers or cpus_per_worker lower")
    resources = {"CPU": per_worker, **({"GPU": 1.0} if gpu else {})}
    return ray.train.ScalingConfig(num_workers=config.num_workers, use_gpu=gpu, resources_per_worker=resources)


def _threads(scaling: ray.train.ScalingConfig) -> int:
    nodes = max(1, sum(1 for node in ray.nodes() if node["Alive"]))
    return max(1, (os.cpu_count() or 1) * nodes // int(scaling.num_workers))


def _samples(config: TrainConfig) -> Any:
    if not config.num_samples:
        return None
    try:
        rows = read_split(config.data, "val", limit=config.num_samples)
    except DataError:
        return None
    rows.pop("id")
    return rows


def _finish(work: Plan, run: Run, latest: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Write the bundle from the last checkpoint, and the summary."""
    config = work.config
    bundle, parameters = _write_bundle(work, latest, seconds)
    summary = {
        "run": work.run,
        "run_dir": str(work.folder),
        "bundle": str(bundle),
        "steps": latest_step(work.storage),
        "resumed_from": work.start_step or None,
        "seconds": round(seconds, 1),
        "images_per_s": round(latest.get("images_per_s", 0.0), 1),
        "num_parameters": parameters,
        "device": latest.get("device", "cpu"),
        "attention": latest.get("attention", attention_used()),
        "mlflow_run_id": run.run_id,
        "metrics": {key: latest[key] for key in ("loss", "grad_norm", "data_wait") if key in latest},
    }
    run.log_artifact(work.folder / "config.yaml")
    run.log_artifact(bundle / "card.md")
    run.finish()
    record = {"run": work.run, "mlflow_run_id": run.run_id, "finished": True, "result": summary}
    budget = {"max_steps": config.max_steps, "max_minutes": config.max_minutes}
    write_json(work.folder / "run.json", {**record, "budget": budget})
    return summary


def _write_bundle(work: Plan, latest: dict[str, Any], seconds: float) -> tuple[Path, int]:
    config, step = work.config, latest_step(work.storage)
    bundle_config = config.bundle_config(work.image_size)
    denoiser = bundle_config.build()
    state = TrainState(denoiser, config.optimizer, max(1, step))
    with tempfile.TemporaryDirectory() as folder:
        storage.download_folder(storage.join(work.storage, "checkpoints", f"step-{step:08d}"), Path(folder))
        state.restore(Path(folder))
    provenance = {
        "run": work.run,
        "recipe": config.recipe,
        "objective": config.objective.name,
        "steps": step,
        "batch_size": config.batch_size,
        "attention": latest.get("attention", ""),
        "data": config.data,
        "data_hash": work.data_hash,
        "parent": None if work.parent_folder is None else identity(work.parent_folder),
    }
    bundle_config = replace(bundle_config, provenance=provenance)
    parameters = sum(parameter.numel() for parameter in denoiser.parameters())
    # Of a resumed run only the last part is known. Not in the provenance: equal runs are to have equal bundles.
    card = model_card(bundle_config, parameters, None if work.start_step else seconds)
    folder_path = work.folder / "bundle"
    save_bundle(folder_path, state.averaged(), bundle_config, {}, card)
    return folder_path, parameters


def _explain(error: BaseException, work: Plan) -> BaseException:
    failures = getattr(error, "worker_failures", None) or {}
    cause = next(iter(failures.values()), error)
    line = next((line for line in reversed(str(cause).splitlines()) if line.strip()), type(cause).__name__).strip()
    step = latest_step(work.storage)
    return TrainingError(f"run {work.run}", line, f"the last checkpoint is step {step}; the same command goes on there")


logging.getLogger("ray.train").setLevel(logging.ERROR)
