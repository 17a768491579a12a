"""Number of workers of a run, the CPUs and GPUs of each, and the rows for the workers that Ray has started.

    scaling, lines = scaling_for(config, *cluster.resources())

Ray Train's controller and Ray Data's processes import this file, so it needs no torch, which takes seconds to import.
platform/cluster/cluster.py warns if a run waits for free resources.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
import ray.data
import ray.train

from animediffusion.pipelines.data.stream import Rehearsal, training_dataset
from animediffusion.pipelines.training.checkpoints import latest_step, retry_outage
from animediffusion.platform.errors import ClusterError
from animediffusion.platform.storage import storage

if TYPE_CHECKING:
    from animediffusion.pipelines.training.recipe import TrainConfig

MOST_IMAGES_PER_S = {"cpu": 400, "gpu": 6000}
"""Upper limit of one worker's speed: it bounds the rows of a run with max_minutes until the speed is measured."""


def scaling_for(
    config: TrainConfig, available: Mapping[str, float], limits: Mapping[str, float]
) -> tuple[ray.train.ScalingConfig, list[str]]:
    """Return Ray Train's scaling config (workers and resources of each), and warnings about idle GPUs.

    Args:
        config: settings of the run.
        available: resources of the cluster now.
        limits: upper limits of these resources; Ray Train waits for nodes that an autoscaler has to add.

    Raises:
        ClusterError: the cluster can never hold the run.
    """
    gpus, cpus = int(available.get("GPU", 0)), limits.get("CPU", 0.0)
    usable = 0 if config.use_gpu is False else max(gpus, int(config.use_gpu is True))
    fewest, most = config.workers_on(usable)
    gpu = bool(config.use_gpu) or fewest <= usable
    if gpu and limits.get("GPU", 0) < fewest:
        found = f"one GPU for each of {fewest} workers, the cluster has at most {limits.get('GPU', 0):g}"
        raise ClusterError("use_gpu", found, "lower num_workers or set use_gpu=false")
    per_worker = config.cpus_per_worker or (1.0 if gpu else min(0.5, cpus / (2 * most)))
    if per_worker * fewest >= cpus:
        found = f"{fewest} workers take {per_worker * fewest:g} of {cpus:g} CPUs"
        raise ClusterError("num_workers", found, "lower num_workers or cpus_per_worker to leave some for Ray Data")
    scaling = ray.train.ScalingConfig(
        num_workers=fewest if fewest == most else (fewest, most),
        use_gpu=gpu,
        resources_per_worker={"CPU": per_worker, **({"GPU": 1.0} if gpu else {})},
        # On CPUs, more workers on one node would only share its cores.
        placement_strategy="PACK" if gpu else "SPREAD",
    )
    return scaling, _idle_gpus(config, most if gpu else 0, gpus, int(limits.get("GPU", 0)))


def _idle_gpus(config: TrainConfig, used: int, gpus: int, most: int) -> list[str]:
    """Return one warning if the run leaves GPUs idle that the cluster has or its autoscaler can add."""
    if config.use_gpu is False or used >= (gpus or most):
        return []
    where = "" if used else "training runs on CPUs: "
    if gpus and config.num_workers is None:
        return [f"{where}{gpus - used} of {gpus} GPUs are idle, batch_size={config.batch_size} has no larger divisor"]
    if gpus:
        return [f"{where}{gpus - used} of {gpus} GPUs are idle, num_workers is {config.num_workers}; omit it"]
    if not used:
        return [f"{where}the cluster has no GPU yet and can add {most}; set use_gpu=true to wait for them"]
    return (
        []
        if config.num_workers
        else [f"the run has one worker, and the cluster can add {most} GPUs; raise num_workers"]
    )


def worker_threads(scaling: ray.train.ScalingConfig) -> int:
    """Return the number of OpenMP threads of each worker, given the nodes that are alive now."""
    nodes = max(1, sum(1 for node in ray.nodes() if node["Alive"]))
    return threads_per_worker(_most_workers(scaling), nodes)


def _most_workers(scaling: ray.train.ScalingConfig) -> int:
    return scaling.num_workers if isinstance(scaling.num_workers, int) else scaling.num_workers[1]


def threads_per_worker(workers: int, nodes: int = 1) -> int:
    """Return OMP_NUM_THREADS if it is set, else a worker's share of the cores of `nodes` nodes like this one."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return int(threads) if threads.isdigit() else max(1, (os.cpu_count() or 1) * nodes // workers)


def cpus_of_a_read(scaling: ray.train.ScalingConfig) -> float:
    """Return the CPUs of a task that reads rows: 1, or less if the workers leave no whole CPU on any node."""
    nodes = [float(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    workers = _most_workers(scaling) // max(1, len(nodes))
    left = max(nodes, default=0.0) - workers * (scaling.resources_per_worker or {})["CPU"]
    # Less than what is left, because Ray rounds the CPUs of the workers.
    return 1.0 if left >= 1 or left <= 0 or scaling.use_gpu else 0.9 * left


@dataclass(frozen=True, slots=True)
class RowsToRead:
    """What decides which rows a run still reads."""

    data: str
    """URI of the dataset."""
    checkpoints: str
    """URI of the folder with the checkpoints."""
    seed: int
    batch_size: int
    """Rows of a step, of all workers together."""
    max_steps: int | None
    """Length of the run in steps; None if its time is limited."""
    most_rows: int
    """Upper limit of the rows of one worker if max_steps is None."""
    rehearse: Rehearsal | None = None
    """The second dataset, if the run mixes one into its batches."""
    cpus: float = 1.0
    """CPUs of a task that reads."""

    @classmethod
    def of(cls, config: TrainConfig, checkpoints: str, scaling: ray.train.ScalingConfig) -> RowsToRead:
        """Return what the config says about the rows."""
        most_rows = int((config.max_minutes or 0) * 60 * MOST_IMAGES_PER_S["gpu" if scaling.use_gpu else "cpu"])
        rehearse = None if config.rehearse is None else Rehearsal(config.rehearse, config.rehearse_share)
        return cls(
            config.data,
            checkpoints,
            config.seed,
            config.batch_size,
            config.max_steps,
            most_rows,
            rehearse,
            cpus_of_a_read(scaling),
        )


def unread_rows(run: RowsToRead, world_size: int) -> ray.data.Dataset:
    """Return the rows after the newest checkpoint, for a new group of `world_size` workers."""
    storage.expect(run.checkpoints, run.data, *([run.rehearse.uri] if run.rehearse is not None else []))
    start = retry_outage(lambda: latest_step(run.checkpoints))
    rows = run.batch_size // world_size  # as TrainConfig.rows_per_worker()
    steps = run.most_rows // rows if run.max_steps is None else run.max_steps - start
    return training_dataset(
        run.data,
        seed=run.seed,
        world_size=world_size,
        num_rows=max(1, steps) * rows,
        start_rows=start * rows,
        rehearse=run.rehearse,
        read_cpus=run.cpus,
    )


class TrainingData(ray.train.DataConfig):
    """Ray Train's `dataset_config`: builds an ordered dataset for the number of workers that Ray started.

    Args:
        build: returns the dataset for a number of workers; called for every group of workers that Ray starts.
    """

    def __init__(self, build: Callable[[int], ray.data.Dataset]) -> None:
        super().__init__(execution_options=ray.data.ExecutionOptions(preserve_order=True))
        self._build = build

    def configure(
        self, datasets: dict[str, Any], world_size: int, *args: Any, **kwargs: Any
    ) -> list[dict[str, ray.data.DataIterator]]:
        """Return each worker's iterators over a dataset built for `world_size` workers.

        That dataset replaces the placeholder that the trainer got.
        """
        built = {name: self._build(world_size) for name in datasets}
        iterators: list[dict[str, ray.data.DataIterator]] = super().configure(built, world_size, *args, **kwargs)
        return iterators


def no_rows() -> None:
    """Placeholder for the dataset of a trainer; TrainingData builds the real one."""
