"""How many steps fit into a time, told from the first of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise

ENOUGH = 40
"""After so many steps it is told, the first half of them taken as a warm-up."""


class StepBudget:
    """The clock of a run that was given minutes instead of steps; it begins to run when it is made."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`seconds`: how long the run may take."""
        self._clock = clock
        self._end = clock() + seconds
        self._ends: list[float] = []

    def step(self) -> None:
        """A step is over."""
        if len(self._ends) < ENOUGH:
            self._ends.append(self._clock())

    def more(self) -> int | None:
        """How many more steps fit, at least 1; None if it is too early to tell."""
        done = len(self._ends)
        if done < 2:
            return None
        left = self._end - self._clock()
        # On a slow machine those first steps may be more than the time is for. The fastest step tells: compiling and
        # other first costs are not in it, so that a short run on a fast machine is not taken for one on a slow one.
        if done < ENOUGH and left > (ENOUGH - done) * min(end - start for start, end in pairwise(self._ends)):
            return None
        warm = done // 2 - 1
        per_step = (self._ends[-1] - self._ends[warm]) / (done - 1 - warm)
        return max(1, int(left / max(per_step, 1e-6)))
