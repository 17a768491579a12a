"""Tracks of a benchmark: fixed inputs with an exact truth, the same for every model.

    for name in TRACKS:
        batch = build(rows, name, range(start, stop))     # rows as read_split() returns them

same          the reference is the target: warped, rotated, scaled and shifted
cross         the reference is the dataset's other picture with the target's colors
recolored     one color map recolors target and reference; the reference is warped as in `same`
lines/STYLE   like `same`, with line art drawn in a style of models/augmentation/lineart.py, not taken from the dataset
damage/KIND   like `recolored`, with a damaged reference

A row's random numbers depend on its position in the split, so they are the same on every track and for any chunk size.
models/augmentation/augment.py defines the two tracks of `animediffusion evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from animediffusion.models.augmentation.augment import (
    EVALUATION,
    AugmentConfig,
    Batch,
    Chance,
    bend,
    draw_order,
    draw_warp,
    fixed_sketch,
)
from animediffusion.models.augmentation.lineart import LUMA, STYLES, Pens, line_art
from animediffusion.models.augmentation.patch_shuffle import shuffle
from animediffusion.models.augmentation.recolor import (
    NUM_ORDERS,
    apply_gamma,
    apply_matrix,
    apply_regions,
    find_regions,
    hue_matrix,
    order_matrix,
)
from animediffusion.models.tensors import to_tensor
from animediffusion.platform.errors import ConfigError, DataError

SEED = 20240
WARP = AugmentConfig(warp=0.15, warp_points=4, rotate=15.0, scale=(0.85, 1.2), translate=0.08)
"""Explicit values, so that measurements remain comparable when the training defaults change."""
PEN = {"sigma": 0.4, "k": 3.5, "p": 10.0, "width": 0.65}
"""Constants of the styles with filled areas and of the style `pencil`."""
LINE_P = 16.0
"""Value of `p` for thin, thick and binarized: with 10, these styles lose the lines of light hair."""
KINDS = ("hue", "permutation", "gamma", "regions")
"""Kinds of recoloring on the track `recolored`, chosen in rotation by a row's position in the split."""
NUM_REGIONS = 5

Rows = Mapping[str, NDArray[Any]]


class _RowChance(Chance):
    """Random numbers that depend on each row's position in the split."""

    def __init__(self, places: Sequence[int], purpose: int) -> None:
        super().__init__(len(places), torch.device("cpu"), torch.Generator())
        self.places, self.purpose, self.drawn = places, purpose, 0

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        self.drawn += 1
        keys = ([SEED, self.purpose, place, self.drawn] for place in self.places)
        unit = np.stack([np.random.default_rng(key).random(shape, np.float32) for key in keys])
        return low + (high - low) * torch.from_numpy(unit)


def build(rows: Rows, name: str, places: Sequence[int] | None = None) -> Batch:
    """Return the inputs and the truth of a track.

    Args:
        rows: a whole split, as read_split() returns it; `id` may be missing.
        name: one of TRACKS.
        places: positions of the rows in the split, all rows by default.

    Raises:
        ConfigError: if the track does not exist.
        DataError: if a row has no cross reference (`cross`), or the split has a single row (`damage/unrelated`).
    """
    if name not in TRACKS:
        raise ConfigError(f"track {name!r}", "is unknown", f"one of {', '.join(TRACKS)}")
    return TRACKS[name](rows, range(len(rows["target"])) if places is None else places)


def _take(rows: Rows, places: Sequence[int]) -> dict[str, Tensor]:
    return {key: torch.from_numpy(value[list(places)]) for key, value in rows.items() if key != "id"}


def _same(rows: Rows, places: Sequence[int]) -> Batch:
    some = _take(rows, places)
    target = to_tensor(some["target"])
    return Batch(target, fixed_sketch(some, target, EVALUATION), _bent(target, places))


def _drawn(style: str) -> Callable[[Rows, Sequence[int]], Batch]:
    def track(rows: Rows, places: Sequence[int]) -> Batch:
        target = to_tensor(_take(rows, places)["target"])
        values = {**PEN, "p": LINE_P} if style in ("thin", "thick", "binarized") else PEN
        constants = {key: torch.full((len(target),), value) for key, value in values.items()}
        pens = Pens(torch.full((len(target),), STYLES.index(style)), **constants)
        return Batch(target, line_art(target, pens), _bent(target, places))

    return track


def _cross(rows: Rows, places: Sequence[int]) -> Batch:
    some = _take(rows, places)
    missing = int((~some["has_cross"]).sum())
    if missing:
        raise DataError("track 'cross'", f"{missing} of {len(places)} rows have no cross reference", "use 'recolored'")
    target = to_tensor(some["target"])
    return Batch(target, fixed_sketch(some, target, EVALUATION), to_tensor(some["cross_reference"]))


def _recolored(rows: Rows, places: Sequence[int]) -> Batch:
    some = _take(rows, places)
    target = to_tensor(some["target"])
    truth = recolored(target, places)
    return Batch(truth, fixed_sketch(some, target, EVALUATION), _bent(truth, places))


def _bent(images: Tensor, places: Sequence[int]) -> Tensor:
    return bend(images, *draw_warp(WARP, _RowChance(places, 0)))


def recolored(images: Tensor, places: Sequence[int]) -> Tensor:
    """Recolor each image with a fixed color map that depends on the image's position in the split.

    The map depends only on a pixel's color, so all pixels of a row share it.
    """
    chance = _RowChance(places, 1)
    turns = hue_matrix(_far_turn(chance), chance.uniform(0.8, 1.2), chance.uniform(0.85, 1.1))
    orders = order_matrix(1 + chance.below(NUM_ORDERS - 1))
    gamma = 2 ** chance.uniform(-1, 1, 3)
    matrices = _region_matrices(chance)
    changes: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "hue": lambda some, rows: apply_matrix(some, turns[rows]),
        "permutation": lambda some, rows: apply_matrix(some, orders[rows]),
        "gamma": lambda some, rows: apply_gamma(some, gamma[rows]),
        "regions": lambda some, rows: apply_regions(some, find_regions(some, NUM_REGIONS), matrices[rows]),
    }
    changed = torch.empty_like(images)
    for number, kind in enumerate(KINDS):
        rows = (torch.tensor(list(places)) % len(KINDS) == number).nonzero().flatten()
        changed[rows] = changes[kind](images[rows], rows)
    return changed


def _far_turn(chance: Chance) -> Tensor:
    """Return hue rotations [B] in radians of 60 to 300 degrees, which are clearly different from the old color."""
    return chance.uniform(1 / 6, 5 / 6) * (2 * torch.pi)


def _region_matrices(chance: Chance) -> Tensor:
    """Return random color matrices [B, NUM_REGIONS, 3, 3]."""
    hue, saturation, gain = (
        chance.uniform(low, high, NUM_REGIONS).flatten()
        for low, high in ((-torch.pi, torch.pi), (0.8, 1.3), (0.9, 1.1))
    )
    return hue_matrix(hue, saturation, gain).reshape(-1, NUM_REGIONS, 3, 3)


def _damaged(damage: Callable[[Tensor, Chance], Tensor]) -> Callable[[Rows, Sequence[int]], Batch]:
    def track(rows: Rows, places: Sequence[int]) -> Batch:
        batch = _recolored(rows, places)
        return batch._replace(reference=damage(batch.reference, _RowChance(places, 2)))

    return track


def _unrelated(rows: Rows, places: Sequence[int]) -> Batch:
    """Replace each row's reference with the reference of the row half a split further on."""
    count = len(rows["target"])
    if count < 2:
        raise DataError("track 'damage/unrelated'", "the split has one row", "two or more")
    others = [(place + count // 2) % count for place in places]
    return _recolored(rows, places)._replace(reference=_recolored(rows, others).reference)


def _none(reference: Tensor, chance: Chance) -> Tensor:  # noqa: ARG001
    """Replace the reference with middle gray."""
    return torch.zeros_like(reference)


def _gray(reference: Tensor, chance: Chance) -> Tensor:  # noqa: ARG001
    """Replace the reference with its luma."""
    weights = reference.new_tensor(LUMA).reshape(1, 3, 1, 1)
    return (reference * weights).sum(1, keepdim=True).expand_as(reference)


def _cropped(reference: Tensor, chance: Chance) -> Tensor:  # noqa: ARG001
    """Crop the middle, half a side wide and high, and enlarge it to the full size."""
    side = reference.shape[-1]
    middle = reference[..., side // 4 : side - side // 4, side // 4 : side - side // 4]
    return F.interpolate(middle, (side, side), mode="bicubic", align_corners=False).clamp(-1, 1)


def _half(reference: Tensor, chance: Chance) -> Tensor:
    """Keep the left, right, upper or lower half, and replace the other half with middle gray."""
    side = reference.shape[-1]
    first = torch.arange(side) < side // 2
    halves = torch.stack([first.expand(side, -1), ~first.expand(side, -1), first[:, None].expand(-1, side)])
    halves = torch.cat([halves, ~halves[2:]])
    kept = halves[chance.below(4)][:, None]
    return torch.where(kept, reference, 0.0)


def _shuffled(reference: Tensor, chance: Chance) -> Tensor:
    """Shuffle the patches of the reference."""
    return shuffle(reference, draw_order(chance))


def _flipped(reference: Tensor, chance: Chance) -> Tensor:  # noqa: ARG001
    """Mirror the reference."""
    return reference.flip(-1)


TRACKS: dict[str, Callable[[Rows, Sequence[int]], Batch]] = {
    "same": _same,
    "cross": _cross,
    "recolored": _recolored,
    **{f"lines/{style}": _drawn(style) for style in STYLES},
    "damage/none": _damaged(_none),
    "damage/gray": _damaged(_gray),
    "damage/cropped": _damaged(_cropped),
    "damage/half": _damaged(_half),
    "damage/shuffled": _damaged(_shuffled),
    "damage/flipped": _damaged(_flipped),
    "damage/unrelated": _unrelated,
}
"""Functions that build each track, by name."""
