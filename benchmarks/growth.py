"""Measure how the cost of a training step grows with image size, rows and workers.

    python benchmarks/growth.py [--recipe phase1] [--sizes 32 64 128] [--rows 1 4 16 32] [--repeats 8]

The benchmark trains on drawn faces with one thread and measures CPU time, which other work on the machine hardly
affects. The table of sizes uses 8 rows, and the table of rows uses 64 px. In the table of workers each worker has 16
rows, so two workers share a step of 32 rows, under DDP with gloo on one machine; a worker's time includes its share of
the all-reduce, but no waiting.
"""

from __future__ import annotations

import argparse
import itertools
import os
import socket
import statistics
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing

from animediffusion.models.bundle import SamplerDefaults
from animediffusion.models.training.loop import Rows, TrainState, fit
from animediffusion.pipelines.synthetic.dataset import make_row
from animediffusion.pipelines.training.recipe import load_recipe

SIZE, ROWS, WORKER_ROWS = 64, 8, 16


def drawn_rows(count: int, size: int) -> Rows:
    """Return decoded rows of drawn faces."""
    drawn = [make_row(0, index, size) for index in range(count)]
    rows = {name: torch.from_numpy(np.stack([getattr(row, name) for row in drawn])) for name in drawn[0]._fields}
    return rows | {flag: torch.ones(count, dtype=torch.bool) for flag in ("has_sketch", "has_reference", "has_cross")}


def step_seconds(recipe: str, size: int, rows: int, repeats: int, rank: int = 0, world_size: int = 1) -> float:
    """Return the median CPU time of a training step in this process."""
    torch.set_num_threads(1)
    config = load_recipe(recipe, ["max_steps=1000000"])
    torch.manual_seed(0)
    state = TrainState(config.bundle_config(size).build(), config.optimizer, 1_000_000)
    objective = config.objective.build(state.denoiser, config.sampler or SamplerDefaults(), 0)
    if world_size > 1:
        objective = torch.nn.parallel.DistributedDataParallel(objective, gradient_as_bucket_view=True)
    ends: list[float] = []
    batches = itertools.repeat(drawn_rows(rows, size))

    def on_step(_: object) -> None:
        ends.append(time.process_time())

    fit(state, objective, batches, repeats + 2, on_step, augment=config.augment, seed=0, rank=rank)
    return statistics.median(b - a for a, b in itertools.pairwise(ends[1:]))


def _worker(rank: int, world_size: int, port: int, recipe: str, repeats: int, found: dict[int, float]) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    found[rank] = step_seconds(recipe, SIZE, WORKER_ROWS, repeats, rank, world_size)
    dist.destroy_process_group()


def worker_seconds(recipe: str, world_size: int, repeats: int) -> float:
    """Return the CPU time of a step, averaged over the workers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with torch.multiprocessing.Manager() as manager:
        found = manager.dict()
        torch.multiprocessing.spawn(_worker, (world_size, port, recipe, repeats, found), nprocs=world_size)
        return statistics.fmean(found.values())


def main() -> None:
    """Print three tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="phase1")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--repeats", type=int, default=8, help="timed steps of each case")
    args = parser.parse_args()
    print("| px, 8 rows | seconds a step | images/s of a core |\n|---|---|---|")
    for size in args.sizes:
        seconds = step_seconds(args.recipe, size, ROWS, args.repeats)
        print(f"| {size} | {seconds:.3f} | {ROWS / seconds:.1f} |", flush=True)
    print("\n| rows, 64 px | seconds a step | images/s of a core |\n|---|---|---|")
    for rows in args.rows:
        seconds = step_seconds(args.recipe, SIZE, rows, args.repeats)
        print(f"| {rows} | {seconds:.3f} | {rows / seconds:.1f} |", flush=True)
    print("\n| workers, 16 rows each, 64 px | seconds a step and worker | images/s of a core |\n|---|---|---|")
    for workers in (1, 2):
        seconds = worker_seconds(args.recipe, workers, args.repeats)
        print(f"| {workers} | {seconds:.3f} | {WORKER_ROWS / seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
