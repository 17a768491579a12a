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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import animediffusion
from animediffusion.models.training.loop import MALLOC
from animediffusion.pipelines.estimate.estimate_worker import CheckpointCost, TrialAnswer, TrialOrder
from animediffusion.pipelines.training.plan import RunPlan
from animediffusion.pipelines.training.recipe import TrainConfig, plain
from animediffusion.pipelines.training.scaling import threads_per_worker
from animediffusion.platform.cluster.cluster import cluster_address
from animediffusion.platform.cluster.signals import handling

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


@dataclass(frozen=True, slots=True)
class NoEstimate:
    """Why an estimate is impossible."""

    note: str

    def to_json(self) -> Mapping[str, object]:
        """Return the JSON object that `train --dry-run` prints as `estimate`."""
        return {"possible": False, "note": self.note}


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run will take. Times are in seconds, sizes in MB (2**20 bytes); the field order is that of its JSON."""

    note: str | None
    """A limitation of the estimate; None if there is none."""
    threads_per_worker: int
    device: str
    """Name of the GPU, or cpu."""
    num_workers: int
    rows_per_worker: int
    steps_timed: int
    seconds_per_step: float
    images_per_s: float
    others_share: float
    """Share of the CPUs that other programs used during the trial, 0 to 1."""
    images_per_s_alone: float
    """images_per_s without the other programs."""
    steps: int
    """Steps that remain."""
    training_s: float
    start_s: float
    """Fixed duration outside training."""
    seconds: float
    """Duration in all: training, start, and saving checkpoints."""
    memory_per_worker_mb: float
    """On a GPU, its memory, CUDA_MEMORY_MB included."""
    memory_mb: float
    """Memory of all workers; on CPUs with RAY_MEMORY_MB."""
    gpu_memory_mb: float | None
    """Memory of one GPU; None on CPUs."""
    workers_that_fit: int | None
    """Smallest number of workers whose rows fit a GPU; None on CPUs, or if no number fits."""
    checkpoint_mb: float
    disk_mb: float
    """Size of the checkpoints that are kept, with the best one, and of the bundle."""

    def to_json(self) -> Mapping[str, object]:
        """Return the JSON object that `train --dry-run` prints as `estimate`."""
        return {"possible": True, **asdict(self)}


class _ImpossibleError(Exception):
    """An error whose message says in one line why an estimate is impossible."""


def estimate(work: RunPlan, timed_s: float = TIMED_S) -> Estimate | NoEstimate:
    """Time some steps of a run; this takes about 15 seconds, or longer if a step takes more than three seconds.

    Args:
        work: the run.
        timed_s: duration of the timed steps in seconds, after the processes have started and warmed up.
    """
    if work.finished:
        return NoEstimate("the run is finished, nothing is left to do")
    try:
        trial = trial_layout(work.config)
        order = TrialOrder(
            parent=os.getpid(),
            run=plain(work.config),
            image_size=work.image_size,
            rows=work.config.rows_per_worker(trial.workers),
            timed_s=timed_s,
            world_size=trial.processes,
            cuda=trial.cuda,
        )
        threads = threads_per_worker(trial.processes)
        answers, import_s = _measure(order, threads)
    except _ImpossibleError as reason:
        return NoEstimate(str(reason))
    return derive(work, trial, threads, answers, import_s)


def derive(
    work: RunPlan, trial: TrialLayout, threads: int, answers: Sequence[TrialAnswer], import_s: float
) -> Estimate:
    """Compute the estimate from the processes' answers.

    Args:
        work: the run.
        trial: which processes measured.
        threads: OpenMP threads of each process.
        answers: answers of the processes, by rank.
        import_s: seconds until the first process was ready.
    """
    config, first, workers = work.config, answers[0], trial.workers
    checkpoint = first.checkpoint or CheckpointCost(0.0, 0.0, 0.0)
    rows = config.rows_per_worker(workers)
    cuda = first.device != "cpu"
    per_step = max(_seconds_at(rows, answer) for answer in answers) * trial.slowdown * (1.0 if cuda else WORKER_TIME)
    memory, card = _memory_mb(rows, answers), first.gpu_memory_mb
    divisors = [number for number in range(1, config.batch_size + 1) if config.batch_size % number == 0]
    fitting = [number for number in divisors if card and _memory_mb(config.rows_per_worker(number), answers) <= card]
    steps = config.max_steps or max(1, int((config.max_minutes or 0) * 60 / per_step))
    steps = max(0, steps - work.start_step)
    saves = math.ceil(steps / config.checkpoint_every)
    training = steps * per_step
    start = START_S + START_IMPORTS * import_s
    bundle_mb = checkpoint.weights_mb * (1 + len(config.optimizer.ema_lengths))
    return Estimate(
        note=trial.note,
        threads_per_worker=threads,
        device=first.device,
        num_workers=workers,
        rows_per_worker=rows,
        steps_timed=first.steps,
        seconds_per_step=per_step,
        images_per_s=config.batch_size / per_step,
        others_share=first.others,
        images_per_s_alone=config.batch_size / per_step / (1.0 if cuda else max(0.01, 1 - first.others)),
        steps=steps,
        training_s=training,
        start_s=start,
        seconds=start + training + saves * checkpoint.seconds,
        memory_per_worker_mb=memory,
        memory_mb=workers * memory + (0.0 if cuda else RAY_MEMORY_MB),
        gpu_memory_mb=card,
        workers_that_fit=min(fitting, default=None),
        checkpoint_mb=checkpoint.size_mb,
        disk_mb=checkpoint.size_mb * min(saves, config.keep_checkpoints + 1) + bundle_mb,
    )


def _memory_mb(rows: int, answers: Sequence[TrialAnswer]) -> float:
    """Return the memory of one worker with this many rows, in MB."""
    beyond = CUDA_MEMORY_MB if answers[0].device != "cpu" else WORKER_MEMORY_MB
    return beyond + max(max(_step_memory_mb(rows, answer), answer.memory_saving_mb) for answer in answers)


def lines(found: Estimate | NoEstimate) -> list[str]:
    """Format the estimate as YAML comments, so that the printed configuration remains a valid recipe."""
    if isinstance(found, NoEstimate):
        return [f"# no estimate: {found.note}"]
    where = (
        f"of GPU memory ({CUDA_MEMORY_MB / 1024:.1f} GB allowed for CUDA and NCCL)"
        if found.device != "cpu"
        else "of memory"
    )
    threads = f"{found.threads_per_worker} thread{'s' * (found.threads_per_worker > 1)} each"
    shown = [
        f"estimate of this machine, {found.steps_timed} steps timed: {found.device}, "
        f"{found.num_workers} x {found.rows_per_worker} rows, {threads}",
        f"  speed   {found.images_per_s:.3g} images/s, {found.seconds_per_step:.3g} s per step",
        f"  time    {duration(found.training_s)} for {found.steps} steps, {duration(found.seconds)} in all",
        f"  memory  {_gb(found.memory_per_worker_mb)} {where} per worker, {_gb(found.memory_mb)} in all",
        f"  disk    {found.checkpoint_mb:.0f} MB a checkpoint, {found.disk_mb:.0f} MB in all",
    ]
    if found.others_share > BUSY:
        busy = f"other programs used {found.others_share:.0%} of the CPUs during the trial"
        shown.append(f"  note    {busy}; alone about {found.images_per_s_alone:.3g} images/s")
    if (card := found.gpu_memory_mb) and found.memory_per_worker_mb > card:
        fewest = found.workers_that_fit
        way = f"use {fewest} workers (num_workers={fewest}) or lower batch_size" if fewest else "lower image_size"
        shown.append(f"  note    a worker does not fit: the GPU has {_gb(card)}; {way}")
    if found.note:
        shown.append(f"  note    {found.note}")
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


def _seconds_at(rows: int, answer: TrialAnswer) -> float:
    """Return the duration of a step with `rows` rows."""
    # If a second row was too slow or too large to try, this is an upper bound.
    return _at(rows, answer, answer.timed.seconds, answer.one.seconds, per_row=answer.timed.seconds)


def _step_memory_mb(rows: int, answer: TrialAnswer) -> float:
    """Return the memory of a step with `rows` rows."""
    return _at(rows, answer, answer.timed.memory_mb, answer.one.memory_mb, per_row=answer.row_mb)


def _at(rows: int, answer: TrialAnswer, value: float, one: float, per_row: float) -> float:
    """Extrapolate linearly to `rows` rows.

    Args:
        rows: number of rows.
        answer: answer that has the number of rows that were tried.
        value: value with these rows.
        one: value with one row.
        per_row: growth of the value per row if only one row was tried.
    """
    if answer.rows > 1:
        per_row = max(0.0, value - one) / (answer.rows - 1)
    return value + (rows - answer.rows) * per_row


@dataclass(frozen=True, slots=True)
class TrialLayout:
    """Which workers a run will have, and which of them are tried on this machine."""

    workers: int
    """Number of workers of the run."""
    processes: int
    """Number of workers that are tried here."""
    cuda: bool
    """Whether they use GPUs."""
    note: str | None = None
    """A limitation of the estimate; None if there is none."""
    slowdown: float = 1.0
    """Factor on a step's duration; above 1 if the run's workers share the cores of this machine."""


def trial_layout(config: TrainConfig) -> TrialLayout:
    """Return what to try for a run.

    Raises:
        _ImpossibleError: if the workers need hardware that this machine lacks.
    """
    gpus, address = torch.cuda.device_count(), cluster_address()
    if config.use_gpu and not gpus:
        raise _ImpossibleError("the workers need GPUs, but this machine has none")
    fewest, workers = config.workers_on(0 if config.use_gpu is False else gpus)
    cuda = gpus > 0 if address and config.use_gpu is None else gpus >= fewest
    cuda = (cuda or bool(config.use_gpu)) and config.use_gpu is not False
    if address:
        note = f"one worker on this machine was measured, not the cluster at {address}"
        return TrialLayout(workers, 1, cuda, note if cuda else f"{note}; workers with GPUs are much faster")
    if not cuda:
        processes = min(workers, os.cpu_count() or 1)
        return TrialLayout(workers, processes, cuda=False, slowdown=workers / processes)
    if gpus < fewest:
        raise _ImpossibleError(f"{fewest} workers need {fewest} GPUs, but this machine has {gpus}")
    # An elastic run gets as many workers as there are GPUs.
    workers = min(workers, gpus)
    return TrialLayout(workers, workers, cuda=True)


def _measure(order: TrialOrder, threads: int) -> tuple[list[TrialAnswer], float]:
    """Run the processes, and return their answers, by rank, and the seconds until the first process was ready.

    Raises:
        _ImpossibleError: if a process fails, or the trial exceeds LIMIT_S.
    """
    with tempfile.TemporaryDirectory(prefix="animediffusion-") as name:
        folder, begun = Path(name), time.time()
        (folder / "order.json").write_text(json.dumps(asdict(order)))
        terminate = handling(lambda number: sys.exit(128 + number), [signal.SIGTERM])
        # sys.exit() removes the child processes and the folder before this process ends.
        with terminate, _children(folder, order.world_size, threads) as children:
            while any(child.poll() is None for child in children):
                if any(child.poll() for child in children) or time.time() - begun > LIMIT_S:
                    break
                time.sleep(0.05)
            codes = [child.poll() for child in children]
        # Only answers of failed processes explain the failure; the other processes only waited for them.
        failed = [rank for rank, code in enumerate(codes) if code]
        answers = [_read_answer(folder, rank, codes[rank]) for rank in failed or range(order.world_size)]
    return answers, answers[0].ready - begun


def _read_answer(folder: Path, rank: int, code: int | None) -> TrialAnswer:
    path = folder / f"{rank}.json"
    if path.exists():
        found = json.loads(path.read_text())
        if "error" in found:
            raise _ImpossibleError(found["error"])
        return TrialAnswer.from_json(found)
    if code is None:
        raise _ImpossibleError(f"steps are too slow on this machine: none could be timed within {LIMIT_S:.0f} s")
    why = "killed, perhaps because memory ran out" if code < 0 else f"exit code {code}"
    raise _ImpossibleError(f"a process that timed steps ended early ({why})")


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
