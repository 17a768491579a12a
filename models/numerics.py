"""How a GPU computes float32: one choice for training, serving and benchmarks."""

from __future__ import annotations

import torch


def choose_numerics(device: torch.device, *, exact: bool = False) -> str:
    """Set how this process computes float32 products and convolutions on CUDA; returns `tf32` or `float32`.

    TF32 keeps float32's range and rounds products to 11 bits; sums stay float32. bfloat16 is not affected, and
    neither is a CPU. cuDNN measures its algorithms once per shape, which pays since shapes repeat.

    Args:
        device: where the process computes.
        exact: float32 as it is, for numbers that are compared with those of other code.
    """
    if device.type != "cuda":
        return "float32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not exact
    torch.backends.cudnn.benchmark = not exact
    return "float32" if exact else "tf32"
