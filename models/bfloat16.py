"""Training where a CPU has no instructions for bfloat16: torch's loops for it take up to 40 times as long as float32.

Not here: the training loop, which asks, see models/training.py.
"""

from __future__ import annotations

import torch


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is worth its while there: on a CPU where oneDNN has kernels for it, on all else always."""
    if device.type != "cpu":
        return True
    there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(there and torch.ops.mkldnn._is_mkldnn_bf16_supported())
