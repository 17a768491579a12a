"""Estimate of the Retry-After header from the recent rate of finished pictures."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable

UNKNOWN_S = 5
"""The estimate before two pictures were finished, for example while an engine starts."""
LONGEST_S = 60


class CompletionRate:
    """Rate of the latest finished pictures. Idle time, in which no request was present, does not count.

    Args:
        clock: returns monotonic seconds; tests pass their own.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._busy_s = 0.0
        """Seconds with at least one unanswered request, up to `_since`."""
        self._since = 0.0
        self._num_pending = 0
        self._finished: deque[float] = deque(maxlen=64)
        """Value of `_busy_s` at the end of each of the latest pictures."""
        self._lock = threading.Lock()

    def started(self) -> None:
        """Count a request that came in."""
        with self._lock:
            self._advance()
            self._num_pending += 1

    def ended(self, *, finished: bool) -> None:
        """Count the end of a request, with or without a finished picture."""
        with self._lock:
            self._advance()
            self._num_pending -= 1
            if finished:
                self._finished.append(self._busy_s)

    def retry_after_s(self) -> int:
        """Return the whole seconds until all pending requests are finished at the recent rate; 1 to LONGEST_S."""
        with self._lock:
            self._advance()
            if len(self._finished) < 2:
                return UNKNOWN_S
            # The time since the last picture counts, so that the estimate grows if no further picture is finished.
            per_picture = (self._busy_s - self._finished[0]) / (len(self._finished) - 1)
            return retry_after_s(self._num_pending * per_picture)

    def _advance(self) -> None:
        now = self._clock()
        if self._num_pending:
            self._busy_s += now - self._since
        self._since = now


def retry_after_s(seconds: float) -> int:
    """Return seconds for the Retry-After header: rounded up, from 1 to LONGEST_S."""
    return min(LONGEST_S, max(1, math.ceil(seconds)))
