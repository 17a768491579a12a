"""Which version answers a request: drawn by share from the request itself, so that every replica draws the same.

The same drawing, reference and seed get the same version for as long as the shares stand. A challenger whose share
grows takes requests over from the champion and gives none back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np

from animediffusion.serve.protocol import ColorizeJob

STRIDE = 8
"""Every eighth pixel each way tells drawings apart; hashing all of 25 Mpixel would take tens of milliseconds."""


def point(job: ColorizeJob) -> float:
    """Where a request stands between 0 and 1, evenly spread over requests that differ."""
    digest = hashlib.blake2b(digest_size=8)
    for pixels in (job.lines, job.reference):
        digest.update(np.ascontiguousarray(pixels[::STRIDE, ::STRIDE]).tobytes())
    digest.update(str(job.seed).encode())
    return int.from_bytes(digest.digest()) / 2**64


def draw(shares: Mapping[str, float], place: float) -> str:
    """The version whose part of [0, 1) holds `place`; parts lie in the order of `shares`."""
    end = 0.0
    for version, share in shares.items():
        end += share
        if place < end:
            return version
    return max(shares, key=lambda version: shares[version])  # place is 1 less than rounding


def among(shares: Mapping[str, float], loaded: Iterable[str], stand_in: str | None) -> dict[str, float]:
    """The shares that can be had: what belongs to versions that are not loaded goes to the stand-in.

    Args:
        shares: as wanted.
        loaded: versions that can answer.
        stand_in: the loaded version that answers for those that cannot; None if there is none.
    """
    there = set(loaded)
    result: dict[str, float] = {}
    for version, share in shares.items():
        answering = version if version in there else stand_in
        if answering is not None:
            result[answering] = result.get(answering, 0.0) + share
    total = sum(result.values())
    return {version: share / total for version, share in result.items()} if total else result
