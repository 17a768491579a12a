"""Execute and time the steps of one worker without Ray; this is the child process of pipelines/estimate/estimate.py.

    python -m animediffusion.pipelines.estimate.estimate_worker FOLDER RANK

The process reads a TrialOrder from FOLDER/order.json and writes a TrialAnswer to FOLDER/RANK.json. The steps are those
of a run, on rows of its dataset: decoding, augmentation, network, objective, optimizer and, for several workers, DDP.
pipelines/estimate/estimate.py computes the estimate from the answers.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from animediffusion.models.device import MB, data_parallel, device_name, peak_memory_mb
from animediffusion.models.network.attention import use_attention
from animediffusion.models.numerics import choose_numerics
from animediffusion.models.out_of_memory import is_out_of_memory
from animediffusion.models.training.loop import TrainState, fit
from animediffusion.pipelines.data.manifest import Manifest
from animediffusion.pipelines.data.shards import PICTURES, read_rows
from animediffusion.pipelines.data.stream import decode_rows
from animediffusion.pipelines.training.recipe import TrainConfig
from animediffusion.platform.storage import storage
from animediffusion.platform.tracking import tracking  # noqa: F401 - a worker imports MLflow, so its memory counts

MIN_STEPS = 2
"""Fewest timed steps, however long a step takes."""
LONGEST_S = 40.0
"""Fewer rows are tried if MIN_STEPS and a warm-up step might take longer than this, in seconds."""
ROWS_READ = 64
"""Most rows to read from the dataset; a step with more rows repeats them."""
MEMORY_SHARE = 0.7
"""Share of the free memory that the trial may use."""
STATE_BYTES = 20
"""Bytes per parameter: 4 each for value, average, gradient and two moments. Each further average adds 4 bytes."""


@dataclass(frozen=True, slots=True)
class TrialOrder:
    """What the processes of an estimate should try."""

    parent: int
    """Id of the process that waits for the answers; they end when it ends."""
    run: dict[str, Any]
    """The TrainConfig of the run as JSON."""
    image_size: int
    """Side of the images in pixels."""
    rows: int
    """Rows per step and worker."""
    timed_s: float
    """Duration of the timed steps in seconds."""
    world_size: int
    """Number of processes."""
    cuda: bool
    """Whether each process uses a GPU."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """Cost of one step."""

    seconds: float
    memory_mb: float
    """Peak memory of the process so far, in MB (2**20 bytes)."""


@dataclass(frozen=True, slots=True)
class CheckpointCost:
    """Cost of saving the state once."""

    seconds: float
    size_mb: float
    """Size of the checkpoint in MB."""
    weights_mb: float
    """Size of the weights in it in MB."""


@dataclass(frozen=True, slots=True)
class TrialAnswer:
    """What one process of an estimate measured."""

    ready: float
    """Time (seconds since the epoch) at which the process was ready."""
    one: StepCost
    """Cost of a step with one row."""
    row_mb: float
    """Memory of one more row in MB."""
    rows: int
    """Rows of the timed steps."""
    steps: int
    """Number of timed steps."""
    timed: StepCost
    """Mean duration and peak memory of the timed steps."""
    others: float
    """Share of all CPUs that other programs used meanwhile, 0 to 1."""
    memory_saving_mb: float
    """Peak memory after a checkpoint was saved, in MB."""
    device: str
    """Name of the GPU, or cpu."""
    gpu_memory_mb: float | None
    """Memory of the GPU in MB; None on CPUs."""
    checkpoint: CheckpointCost | None
    """Set on rank 0."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Return the answer from asdict() after a JSON round trip."""
        saved = value["checkpoint"]
        costs = {"one": StepCost(**value["one"]), "timed": StepCost(**value["timed"])}
        return cls(**{**value, **costs, "checkpoint": CheckpointCost(**saved) if saved else None})


def main(folder: Path, rank: int) -> None:
    """Execute the order and write the answer, or a one-line `error`, to FOLDER/RANK.json."""
    order = TrialOrder(**json.loads((folder / "order.json").read_text()))
    threading.Thread(target=_end_with_parent, args=(order.parent,), daemon=True).start()
    probe = None
    try:
        probe = _Probe(order, rank, folder)
        answer = asdict(probe.run())
    except Exception as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if order.cuda and is_out_of_memory(error) and not isinstance(error, MemoryError):
            line = _too_much(1 if probe is None else probe.tried)
        answer = {"error": line}
    written = folder / f"{rank}.partial"
    written.write_text(json.dumps(answer))
    written.rename(folder / f"{rank}.json")
    # os._exit() does not wait for the other ranks, which may have failed.
    os._exit("error" in answer)


def _too_much(rows: int) -> str:
    if rows > 1:
        return f"out of GPU memory with {rows} rows of a worker; lower batch_size or use more workers (num_workers)"
    return "out of GPU memory with one row; lower image_size or take a smaller network"


class _Probe:
    """The trial of one rank.

    Args:
        order: what to try.
        rank: rank of this process.
        folder: folder for the rendezvous of the ranks and for a checkpoint.

    Raises:
        MemoryError: if weights and optimizer state exceed the free memory.
    """

    def __init__(self, order: TrialOrder, rank: int, folder: Path) -> None:
        self.config = TrainConfig.check(order.run)
        self.rows, self.timed_s = order.rows, order.timed_s
        self.tried = 1
        """Rows of the last step that was begun."""
        self.rank, self.world_size, self.folder = rank, order.world_size, folder
        self.device = torch.device("cuda", rank) if order.cuda else torch.device("cpu")
        use_attention(self.config.attention)
        choose_numerics(self.device, exact=self.config.objective.strict)
        bundle = self.config.bundle_config(order.image_size)
        self.encoded = _encoded_rows(self.config.data, min(self.rows, ROWS_READ))
        self.base_mb = peak_memory_mb(self.device)
        denoiser = bundle.build()
        state_bytes = STATE_BYTES + 4 * len(self.config.optimizer.ema_lengths)
        self.state_mb = sum(parameter.numel() for parameter in denoiser.parameters()) * state_bytes / MB
        if self.state_mb > self._free_mb():
            raise MemoryError(
                f"weights and optimizer alone need {self.state_mb:.0f} MB, {self._free_mb():.0f} are free"
            )
        self.state = TrainState(denoiser.to(self.device), self.config.optimizer, self.config.max_steps)
        self.objective = self.config.objective.build(self.state.denoiser, bundle.sampler, self.config.seed)
        if self.world_size > 1:
            backend, meeting = "nccl" if order.cuda else "gloo", f"file://{folder}/meet"
            dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=self.world_size)
            self.objective = data_parallel(self.objective, self.device)

    def run(self) -> TrialAnswer:
        """Measure the duration of a step and the peak memory, for one row and for more rows, and save a checkpoint."""
        ready = time.time()
        self._step(1)
        one = StepCost(self._step(1), peak_memory_mb(self.device))
        row_mb = max(1.0, one.memory_mb - self.base_mb - self.state_mb)
        rows = self._most_rows(one.seconds, row_mb)
        begun, steps, load = time.monotonic(), 0, _CpuLoad()
        while self._agree(steps < MIN_STEPS or time.monotonic() - begun < self.timed_s):
            self._step(rows)
            steps += 1
        timed = StepCost((time.monotonic() - begun) / steps, peak_memory_mb(self.device))
        others = load.others(self.world_size)
        checkpoint = self._checkpoint() if self.rank == 0 else None
        return TrialAnswer(
            ready=ready,
            one=one,
            row_mb=row_mb,
            rows=rows,
            steps=steps,
            timed=timed,
            others=others,
            memory_saving_mb=peak_memory_mb(self.device),
            device=device_name(self.device),
            gpu_memory_mb=torch.cuda.mem_get_info(self.device)[1] / MB if self.device.type == "cuda" else None,
            checkpoint=checkpoint,
        )

    def _most_rows(self, seconds: float, row_mb: float) -> int:
        """Double the rows up to those of a worker, while twice as many are expected to fit in time and memory."""
        rows = 1
        while rows < self.rows:
            more, before = min(2 * rows, self.rows), peak_memory_mb(self.device)
            in_time = (MIN_STEPS + 1) * seconds * more / rows <= LONGEST_S
            in_memory = (more - rows) * row_mb <= MEMORY_SHARE * self._free_mb()
            if not self._agree(in_time and in_memory):
                break
            seconds = self._step(more)
            row_mb = max(1.0, (peak_memory_mb(self.device) - before) / (more - rows))
            rows = more
        return rows

    def _free_mb(self) -> float:
        if self.device.type == "cuda":
            return float(torch.cuda.mem_get_info(self.device)[0]) / MB
        return float(psutil.virtual_memory().available) / MB / self.world_size

    def _step(self, rows: int) -> float:
        """Execute one step as a worker does, and return its duration in seconds."""
        begun, self.tried = time.monotonic(), rows
        chosen = np.resize(np.arange(len(self.encoded["target"])), rows)
        arrays = decode_rows({name: [column[i] for i in chosen] for name, column in self.encoded.items()})
        batch = {name: torch.from_numpy(value).to(self.device) for name, value in arrays.items()}
        seed, augment = self.config.seed, self.config.augment
        fit(self.state, self.objective, [batch], None, lambda _: None, augment=augment, seed=seed, rank=self.rank)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.monotonic() - begun

    def _agree(self, value: int) -> int:
        """Return the value of rank 0 on all ranks."""
        if self.world_size == 1:
            return int(value)
        agreed: Tensor = torch.tensor(int(value), device=self.device)
        dist.broadcast(agreed, 0)
        return int(agreed)

    def _checkpoint(self) -> CheckpointCost:
        begun, place = time.monotonic(), self.folder / "checkpoint"
        self.state.save(place)
        seconds = time.monotonic() - begun
        checkpoint_mb = sum(path.stat().st_size for path in place.iterdir()) / MB
        weights_mb = sum(parameter.nbytes for parameter in self.state.parameters) / MB
        return CheckpointCost(seconds, checkpoint_mb, weights_mb)


class _CpuLoad:
    """Measurement of the CPU load, from its construction on."""

    def __init__(self) -> None:
        self.begun, self.own, self.all = time.monotonic(), time.process_time(), self._busy()

    def others(self, processes: int) -> float:
        """Return the share of all cores that other programs used, 0 to 1.

        The CPU time of this process times `processes` counts as the trial's own.
        """
        seconds = (time.monotonic() - self.begun) * (os.cpu_count() or 1)
        own = processes * (time.process_time() - self.own)
        return min(1.0, max(0.0, (self._busy() - self.all - own) / seconds))

    def _busy(self) -> float:
        times = psutil.cpu_times()
        return float(times.user + times.nice + times.system)


def _encoded_rows(uri: str, most: int) -> dict[str, list[Any]]:
    shard = Manifest.load(uri).split("train").shards[0]
    numbers = list(range(min(most, shard.rows)))
    return read_rows(storage.join(uri, shard.path), shard.sha256, numbers, PICTURES).to_pydict()  # type: ignore[no-any-return]


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
