"""NVIDIA GPUs and driver of this machine, read from NVML, which also finds GPUs that torch cannot use."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pynvml

DRIVERS = {12: "525 (570 for Blackwell)", 13: "580"}
"""The oldest Linux driver for each major version of CUDA (CUDA Toolkit Release Notes, table 3)."""


@dataclass(frozen=True)
class Driver:
    """An installed driver and its GPUs."""

    version: str
    cuda: tuple[int, int]
    """The newest CUDA version that the driver supports, as (major, minor)."""
    gpus: tuple[str, ...]


def driver() -> Driver | None:
    """Return the NVIDIA driver of this machine; None if it has no driver or no GPU."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        cuda = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        names = tuple(str(pynvml.nvmlDeviceGetName(handle)) for handle in handles)
        version = str(pynvml.nvmlSystemGetDriverVersion())
        return Driver(version, (cuda // 1000, cuda % 1000 // 10), names) if names else None
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def why_unused(torch_version: str, torch_cuda: str | None) -> str | None:
    """Explain why torch cannot use this machine's GPUs and what to do; None if it has no GPUs or they are hidden.

    Args:
        torch_version: version of the installed torch, which finds no CUDA device.
        torch_cuda: the CUDA version that torch is built for, `torch.version.cuda`; None if built without CUDA.
    """
    found = driver()
    if found is None or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    there = f"torch {torch_version} cannot use {len(found.gpus)} x {found.gpus[0]}"
    if torch_cuda is None:
        return f"{there}: it is built without CUDA; install with -c constraints.txt -c constraints-gpu.txt"
    major, newest = int(torch_cuda.partition(".")[0]), ".".join(map(str, found.cuda))
    if major > found.cuda[0]:
        return (
            f"{there}: the driver {found.version} runs CUDA {newest} and is too old for {torch_cuda}; "
            f"install driver {DRIVERS.get(major, 'of that CUDA version')} or later, or the torch of constraints-gpu.txt"
        )
    return f"{there}, although driver {found.version} runs CUDA {newest}; check nvidia-smi and the container's devices"
