"""Extract line art from color images, in batches on the device: XDoG (Winnemoeller et al. 2012) and other styles.

XDoG fills dark areas, and its lines are black and sharp. People leave black hair empty, draw thin or thick lines, use
pencils and scan their drawings; a network that colors such drawings should be trained on similar lines.
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
"""Drawing styles. xdog: lines and filled dark areas; blurred: xdog with soft edges. The other styles leave dark areas
empty: binarized is black where the image is darker than its surroundings; thin keeps one pixel of binarized's line
width; thick widens binarized's lines; pencil has darkness proportional to local contrast."""
PEN_RANGES = {"sigma": (0.3, 0.6), "k": (2.5, 4.0), "p": (8.0, 20.0), "width": (0.5, 0.8)}
"""Ranges of the constants of Pens in training, chosen so that lines appear at 64 px and at 256 px."""
_DARK = 0.1
"""Added to a brightness before a difference is compared with it, so that noise in black areas does not become lines."""
_PENCIL = 0.4
"""Darkness of pencil strokes: factor on the relief, which already contains p."""


@dataclass(frozen=True, kw_only=True)
class XDoGConfig:
    """Constants of XDoG; the defaults are the authors' (utils/image/xdog.py of their code), made for 256 px."""

    sigma: tuple[float, float] = (0.3, 0.5)
    """Range of the small blur's sigma in pixels: training draws from it, evaluation uses its mean."""
    k: float = 3.5
    """Ratio of the large blur's sigma to the small blur's."""
    p: float = 10.0
    """Strength of the difference."""
    epsilon: float = 0.01
    """Threshold on image * difference."""
    phi: float = 1e9
    """Steepness below the threshold; the default is high enough that the result is either black or white."""

    def __post_init__(self) -> None:
        if not 0 < self.sigma[0] <= self.sigma[1] or self.k <= 0:
            raise ValueError(f"xdog blurs must be above 0 and sigma rising, got sigma {self.sigma}, k {self.k}")


class Pens(NamedTuple):
    """Style and constants of each row's line art; all fields are [B]."""

    style: Tensor
    """int64, an index into STYLES."""
    sigma: Tensor
    """Sigma of the small blur, in pixels."""
    k: Tensor
    """Ratio of the large blur's sigma to the small blur's."""
    p: Tensor
    """Strength of the difference; with a larger p, weaker edges become lines."""
    width: Tensor
    """Sigma of the blur that style `blurred` applies to its lines, in pixels."""


def line_art(images: Tensor, pens: Pens, config: XDoGConfig | None = None) -> Tensor:
    """Draw dark lines on white, [B, 1, H, W] in [-1, 1], each row in its own style.

    Args:
        images: [B, 3, H, W] in [-1, 1].
        pens: the rows' styles and constants, on the host; style `xdog` with a config's constants gives the same result
            as xdog().
        config: provides the threshold (epsilon) and its steepness (phi).
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
    """Input of the styles for some rows: brightness in 0..1 before and after both blurs, and the constants."""

    gray: Tensor
    small: Tensor
    large: Tensor
    p: Tensor
    width: Tensor
    config: XDoGConfig

    def relief(self) -> Tensor:
        """Return how much darker each pixel is than its surroundings, times p."""
        return self.p * (self.large - self.small)

    def black(self) -> Tensor:
        """Return 1 where the relief exceeds the brightness plus _DARK, else 0."""
        return (self.relief() > self.small + _DARK).to(self.gray.dtype)


def _filled(tones: _Tones) -> Tensor:
    return _threshold(tones.gray * ((1 + tones.p) * tones.small - tones.p * tones.large), tones.config)


def _blurred(tones: _Tones) -> Tensor:
    return blur(_filled(tones), tones.width)


def _binarized(tones: _Tones) -> Tensor:
    return 1 - tones.black()


def _thin(tones: _Tones) -> Tensor:
    """Keep the black pixels where the relief peaks horizontally or vertically: the middle of each line."""
    height = tones.relief()
    around = F.pad(height, [1] * 4)
    left, right = around[..., 1:-1, :-2], around[..., 1:-1, 2:]
    above, below = around[..., :-2, 1:-1], around[..., 2:, 1:-1]
    ridge = ((height > left) & (height >= right)) | ((height > above) & (height >= below))
    return 1 - tones.black() * ridge


def _thick(tones: _Tones) -> Tensor:
    """Widen black pixels by one pixel to the right and below; at 256 px, by one pixel on every side."""
    more = max(1, tones.gray.shape[-1] // 128)
    return 1 - F.max_pool2d(F.pad(tones.black(), (more - more // 2, more // 2) * 2), more + 1, 1)


def _pencil(tones: _Tones) -> Tensor:
    return 1 - (_PENCIL * tones.relief() / (tones.large + _DARK)).clamp(0, 1)


def xdog(images: Tensor, sigma: Tensor, config: XDoGConfig | None = None) -> Tensor:
    """Draw dark lines on white with XDoG, [B, 1, H, W] in [-1, 1].

    Args:
        images: [B, 3, H, W] in [-1, 1].
        sigma: each row's sigma of the small blur in pixels, [B].
        config: the other constants.
    """
    config = config or XDoGConfig()
    gray = _gray(images)
    sharp = (1 + config.p) * blur(gray, sigma) - config.p * blur(gray, config.k * sigma)
    return 2 * _threshold(gray * sharp, config) - 1


def reduced_xdog(images: Tensor, sigma: Tensor, noise: Tensor, ink: Tensor, config: XDoGConfig | None = None) -> Tensor:
    """Draw XDoG's lines on the images at twice their size and reduce them: thin gray lines, and specks in dark areas.

    Line art that was extracted from larger pictures looks so at the network's size. There, the specks come from the
    artifacts of JPEG.

    Args:
        images: [B, 3, H, W] in [-1, 1].
        sigma: each row's sigma of the small blur in pixels of the enlarged images, [B].
        noise: what is added to the enlarged images, [B, 1, 2 * H, 2 * W].
        ink: factor on each row's darkness after the reduction, [B], at least 1.
        config: the other constants.
    """
    enlarged = F.interpolate(images, scale_factor=2, mode="bicubic", align_corners=False)
    lines = F.avg_pool2d(xdog((enlarged + noise).clamp(-1, 1), sigma, config), 2)
    return 1 - ((1 - lines) * onto(ink, images)[:, None, None, None]).clamp_max(2)


def _gray(images: Tensor) -> Tensor:
    luma = onto(torch.tensor(LUMA, dtype=images.dtype), images).reshape(1, 3, 1, 1)
    return ((images + 1) / 2 * luma).sum(1, keepdim=True)


def _threshold(response: Tensor, config: XDoGConfig) -> Tensor:
    """Return 1 for paper and 0 for ink."""
    return 1 + torch.tanh(config.phi * (response - config.epsilon).clamp_max(0))


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Apply a Gaussian blur to each row [C, H, W] with its own sigma in pixels ([B], on the host); borders reflect."""
    radius = max(1, int((3 * sigma.max()).ceil()))
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (offsets / onto(sigma.to(images.dtype), images)[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(images.shape[1], 0)[:, None]
    flat = F.pad(images.flatten(0, 1)[None], [radius] * 4, mode="reflect")
    groups = flat.shape[1]
    flat = F.conv2d(flat, kernel[:, :, None], groups=groups)
    return F.conv2d(flat, kernel[:, :, :, None], groups=groups).reshape(images.shape)
