"""The condition of a request: everything computed from sketch, references and hints before the first denoising step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor


class Condition(NamedTuple):
    """The encoded sketch, references and hints of B rows, computed once per request: neither t nor noise matter."""

    features: Tensor
    """[B, C, h, w]: output of the first convolution on sketch and reference, which is added to that on x_t."""
    tokens: Tensor
    """[B, N, D]: the references as attention tokens, one after the other; N = 0 for a network without such tokens."""
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


def join_references(references: Sequence[Reference]) -> Reference:
    """Join several references of the same rows to one: every attention then searches the tokens of all of them.

    The picture, which the network compares with the sketch at the same positions, is that of the first reference: the
    mean of several pictures would show colors that none of them has, and the matcher finds colors at any position.
    """
    if len(references) == 1:
        return references[0]
    tokens = torch.cat([reference.tokens for reference in references], 1)
    palette = torch.stack([reference.palette for reference in references]).mean(0)
    return Reference(references[0].picture, tokens, palette)


def cat_conditions(conditions: Sequence[Rows]) -> Rows:
    """Concatenate the rows of several conditions (or of several references)."""
    return type(conditions[0])(*(torch.cat(parts) for parts in zip(*conditions, strict=True)))


def select(condition: Rows, index: Tensor | slice) -> Rows:
    """Select rows by `index` (a slice, a bool mask [B] or row numbers)."""
    return type(condition)(*(part[index] for part in condition))
