"""The tensors that the network gets for a drawing, in a server and in standalone.py alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from animediffusion.models.network.hints import HintPoint, draw_hints
from animediffusion.models.tensors import from_pixels
from animediffusion.platform.images.codec import letterbox, letterbox_points
from animediffusion.serve.rendering.sketch import Pixels, for_network


class NetworkInputs(NamedTuple):
    """The inputs of one picture, S x S, as the first and only row of a batch."""

    sketch: Tensor
    """[1, 1, S, S] in [-1, 1]."""
    references: tuple[Tensor, ...]
    """Each [1, 3, S, S] in [-1, 1]."""
    hints: Tensor | None
    """[1, 4, S, S], see models/network/hints.py; None without hints."""


def network_inputs(lines: Pixels, references: Sequence[Pixels], hints: Sequence[HintPoint], size: int) -> NetworkInputs:
    """Return the letterboxed inputs of a picture with `size` pixels a side.

    Args:
        lines: [H, W]: black lines on white.
        references: pictures [H, W, 3], each of any size.
        hints: colors of points, in pixels of `lines`.
        size: pixels per side of the network's pictures.
    """
    height, width = lines.shape
    planes = draw_hints(letterbox_points(hints, height, width, size), size)
    return NetworkInputs(
        from_pixels(for_network(lines, size)),
        tuple(from_pixels(letterbox(reference, size)[0]) for reference in references),
        None if planes is None else planes[None],
    )
