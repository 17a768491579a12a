"""Estimate a run's speed, time, memory and disk space before it starts, by timing some real steps.

    found = estimate(plan(settings, config))
    print(*lines(found), sep=chr(10))

One process for each worker that the run will have on this machine executes steps of the run, with the threads of a
worker (pipelines/estimate/estimate_worker.py). The processes run in parallel, so they slow each other down as the
workers will. The constants below add the measured overhead of Ray. The estimate writes only a temporary folder and
needs no cluster.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import animediffusion
from animediffusion.models.training.loop import MALLOC
from animediffusion.pipelines.training.plan import RunPlan
from animediffusion.pipelines.training.recipe import TrainConfig, plain
from animediffusion.pipelines.training.scaling import threads_per_worker
from animediffusion.platform.cluster.connect import cluster_address
from animediffusion.platform.signals import handling

# The next five constants come from a comparison with `train` of the same recipe: two cores, 64 px, recipes demo and
# phase1, two workers.
WORKER_TIME = 1.1
"""Ratio of a step's duration in a run to the duration measured here: Ray Data, driver and MLflow share the cores."""
WORKER_MEMORY_MB = 80.0
"""Memory of a Ray Train worker in excess of the process measured here."""
RAY_MEMORY_MB = 3200.0
"""Memory of the driver, Ray's processes, data readers and checkpoint scoring; shared pages count once."""
START_S = 45.0
"""Fixed duration of a run outside training: start of Ray, workers and data, and scoring of the last checkpoint."""
START_IMPORTS = 2.2
"""Multiple of the import time of a process, measured here, that is added to START_S."""
CUDA_MEMORY_MB = 1536.0
"""Allowance (not measured) for GPU memory that PyTorch does not count: CUDA context, NCCL buffers, fragmentation."""
BUSY = 0.15
"""The estimate contains a note if other programs use more than this share of the CPUs."""
TIMED_S = 6.0
LIMIT_S = 240.0
"""Timeout of the trial in seconds."""


class _Impossible(Exception):  # noqa: N818 - caught and reported here
    """An error whose message says in one line why an estimate is impossible."""


def estimate(work: RunPlan, timed_s: float = TIMED_S) -> dict[str, Any]:
    """Time some steps of a run; this takes about 15 seconds, or longer if a step takes more than three seconds.

    Args:
        work: the run.
        timed_s: duration of the timed steps in seconds, after the processes have started and warmed up.

    Returns:
        `possible`, and `note` (a limitation of the estimate, the reason why it is impossible, or None). If `possible`,
        also `threads_per_worker` and the result of derive(). Times are in seconds, sizes in MB (2**20 bytes).
    """
    if work.finished:
        return {"possible": False, "note": "the run is finished, nothing is left to do"}
    try:
        workers, processes, cuda, note = layout(work.config)
        rows = work.config.batch_size // workers
        order = {
            "parent": os.getpid(),
            "run": plain(work.config),
            "image_size": work.image_size,
            "rows": rows,
            "timed_s": timed_s,
            "world_size": processes,
            "cuda": cuda,
        }
        threads = threads_per_worker(processes)
        answers = _measure(order, processes, threads)
    except _Impossible as reason:
        return {"possible": False, "note": str(reason)}
    # If there are more workers than cores, workers share the cores and a step takes longer.
    turns = 1.0 if cluster_address() else workers / processes
    return {
        "possible": True,
        "note": note,
        "threads_per_worker": threads,
        **derive(work, workers, answers, turns),
    }


def derive(work: RunPlan, workers: int, answers: Sequence[dict[str, Any]], turns: float = 1.0) -> dict[str, Any]:
    """Compute the estimate from the processes' answers (pipelines/estimate/estimate_worker.py).

    Args:
        work: the run.
        workers: number of workers of the run.
        answers: answers of the processes, by rank.
        turns: factor on a step's duration; above 1 if there are more workers than processes.

    Returns:
        A dictionary with these keys:
        device, num_workers, rows_per_worker, steps_timed;
        seconds_per_step, images_per_s, others_share (CPU share of other programs during the trial, 0 to 1),
        images_per_s_alone (images_per_s without the other programs);
        steps (remaining), training_s, start_s, seconds (training, start and saving checkpoints);
        memory_per_worker_mb (includes CUDA_MEMORY_MB on a GPU), memory_mb (all workers; on CPUs with RAY_MEMORY_MB),
        gpu_memory_mb (of one GPU, None on CPUs), workers_that_fit (the smallest number of workers whose rows fit a GPU;
        None on CPUs, or if no number fits);
        checkpoint_mb, disk_mb (the checkpoints that are kept, with the best one, and the bundle).
    """
    config, first = work.config, answers[0]
    rows = config.batch_size // workers
    cuda = first["device"] != "cpu"
    per_step = max(_at(rows, answer, "seconds") for answer in answers) * turns * (1.0 if cuda else WORKER_TIME)
    memory, card = _memory(rows, answers), first.get("gpu_memory_mb")
    divisors = [number for number in range(1, config.batch_size + 1) if config.batch_size % number == 0]
    fitting = [number for number in divisors if card and _memory(config.batch_size // number, answers) <= card]
    steps = config.max_steps or max(1, int((config.max_minutes or 0) * 60 / per_step))
    steps = max(0, steps - work.start_step)
    saves = math.ceil(steps / config.checkpoint_every)
    training = steps * per_step
    start = START_S + START_IMPORTS * first["import_s"]
    bundle_mb = first["weights_mb"] * (1 + len(config.optimizer.ema_lengths))
    return {
        "device": first["device"],
        "num_workers": workers,
        "rows_per_worker": rows,
        "steps_timed": first["steps"],
        "seconds_per_step": per_step,
        "images_per_s": config.batch_size / per_step,
        "others_share": first["others"],
        "images_per_s_alone": config.batch_size / per_step / (1.0 if cuda else max(0.01, 1 - first["others"])),
        "steps": steps,
        "training_s": training,
        "start_s": start,
        "seconds": start + training + saves * first["checkpoint_s"],
        "memory_per_worker_mb": memory,
        "memory_mb": workers * memory + (0.0 if cuda else RAY_MEMORY_MB),
        "gpu_memory_mb": card,
        "workers_that_fit": min(fitting, default=None),
        "checkpoint_mb": first["checkpoint_mb"],
        "disk_mb": first["checkpoint_mb"] * min(saves, config.keep_checkpoints + 1) + bundle_mb,
    }


def _memory(rows: int, answers: Sequence[dict[str, Any]]) -> float:
    """Return the memory of one worker with this many rows, in MB."""
    beyond = CUDA_MEMORY_MB if answers[0]["device"] != "cpu" else WORKER_MEMORY_MB
    return beyond + max(max(_at(rows, answer, "memory_mb"), float(answer["memory_saving_mb"])) for answer in answers)


def lines(found: dict[str, Any]) -> list[str]:
    """Format the estimate as YAML comments, so that the printed configuration remains a valid recipe."""
    if not found["possible"]:
        return [f"# no estimate: {found['note']}"]
    where = (
        f"of GPU memory ({CUDA_MEMORY_MB / 1024:.1f} GB allowed for CUDA and NCCL)"
        if found["device"] != "cpu"
        else "of memory"
    )
    threads = f"{found['threads_per_worker']} thread{'s' * (found['threads_per_worker'] > 1)} each"
    shown = [
        f"estimate of this machine, {found['steps_timed']} steps timed: {found['device']}, "
        f"{found['num_workers']} x {found['rows_per_worker']} rows, {threads}",
        f"  speed   {found['images_per_s']:.3g} images/s, {found['seconds_per_step']:.3g} s per step",
        f"  time    {duration(found['training_s'])} for {found['steps']} steps, {duration(found['seconds'])} in all",
        f"  memory  {_gb(found['memory_per_worker_mb'])} {where} per worker, {_gb(found['memory_mb'])} in all",
        f"  disk    {found['checkpoint_mb']:.0f} MB a checkpoint, {found['disk_mb']:.0f} MB in all",
    ]
    if found["others_share"] > BUSY:
        busy = f"other programs took {found['others_share']:.0%} of the CPUs meanwhile"
        shown.append(f"  note    {busy}; alone about {found['images_per_s_alone']:.3g} images/s")
    if (card := found.get("gpu_memory_mb")) and found["memory_per_worker_mb"] > card:
        fewest = found["workers_that_fit"]
        way = f"use {fewest} workers (num_workers={fewest}) or lower batch_size" if fewest else "lower image_size"
        shown.append(f"  note    a worker does not fit: the GPU has {_gb(card)}; {way}")
    if found["note"]:
        shown.append(f"  note    {found['note']}")
    return [f"# {line}" for line in shown]


def duration(seconds: float) -> str:
    """Format a duration as 45 s, 5 min 10 s, 3 h 20 min or 12 d 4 h."""
    for big, small, size, part in (("d", "h", 86400, 3600), ("h", "min", 3600, 60), ("min", "s", 60, 1)):
        if seconds >= size:
            whole, rest = divmod(round(seconds / part), size // part)
            return f"{whole} {big} {rest} {small}" if rest else f"{whole} {big}"
    return f"{seconds:.0f} s"


def _gb(megabytes: float) -> str:
    return f"{megabytes / 1024:.1f} GB"


def _at(rows: int, answer: dict[str, Any], what: str) -> float:
    """Return a value at `rows` rows, by linear extrapolation from one row and the most rows that were tried."""
    tried, value, one = int(answer["rows"]), float(answer[what]), float(answer["one"][what])
    if tried > 1:
        return value + (rows - tried) * max(0.0, value - one) / (tried - 1)
    # A second row was too slow or too large; this is an upper bound.
    return value * rows if what == "seconds" else value + (rows - 1) * float(answer["row_mb"])


def layout(config: TrainConfig) -> tuple[int, int, bool, str | None]:
    """Return the number of workers, the number of processes to try here, whether they use GPUs, and a note.

    The note names a limitation of the estimate; it is None if there is no limitation.

    Raises:
        _Impossible: if the workers need hardware that this machine lacks.
    """
    gpus, address = torch.cuda.device_count(), cluster_address()
    if config.use_gpu and not gpus:
        raise _Impossible("the workers will have GPUs, this machine has none")
    fewest, workers = config.workers_on(0 if config.use_gpu is False else gpus)
    cuda = gpus > 0 if address and config.use_gpu is None else gpus >= fewest
    cuda = (cuda or bool(config.use_gpu)) and config.use_gpu is not False
    if address:
        note = f"one worker on this machine was measured, not the cluster at {address}"
        return workers, 1, cuda, note if cuda else f"{note}; workers with GPUs are much faster"
    if not cuda:
        return workers, min(workers, os.cpu_count() or 1), False, None
    if gpus < fewest:
        raise _Impossible(f"{fewest} workers need as many GPUs, this machine has {gpus}")
    # An elastic run gets as many workers as there are GPUs.
    workers = min(workers, gpus)
    return workers, workers, True, None


def _measure(order: dict[str, Any], processes: int, threads: int) -> list[dict[str, Any]]:
    """Run the processes and return their answers, by rank.

    Raises:
        _Impossible: if a process fails, or the trial exceeds LIMIT_S.
    """
    with tempfile.TemporaryDirectory(prefix="animediffusion-") as name:
        folder, begun = Path(name), time.time()
        (folder / "order.json").write_text(json.dumps(order))
        terminate = handling(lambda number: sys.exit(128 + number), [signal.SIGTERM])
        # sys.exit() removes the child processes and the folder before this process ends.
        with terminate, _children(folder, processes, threads) as children:
            while any(child.poll() is None for child in children):
                if any(child.poll() for child in children) or time.time() - begun > LIMIT_S:
                    break
                time.sleep(0.05)
            codes = [child.poll() for child in children]
        # Only answers of failed processes explain the failure; the other processes only waited for them.
        told = [rank for rank, code in enumerate(codes) if code] or range(processes)
        answers = [_answer(folder, rank, codes[rank]) for rank in told]
    failed = [answer["error"] for answer in answers if "error" in answer]
    if failed:
        raise _Impossible(failed[0])
    return [{**answer, "import_s": answer["ready"] - begun} for answer in answers]


def _answer(folder: Path, rank: int, code: int | None) -> dict[str, Any]:
    path = folder / f"{rank}.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    if code is None:
        return {"error": f"steps are too slow here, {LIMIT_S:.0f} s were not enough to try some"}
    why = "killed, maybe for its memory" if code < 0 else f"exit code {code}"
    return {"error": f"the trial of some steps ended early ({why})"}


@contextmanager
def _children(folder: Path, processes: int, threads: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start the processes, and kill them at the end of the block."""
    # The children import the same package as this process, and (-P) nothing else from the current folder.
    paths = [str(Path(animediffusion.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        **MALLOC,  # workers have these settings too, which change time and memory
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "OMP_NUM_THREADS": str(threads),
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    }
    command = [sys.executable, "-P", "-m", "animediffusion.pipelines.estimate.estimate_worker", str(folder)]
    nowhere = subprocess.DEVNULL
    children: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(processes):
            words = [*command, str(rank)]
            child = subprocess.Popen(words, env=environment, stdin=nowhere, stdout=nowhere, stderr=nowhere)
            children.append(child)
        yield children
    finally:
        for child in children:
            child.kill()
        for child in children:
            child.wait()
