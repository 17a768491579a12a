"""Line art from color images, in batches on the device: XDoG (Winnemoeller et al. 2012)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True, kw_only=True)
class XDoGConfig:
    """The authors' constants (utils/image/xdog.py of their code), made for 256 px."""

    sigma: tuple[float, float] = (0.3, 0.5)
    """Small blur in pixels; drawn between these in training, their mean else."""
    k: float = 3.5
    """Large blur / small blur."""
    p: float = 10.0
    """Strength of the difference."""
    epsilon: float = 0.01
    """Threshold on image * difference."""
    phi: float = 1e9
    """Steepness below it: this high is black or white."""

    def __post_init__(self) -> None:
        if not 0 < self.sigma[0] <= self.sigma[1] or self.k <= 0:
            raise ValueError(f"xdog blurs must be above 0 and sigma rising, got sigma {self.sigma}, k {self.k}")


def xdog(images: Tensor, sigma: Tensor, config: XDoGConfig | None = None) -> Tensor:
    """Dark lines on white, [B, 1, H, W] in [-1, 1].

    Args:
        images: [B, 3, H, W] in [-1, 1].
        sigma: small blur of each row in pixels, [B].
        config: the other constants.
    """
    config = config or XDoGConfig()
    luma = torch.tensor(LUMA, device=images.device, dtype=images.dtype).reshape(1, 3, 1, 1)
    gray = ((images + 1) / 2 * luma).sum(1, keepdim=True)
    sharp = (1 + config.p) * blur(gray, sigma) - config.p * blur(gray, config.k * sigma)
    response = gray * sharp
    dark = 1 + torch.tanh(config.phi * (response - config.epsilon))
    return 2 * torch.where(response >= config.epsilon, torch.ones_like(dark), dark) - 1


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of each row [C, H, W] with its own sigma in pixels, borders reflected."""
    radius = max(1, int((3 * sigma.max()).ceil()))
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma.to(images.dtype)[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(images.shape[1], 0)[:, None]
    flat = F.pad(images.flatten(0, 1)[None], [radius] * 4, mode="reflect")
    groups = flat.shape[1]
    flat = F.conv2d(flat, kernel[:, :, None], groups=groups)
    return F.conv2d(flat, kernel[:, :, :, None], groups=groups).reshape(images.shape)
