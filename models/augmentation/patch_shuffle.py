"""Shuffle square patches of an image, which keeps its colors but not their positions.

The random numbers are drawn in models/augmentation/augment.py. Shapes: B rows, S pixels per side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from animediffusion.models.tensors import onto

SIDES = (2, 4, 8)
"""Allowed numbers of patches per side."""
CELLS = 8
"""Cells per side that are moved; a larger patch is a square of cells that stay together."""


def shuffle(images: Tensor, order: Tensor) -> Tensor:
    """Put the 8 x 8 cells of each image [C, S, S] into an order [B, 64] from patch_order().

    Raises:
        ValueError: if S is not a multiple of 8.
    """
    rows, channels, size, _ = images.shape
    if size % CELLS:
        raise ValueError(f"images to shuffle must be a multiple of {CELLS} pixels a side, got {size}")
    side = size // CELLS
    tiles = images.reshape(rows, channels, CELLS, side, CELLS, side).permute(0, 2, 4, 1, 3, 5)
    tiles = tiles.reshape(rows, CELLS**2, channels * side**2)
    mixed = tiles.gather(1, onto(order, tiles)[..., None].expand_as(tiles))
    return mixed.reshape(rows, CELLS, CELLS, channels, side, side).permute(0, 3, 1, 4, 2, 5).reshape(images.shape)


def patch_order(sides: Tensor, keys: Tensor) -> Tensor:
    """Return int64 [B, 64]: for each of the 8 x 8 positions, the cell that moves there.

    Args:
        sides: patches per side, int64 [B], values from SIDES.
        keys: random numbers in 0..1, [B, 64]; sorting as many as a row has patches gives the row's order.
    """
    side = sides[:, None]
    number = torch.arange(CELLS**2, device=sides.device)[None]
    # A row with n patches uses its first n keys; the value 2 makes the rest sort behind them.
    order = torch.where(number < side**2, keys, torch.full_like(keys, 2.0)).argsort(1)
    y, x, run = number // CELLS, number % CELLS, CELLS // side
    source = order.gather(1, y // run * side + x // run)
    return (source // side * run + y % run) * CELLS + source % side * run + x % run
