"""Cache of encoded conditions: a reference is encoded once for all sketches, a pair of both once for all seeds.

The null condition of guidance counts as one more reference, the same for every sketch, so a model encodes it once. All
missing entries are encoded in one call. The entries stay on the device of the model, and the least recently used entry
is dropped first. The cache is not thread-safe.
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
"""Digest that stands for no reference."""

Key = TypeVar("Key", bound=Hashable)
Cached = TypeVar("Cached", Condition, Reference)


class Pair(NamedTuple):
    """The inputs of a condition."""

    sketch: Tensor
    """[1, S, S] in [-1, 1]."""
    reference: Tensor
    """[3, S, S] in [-1, 1]."""
    sketch_digest: bytes
    reference_digest: bytes

    def without_reference(self) -> Pair:
        """Return the same sketch without a reference: the null condition of guidance."""
        return self._replace(reference_digest=NULL)


def pair_of(sketch: Tensor, reference: Tensor) -> Pair:
    """Return a pair with its digests. The thread that submits calls this, so that the engine's thread need not hash."""
    one, two = (hashlib.sha256(picture.numpy().tobytes()).digest() for picture in (sketch, reference))
    return Pair(sketch, reference, one, two)


class ConditionCache:
    """Cache of the conditions of recent pairs.

    Args:
        denoiser: the model.
        size: maximum number of cached pairs, and of cached references.
    """

    def __init__(self, denoiser: Denoiser, size: int) -> None:
        self._denoiser = denoiser
        self._device = next(denoiser.parameters()).device
        self._conditions = _LruCache[tuple[bytes, bytes], Condition](size)
        self._references = _LruCache[bytes, Reference](size)
        self.hits = 0
        """Requested conditions whose reference was encoded already, with this sketch or another; nulls do not count."""
        self.misses = 0
        """Requested conditions whose reference had to be encoded; nulls do not count."""

    def get(self, pairs: Sequence[Pair]) -> list[Condition]:
        """Return the condition of each pair, as one row each."""
        self._count(pairs)
        named = {(pair.sketch_digest, pair.reference_digest): pair for pair in pairs}

        def combine(missing: list[tuple[bytes, bytes]]) -> Condition:
            new = [named[key] for key in missing]
            sketches = torch.stack([pair.sketch for pair in new]).to(self._device)
            return self._denoiser.combine(sketches, cat_conditions(self._get_references(new)))

        return self._conditions.get([(pair.sketch_digest, pair.reference_digest) for pair in pairs], combine)

    def clear(self) -> None:
        """Drop all entries to free their memory."""
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


class _LruCache(Generic[Key, Cached]):
    """Cache of rows by key, which drops the least recently used rows."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._rows: OrderedDict[Key, Cached] = OrderedDict()

    def __contains__(self, key: Key) -> bool:
        return key in self._rows

    def clear(self) -> None:
        self._rows.clear()

    def get(self, keys: Sequence[Key], make: Callable[[list[Key]], Cached]) -> list[Cached]:
        """Return the row of each key; `make` computes the rows of all missing keys."""
        if missing := [key for key in dict.fromkeys(keys) if key not in self._rows]:
            made = make(missing)
            for number, key in enumerate(missing):
                row = select(made, slice(number, number + 1))
                # A view would keep the neighboring rows in memory, too.
                self._rows[key] = type(row)(*(part.clone() for part in row))
        for key in keys:
            self._rows.move_to_end(key)
        found = [self._rows[key] for key in keys]
        while len(self._rows) > self._size:
            self._rows.popitem(last=False)
        return found
