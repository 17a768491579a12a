"""The device that a replica computes on, and the precision of its network there."""

from __future__ import annotations

from typing import Literal

import torch

from animediffusion.models.training.cpu_precision import has_bfloat16
from animediffusion.platform.errors import ConfigError
from animediffusion.platform.gpu import why_unused
from animediffusion.serve.engine.faults import summary

Precision = Literal["auto", "float32", "bfloat16"]


def usable_device(*, must_be_gpu: bool) -> str:
    """Return `cuda` if torch can use a GPU in this process, else `cpu`.

    Args:
        must_be_gpu: whether a GPU is reserved for this process; a silent fallback to a slow CPU would be a mistake.

    Raises:
        ConfigError: `must_be_gpu` is set, and torch cannot use a GPU.
    """
    if torch.cuda.is_available():
        return "cuda"
    if must_be_gpu:
        raise ConfigError(
            "GPU",
            f"reserved for this engine, but not usable ({_why_not()})",
            "see `animediffusion doctor` on that node, or set engine_gpus to 0",
        )
    return "cpu"


def precision_on(device: torch.device, asked: Precision) -> Precision:
    """Return float32 or bfloat16; `auto` is bfloat16 on a GPU whose hardware supports it, else float32."""
    if asked != "auto":
        return asked
    return "bfloat16" if device.type == "cuda" and has_bfloat16(device) else "float32"


def _why_not() -> str:
    """Return why torch cannot use a GPU, according to NVML (for example an old driver), else the error of torch."""
    if found := why_unused(torch.__version__, torch.version.cuda):
        return found
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except Exception as error:
        return summary(error)
    return "torch finds no GPU"
