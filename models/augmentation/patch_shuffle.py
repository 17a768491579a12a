"""Images cut into patches that change places: the colors stay, the places say nothing.

Not here: what is drawn at random, see models/augmentation/augment.py. B rows, S pixels a side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from animediffusion.models.tensors import onto

SIDES = (2, 4, 8)
"""How many patches a side an image may be cut into."""
CELLS = 8
"""Patches a side that are moved; larger ones are squares of these that stay together."""


def shuffle(images: Tensor, order: Tensor) -> Tensor:
    """Each image [C, S, S] with its 8 x 8 patches in the order of patch_order(), [B, 64]; S a multiple of 8."""
    rows, channels, size, _ = images.shape
    if size % CELLS:
        raise ValueError(f"images to shuffle must be a multiple of {CELLS} pixels a side, got {size}")
    side = size // CELLS
    tiles = images.reshape(rows, channels, CELLS, side, CELLS, side).permute(0, 2, 4, 1, 3, 5)
    tiles = tiles.reshape(rows, CELLS**2, channels * side**2)
    mixed = tiles.gather(1, onto(order, tiles)[..., None].expand_as(tiles))
    return mixed.reshape(rows, CELLS, CELLS, channels, side, side).permute(0, 3, 1, 4, 2, 5).reshape(images.shape)


def patch_order(sides: Tensor, keys: Tensor) -> Tensor:
    """int64 [B, 64]: which of the 8 x 8 patches goes to each place.

    Args:
        sides: of SIDES, int64 [B]: patches a side that stay whole.
        keys: random numbers in 0..1, [B, 64]; those that a row needs are sorted, and their ranks are the order.
    """
    side = sides[:, None]
    number = torch.arange(CELLS**2, device=sides.device)[None]
    # Of a row with n patches, the first n keys are in play: the others sort behind them.
    order = torch.where(number < side**2, keys, torch.full_like(keys, 2.0)).argsort(1)
    y, x, run = number // CELLS, number % CELLS, CELLS // side
    source = order.gather(1, y // run * side + x // run)
    return (source // side * run + y % run) * CELLS + source % side * run + x % run
