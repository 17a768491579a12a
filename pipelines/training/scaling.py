"""Number of workers of a run, and the CPUs and GPUs of each.

    scaling, lines = scaling_for(config, *cluster.resources())

platform/cluster/cluster.py warns if a run waits for free resources.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import ray
import ray.train

from animediffusion.pipelines.training.recipe import TrainConfig
from animediffusion.platform.errors import ClusterError


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
    workers = scaling.num_workers if isinstance(scaling.num_workers, int) else scaling.num_workers[1]
    return threads_per_worker(workers, nodes)


def threads_per_worker(workers: int, nodes: int = 1) -> int:
    """Return OMP_NUM_THREADS if it is set, else a worker's share of the cores of `nodes` nodes like this one."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return int(threads) if threads.isdigit() else max(1, (os.cpu_count() or 1) * nodes // workers)
