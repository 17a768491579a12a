"""Between 8-bit images and the tensors of the mathematics."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_tensor(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] or [B, H, W] as float32 [B, C, H, W] in [-1, 1]."""
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    channels_first = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    # A permuted view would make every layer after it work channels last, which costs a CPU a quarter of a step.
    return channels_first.contiguous().float().div_(127.5).sub_(1)


def onto(small: Tensor, images: Tensor) -> Tensor:
    """A small tensor of the host on the images' device. The host does not wait, as it would for `.to(device)` alone."""
    return small.to(images.device, non_blocking=True)


def from_pixels(pixels: NDArray[np.uint8]) -> Tensor:
    """One picture, uint8 [H, W, 3] or [H, W], as float32 [1, C, H, W] in [-1, 1]."""
    return to_tensor(torch.from_numpy(np.ascontiguousarray(pixels))[None])


def to_uint8(images: Tensor) -> Tensor:
    """[B, C, H, W] in [-1, 1] as uint8 [B, H, W, C], rounded; values outside are cut."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
