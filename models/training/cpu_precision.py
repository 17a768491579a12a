"""Training where a CPU has no instructions for bfloat16: torch's loops for it take up to 40 times as long as float32.

Not here: the training loop, which asks, see models/training/loop.py.
"""

from __future__ import annotations

import torch


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16: a CPU where oneDNN has kernels for it, a GPU from Ampere (8.0) on.

    Older GPUs (a T4 is 7.5) convert each number: slower than float32, and xformers has no kernel for it.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return True
    there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(there and torch.ops.mkldnn._is_mkldnn_bf16_supported())
