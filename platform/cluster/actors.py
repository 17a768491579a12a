"""Stream blocks of rows through actors that hold a model, over Ray Data.

    for row in run_on_actors(blocks, ColorDrawings, (files, settings), threads=1, command="colorize --on-cluster"):
        ...

An actor that dies is started again, and Ray repeats its block, so that a block may be processed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import pyarrow as pa
import ray
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy

from animediffusion.platform.cluster import cluster, ray_compat
from animediffusion.platform.errors import ClusterError

FINISHED_BYTES = 2**20
"""Size of a block between the actors and the tasks that finish: the work of a task is a few seconds at most."""


def actor_device() -> Literal["CPU", "GPU"]:
    """Return whether actors compute on GPUs: where the cluster has some, or an autoscaler can add some."""
    return "GPU" if cluster.resources()[1].get("GPU") else "CPU"


def run_on_actors(
    blocks: Sequence[pa.Table],
    worker: type,
    arguments: tuple[Any, ...],
    *,
    threads: int,
    command: str,
    finish: Callable[[dict[str, NDArray[Any]]], dict[str, NDArray[Any]]] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the rows that actors make of blocks, in any order; the caller connects to Ray first.

    There is an actor for each GPU of the cluster, also of nodes that an autoscaler can add. Without GPUs, an actor
    takes as many CPUs as it has threads.

    Args:
        blocks: the blocks; an actor gets one at a time.
        worker: class for map_batches(), which is called with a block. Its constructor takes `arguments` and a number of
            threads, which is None on a GPU.
        arguments: the first arguments of the constructor.
        threads: threads of an actor without a GPU, at most the CPUs of a node.
        command: the command in error messages.
        finish: a function that makes the rows of what the actors return, in tasks on all CPUs.

    Raises:
        ClusterError: an actor or the cluster failed.
    """
    device = actor_device()
    cpus = None if device == "GPU" else min(threads, _cpus_of_a_node())
    now, limits = cluster.resources()
    most = max(1, min(int(limits.get(device, 1)) // (cpus or 1), len(blocks)))
    least = max(1, min(int(now.get(device, 1)) // (cpus or 1), most))
    cluster.silence_ray_data()
    made = ray.data.from_arrow(list(blocks)).map_batches(
        worker,
        batch_size=max(block.num_rows for block in blocks) if device == "GPU" else None,  # Ray wants one with GPUs
        compute=ActorPoolStrategy(min_size=1, max_size=most, initial_size=least),
        fn_constructor_args=(*arguments, cpus),
        num_gpus=1 if device == "GPU" else None,
        num_cpus=cpus or 0,
    )
    if finish is not None:
        made.context.target_max_block_size = FINISHED_BYTES
        made = made.map_batches(finish, batch_size=None, num_cpus=1)
    ray_compat.pause_scheduling(made.context)
    try:
        yield from made.iter_rows()
    except ray.exceptions.RayError as error:
        raise ClusterError(command, ray_compat.last_line(error), "run the same command again") from error


def _cpus_of_a_node() -> int:
    return max([1, *(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])])
