"""Convert between 8-bit images and float tensors in [-1, 1], and copy small tensors to a device."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_tensor(images: Tensor) -> Tensor:
    """Convert uint8 [B, H, W, 3] or [B, H, W] to float32 [B, C, H, W] in [-1, 1].

    Raises:
        TypeError: if the images are not uint8.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    channels_first = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    # A permuted view would make all later layers run channels-last, which slows a training step on a CPU by a quarter.
    return channels_first.contiguous().float().div_(127.5).sub_(1)


def onto(small: Tensor, images: Tensor) -> Tensor:
    """Copy a small tensor to the images' device without making the host wait, as `.to(device)` alone would."""
    return small.to(images.device, non_blocking=True)


def from_pixels(pixels: NDArray[np.uint8]) -> Tensor:
    """Convert one image, uint8 [H, W, 3] or [H, W], to float32 [1, C, H, W] in [-1, 1]."""
    return to_tensor(torch.from_numpy(np.ascontiguousarray(pixels))[None])


def to_uint8(images: Tensor) -> Tensor:
    """Convert [B, C, H, W] in [-1, 1] to uint8 [B, H, W, C], rounded; values outside [-1, 1] are clamped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
