"""Helpers for several benchmarks: clocks, hardware, training for a given time.

This module is not a benchmark itself.
"""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from animediffusion.models.bundle import SamplerDefaults
from animediffusion.models.diffusion.denoiser import Denoiser
from animediffusion.models.training.loop import Step, TrainState, fit
from animediffusion.pipelines.data.stream import Arrays
from animediffusion.pipelines.synthetic.dataset import make_row
from animediffusion.pipelines.training.recipe import TrainConfig

HERE = Path(__file__).parent / "recipes"
RECIPES: dict[str, list[tuple[str, float]]] = {
    "authors": [("animediffusion-strict", 1.0)],
    "ours-their-network": [(str(HERE / "ours-their-network.yaml"), 1.0)],
    "theirs-our-network": [(str(HERE / "theirs-our-network.yaml"), 1.0)],
    "flow-v": [(str(HERE / "flow-v.yaml"), 1.0)],
    "flow-x0": [(str(HERE / "flow-x0.yaml"), 1.0)],
    "regression": [(str(HERE / "regression.yaml"), 1.0)],
    "ours": [("phase1", 1.0)],
    "ours-2": [("phase1", 0.75), ("phase2", 0.25)],
}
"""Maps a name to recipes that are trained one after the other, with their shares of the time. Any other name is itself
a recipe."""
NUM_TIMED = 12
"""Number of steps that are timed to estimate how many fit into the given time."""


def clock(device: torch.device) -> float:
    """Return seconds: CPU time of all threads of this process on a CPU, wall-clock time on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def peak_mb(device: torch.device) -> float:
    """Return the peak memory so far in MB: of the process on a CPU, of tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def matmul_flops(device: torch.device, repeats: int = 10) -> float:
    """Return the floating-point operations per second of a large bf16 matrix product, the best of `repeats` runs."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    taken = []
    for _ in range(repeats):
        begun = clock(device)
        a @ b
        taken.append(clock(device) - begun)
    return 2 * side**3 / min(taken)


def hardware(device: torch.device) -> str:
    """Return the name of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def batches(rows: Arrays, config: TrainConfig, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """Yield full batches of rows in memory without end, in a new order every epoch."""
    tensors = {key: torch.from_numpy(value).to(device) for key, value in rows.items() if key != "id"}
    generator = torch.Generator().manual_seed(config.seed)
    size = min(config.batch_size, len(rows["target"]))
    while True:
        order = torch.randperm(len(rows["target"]), generator=generator)
        for start in range(0, len(order) - size + 1, size):
            index = order[start : start + size].to(device)
            yield {key: value[index] for key, value in tensors.items()}


def train(
    config: TrainConfig, start: Denoiser | None, rows: Arrays, seconds: float, device: torch.device
) -> tuple[Denoiser, dict[str, int]]:
    """Train for `seconds`; return the averaged model, and steps, images, seconds and parameters of the training."""
    torch.manual_seed(config.seed)
    denoiser = start or config.bundle_config(rows["target"].shape[1]).build().to(device)
    denoiser.train().requires_grad_(True)
    state = TrainState(denoiser, config.optimizer, 1_000_000)
    objective = config.objective.build(denoiser, config.sampler or SamplerDefaults(), config.seed)
    stream = batches(rows, config, device)
    begun = clock(device)

    def go(until: int) -> None:
        fit(state, objective, stream, until, on_step, augment=config.augment, seed=config.seed)

    def on_step(step: Step) -> bool:
        if step.step % 100 == 0:
            print(f"  step {step.step} loss {float(step.loss.total.detach()):.4f}", file=sys.stderr, flush=True)
        return clock(device) - begun > 1.1 * seconds

    go(3)
    timed = clock(device)
    go(3 + NUM_TIMED)
    per_step = (clock(device) - timed) / NUM_TIMED
    state.max_steps = max(state.step + 1, state.step + int((seconds - (clock(device) - begun)) / per_step))
    go(state.max_steps)
    spent = clock(device) - begun
    parameters = sum(p.numel() for p in denoiser.parameters())
    images = state.step * min(config.batch_size, len(rows["target"]))
    return state.averaged(), {"steps": state.step, "images": images, "seconds": round(spent), "parameters": parameters}


def drawn(count: int, size: int, first: int = 0) -> Arrays:
    """Draw faces, with all images of a row."""
    faces = [make_row(0, first + index, size) for index in range(count)]
    arrays = {name: np.stack([getattr(row, name) for row in faces]) for name in faces[0]._fields}
    return arrays | {flag: np.ones(count, bool) for flag in ("has_sketch", "has_reference", "has_cross")}
