"""Line art from color images, in batches on the device: XDoG (Winnemoeller et al. 2012), and other hands than its.

XDoG fills what is dark, and its lines are black and sharp. People leave black hair empty, draw thin or thick, in
pencil, and scan; a network that shall color their drawings should have seen such lines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from animediffusion.models.tensors import onto

LUMA = (0.299, 0.587, 0.114)

STYLES = ("xdog", "thin", "thick", "blurred", "binarized", "pencil")
"""xdog: lines, and dark areas filled. blurred: the same, soft. The others have no filled areas: binarized: black where
it is darker than around. thin: one pixel of that. thick: broadened. pencil: the darker than around, the darker."""
PEN_RANGES = {"sigma": (0.3, 0.6), "k": (2.5, 4.0), "p": (8.0, 20.0), "width": (0.5, 0.8)}
"""Between what the constants of Pens are drawn in training: there are lines at 64 px as well as at 256."""
_DARK = 0.1
"""Added to a brightness that a difference is compared with: noise in black areas is no line."""
_PENCIL = 0.4
"""How dark a pencil is, in units of p."""


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


class Pens(NamedTuple):
    """How each of B rows is drawn; all [B]."""

    style: Tensor
    """int64, an index into STYLES."""
    sigma: Tensor
    """Small blur in pixels."""
    k: Tensor
    """Large blur / small blur."""
    p: Tensor
    """Strength of the difference: with more, weaker edges become lines."""
    width: Tensor
    """Blur of the line in pixels, for `blurred`."""


def line_art(images: Tensor, pens: Pens, config: XDoGConfig | None = None) -> Tensor:
    """Dark lines on white, [B, 1, H, W] in [-1, 1], each row in its own style.

    Args:
        images: [B, 3, H, W] in [-1, 1].
        pens: the rows' styles and constants, on the host; with style `xdog` and a config's constants, it is what xdog()
            makes.
        config: XDoG's threshold and steepness.
    """
    gray = _gray(images)
    small, large = blur(gray, pens.sigma), blur(gray, pens.k * pens.sigma)
    drawn = torch.empty_like(gray)
    for number, draw in enumerate((_filled, _thin, _thick, _blurred, _binarized, _pencil)):
        chosen = (pens.style == number).nonzero().flatten()
        if len(chosen):
            rows, p = onto(chosen, gray), onto(pens.p[chosen, None, None, None], gray)
            tones = _Tones(gray[rows], small[rows], large[rows], p, pens.width[chosen], config or XDoGConfig())
            drawn[rows] = draw(tones)
    return 2 * drawn - 1


class _Tones(NamedTuple):
    """What the styles draw from: a few rows, brightness in 0..1 before and after both blurs."""

    gray: Tensor
    small: Tensor
    large: Tensor
    p: Tensor
    width: Tensor
    config: XDoGConfig

    def relief(self) -> Tensor:
        """How much darker than around, times p."""
        return self.p * (self.large - self.small)

    def black(self) -> Tensor:
        """Where it is darker than around, in relation to how bright it is: 1, else 0."""
        return (self.relief() > self.small + _DARK).to(self.gray.dtype)


def _filled(tones: _Tones) -> Tensor:
    return _threshold(tones.gray * ((1 + tones.p) * tones.small - tones.p * tones.large), tones.config)


def _blurred(tones: _Tones) -> Tensor:
    return blur(_filled(tones), tones.width)


def _binarized(tones: _Tones) -> Tensor:
    return 1 - tones.black()


def _thin(tones: _Tones) -> Tensor:
    """Of what is black, where the relief is highest across or up and down: the middle of a line."""
    height = tones.relief()
    around = F.pad(height, [1] * 4)
    left, right = around[..., 1:-1, :-2], around[..., 1:-1, 2:]
    above, below = around[..., :-2, 1:-1], around[..., 2:, 1:-1]
    ridge = ((height > left) & (height >= right)) | ((height > above) & (height >= below))
    return 1 - tones.black() * ridge


def _thick(tones: _Tones) -> Tensor:
    """What is black, and one pixel to the right and below; at 256 px, one to all sides."""
    more = max(1, tones.gray.shape[-1] // 128)
    return 1 - F.max_pool2d(F.pad(tones.black(), (more - more // 2, more // 2) * 2), more + 1, 1)


def _pencil(tones: _Tones) -> Tensor:
    return 1 - (_PENCIL * tones.relief() / (tones.large + _DARK)).clamp(0, 1)


def xdog(images: Tensor, sigma: Tensor, config: XDoGConfig | None = None) -> Tensor:
    """Dark lines on white, [B, 1, H, W] in [-1, 1].

    Args:
        images: [B, 3, H, W] in [-1, 1].
        sigma: small blur of each row in pixels, [B].
        config: the other constants.
    """
    config = config or XDoGConfig()
    gray = _gray(images)
    sharp = (1 + config.p) * blur(gray, sigma) - config.p * blur(gray, config.k * sigma)
    return 2 * _threshold(gray * sharp, config) - 1


def _gray(images: Tensor) -> Tensor:
    luma = onto(torch.tensor(LUMA, dtype=images.dtype), images).reshape(1, 3, 1, 1)
    return ((images + 1) / 2 * luma).sum(1, keepdim=True)


def _threshold(response: Tensor, config: XDoGConfig) -> Tensor:
    """1 is paper, 0 is ink."""
    return 1 + torch.tanh(config.phi * (response - config.epsilon).clamp_max(0))


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of each row [C, H, W] with its own sigma in pixels (of the host), borders reflected."""
    radius = max(1, int((3 * sigma.max()).ceil()))
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (offsets / onto(sigma.to(images.dtype), images)[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(images.shape[1], 0)[:, None]
    flat = F.pad(images.flatten(0, 1)[None], [radius] * 4, mode="reflect")
    groups = flat.shape[1]
    flat = F.conv2d(flat, kernel[:, :, None], groups=groups)
    return F.conv2d(flat, kernel[:, :, :, None], groups=groups).reshape(images.shape)
