"""The tracks that a benchmark measures on: fixed inputs with an exact truth, the same for everybody.

    for name in TRACKS:
        batch = build(rows, name, range(start, stop))     # rows as read_split() returns them

same          the reference is the target, bent, turned, enlarged and shifted
cross         the reference is the dataset's other picture with the target's colors
recolored     target and reference in other colors, by one map; the reference bent as in `same`
lines/STYLE   as `same`, the line art drawn in a style of models/augmentation/lineart.py, whatever the dataset gives
damage/KIND   as `recolored`, the reference damaged

A row's random numbers follow from its place in the split, so they are the same on every track and in any chunks.
Not here: what a model makes of them; the two tracks of `animediffusion evaluate`, see models/augmentation/augment.py.
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
    order_matrix,
    turn_matrix,
)
from animediffusion.models.tensors import to_tensor
from animediffusion.platform.errors import ConfigError, DataError

SEED = 20240
WARP = AugmentConfig(warp=0.15, warp_points=4, rotate=15.0, scale=(0.85, 1.2), translate=0.08)
"""Written out, so that a change of the training defaults leaves measurements comparable."""
PEN = {"sigma": 0.4, "k": 3.5, "p": 10.0, "width": 0.65}
"""Constants of the styles with filled areas, and of the pencil."""
LINE_P = 16.0
"""p of the others: with 10 they lose the lines of light hair."""
KINDS = ("hue", "permutation", "gamma", "regions")
"""How a row of `recolored` is recolored; its place in the split chooses, in turn."""
NUM_REGIONS = 5

Rows = Mapping[str, NDArray[Any]]


class _RowChance(Chance):
    """Random numbers of which each row has its own, by its place."""

    def __init__(self, places: Sequence[int], purpose: int) -> None:
        super().__init__(len(places), torch.device("cpu"), torch.Generator())
        self.places, self.purpose, self.drawn = places, purpose, 0

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        self.drawn += 1
        keys = ([SEED, self.purpose, place, self.drawn] for place in self.places)
        unit = np.stack([np.random.default_rng(key).random(shape, np.float32) for key in keys])
        return low + (high - low) * torch.from_numpy(unit)


def build(rows: Rows, name: str, places: Sequence[int] | None = None) -> Batch:
    """The inputs and the truth of a track.

    Args:
        rows: a whole split, as read_split() returns it; `id` may be missing.
        name: one of TRACKS.
        places: which rows, all by default.

    Raises:
        ConfigError: there is no such track.
        DataError: the split has no second pictures, for `cross`, or a single row, for `damage/unrelated`.
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
    """The images in the fixed other colors of their places: a map of color alone, the same for all pixels of a row."""
    chance = _RowChance(places, 1)
    turns = turn_matrix(_far_turn(chance), chance.uniform(0.8, 1.2), chance.uniform(0.85, 1.1))
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
    """[B] a turn of hue that nobody takes for the old color: 60 to 300 degrees."""
    return chance.uniform(1 / 6, 5 / 6) * (2 * torch.pi)


def _region_matrices(chance: Chance) -> Tensor:
    """[B, NUM_REGIONS, 3, 3]"""
    hue, saturation, gain = (
        chance.uniform(low, high, NUM_REGIONS).flatten()
        for low, high in ((-torch.pi, torch.pi), (0.8, 1.3), (0.9, 1.1))
    )
    return turn_matrix(hue, saturation, gain).reshape(-1, NUM_REGIONS, 3, 3)


def _damaged(damage: Callable[[Tensor, Chance], Tensor]) -> Callable[[Rows, Sequence[int]], Batch]:
    def track(rows: Rows, places: Sequence[int]) -> Batch:
        batch = _recolored(rows, places)
        return batch._replace(reference=damage(batch.reference, _RowChance(places, 2)))

    return track


def _unrelated(rows: Rows, places: Sequence[int]) -> Batch:
    """Everybody's reference goes to a row half the split away."""
    count = len(rows["target"])
    if count < 2:
        raise DataError("track 'damage/unrelated'", "the split has one row", "two or more")
    others = [(place + count // 2) % count for place in places]
    return _recolored(rows, places)._replace(reference=_recolored(rows, others).reference)


def _none(reference: Tensor, chance: Chance) -> Tensor:  # noqa: ARG001
    """Middle gray."""
    return torch.zeros_like(reference)


def _gray(reference: Tensor, chance: Chance) -> Tensor:  # noqa: ARG001
    """Its luma."""
    weights = reference.new_tensor(LUMA).reshape(1, 3, 1, 1)
    return (reference * weights).sum(1, keepdim=True).expand_as(reference)


def _cropped(reference: Tensor, chance: Chance) -> Tensor:  # noqa: ARG001
    """The middle, half a side wide and high."""
    side = reference.shape[-1]
    middle = reference[..., side // 4 : side - side // 4, side // 4 : side - side // 4]
    return F.interpolate(middle, (side, side), mode="bicubic", align_corners=False).clamp(-1, 1)


def _half(reference: Tensor, chance: Chance) -> Tensor:
    """Its left, right, upper or lower half; middle gray beside it."""
    side = reference.shape[-1]
    first = torch.arange(side) < side // 2
    halves = torch.stack([first.expand(side, -1), ~first.expand(side, -1), first[:, None].expand(-1, side)])
    halves = torch.cat([halves, ~halves[2:]])
    kept = halves[chance.below(4)][:, None]
    return torch.where(kept, reference, 0.0)


def _shuffled(reference: Tensor, chance: Chance) -> Tensor:
    """Its patches in another order."""
    return shuffle(reference, draw_order(chance))


def _flipped(reference: Tensor, chance: Chance) -> Tensor:  # noqa: ARG001
    """Its mirror image."""
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
"""Every track by name."""
