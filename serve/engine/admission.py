"""Estimates of the duration of an engine step and of the end of a new request, by arithmetic over the present requests.

A step here is an engine step: one network evaluation for every running request.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable
from statistics import median

NUM_RECENT_STEPS = 32
"""Number of recent steps from which the duration of a step is estimated."""
MIN_STEPS = 8
"""Number of steps before the first estimate, because the first steps choose kernels and take longer."""

Claim = tuple[int, int]
"""(slots, steps) that a request needs."""


class StepTimes:
    """Durations of recent steps in seconds. Estimates are 0 before MIN_STEPS steps."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=NUM_RECENT_STEPS)
        self._num_seen = 0

    def add(self, seconds: float) -> None:
        """Record the duration of a step."""
        self._num_seen += 1
        self._recent.append(seconds)

    @property
    def fastest(self) -> float:
        """Duration of the fastest recent step."""
        return min(self._recent) if self._num_seen >= MIN_STEPS else 0.0

    @property
    def typical(self) -> float:
        """Median duration of the recent steps."""
        return median(self._recent) if self._num_seen >= MIN_STEPS else 0.0


def steps_until_done(num_slots: int, running: Iterable[Claim], before: Iterable[Claim], own: Claim) -> int:
    """Return the steps from now to the end of a request that starts after the requests of `before`, in this order.

    Args:
        num_slots: slots of the batch.
        running: slots and remaining steps of the running requests.
        before: slots and steps of the requests that start earlier.
        own: slots and steps of the request.
    """
    free_at = [steps for slots, steps in running for _ in range(slots)]
    free_at += [0] * (num_slots - len(free_at))
    heapq.heapify(free_at)
    end = 0
    for slots, steps in [*before, own]:
        # A guided request needs two slots, but it also runs in a batch of one slot.
        start = max(heapq.heappop(free_at) for _ in range(min(slots, len(free_at))))
        end = start + steps
        for _ in range(slots):
            heapq.heappush(free_at, end)
    return end
