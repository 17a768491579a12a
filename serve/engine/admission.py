"""How long turns take, and when a request that comes now would be done. Pure arithmetic over what is here already."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable
from statistics import median

NUM_TURNS = 32
"""Recent turns that say how long one takes."""
MIN_TURNS = 8
"""The first turns choose kernels and take longer; before there were so many, nothing is said."""

Claim = tuple[int, int]
"""(places, turns) that a request takes."""


class TurnTimes:
    """Seconds of recent turns; 0 while too few are known."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=NUM_TURNS)
        self._num_seen = 0

    def add(self, seconds: float) -> None:
        """Note a turn."""
        self._num_seen += 1
        self._recent.append(seconds)

    @property
    def fastest(self) -> float:
        """No turn will be faster, as far as one knows."""
        return min(self._recent) if self._num_seen >= MIN_TURNS else 0.0

    @property
    def typical(self) -> float:
        """The median."""
        return median(self._recent) if self._num_seen >= MIN_TURNS else 0.0


def turns_until_done(num_places: int, running: Iterable[Claim], before: Iterable[Claim], own: Claim) -> int:
    """Turns from now to the end of a request that gets its places after those of `before`, in this order.

    Args:
        num_places: of the batch.
        running: what is left of the requests in it.
        before: the requests that start earlier.
        own: the request.
    """
    free_at = [turns for places, turns in running for _ in range(places)]
    free_at += [0] * (num_places - len(free_at))
    heapq.heapify(free_at)
    end = 0
    for places, turns in [*before, own]:
        # A guided request in a batch of one place takes that one.
        start = max(heapq.heappop(free_at) for _ in range(min(places, len(free_at))))
        end = start + turns
        for _ in range(places):
            heapq.heappush(free_at, end)
    return end
