"""What a run will take, before it is started: speed, time, memory, disk. Measured by some real steps, not guessed.

    found = estimate(plan(settings, config))
    print(*lines(found), sep=chr(10))

As many processes as the run will have workers on this machine take the run's own steps at once, with as many threads as
a worker gets (pipelines/estimate/estimate_worker.py): they slow each other as the workers will. What Ray adds was
measured beside it, see the constants. Nothing is written but a temporary folder, and no cluster is needed.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
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

# The next five on two cores, 64 px, recipes demo and phase1, two workers, beside `train` of the same recipe.
WORKER_TIME = 1.1
"""Seconds of a step in a run by those measured here: Ray Data, the driver and MLflow share the cores."""
WORKER_MEMORY_MB = 80.0
"""What a Ray Train worker has in RAM beyond the process measured here."""
RAY_MEMORY_MB = 3200.0
"""Of the driver, Ray's own processes, and those that read the data and score checkpoints; shared pages counted once."""
START_S = 45.0
"""Of a run that is no training: Ray, workers and the first rows come up, the last checkpoint is scored, ..."""
START_IMPORTS = 2.2
"""... and as many times what a process needs here, now, to import the same libraries."""
CUDA_MEMORY_MB = 1536.0
"""An allowance, not measured, for what PyTorch does not count on a GPU: the CUDA context, NCCL's buffers, fragments."""
BUSY = 0.15
"""A share of the CPUs that others take, which is told."""
TIMED_S = 6.0
LIMIT_S = 240.0
"""The trial ends at the latest now."""


class _Impossible(Exception):  # noqa: N818 - caught here, and told
    """Why there is no estimate, in one line."""


def estimate(work: RunPlan, timed_s: float = TIMED_S) -> dict[str, Any]:
    """Try the run's steps, some 15 seconds in all, longer where one takes more than three.

    Args:
        work: the run.
        timed_s: seconds of steps that are timed, after the start of the processes and some to warm up.

    Returns:
        possible, note (what it does not cover, or why there is none; None), and if possible threads_per_worker and
        what derive() returns. Times are in seconds, sizes in MB (2**20 bytes).
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
    # More workers than cores take turns.
    turns = 1.0 if cluster_address() else workers / processes
    return {
        "possible": True,
        "note": note,
        "threads_per_worker": threads,
        **derive(work, workers, answers, turns),
    }


def derive(work: RunPlan, workers: int, answers: Sequence[dict[str, Any]], turns: float = 1.0) -> dict[str, Any]:
    """What follows from the processes' answers (pipelines/estimate/estimate_worker.py).

    Returns:
        device, num_workers, rows_per_worker, steps_timed; seconds_per_step, images_per_s, others_share (of the CPUs, 0
        to 1: what other programs took meanwhile), images_per_s_alone (as if they were not there); steps (still to do),
        training_s, start_s, seconds (both and the checkpoints); memory_per_worker_mb (on a GPU with CUDA_MEMORY_MB),
        memory_mb (all workers, and Ray on one machine), gpu_memory_mb (of one card, or None), workers_that_fit (the
        fewest with whose rows a worker fits that card; None on CPUs, or if none do); checkpoint_mb, disk_mb
        (checkpoints that are kept, the best among them, and the bundle).
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
    """MB of one worker with so many rows."""
    beyond = CUDA_MEMORY_MB if answers[0]["device"] != "cpu" else WORKER_MEMORY_MB
    return beyond + max(max(_at(rows, answer, "memory_mb"), float(answer["memory_saving_mb"])) for answer in answers)


def lines(found: dict[str, Any]) -> list[str]:
    """The estimate for people, as YAML comments: what is printed stays a recipe."""
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
    """45 s, 5 min 10 s, 3 h 20 min, 12 d 4 h."""
    for big, small, size, part in (("d", "h", 86400, 3600), ("h", "min", 3600, 60), ("min", "s", 60, 1)):
        if seconds >= size:
            whole, rest = divmod(round(seconds / part), size // part)
            return f"{whole} {big} {rest} {small}" if rest else f"{whole} {big}"
    return f"{seconds:.0f} s"


def _gb(megabytes: float) -> str:
    return f"{megabytes / 1024:.1f} GB"


def _at(rows: int, answer: dict[str, Any], what: str) -> float:
    """A number at `rows` rows: measured, or on the straight line through one row and the most that were tried."""
    tried, value, one = int(answer["rows"]), float(answer[what]), float(answer["one"][what])
    if tried > 1:
        return value + (rows - tried) * max(0.0, value - one) / (tried - 1)
    # Too slow or too large for a second row: at most this much.
    return value * rows if what == "seconds" else value + (rows - 1) * float(answer["row_mb"])


def layout(config: TrainConfig) -> tuple[int, int, bool, str | None]:
    """Workers of the run, how many of them to try here, whether on GPUs, and what the estimate cannot say.

    Raises:
        _Impossible: the workers will be on other hardware than there is here.
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
    # Of an elastic run as many as there is room for.
    workers = min(workers, gpus)
    return workers, workers, True, None


def _measure(order: dict[str, Any], processes: int, threads: int) -> list[dict[str, Any]]:
    """The answers of all processes, by rank.

    Raises:
        _Impossible: one failed, or they take too long.
    """
    with tempfile.TemporaryDirectory(prefix="animediffusion-") as name:
        folder, begun = Path(name), time.time()
        (folder / "order.json").write_text(json.dumps(order))
        with _terminable(), _children(folder, processes, threads) as children:
            while any(child.poll() is None for child in children):
                if any(child.poll() for child in children) or time.time() - begun > LIMIT_S:
                    break
                time.sleep(0.05)
            codes = [child.poll() for child in children]
        # The first that failed knows why; others then only miss it.
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
def _terminable() -> Iterator[None]:
    """SIGTERM ends this process as usual, but with the processes and the folder cleared away."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _children(folder: Path, processes: int, threads: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The processes; none of them outlives the block."""
    # They find this package as we did, and nothing else in the current folder.
    paths = [str(Path(animediffusion.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        **MALLOC,  # as workers have it: it changes both time and memory
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
