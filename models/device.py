"""The device that a process trains on: its name, its memory, and the average of gradients over processes."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch
from torch import nn

MB = 2**20


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def peak_memory_mb(device: torch.device) -> float:
    """Return the peak memory of this process so far, on its GPU or (on a CPU) in RAM, in MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MB
    # Linux has VmHWM; ru_maxrss is only the fallback, because a new process inherits the value of its parent.
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / MB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MB if sys.platform == "darwin" else peak * 1024 / MB


def data_parallel(objective: nn.Module, device: torch.device) -> nn.Module:
    """Wrap an objective so that its gradients are averaged over all processes (DDP)."""
    ids = [device.index or 0] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(objective, device_ids=ids, gradient_as_bucket_view=True)
