"""Hints: points whose color is known, as planes that a network gets with the sketch.

Shapes: B rows, N points, S pixels per side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

HINT_PLANES = 4
"""One plane is 1 at a hint and 0 elsewhere; three have its color in [-1, 1], and 0 elsewhere."""
RADIUS_PX = 1
"""A hint covers a square of 2 * RADIUS_PX + 1 pixels of the network per side, as one pixel is easily overlooked."""

HintPoint = tuple[int, int, tuple[int, int, int]]
"""x and y in pixels, and the color as 8-bit RGB."""


def hint_planes(points: Tensor, colors: Tensor, size: int) -> Tensor:
    """Draw hints as planes [B, HINT_PLANES, S, S]; a later point covers an earlier one.

    Args:
        points: int64 [B, N, 2]: x and y in pixels. A point outside of the image is left out.
        colors: [B, N, 3] in [-1, 1].
        size: S.
    """
    rows, count, _ = points.shape
    steps = torch.arange(-RADIUS_PX, RADIUS_PX + 1, device=points.device)
    square = torch.cartesian_prod(steps, steps)
    cells = points[:, :, None] + square
    inside = ((cells >= 0) & (cells < size)).all(-1) & ((points >= 0) & (points < size)).all(-1)[:, :, None]
    # All cells outside of the image share one additional cell at the end. The highest number wins in every cell, so the
    # result does not depend on the order in which a GPU writes.
    index = torch.where(inside, cells[..., 1] * size + cells[..., 0], size * size).flatten(1)
    number = torch.arange(1, count + 1, device=points.device)[:, None].expand(rows, count, len(square)).flatten(1)
    owner = torch.zeros(rows, size * size + 1, dtype=torch.int64, device=points.device)
    owner = owner.scatter_reduce(1, index, number, "amax")[:, :-1, None]
    palette = torch.cat([colors.new_zeros(rows, 1, 3), colors], 1)
    planes = torch.cat([(owner > 0).to(colors.dtype), palette.gather(1, owner.expand(-1, -1, 3))], -1)
    return planes.transpose(1, 2).reshape(rows, HINT_PLANES, size, size)


def draw_hints(hints: Sequence[HintPoint], size: int) -> Tensor | None:
    """Draw hints in pixels of the network as planes [HINT_PLANES, S, S] of one picture; None if there are no hints."""
    if not hints:
        return None
    points = torch.tensor([[x, y] for x, y, _ in hints])
    colors = torch.tensor([color for *_, color in hints], dtype=torch.float32) / 127.5 - 1
    return hint_planes(points[None], colors[None], size)[0]
