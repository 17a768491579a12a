"""Turn decoded rows into training batches on the device: extract line art, warp references, recolor pairs, draw hints.

Every random number comes from the generator of the step, so a step can be repeated exactly. An augmentation that is
switched off draws no numbers, so adding a new option does not change the random numbers of runs without it. Numbers
are drawn on the host, so the host knows which rows change without waiting for a GPU; images stay on their device.
Decoding is in pipelines/data/stream.py; the pure image operations are in lineart.py, recolor.py and patch_shuffle.py.

Shapes: B rows, S pixels per side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from animediffusion.models.augmentation.lineart import (
    PEN_RANGES,
    STYLES,
    Pens,
    XDoGConfig,
    blur,
    line_art,
    reduced_xdog,
    xdog,
)
from animediffusion.models.augmentation.patch_shuffle import CELLS, SIDES, patch_order, shuffle
from animediffusion.models.augmentation.recolor import NUM_ORDERS, apply_gamma, apply_matrix, hue_matrix, order_matrix
from animediffusion.models.authors.warp import draw_points, warp_diagonal
from animediffusion.models.network.hints import RADIUS_PX, hint_planes
from animediffusion.models.tensors import onto, to_tensor


class Batch(NamedTuple):
    """The input of a training objective: float32 in [-1, 1]."""

    target: Tensor
    """[B, 3, S, S]"""
    sketch: Tensor
    """[B, 1, S, S]"""
    reference: Tensor
    """[B, 3, S, S]"""
    second: Tensor | None = None
    """[B, 3, S, S]: a second reference of every row, if there is one."""
    hints: Tensor | None = None
    """[B, 4, S, S] from hint_planes(); None if no row has hints."""

    @property
    def references(self) -> tuple[Tensor, ...]:
        """One or two references."""
        return (self.reference,) if self.second is None else (self.reference, self.second)

    def rows(self, index: slice) -> Batch:
        """Return some rows."""
        return self._changed(lambda part: part[index])

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return self._changed(lambda part: part.to(device))

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Batch:
        parts: list[Any] = [None if part is None else change(part) for part in self]
        return Batch(*parts)


_SHARES = (
    *("cross_reference", "rewarp", "shuffle", "flip", "recolor", "permute", "soften", "line_styles"),
    *("extract", "reduce", "hints", "wrong_reference", "two_views"),
)
MAX_HINTS = 32
MANY_HINTS = 8
"""Only rows with at least this number of hints get wrong references: so many show whether the reference is wrong. With
fewer, a network would learn that a hint alone makes the reference doubtful, and change what was right."""
REDUCED_NOISE = 0.04
"""Largest standard deviation of the noise on enlarged targets, in [-1, 1]; more hides faces behind specks."""
HINT_JITTER = 0.08
"""Largest difference of a hint's color from that of the target, per channel in [-1, 1]: artists pick colors by eye."""
LINE_LEVEL = 0.5
"""A hint is not drawn where the sketch is darker than this within the hint's square."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Settings for how references and sketches are made and augmented. Probabilities are per row."""

    cross_reference: float = 0.5
    """Probability of using the dataset's cross reference, for rows that have one."""
    rewarp: float = 0.5
    """Probability of warping a reference that the dataset provides; a reference made from the target is always
    warped."""
    warp: float = 0.12
    """Largest shift of a warp's control point per axis, as a fraction of half the image side."""
    warp_points: int = 4
    """Control points per side of the thin-plate spline."""
    warp_kind: Literal["grid", "diagonal"] = "grid"
    """grid: the control points move freely, and the image is rotated, scaled and translated. diagonal: the authors'
    warp (models/authors/warp.py)."""
    rotate: float = 0.0
    """Largest rotation of a warp, in degrees."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Range of the factor by which a warp enlarges the image."""
    translate: float = 0.0
    """Largest translation of a warp, as a fraction of the image side."""
    shuffle: float = 0.0
    """Probability of cutting the reference into 2 x 2, 4 x 4 or 8 x 8 patches and shuffling them, which keeps the
    colors but not their positions (Liu et al. 2025)."""
    flip: float = 0.5
    """Probability of mirroring target and sketch together, and independently of mirroring the reference."""
    recolor: float = 0.5
    """Probability of changing hue, saturation and brightness of target and reference together."""
    hue: float = 0.5
    """Largest hue rotation; 0.5 is half the circle."""
    permute: float = 0.0
    """Probability that a recolored row also gets its channels permuted."""
    gamma: float = 0.0
    """Recolored rows have each channel raised to a power between 2**-gamma and 2**gamma."""
    soften: float = 0.5
    """Probability of slightly blurring the sketch: scans and downscaled drawings have gray lines, XDoG's are black."""
    line_styles: float = 0.0
    """Probability that extracted line art is drawn in a random style of models/augmentation/lineart.py instead of
    XDoG."""
    extract: float = 0.0
    """Probability that the line art of a row is extracted from its target although the dataset has line art for it."""
    reduce: float = 0.0
    """Probability that extracted line art is XDoG of the target at twice its size, with noise, and then reduced: what
    larger pictures look like to the network."""
    hints: float = 0.0
    """Probability that a row gets 1 to MAX_HINTS hints: points of the target's color. Small numbers are frequent."""
    wrong_reference: float = 0.5
    """Probability that a row with at least MANY_HINTS hints gets the reference of another row, so that hints overrule
    references."""
    two_views: float = 0.0
    """Probability that all rows of a step get two references, of which each shows what the other lacks."""
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
                "warp_kind diagonal does not rotate, scale or translate: leave out rotate, scale and translate"
            )

    @property
    def moves(self) -> bool:
        """Whether a warp also rotates, scales or translates."""
        return self.rotate > 0 or self.translate > 0 or tuple(self.scale) != (1.0, 1.0)


def make_batch(rows: Mapping[str, Tensor], config: AugmentConfig, generator: torch.Generator) -> Batch:
    """Make a training batch from decoded rows.

    Args:
        rows: uint8 target, reference, cross_reference [B, S, S, 3], sketch [B, S, S]; bool has_sketch,
            has_reference, has_cross [B] (a missing image is all zero). Keep the flags on the host for speed.
        config: augmentation settings.
        generator: a generator on the host.
    """
    rows, target = _with_flags(rows), to_tensor(rows["target"])
    chance = Chance(len(target), generator.device, generator)
    sketch = _soften(_sketches(rows, target, config, chance), config, chance)
    views = [_references(rows, config, chance)]
    if config.two_views and chance.once() < config.two_views:
        views = _two_views(views[0], target, config, chance)
    # Side by side, all views get the same color map.
    target, joined = recolor(target, torch.cat(views, -1), config, chance)
    mirrored = chance(config.flip)
    target, sketch = (_either(mirrored, x.flip(-1), x) for x in (target, sketch))
    views = [_either(chance(config.flip), x.flip(-1), x) for x in joined.chunk(len(views), -1)]
    batch = Batch(target, sketch, views[0], views[1] if len(views) > 1 else None)
    return _hinted(batch, config, chance) if config.hints else batch


def fixed_batch(rows: Mapping[str, Tensor], track: str, generator: torch.Generator) -> Batch:
    """Make the batch of an evaluation track, `same` or `cross`.

    On track `same` the reference is the dataset's, or the warped target where a row has none. On any other track it is
    the dataset's cross reference; in rows without one, the target and its warped copy are recolored together.
    """
    rows, target = _with_flags(rows), to_tensor(rows["target"])
    config = EVALUATION
    chance = Chance(len(target), generator.device, generator)
    if not bool(rows["has_sketch"].all()):
        chance.uniform(0, 1)  # Earlier versions drew this for the line art; later random numbers must not change.
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
"""Settings of the evaluation tracks, independent of the training defaults so that measurements stay comparable."""


class Chance:
    """Random numbers for B rows, drawn from one generator; a subclass may use another source."""

    def __init__(self, rows: int, device: torch.device, generator: torch.Generator) -> None:
        self.rows, self.device, self.generator = rows, device, generator

    def __call__(self, probability: float) -> Tensor:
        """Return bool [B, 1, 1, 1], each value true with this probability."""
        return _mask(self.uniform(0, 1) < probability)

    def once(self) -> float:
        """Return one uniform number in [0, 1) for all rows."""
        return float(torch.rand((), generator=self.generator, device=self.device))

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Return uniform numbers in [low, high), [B, *shape]."""
        unit = torch.rand(self.rows, *shape, generator=self.generator, device=self.device)
        return low + (high - low) * unit

    def below(self, count: int) -> Tensor:
        """Return int64 [B] in 0..count - 1."""
        return self.uniform(0, count).long().clamp_max(count - 1)


def _mask(flags: Tensor) -> Tensor:
    return flags.reshape(-1, 1, 1, 1)


def _with_flags(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the rows with their `has_` flags moved to the host."""
    names = [name for name in rows if name.startswith("has_")]
    return {**rows, **dict(zip(names, torch.stack([rows[name] for name in names]).cpu(), strict=True))}


def _either(chosen: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return torch.where(onto(chosen, one), one, other)


def _sketches(rows: Mapping[str, Tensor], target: Tensor, config: AugmentConfig, chance: Chance) -> Tensor:
    given = _mask(rows["has_sketch"])
    if config.extract:
        given = given & ~chance(config.extract)
    if bool(given.all()):
        return to_tensor(rows["sketch"])
    sigma = chance.uniform(*config.xdog.sigma)
    if config.line_styles:
        drawn = line_art(target, _pens(sigma, config, chance), config.xdog)
    else:
        drawn = xdog(target, sigma, config.xdog)
    if config.reduce:
        drawn = _reduced(drawn, target, sigma, config, chance)
    return _either(given, to_tensor(rows["sketch"]), drawn)


def _reduced(drawn: Tensor, target: Tensor, sigma: Tensor, config: AugmentConfig, chance: Chance) -> Tensor:
    """Replace the line art of some rows by that of the targets at twice their size."""
    rows = chance(config.reduce).flatten().nonzero().flatten()
    strength, ink = chance.uniform(0, REDUCED_NOISE)[rows], chance.uniform(1, 2)[rows]
    height, width = target.shape[-2:]
    noise = torch.randn(len(rows), 1, 2 * height, 2 * width, generator=chance.generator, device=chance.device)
    if not len(rows):
        return drawn
    where = onto(rows, target)
    noise = onto(strength[:, None, None, None] * noise, target)
    return drawn.index_copy(0, where, reduced_xdog(target[where], sigma[rows], noise, ink, config.xdog))


def _pens(sigma: Tensor, config: AugmentConfig, chance: Chance) -> Pens:
    """Draw a random style and constants for some rows; the other rows get plain XDoG with this sigma."""
    styled = chance(config.line_styles).flatten()
    free = Pens(chance.below(len(STYLES)), *(chance.uniform(*PEN_RANGES[name]) for name in Pens._fields[1:]))
    k, p = (torch.full_like(sigma, value) for value in (config.xdog.k, config.xdog.p))
    plain = Pens(torch.full_like(free.style, STYLES.index("xdog")), sigma, k, p, free.width)
    return Pens(*(torch.where(styled, one, other) for one, other in zip(free, plain, strict=True)))


def fixed_sketch(rows: Mapping[str, Tensor], target: Tensor, config: AugmentConfig) -> Tensor:
    """Return [B, 1, S, S]: each row's own line art, or the target's XDoG with the mean sigma if the row has none."""
    drawn = xdog(target, torch.full((len(target),), sum(config.xdog.sigma) / 2), config.xdog)
    return _either(_mask(rows["has_sketch"]), to_tensor(rows["sketch"]), drawn)


def _soften(sketch: Tensor, config: AugmentConfig, chance: Chance) -> Tensor:
    chosen, sigma = chance(config.soften), chance.uniform(0.3, 0.9)
    return _either(chosen, blur(sketch, sigma), sketch) if config.soften else sketch


def _references(rows: Mapping[str, Tensor], config: AugmentConfig, chance: Chance) -> Tensor:
    given, cross = _mask(rows["has_reference"]), _mask(rows["has_cross"])
    take_cross = cross & chance(config.cross_reference)
    # Select while the images are bytes: this takes a quarter of the memory, and only one of three is converted.
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


def _two_views(first: Tensor, target: Tensor, config: AugmentConfig, chance: Chance) -> list[Tensor]:
    """Return the reference and a warped copy of the target, of which each lacks something that the other has.

    In half of the rows, a random line divides the picture, and each view shows one side of it. In a quarter of the rows
    each, the first or the second view is the reference of another row.
    """
    second = bend(target, *draw_warp(config, chance))
    kind, angle = chance.below(4), chance.uniform(-torch.pi, torch.pi)
    height, width = target.shape[-2:]
    # [B, S * S]: the signed distance from a line through the center.
    distance = (_lattice(height, width, chance.device)[0] @ torch.stack([angle.cos(), angle.sin()])).T
    side = (distance > chance.uniform(-0.4, 0.4, 1)).reshape(-1, 1, height, width)
    paper = onto(chance.uniform(-1, 1, 2, 3, 1, 1), target)
    parts = _mask(kind >= 2) & torch.stack([~side, side])
    views = [_either(_mask(kind == n), view.roll(1, 0), view) for n, view in enumerate((first, second))]
    return [_either(parts[n], paper[:, n], view) for n, view in enumerate(views)]


def _hinted(batch: Batch, config: AugmentConfig, chance: Chance) -> Batch:
    """Give some rows hints, and some of the rows with many hints the references of other rows."""
    size = batch.target.shape[-1]
    chosen, wrong = chance(config.hints), chance(config.wrong_reference)
    count = ((MAX_HINTS + 1) ** chance.uniform(0, 1)).long()
    points = chance.uniform(0, size, MAX_HINTS, 2).long().clamp_max(size - 1)
    jitter = chance.uniform(-HINT_JITTER, HINT_JITTER, MAX_HINTS, 3)
    there = chosen.flatten()[:, None] & (torch.arange(MAX_HINTS, device=chance.device) < count[:, None])
    points, jitter, there = (onto(small, batch.target) for small in (points, jitter, there))
    side = 2 * RADIUS_PX + 1
    index = (points[..., 1] * size + points[..., 0])[:, None]
    lightness = -F.max_pool2d(-batch.sketch, side, 1, RADIUS_PX)
    there = there & (lightness.flatten(2).gather(2, index)[:, 0] > LINE_LEVEL)
    mean = F.avg_pool2d(batch.target, side, 1, RADIUS_PX, count_include_pad=False)
    colors = mean.flatten(2).gather(2, index.expand(-1, 3, -1)).transpose(1, 2)
    planes = hint_planes(torch.where(there[..., None], points, -1), (colors + jitter).clamp(-1, 1), size)
    wrong = onto(wrong, batch.target) & _mask(there.sum(1) >= MANY_HINTS)
    views = [_either(wrong, view.roll(1, 0), view) for view in batch.references]
    return batch._replace(**dict(zip(("reference", "second"), views, strict=False)), hints=planes)


def draw_order(chance: Chance) -> Tensor:
    """Draw a patch order for shuffle(), with a random number of patches per row."""
    sides = torch.tensor(SIDES, device=chance.device)[chance.below(len(SIDES))]
    return patch_order(sides, chance.uniform(0, 1, CELLS**2))


def _changed(images: Tensor, chosen: Tensor, change: Callable[..., Tensor], drawn: tuple[Tensor, ...]) -> Tensor:
    """Apply `change` to the chosen rows, with their part of the drawn numbers; the other rows cost nothing."""
    index = chosen.flatten().nonzero().flatten()
    if not len(index):
        return images
    rows = onto(index, images)
    return images.index_copy(0, rows, change(images[rows], *(part[index] for part in drawn)))


class Warp(NamedTuple):
    """Parameters of one warp for each of B rows."""

    points: Tensor
    """[B, N, 2]: control points (x, y) in [-1, 1]."""
    moved: Tensor
    """[B, N, 2]: positions of the control points after the spline."""
    back: Tensor
    """[B, 2, 2]: inverse of rotation and scaling, applied as (x, y) @ back."""
    shift: Tensor
    """[B, 1, 2]: translation of the image, applied after rotation and scaling."""


def draw_warp(config: AugmentConfig, chance: Chance) -> Warp:
    """Draw random warps. All control points move, so copying the reference from the same position never works."""
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
    """Rotate, scale, translate and bend each image [3, S, S] in one resampling.

    The bending is a thin-plate spline (Bookstein 1989). The arguments after `images` are the fields of Warp.
    """
    # This import takes a second of CPU time, and commands that only read a recipe do not need it.
    from kornia.geometry.transform import get_tps_transform, warp_points_tps

    # The transform maps destination to source, to the position where each output pixel is read. kornia centers the
    # kernels at the points of the second argument.
    solved = get_tps_transform(moved, points)
    points, kernel, affine, back, shift = (onto(small, images) for small in (points, *solved, back, shift))
    # Evaluated at every fourth pixel and interpolated: the spline is smooth, and each point costs a logarithm.
    height, width = images.shape[-2] // 4 + 1, images.shape[-1] // 4 + 1
    pixels = _lattice(height, width, images.device).expand(len(images), -1, -1)
    read = warp_points_tps(pixels, points, kernel, affine)
    read = ((read - shift)[..., None] * back[:, None]).sum(-2)
    # On a permuted view interpolate() would take its slow channels-last path.
    coarse = read.reshape(-1, height, width, 2).permute(0, 3, 1, 2).contiguous()
    grid = F.interpolate(coarse, images.shape[-2:], mode="bilinear", align_corners=True).permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=True)


def _lattice(height: int, width: int, device: torch.device) -> Tensor:
    """Return [1, height * width, 2]: evenly spaced points (x, y) in [-1, 1]."""
    ys, xs = (torch.linspace(-1, 1, n, device=device) for n in (height, width))
    return torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1).reshape(1, -1, 2)


def recolor(target: Tensor, reference: Tensor, config: AugmentConfig, chance: Chance) -> tuple[Tensor, Tensor]:
    """Recolor target and reference of each row with the same random map: hue, saturation, brightness, channels."""
    hue = chance.uniform(-config.hue, config.hue) * (2 * torch.pi)
    matrix = hue_matrix(hue, chance.uniform(0.6, 1.4), chance.uniform(0.8, 1.15))
    chosen = chance(config.recolor)
    if config.permute:
        matrix = matrix @ order_matrix(chance.below(NUM_ORDERS) * chance(config.permute).flatten())
    drawn = (matrix, 2 ** chance.uniform(-config.gamma, config.gamma, 3)) if config.gamma else (matrix,)
    if not config.recolor:
        return target, reference
    return _changed(target, chosen, _recolored, drawn), _changed(reference, chosen, _recolored, drawn)


def _recolored(images: Tensor, matrix: Tensor, gamma: Tensor | None = None) -> Tensor:
    return apply_matrix(images if gamma is None else apply_gamma(images, gamma), matrix)
