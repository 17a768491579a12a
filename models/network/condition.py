"""The condition of a request: everything computed from sketch and reference before the first denoising step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor


class Condition(NamedTuple):
    """The encoded sketch and reference of B rows, computed once per request, as it depends on neither t nor noise."""

    features: Tensor
    """[B, C, h, w]: output of the first convolution on sketch and reference, which is added to that on x_t."""
    tokens: Tensor
    """[B, N, D]: the reference as attention tokens; N = 0 for a network without reference tokens."""
    palette: Tensor
    """[B, E]: pooled tokens, added to the time embedding; E = 0 without tokens."""
    sketch: Tensor
    """[B, 1, H, W] in [-1, 1]: input of the last layers, which work at full resolution."""
    guess: Tensor
    """[B, 3, H, W]: the matcher's own estimate of the image, for training; H = 0 for a network without a matcher."""


class Reference(NamedTuple):
    """The part of a condition that depends on the reference alone, computed once for all sketches; B rows."""

    picture: Tensor
    """[B, 3, H, W] in [-1, 1]; a row without reference has the learned null reference."""
    tokens: Tensor
    """[B, N, D]: see Condition.tokens."""
    palette: Tensor
    """[B, E]: see Condition.palette."""


Rows = TypeVar("Rows", Condition, Reference)


def cat_conditions(conditions: Sequence[Rows]) -> Rows:
    """Concatenate the rows of several conditions (or of several references)."""
    return type(conditions[0])(*(torch.cat(parts) for parts in zip(*conditions, strict=True)))


def select(condition: Rows, index: Tensor | slice) -> Rows:
    """Select rows by `index` (a slice, a bool mask [B] or row numbers)."""
    return type(condition)(*(part[index] for part in condition))
