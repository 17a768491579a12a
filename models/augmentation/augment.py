"""From decoded rows to training batches, on the device: line art, references by warping, shared recoloring.

Every random number comes from the generator of the step, so a step can be repeated exactly. What is switched off draws
none, so a new option leaves the numbers of runs without it alone. Numbers are drawn on the host, which therefore knows
which rows change without waiting for a GPU; pictures stay where they are. Not here: decoding
(pipelines/data/dataset.py); what only changes pixels, see models/augmentation/lineart.py, recolor.py, shuffle.py. B
rows, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import kornia
import torch
import torch.nn.functional as F
from torch import Tensor

from animediffusion.models.augmentation.lineart import PEN_RANGES, STYLES, Pens, XDoGConfig, blur, line_art, xdog
from animediffusion.models.augmentation.patch_shuffle import CELLS, SIDES, patch_order, shuffle
from animediffusion.models.augmentation.recolor import NUM_ORDERS, apply_gamma, apply_matrix, order_matrix, turn_matrix
from animediffusion.models.authors.warp import draw_points, warp_diagonal
from animediffusion.models.tensors import onto, to_tensor


class Batch(NamedTuple):
    """What an objective takes: float32 in [-1, 1]."""

    target: Tensor
    """[B, 3, S, S]"""
    sketch: Tensor
    """[B, 1, S, S]"""
    reference: Tensor
    """[B, 3, S, S]"""


_SHARES = ("cross_reference", "rewarp", "shuffle", "flip", "recolor", "permute", "soften", "line_styles")


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
    warp_kind: Literal["grid", "diagonal"] = "grid"
    """grid: the points move freely, and the picture is turned, enlarged and shifted. diagonal: as the authors warp."""
    rotate: float = 0.0
    """Largest turn within a warp, degrees."""
    scale: tuple[float, float] = (1.0, 1.0)
    """A warp enlarges by a factor between these."""
    translate: float = 0.0
    """Largest shift within a warp, in sides."""
    shuffle: float = 0.0
    """Cut the reference into 2 x 2, 4 x 4 or 8 x 8 patches and mix them: colors without places (Liu et al. 2025)."""
    flip: float = 0.5
    """Mirror target and sketch, and the reference independently."""
    recolor: float = 0.5
    """Change hue, saturation and brightness of target and reference together."""
    hue: float = 0.5
    """Largest hue turn; 0.5 is half the circle."""
    permute: float = 0.0
    """Of the rows recolored, put the channels of this share into another order."""
    gamma: float = 0.0
    """Of the rows recolored, raise each channel to a power between 2**-gamma and 2**gamma."""
    soften: float = 0.5
    """Blur the sketch a little: scans and drawings made smaller have gray lines, XDoG has black ones."""
    line_styles: float = 0.0
    """Of the rows whose line art is extracted, draw this share in a random style of models/augmentation/lineart.py, not
    in XDoG."""
    xdog: XDoGConfig = field(default_factory=XDoGConfig)

    def __post_init__(self) -> None:
        for name in (*_SHARES, "warp", "hue", "translate", "gamma"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in 0..1, got {getattr(self, name)}")
        if self.warp_points < 2:
            raise ValueError(f"warp_points must be at least 2, got {self.warp_points}")
        if not 0 <= self.rotate <= 180:
            raise ValueError(f"rotate must be in 0..180 degrees, got {self.rotate}")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale must be above 0 and rising, got {self.scale}")
        if self.warp_kind == "diagonal" and self.moves:
            raise ValueError(
                "warp_kind diagonal does not turn, enlarge or shift: leave out rotate, scale and translate"
            )

    @property
    def moves(self) -> bool:
        """Whether a warp does more than bend."""
        return self.rotate > 0 or self.translate > 0 or tuple(self.scale) != (1.0, 1.0)


def make_batch(rows: Mapping[str, Tensor], config: AugmentConfig, generator: torch.Generator) -> Batch:
    """A training batch from decoded rows.

    Args:
        rows: uint8 target, reference, cross_reference [B, S, S, 3], sketch [B, S, S]; bool has_sketch,
            has_reference, has_cross [B] (images of rows without are zero). Best with the flags on the host.
        config: what to vary.
        generator: of the host.
    """
    rows, target = _with_flags(rows), to_tensor(rows["target"])
    chance = Chance(len(target), generator.device, generator)
    sketch = _soften(_sketches(rows, target, config, chance), config, chance)
    reference = _references(rows, config, chance)
    target, reference = recolor(target, reference, config, chance)
    mirrored = chance(config.flip)
    target, sketch = (_either(mirrored, x.flip(-1), x) for x in (target, sketch))
    return Batch(target, sketch, _either(chance(config.flip), reference.flip(-1), reference))


def fixed_batch(rows: Mapping[str, Tensor], track: str, generator: torch.Generator) -> Batch:
    """The batch of an evaluation track: `same` (the target warped) or `cross` (exact truth, other picture).

    Rows without a cross reference are recolored instead: target and warped reference together.
    """
    rows, target = _with_flags(rows), to_tensor(rows["target"])
    config = EVALUATION
    chance = Chance(len(target), generator.device, generator)
    if not bool(rows["has_sketch"].all()):
        chance.uniform(0, 1)  # once drawn for the line art: the numbers after it must stay
    sketch = fixed_sketch(rows, target, config)
    warped = bend(target, *draw_warp(config, chance))
    if track == "same":
        given = _mask(rows["has_reference"])
        return Batch(target, sketch, _either(given, to_tensor(rows["reference"]), warped))
    recolored_target, recolored = recolor(target, warped, config, chance)
    given = _mask(rows["has_cross"])
    return Batch(
        _either(given, target, recolored_target),
        sketch,
        _either(given, to_tensor(rows["cross_reference"]), recolored),
    )


EVALUATION = AugmentConfig(
    warp=0.12, warp_points=4, flip=0.0, recolor=1.0, hue=0.5, soften=0.0, xdog=XDoGConfig(sigma=(0.3, 0.5))
)
"""Written out, so that a change of the training defaults leaves measurements comparable."""


class Chance:
    """Random numbers for B rows from one generator; a subclass may take them from elsewhere."""

    def __init__(self, rows: int, device: torch.device, generator: torch.Generator) -> None:
        self.rows, self.device, self.generator = rows, device, generator

    def __call__(self, probability: float) -> Tensor:
        """bool [B, 1, 1, 1], true with that probability."""
        return _mask(self.uniform(0, 1) < probability)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """[B, *shape]"""
        unit = torch.rand(self.rows, *shape, generator=self.generator, device=self.device)
        return low + (high - low) * unit

    def below(self, count: int) -> Tensor:
        """int64 [B] in 0..count - 1."""
        return self.uniform(0, count).long().clamp_max(count - 1)


def _mask(flags: Tensor) -> Tensor:
    return flags.reshape(-1, 1, 1, 1)


def _with_flags(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rows with their flags on the host."""
    names = [name for name in rows if name.startswith("has_")]
    return {**rows, **dict(zip(names, torch.stack([rows[name] for name in names]).cpu(), strict=True))}


def _either(chosen: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return torch.where(onto(chosen, one), one, other)


def _sketches(rows: Mapping[str, Tensor], target: Tensor, config: AugmentConfig, chance: Chance) -> Tensor:
    if bool(rows["has_sketch"].all()):
        return to_tensor(rows["sketch"])
    sigma = chance.uniform(*config.xdog.sigma)
    if config.line_styles:
        drawn = line_art(target, _pens(sigma, config, chance), config.xdog)
    else:
        drawn = xdog(target, sigma, config.xdog)
    return _either(_mask(rows["has_sketch"]), to_tensor(rows["sketch"]), drawn)


def _pens(sigma: Tensor, config: AugmentConfig, chance: Chance) -> Pens:
    """Any style with any constants for some rows, plain XDoG with this sigma for the others."""
    styled = chance(config.line_styles).flatten()
    free = Pens(chance.below(len(STYLES)), *(chance.uniform(*PEN_RANGES[name]) for name in Pens._fields[1:]))
    k, p = (torch.full_like(sigma, value) for value in (config.xdog.k, config.xdog.p))
    plain = Pens(torch.full_like(free.style, STYLES.index("xdog")), sigma, k, p, free.width)
    return Pens(*(torch.where(styled, one, other) for one, other in zip(free, plain, strict=True)))


def fixed_sketch(rows: Mapping[str, Tensor], target: Tensor, config: AugmentConfig) -> Tensor:
    """[B, 1, S, S]: the rows' own line art, or XDoG of the target with the middle blur where there is none."""
    drawn = xdog(target, torch.full((len(target),), sum(config.xdog.sigma) / 2), config.xdog)
    return _either(_mask(rows["has_sketch"]), to_tensor(rows["sketch"]), drawn)


def _soften(sketch: Tensor, config: AugmentConfig, chance: Chance) -> Tensor:
    chosen, sigma = chance(config.soften), chance.uniform(0.3, 0.9)
    return _either(chosen, blur(sketch, sigma), sketch) if config.soften else sketch


def _references(rows: Mapping[str, Tensor], config: AugmentConfig, chance: Chance) -> Tensor:
    given, cross = _mask(rows["has_reference"]), _mask(rows["has_cross"])
    take_cross = cross & chance(config.cross_reference)
    # Chosen while they are bytes, which are a quarter of the memory, and of the three one becomes a tensor of floats.
    reference = _either(given, rows["reference"], rows["target"])
    reference = to_tensor(_either(take_cross, rows["cross_reference"], reference))
    again = chance(config.rewarp) | (~given & ~take_cross)
    if config.warp_kind == "diagonal":
        drawn = draw_points(chance.rows, chance.generator, chance.device)
        reference = _changed(reference, again, warp_diagonal, drawn)
    else:
        reference = _changed(reference, again, bend, draw_warp(config, chance))
    if not config.shuffle:
        return reference
    return _changed(reference, chance(config.shuffle), shuffle, (draw_order(chance),))


def draw_order(chance: Chance) -> Tensor:
    """An order of patches for shuffle(), of a random size."""
    sides = torch.tensor(SIDES, device=chance.device)[chance.below(len(SIDES))]
    return patch_order(sides, chance.uniform(0, 1, CELLS**2))


def _changed(images: Tensor, chosen: Tensor, change: Callable[..., Tensor], drawn: tuple[Tensor, ...]) -> Tensor:
    """The images, those of the chosen rows changed with their rows of what was drawn; the others cost nothing."""
    index = chosen.flatten().nonzero().flatten()
    if not len(index):
        return images
    rows = onto(index, images)
    return images.index_copy(0, rows, change(images[rows], *(part[index] for part in drawn)))


class Warp(NamedTuple):
    """One warp for each of B rows."""

    points: Tensor
    """[B, N, 2]: control points (x, y) in [-1, 1]."""
    moved: Tensor
    """[B, N, 2]: where the spline takes them."""
    back: Tensor
    """[B, 2, 2]: undoes turning and enlarging, (x, y) from the left."""
    shift: Tensor
    """[B, 1, 2]: of the picture, after that."""


def draw_warp(config: AugmentConfig, chance: Chance) -> Warp:
    """Random warps as the config says: all points move freely, so that copying from the same place never works."""
    side = config.warp_points
    points = _lattice(side, side, chance.device).expand(chance.rows, -1, -1)
    moved = points + chance.uniform(-2 * config.warp, 2 * config.warp, side * side, 2) / 2
    if not config.moves:
        still = torch.zeros(chance.rows, 1, 2, device=chance.device)
        return Warp(points, moved, torch.eye(2, device=chance.device).expand(chance.rows, -1, -1), still)
    angle = chance.uniform(-config.rotate, config.rotate) * (torch.pi / 180)
    low, high = config.scale
    zoom = low * (high / low) ** chance.uniform(0, 1)
    shift = chance.uniform(-2 * config.translate, 2 * config.translate, 1, 2)
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    return Warp(points, moved, torch.stack([cos, -sin, sin, cos], -1).reshape(-1, 2, 2), shift)


def bend(images: Tensor, points: Tensor, moved: Tensor, back: Tensor, shift: Tensor) -> Tensor:
    """Each image [3, S, S] turned, enlarged, shifted, and bent by a thin-plate spline (Bookstein 1989), read once."""
    # The transform is solved from destination to source: where each output pixel is read. kornia puts the kernels
    # at the second argument's points.
    solved = kornia.geometry.transform.get_tps_transform(moved, points)
    points, kernel, affine, back, shift = (onto(small, images) for small in (points, *solved, back, shift))
    # On every fourth pixel, then bilinear between: the spline is smooth, and costs a logarithm a point.
    height, width = images.shape[-2] // 4 + 1, images.shape[-1] // 4 + 1
    places = _lattice(height, width, images.device).expand(len(images), -1, -1)
    read = kornia.geometry.transform.warp_points_tps(places, points, kernel, affine)
    read = ((read - shift)[..., None] * back[:, None]).sum(-2)
    # Contiguous: of a permuted view interpolate() makes its slow case for channels last.
    coarse = read.reshape(-1, height, width, 2).permute(0, 3, 1, 2).contiguous()
    grid = F.interpolate(coarse, images.shape[-2:], mode="bilinear", align_corners=True).permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=True)


def _lattice(height: int, width: int, device: torch.device) -> Tensor:
    """[1, height * width, 2]: evenly spaced points (x, y) in [-1, 1]."""
    ys, xs = (torch.linspace(-1, 1, n, device=device) for n in (height, width))
    return torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1).reshape(1, -1, 2)


def recolor(target: Tensor, reference: Tensor, config: AugmentConfig, chance: Chance) -> tuple[Tensor, Tensor]:
    """Target and reference with one random map of color per row: hue, saturation, brightness, channels."""
    hue = chance.uniform(-config.hue, config.hue) * (2 * torch.pi)
    matrix = turn_matrix(hue, chance.uniform(0.6, 1.4), chance.uniform(0.8, 1.15))
    chosen = chance(config.recolor)
    if config.permute:
        matrix = matrix @ order_matrix(chance.below(NUM_ORDERS) * chance(config.permute).flatten())
    drawn = (matrix, 2 ** chance.uniform(-config.gamma, config.gamma, 3)) if config.gamma else (matrix,)
    if not config.recolor:
        return target, reference
    return _changed(target, chosen, _recolored, drawn), _changed(reference, chosen, _recolored, drawn)


def _recolored(images: Tensor, matrix: Tensor, gamma: Tensor | None = None) -> Tensor:
    return apply_matrix(images if gamma is None else apply_gamma(images, gamma), matrix)
