"""How long a client should wait before it comes back: from how fast pictures were finished lately."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable

UNKNOWN_S = 5
"""Answered before two pictures were finished, while an engine starts for example."""
LONGEST_S = 60


class CompletionRate:
    """Pictures a second, over the latest of them. Time in which nothing was to be done does not count.

    Args:
        clock: seconds that only grow; tests bring their own.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._busy_s = 0.0
        """Seconds in which at least one request was here, up to `_since`."""
        self._since = 0.0
        self._num_here = 0
        self._finished: deque[float] = deque(maxlen=64)
        """At which busy second each of the latest pictures was finished."""
        self._lock = threading.Lock()

    def started(self) -> None:
        """A request came in."""
        with self._lock:
            self._advance()
            self._num_here += 1

    def ended(self, *, finished: bool) -> None:
        """A request left, with its picture or without."""
        with self._lock:
            self._advance()
            self._num_here -= 1
            if finished:
                self._finished.append(self._busy_s)

    def retry_after_s(self) -> int:
        """Whole seconds until what is here now will be finished at this pace; 1 to LONGEST_S."""
        with self._lock:
            self._advance()
            if len(self._finished) < 2:
                return UNKNOWN_S
            # The time since the last picture counts, so that no pace of the past is promised when nothing moves.
            per_picture = (self._busy_s - self._finished[0]) / (len(self._finished) - 1)
            return retry_after_s(self._num_here * per_picture)

    def _advance(self) -> None:
        now = self._clock()
        if self._num_here:
            self._busy_s += now - self._since
        self._since = now


def retry_after_s(seconds: float) -> int:
    """Seconds as Retry-After says them: whole, 1 to LONGEST_S."""
    return min(LONGEST_S, max(1, math.ceil(seconds)))
