"""Cache of encoded conditions: a reference is encoded once for all sketches, a pair of both once for all seeds.

Hints are part of the sketch, and a pair has one or more references. The null condition of guidance counts as one more
reference, the same for every sketch, so a model encodes it once. All missing references are encoded in one call, and
all missing pairs with the same number of references. The entries stay on the device of the model, and the least
recently used entry is dropped first. The cache is not thread-safe.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from animediffusion.models.diffusion.denoiser import Denoiser
from animediffusion.models.network.condition import Condition, Reference, cat_conditions, join_references, select
from animediffusion.models.network.hints import HINT_PLANES

NULL = b""
"""Digest that stands for no reference."""

Key = TypeVar("Key", bound=Hashable)
Cached = TypeVar("Cached", Condition, Reference)


class Pair(NamedTuple):
    """The inputs of a condition: a sketch, with or without hints, and its references."""

    sketch: Tensor
    """[1, S, S] in [-1, 1]."""
    references: tuple[Tensor, ...]
    """Each [3, S, S] in [-1, 1]."""
    hints: Tensor | None
    """[4, S, S], see models/network/hints.py."""
    sketch_digest: bytes
    """Digest of sketch and hints."""
    reference_digests: tuple[bytes, ...]

    @property
    def key(self) -> tuple[bytes, tuple[bytes, ...]]:
        """The digests, which identify the pair."""
        return self.sketch_digest, self.reference_digests

    def without_reference(self) -> Pair:
        """Return the same sketch with as many null references: the null condition of guidance."""
        return self._replace(reference_digests=(NULL,) * len(self.references))


def pair_of(sketch: Tensor, references: Sequence[Tensor], hints: Tensor | None = None) -> Pair:
    """Return a pair with its digests. The thread that submits calls this, so that the engine's thread need not hash."""
    drawn = _digest(sketch) if hints is None else _digest(sketch, hints)
    return Pair(sketch, tuple(references), hints, drawn, tuple(_digest(reference) for reference in references))


def _digest(*pictures: Tensor) -> bytes:
    return hashlib.sha256(b"".join(picture.numpy().tobytes() for picture in pictures)).digest()


class ConditionCache:
    """Cache of the conditions of recent pairs.

    Args:
        denoiser: the model.
        size: maximum number of cached pairs, and of cached references.
    """

    def __init__(self, denoiser: Denoiser, size: int) -> None:
        self._denoiser = denoiser
        self._device = next(denoiser.parameters()).device
        self._conditions = _LruCache[tuple[bytes, tuple[bytes, ...]], Condition](size)
        self._references = _LruCache[bytes, Reference](size)
        self.hits = 0
        """Requested references that were encoded already, with this sketch or another; nulls do not count."""
        self.misses = 0
        """Requested references that had to be encoded; nulls do not count."""

    def __len__(self) -> int:
        """Return the number of cached conditions and references."""
        return len(self._conditions) + len(self._references)

    def get(self, pairs: Sequence[Pair]) -> list[Condition]:
        """Return the condition of each pair, as one row each."""
        self._count(pairs)
        named = {pair.key: pair for pair in pairs}

        def combine(missing: list[tuple[bytes, tuple[bytes, ...]]]) -> list[Condition]:
            new = [named[key] for key in missing]
            made: dict[int, Condition] = {}
            references = self._get_references(new)
            # Rows of one call must have the same number of references.
            for count in {len(pair.references) for pair in new}:
                numbers = [number for number, pair in enumerate(new) if len(pair.references) == count]
                together = self._combine([new[n] for n in numbers], [references[n] for n in numbers])
                made.update({number: _row(together, place) for place, number in enumerate(numbers)})
            return [made[number] for number in range(len(new))]

        return self._conditions.get([pair.key for pair in pairs], combine)

    def _combine(self, pairs: list[Pair], references: list[Reference]) -> Condition:
        sketches = torch.stack([pair.sketch for pair in pairs]).to(self._device)
        if all(pair.hints is None for pair in pairs):
            return self._denoiser.combine(sketches, cat_conditions(references))
        none = torch.zeros(HINT_PLANES, *sketches.shape[2:])
        hints = torch.stack([none if pair.hints is None else pair.hints for pair in pairs]).to(self._device)
        return self._denoiser.combine(sketches, cat_conditions(references), hints)

    def clear(self) -> None:
        """Drop all entries to free their memory."""
        self._conditions.clear()
        self._references.clear()

    def _get_references(self, pairs: Sequence[Pair]) -> list[Reference]:
        """Return the joined references of each pair, as one row each."""
        named = dict(one for pair in pairs for one in zip(pair.reference_digests, pair.references, strict=True))

        def encode(missing: list[bytes]) -> list[Reference]:
            pictures = torch.stack([named[digest] for digest in missing]).to(self._device)
            keep = torch.tensor([digest != NULL for digest in missing], device=self._device)
            made = self._denoiser.encode_reference(pictures, keep)
            return [_row(made, number) for number in range(len(missing))]

        found = iter(self._references.get([digest for pair in pairs for digest in pair.reference_digests], encode))
        return [join_references([next(found) for _ in pair.references]) for pair in pairs]

    def _count(self, pairs: Sequence[Pair]) -> None:
        new: set[bytes] = set()
        for pair in pairs:
            for digest in pair.reference_digests:
                if digest != NULL:
                    known = digest in self._references or digest in new or pair.key in self._conditions
                    self.hits += known
                    self.misses += not known
                    new.add(digest)


def _row(rows: Cached, number: int) -> Cached:
    """Return a copy of one row; a view would keep the neighboring rows in memory, too."""
    row = select(rows, slice(number, number + 1))
    return type(row)(*(part.clone() for part in row))


class _LruCache(Generic[Key, Cached]):
    """Cache of rows by key, which drops the least recently used rows."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._rows: OrderedDict[Key, Cached] = OrderedDict()

    def __contains__(self, key: Key) -> bool:
        return key in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def clear(self) -> None:
        self._rows.clear()

    def get(self, keys: Sequence[Key], make: Callable[[list[Key]], list[Cached]]) -> list[Cached]:
        """Return the row of each key; `make` computes the rows of all missing keys."""
        if missing := [key for key in dict.fromkeys(keys) if key not in self._rows]:
            self._rows.update(zip(missing, make(missing), strict=True))
        for key in keys:
            self._rows.move_to_end(key)
        found = [self._rows[key] for key in keys]
        while len(self._rows) > self._size:
            self._rows.popitem(last=False)
        return found
