"""Estimates of the duration of turns and of the end of a new request, by pure arithmetic over the present requests.

A turn is one network evaluation for every running request.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable
from statistics import median

NUM_TURNS = 32
"""Number of recent turns from which the duration of a turn is estimated."""
MIN_TURNS = 8
"""Number of turns before the first estimate, because the first turns choose kernels and take longer."""

Claim = tuple[int, int]
"""(slots, turns) that a request needs."""


class TurnTimes:
    """Durations of recent turns in seconds. Estimates are 0 before MIN_TURNS turns."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=NUM_TURNS)
        self._num_seen = 0

    def add(self, seconds: float) -> None:
        """Record the duration of a turn."""
        self._num_seen += 1
        self._recent.append(seconds)

    @property
    def fastest(self) -> float:
        """Duration of the fastest recent turn."""
        return min(self._recent) if self._num_seen >= MIN_TURNS else 0.0

    @property
    def typical(self) -> float:
        """Median duration of the recent turns."""
        return median(self._recent) if self._num_seen >= MIN_TURNS else 0.0


def turns_until_done(num_places: int, running: Iterable[Claim], before: Iterable[Claim], own: Claim) -> int:
    """Return the turns from now to the end of a request that starts after the requests of `before`, in this order.

    Args:
        num_places: slots of the batch.
        running: slots and remaining turns of the running requests.
        before: slots and turns of the requests that start earlier.
        own: slots and turns of the request.
    """
    free_at = [turns for places, turns in running for _ in range(places)]
    free_at += [0] * (num_places - len(free_at))
    heapq.heapify(free_at)
    end = 0
    for places, turns in [*before, own]:
        # A guided request needs two slots, but it also runs in a batch of one slot.
        start = max(heapq.heappop(free_at) for _ in range(min(places, len(free_at))))
        end = start + turns
        for _ in range(places):
            heapq.heappush(free_at, end)
    return end
