"""Execute and time the steps of one worker without Ray; this is the child process of pipelines/estimate/estimate.py.

    python -m animediffusion.pipelines.estimate.estimate_worker FOLDER RANK

FOLDER/order.json contains the arguments, and the process writes its answer to FOLDER/RANK.json. The steps are the same
as in a run, on rows of its dataset: decoding, augmentation, network, objective, optimizer and, for several workers,
DDP. estimate.py computes the estimate from the answers.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from animediffusion.models.network.attention import use_attention
from animediffusion.models.numerics import choose_numerics
from animediffusion.models.out_of_memory import is_out_of_memory
from animediffusion.models.training.loop import TrainState, fit
from animediffusion.pipelines.data.manifest import Manifest
from animediffusion.pipelines.data.shards import PICTURES, read_rows
from animediffusion.pipelines.data.stream import decode_rows
from animediffusion.pipelines.training.recipe import TrainConfig
from animediffusion.platform.storage import files as storage
from animediffusion.platform.tracking import run as tracking  # noqa: F401 - a worker imports MLflow, so its memory counts

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
MB = 2**20


def main(folder: Path, rank: int) -> None:
    """Execute the order and write the answer, or a one-line `error`, to FOLDER/RANK.json."""
    order = json.loads((folder / "order.json").read_text())
    threading.Thread(target=_end_with_parent, args=(order["parent"],), daemon=True).start()
    probe = None
    try:
        probe = _Probe(order, rank, folder)
        answer = probe.run()
    except Exception as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if order["cuda"] and is_out_of_memory(error) and not isinstance(error, MemoryError):
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
        order: parent (process id), run (TrainConfig as a dictionary), image_size, rows (per step and worker), timed_s
            (duration of the timed steps in seconds), world_size, cuda.
        rank: rank of this process.
        folder: folder for the rendezvous of the ranks and for a checkpoint.

    Raises:
        MemoryError: if weights and optimizer state exceed the free memory.
    """

    def __init__(self, order: dict[str, Any], rank: int, folder: Path) -> None:
        self.config = TrainConfig.check(order["run"])
        self.rows, self.timed_s = int(order["rows"]), float(order["timed_s"])
        self.tried = 1
        """Rows of the last step that was begun."""
        self.rank, self.world_size, self.folder = rank, int(order["world_size"]), folder
        self.device = torch.device("cuda", rank) if order["cuda"] else torch.device("cpu")
        use_attention(self.config.attention)
        choose_numerics(self.device, exact=self.config.objective.strict)
        bundle = self.config.bundle_config(order["image_size"])
        self.encoded = _encoded_rows(self.config.data, min(self.rows, ROWS_READ))
        self.base_mb = self._peak_mb()
        denoiser = bundle.build()
        state_bytes = STATE_BYTES + 4 * len(self.config.optimizer.ema_lengths)
        self.state_mb = sum(parameter.numel() for parameter in denoiser.parameters()) * state_bytes / MB
        if self.state_mb > self._free_mb():
            raise MemoryError(
                f"weights and optimizer alone need {self.state_mb:.0f} MB, {self._free_mb():.0f} are free"
            )
        self.state = TrainState(denoiser.to(self.device), self.config.optimizer, self.config.max_steps or 1 << 40)
        self.objective = self.config.objective.build(self.state.denoiser, bundle.sampler, self.config.seed)
        if self.world_size > 1:
            backend, meeting = "nccl" if order["cuda"] else "gloo", f"file://{folder}/meet"
            dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=self.world_size)
            ids = [rank] if order["cuda"] else None
            self.objective = nn.parallel.DistributedDataParallel(
                self.objective, device_ids=ids, gradient_as_bucket_view=True
            )

    def run(self) -> dict[str, Any]:
        """Measure the duration of a step and the peak memory, for one row and for more rows, and save a checkpoint.

        Returns:
            The answer: ready (time when the process was ready), one (seconds and memory_mb of a step with one row),
            row_mb (memory of one more row), rows (rows of the timed steps), steps, seconds (per step), others (CPU
            share of other programs), memory_mb and memory_saving_mb (peak before and after saving), device,
            gpu_memory_mb (None on CPUs); on rank 0 also checkpoint_s, checkpoint_mb and weights_mb.
        """
        ready = time.time()
        self._step(1)
        one, one_mb = self._step(1), self._peak_mb()
        row_mb = max(1.0, one_mb - self.base_mb - self.state_mb)
        rows = self._most_rows(one, row_mb)
        begun, steps, watch = time.monotonic(), 0, _Watch()
        while self._agree(steps < MIN_STEPS or time.monotonic() - begun < self.timed_s):
            self._step(rows)
            steps += 1
        seconds = (time.monotonic() - begun) / steps
        others = watch.others(self.world_size)
        training_mb = self._peak_mb()
        checkpoint = self._checkpoint() if self.rank == 0 else {}
        return {
            "ready": ready,
            "one": {"seconds": one, "memory_mb": one_mb},
            "row_mb": row_mb,
            "rows": rows,
            "steps": steps,
            "seconds": seconds,
            "others": others,
            "memory_mb": training_mb,
            "memory_saving_mb": self._peak_mb(),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "gpu_memory_mb": torch.cuda.mem_get_info(self.device)[1] / MB if self.device.type == "cuda" else None,
            **checkpoint,
        }

    def _most_rows(self, seconds: float, row_mb: float) -> int:
        """Double the rows up to those of a worker, while twice as many are expected to fit in time and memory."""
        rows = 1
        while rows < self.rows:
            more, before = min(2 * rows, self.rows), self._peak_mb()
            in_time = (MIN_STEPS + 1) * seconds * more / rows <= LONGEST_S
            in_memory = (more - rows) * row_mb <= MEMORY_SHARE * self._free_mb()
            if not self._agree(in_time and in_memory):
                break
            seconds = self._step(more)
            row_mb = max(1.0, (self._peak_mb() - before) / (more - rows))
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
        fit(self.state, self.objective, [batch], 1 << 40, lambda _: None, augment=augment, seed=seed, rank=self.rank)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.monotonic() - begun

    def _agree(self, value: int) -> int:
        """Return the value of rank 0 on all ranks."""
        if self.world_size == 1:
            return int(value)
        said: Tensor = torch.tensor(int(value), device=self.device)
        dist.broadcast(said, 0)
        return int(said)

    def _checkpoint(self) -> dict[str, float]:
        begun, place = time.monotonic(), self.folder / "checkpoint"
        self.state.save(place)
        seconds = time.monotonic() - begun
        checkpoint_mb = sum(path.stat().st_size for path in place.iterdir()) / MB
        weights_mb = sum(parameter.nbytes for parameter in self.state.parameters) / MB
        return {"checkpoint_s": seconds, "checkpoint_mb": checkpoint_mb, "weights_mb": weights_mb}

    def _peak_mb(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / MB
        return peak_resident_mb()


class _Watch:
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


def peak_resident_mb() -> float:
    """Return the peak resident memory of this process so far, in MB."""
    # Linux has VmHWM; ru_maxrss is only the fallback, because a new process inherits the value of its parent.
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / MB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MB if sys.platform == "darwin" else peak * 1024 / MB


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
