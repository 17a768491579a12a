"""Choice of the version that answers a request, by a hash of the request, so that all replicas choose the same version.

The same drawing, reference and seed get the same version as long as the shares are unchanged. If the share of a
challenger grows, requests move only from the champion to the challenger.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np

from animediffusion.serve.protocol import ColorizeJob

STRIDE = 8
"""Only every eighth pixel in both directions is hashed, which is enough to distinguish drawings; hashing all of 25
Mpixel would take tens of milliseconds."""


def hash_position(job: ColorizeJob) -> float:
    """Return the hash of a request as a number in [0, 1], which is uniformly distributed over different requests."""
    digest = hashlib.blake2b(digest_size=8)
    for pixels in (job.lines, *job.references):
        digest.update(np.ascontiguousarray(pixels[::STRIDE, ::STRIDE]).tobytes())
    digest.update(str(job.options.seed).encode())
    return int.from_bytes(digest.digest()) / 2**64


def choose_version(shares: Mapping[str, float], position: float) -> str:
    """Return the version whose part of [0, 1) contains `position`; the parts are in the order of `shares`."""
    end = 0.0
    for version, share in shares.items():
        end += share
        if position < end:
            return version
    return max(shares, key=lambda version: shares[version])  # By rounding, the shares may sum to slightly less than 1.


def loaded_shares(shares: Mapping[str, float], loaded: Iterable[str], fallback: str | None) -> dict[str, float]:
    """Return the shares of the loaded versions, where the fallback gets the shares of versions that are not loaded.

    Args:
        shares: desired shares.
        loaded: versions that can answer.
        fallback: loaded version that answers in place of missing versions; None if there is none.
    """
    available = set(loaded)
    result: dict[str, float] = {}
    for version, share in shares.items():
        answering = version if version in available else fallback
        if answering is not None:
            result[answering] = result.get(answering, 0.0) + share
    total = sum(result.values())
    return {version: share / total for version, share in result.items()} if total else result
