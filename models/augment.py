"""From decoded rows to training batches, on the device: line art, references by warping, shared recoloring.

Every random number comes from the generator of the step, so a step can be repeated exactly.
Not here: decoding (pipelines/dataset.py). B rows, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import kornia
import torch
import torch.nn.functional as F
from torch import Tensor

from animediffusion.models.images import to_tensor
from animediffusion.models.lineart import XDoGConfig, blur, xdog


class Batch(NamedTuple):
    """What an objective takes: float32 in [-1, 1]."""

    target: Tensor
    """[B, 3, S, S]"""
    sketch: Tensor
    """[B, 1, S, S]"""
    reference: Tensor
    """[B, 3, S, S]"""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How references and sketches are made and varied. Probabilities are per row."""

    cross_reference: float = 0.5
    """Take the dataset's cross reference where a row has one."""
    rewarp: float = 0.5
    """Warp a reference that the dataset gives once more; rows without one are always warped."""
    warp: float = 0.12
    """Largest shift of a warp's control point, in half sides."""
    warp_points: int = 4
    """Control points per side of the thin-plate spline."""
    flip: float = 0.5
    """Mirror target and sketch, and the reference independently."""
    recolor: float = 0.5
    """Change hue, saturation and brightness of target and reference together."""
    hue: float = 0.5
    """Largest hue turn; 0.5 is half the circle."""
    soften: float = 0.5
    """Blur the sketch a little: scans and drawings made smaller have gray lines, XDoG has black ones."""
    xdog: XDoGConfig = field(default_factory=XDoGConfig)

    def __post_init__(self) -> None:
        for name in ("cross_reference", "rewarp", "flip", "recolor", "soften", "warp", "hue"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in 0..1, got {getattr(self, name)}")
        if self.warp_points < 2:
            raise ValueError(f"warp_points must be at least 2, got {self.warp_points}")


def make_batch(rows: Mapping[str, Tensor], config: AugmentConfig, generator: torch.Generator) -> Batch:
    """A training batch from decoded rows.

    Args:
        rows: uint8 target, reference, cross_reference [B, S, S, 3], sketch [B, S, S]; bool has_sketch,
            has_reference, has_cross [B] (images of rows without are zero).
        config: what to vary.
        generator: on the rows' device.
    """
    target = to_tensor(rows["target"])
    chance = _Chance(len(target), target.device, generator)
    sketch = _soften(_sketches(rows, target, config, chance), config, chance)
    reference = _references(rows, target, config, chance)
    target, reference = recolor(target, reference, config, chance)
    mirrored = chance(config.flip)
    target, sketch = (torch.where(mirrored, x.flip(-1), x) for x in (target, sketch))
    return Batch(target, sketch, torch.where(chance(config.flip), reference.flip(-1), reference))


def fixed_batch(rows: Mapping[str, Tensor], track: str, generator: torch.Generator) -> Batch:
    """The batch of an evaluation track: `same` (the target warped) or `cross` (exact truth, other picture).

    Rows without a cross reference are recolored instead: target and warped reference together.
    """
    target = to_tensor(rows["target"])
    config = EVALUATION
    chance = _Chance(len(target), target.device, generator)
    sketch = _sketches(rows, target, config, chance, fixed=True)
    warped = warp(target, config, chance)
    if track == "same":
        given = _mask(rows["has_reference"])
        return Batch(target, sketch, torch.where(given, to_tensor(rows["reference"]), warped))
    recolored_target, recolored = recolor(target, warped, config, chance)
    given = _mask(rows["has_cross"])
    return Batch(
        torch.where(given, target, recolored_target),
        sketch,
        torch.where(given, to_tensor(rows["cross_reference"]), recolored),
    )


EVALUATION = AugmentConfig(
    warp=0.12, warp_points=4, flip=0.0, recolor=1.0, hue=0.5, soften=0.0, xdog=XDoGConfig(sigma=(0.3, 0.5))
)
"""Written out, so that a change of the training defaults leaves measurements comparable."""


class _Chance:
    """Random numbers for B rows from one generator."""

    def __init__(self, rows: int, device: torch.device, generator: torch.Generator) -> None:
        self.rows, self.device, self.generator = rows, device, generator

    def __call__(self, probability: float) -> Tensor:
        """bool [B, 1, 1, 1], true with that probability."""
        return _mask(self.uniform(0, 1) < probability)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """[B, *shape]"""
        unit = torch.rand(self.rows, *shape, generator=self.generator, device=self.device)
        return low + (high - low) * unit


def _mask(flags: Tensor) -> Tensor:
    return flags.reshape(-1, 1, 1, 1)


def _sketches(
    rows: Mapping[str, Tensor], target: Tensor, config: AugmentConfig, chance: _Chance, *, fixed: bool = False
) -> Tensor:
    given = _mask(rows["has_sketch"])
    if bool(given.all()):
        return to_tensor(rows["sketch"])
    low, high = config.xdog.sigma
    sigma = torch.full_like(chance.uniform(0, 1), (low + high) / 2) if fixed else chance.uniform(low, high)
    return torch.where(given, to_tensor(rows["sketch"]), xdog(target, sigma, config.xdog))


def _soften(sketch: Tensor, config: AugmentConfig, chance: _Chance) -> Tensor:
    return torch.where(chance(config.soften), blur(sketch, chance.uniform(0.3, 0.9)), sketch)


def _references(rows: Mapping[str, Tensor], target: Tensor, config: AugmentConfig, chance: _Chance) -> Tensor:
    given, cross = _mask(rows["has_reference"]), _mask(rows["has_cross"])
    reference = torch.where(given, to_tensor(rows["reference"]), target)
    take_cross = cross & chance(config.cross_reference)
    reference = torch.where(take_cross, to_tensor(rows["cross_reference"]), reference)
    again = chance(config.rewarp) | (~given & ~take_cross)
    return torch.where(again, warp(reference, config, chance), reference)


def warp(images: Tensor, config: AugmentConfig, chance: _Chance) -> Tensor:
    """Each image [3, S, S] bent by its own thin-plate spline over a grid of points (Bookstein 1989).

    The authors' spline moves two points along one diagonal; here all points move freely, so that a
    model cannot copy pixels from where they are.
    """
    side = config.warp_points
    line = torch.linspace(-1, 1, side, device=images.device)
    points = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).reshape(1, -1, 2).expand(len(images), -1, -1)
    moved = points + chance.uniform(-2 * config.warp, 2 * config.warp, side * side, 2) / 2
    # The transform is solved from destination to source: where each output pixel is read. kornia puts the kernels
    # at the second argument's points.
    kernel, affine = kornia.geometry.transform.get_tps_transform(moved, points)
    grid = _coarse_grid(images, points, kernel, affine)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=True)


def _coarse_grid(images: Tensor, centers: Tensor, kernel: Tensor, affine: Tensor) -> Tensor:
    """The spline on every fourth pixel, then bilinear between: it is smooth, and costs a logarithm a point."""
    height, width = images.shape[-2] // 4 + 1, images.shape[-1] // 4 + 1
    ys, xs = (torch.linspace(-1, 1, n, device=images.device) for n in (height, width))
    points = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1).reshape(1, -1, 2).expand(len(images), -1, -1)
    warped = kornia.geometry.transform.warp_points_tps(points, centers, kernel, affine)
    coarse = warped.reshape(len(images), height, width, 2).permute(0, 3, 1, 2)
    return F.interpolate(coarse, images.shape[-2:], mode="bilinear", align_corners=True).permute(0, 2, 3, 1)


def recolor(target: Tensor, reference: Tensor, config: AugmentConfig, chance: _Chance) -> tuple[Tensor, Tensor]:
    """Target and reference with one random change of hue, saturation and brightness per row."""
    hue = chance.uniform(-config.hue, config.hue) * (2 * torch.pi)
    saturation, gain = chance.uniform(0.6, 1.4), chance.uniform(0.8, 1.15)
    matrix = _color_matrix(hue, saturation, gain)
    chosen = chance(config.recolor)
    changed = ((torch.einsum("bij,bjhw->bihw", matrix, (x + 1) / 2) * 2 - 1).clamp(-1, 1) for x in (target, reference))
    new_target, new_reference = changed
    return torch.where(chosen, new_target, target), torch.where(chosen, new_reference, reference)


def _color_matrix(hue: Tensor, saturation: Tensor, gain: Tensor) -> Tensor:
    """[B, 3, 3] on RGB: a turn about the gray axis, then away from or toward gray, then a gain.

    Linear in RGB and the same for both images, so the recolored pair stays exactly consistent.
    """
    cos, sin = hue.cos(), hue.sin()
    third = torch.full_like(hue, 1 / 3)
    diagonal = third + cos * 2 / 3
    plus = third * (1 - cos) + sin / 3**0.5
    minus = third * (1 - cos) - sin / 3**0.5
    rows = [diagonal, minus, plus, plus, diagonal, minus, minus, plus, diagonal]
    turn = torch.stack(rows, -1).reshape(-1, 3, 3)
    gray = torch.full_like(turn, 1 / 3)
    toward = gray + saturation[:, None, None] * (torch.eye(3, device=hue.device) - gray)
    return gain[:, None, None] * toward @ turn
