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
    """`cuda` if torch can use a GPU here, else `cpu`.

    Args:
        must_be_gpu: a GPU is reserved for this process, so that a CPU would do its work slowly and unnoticed.

    Raises:
        ConfigError: it must be a GPU, and torch cannot use any.
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
    """float32 or bfloat16; `auto` is bfloat16 on a GPU whose hardware has it, and float32 elsewhere."""
    if asked != "auto":
        return asked
    return "bfloat16" if device.type == "cuda" and has_bfloat16(device) else "float32"


def _why_not() -> str:
    """The driver is too old or missing, or this torch is for CPUs: what NVML shows, else what torch says."""
    if found := why_unused(torch.__version__, torch.version.cuda):
        return found
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except Exception as error:
        return summary(error)
    return "it sees no GPU"
