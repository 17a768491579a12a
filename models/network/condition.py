"""What a request fixes before the first denoising step: everything made from sketch and reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor


class Condition(NamedTuple):
    """Independent of t and of the noise, so made once per request. B rows, batch first."""

    features: Tensor
    """[B, C, h, w]: first convolution of sketch and reference, to be added to that of x_t."""
    tokens: Tensor
    """[B, N, D]: the reference as attention tokens; N = 0 for a network without them."""
    palette: Tensor
    """[B, E]: pooled tokens, added to the time embedding; E = 0 without tokens."""
    sketch: Tensor
    """[B, 1, H, W] in [-1, 1]: for the last layers, which work at full resolution."""
    guess: Tensor
    """[B, 3, H, W]: the image as the matcher alone would have it, for training; H = 0 for a network without one."""


class Reference(NamedTuple):
    """What of a condition depends on the reference alone, so made once for all sketches. B rows, batch first."""

    picture: Tensor
    """[B, 3, H, W] in [-1, 1]; a row without reference has the learned null."""
    tokens: Tensor
    """As in Condition."""
    palette: Tensor
    """As in Condition."""


Rows = TypeVar("Rows", Condition, Reference)


def cat_conditions(conditions: Sequence[Rows]) -> Rows:
    """Rows of several conditions (or of several references), one after the other."""
    return type(conditions[0])(*(torch.cat(parts) for parts in zip(*conditions, strict=True)))


def select(condition: Rows, index: Tensor | slice) -> Rows:
    """The rows that `index` names (a slice, a bool mask [B] or row numbers)."""
    return type(condition)(*(part[index] for part in condition))
