"""Detect whether a device supports bfloat16, for the training loop (models/training/loop.py).

On a CPU without bfloat16 instructions, torch's bfloat16 loops take up to 40 times as long as float32.
"""

from __future__ import annotations

import torch


def has_bfloat16(device: torch.device) -> bool:
    """Return whether the device computes in bfloat16: a CPU with oneDNN kernels for it, a GPU from Ampere (8.0) on.

    Older GPUs (a T4 is 7.5) convert each number, which is slower than float32, and xformers has no kernel for them.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return True
    there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(there and torch.ops.mkldnn._is_mkldnn_bf16_supported())
