"""Encoded conditions by reference: a reference is encoded once for all sketches, a pair of both once for all seeds.

The null of guidance is one more reference, the same for every sketch, so a model encodes it once. What is missing is
encoded in one call. Kept on the model's device; the least recently used goes first. For one thread.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from animediffusion.models.diffusion.denoiser import Denoiser
from animediffusion.models.network.condition import Condition, Reference, cat_conditions, select

NULL = b""
"""In the place of a digest: no reference."""

Key = TypeVar("Key", bound=Hashable)
Kept = TypeVar("Kept", Condition, Reference)


class Pair(NamedTuple):
    """What a condition is made from."""

    sketch: Tensor
    """[1, S, S] in [-1, 1]."""
    reference: Tensor
    """[3, S, S] in [-1, 1]."""
    sketch_digest: bytes
    reference_digest: bytes

    def without_reference(self) -> Pair:
        """The same sketch for the other half of guidance."""
        return self._replace(reference_digest=NULL)


def pair_of(sketch: Tensor, reference: Tensor) -> Pair:
    """A pair and its digests: work for the thread that asks, not for the one that computes."""
    one, two = (hashlib.sha256(picture.numpy().tobytes()).digest() for picture in (sketch, reference))
    return Pair(sketch, reference, one, two)


class ConditionCache:
    """Conditions of recent pairs.

    Args:
        denoiser: the model.
        size: pairs that are kept, and as many references.
    """

    def __init__(self, denoiser: Denoiser, size: int) -> None:
        self._denoiser = denoiser
        self._device = next(denoiser.parameters()).device
        self._conditions = _Recent[tuple[bytes, bytes], Condition](size)
        self._references = _Recent[bytes, Reference](size)
        self.hits = 0
        """Conditions asked for whose reference was encoded already, for this sketch or another; nulls not counted."""
        self.misses = 0
        """Those whose reference had to be encoded."""

    def get(self, pairs: Sequence[Pair]) -> list[Condition]:
        """The condition of each pair, of one row each."""
        self._count(pairs)
        named = {(pair.sketch_digest, pair.reference_digest): pair for pair in pairs}

        def combine(missing: list[tuple[bytes, bytes]]) -> Condition:
            new = [named[key] for key in missing]
            sketches = torch.stack([pair.sketch for pair in new]).to(self._device)
            return self._denoiser.combine(sketches, cat_conditions(self._get_references(new)))

        return self._conditions.get([(pair.sketch_digest, pair.reference_digest) for pair in pairs], combine)

    def clear(self) -> None:
        """Drop everything, to give its memory back."""
        self._conditions.clear()
        self._references.clear()

    def _get_references(self, pairs: Sequence[Pair]) -> list[Reference]:
        named = {pair.reference_digest: pair.reference for pair in pairs}

        def encode(missing: list[bytes]) -> Reference:
            pictures = torch.stack([named[digest] for digest in missing]).to(self._device)
            keep = torch.tensor([digest != NULL for digest in missing], device=self._device)
            return self._denoiser.encode_reference(pictures, keep)

        return self._references.get([pair.reference_digest for pair in pairs], encode)

    def _count(self, pairs: Sequence[Pair]) -> None:
        new: set[bytes] = set()
        for pair in pairs:
            if pair.reference_digest != NULL:
                known = pair.reference_digest in self._references or pair.reference_digest in new
                known = known or (pair.sketch_digest, pair.reference_digest) in self._conditions
                self.hits += known
                self.misses += not known
                new.add(pair.reference_digest)


class _Recent(Generic[Key, Kept]):
    """Rows under keys, the least recently used dropped."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: OrderedDict[Key, Kept] = OrderedDict()

    def __contains__(self, key: Key) -> bool:
        return key in self._kept

    def clear(self) -> None:
        self._kept.clear()

    def get(self, keys: Sequence[Key], make: Callable[[list[Key]], Kept]) -> list[Kept]:
        """The row of each key; `make` gives the rows of all that are missing."""
        if missing := [key for key in dict.fromkeys(keys) if key not in self._kept]:
            made = make(missing)
            for number, key in enumerate(missing):
                row = select(made, slice(number, number + 1))
                # A view would keep the rows of its neighbours in memory.
                self._kept[key] = type(row)(*(part.clone() for part in row))
        for key in keys:
            self._kept.move_to_end(key)
        found = [self._kept[key] for key in keys]
        while len(self._kept) > self._size:
            self._kept.popitem(last=False)
        return found
