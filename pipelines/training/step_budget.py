"""Estimate from the first steps of a run how many steps fit into its time limit."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise

ENOUGH = 40
"""Number of steps that are timed at most; the first half of them is the warm-up."""


class StepBudget:
    """Time limit of a run, to be converted to a number of steps; the time counts from the construction on."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Start the clock; `seconds` is the time limit of the run."""
        self._clock = clock
        self._end = clock() + seconds
        self._ends: list[float] = []

    def step(self) -> None:
        """Record that a step has just ended."""
        if len(self._ends) < ENOUGH:
            self._ends.append(self._clock())

    def more(self) -> int | None:
        """Return how many more steps fit, at least 1; None if too few steps have been timed."""
        done = len(self._ends)
        if done < 2:
            return None
        left = self._end - self._clock()
        # Estimate early if the time left may not suffice for ENOUGH steps. The fastest step decides this: it is free of
        # compilation and other startup costs, which would make a short run on a fast machine look slow.
        if done < ENOUGH and left > (ENOUGH - done) * min(end - start for start, end in pairwise(self._ends)):
            return None
        warm = done // 2 - 1
        per_step = (self._ends[-1] - self._ends[warm]) / (done - 1 - warm)
        return max(1, int(left / max(per_step, 1e-6)))
