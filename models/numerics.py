"""Float32 precision on a GPU: one setting for training, serving and benchmarks."""

from __future__ import annotations

import torch


def choose_numerics(device: torch.device, *, exact: bool = False) -> str:
    """Set how this process computes float32 products and convolutions on CUDA; return `tf32` or `float32`.

    TF32 keeps float32's range, rounds the factors of products to 11 bits and sums in float32. Neither bfloat16 nor a
    CPU is affected. Unless `exact` is set, cuDNN benchmarks its algorithms once per shape, which pays off because
    shapes repeat.

    Args:
        device: the device that the process computes on.
        exact: use full float32, for results that are compared with those of other code.
    """
    if device.type != "cuda":
        return "float32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not exact
    torch.backends.cudnn.benchmark = not exact
    return "float32" if exact else "tf32"
