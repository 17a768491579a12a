"""Limit of requests in one network evaluation, learned from the evaluations that run out of memory.

An engine step evaluates every running request. With the limit, it consists of several network evaluations.
"""

from __future__ import annotations

import logging

from animediffusion.serve.engine.faults import ADVICE

FAILED_STEPS = 2
"""Consecutive engine steps out of memory after which evaluations are limited; loading a version may cause one."""
STEPS_UNTIL_RETRY = 1000
"""Engine steps within the limit after which the limit is lifted to try a larger evaluation again."""

log = logging.getLogger(__name__)


class MemoryLimit:
    """The largest evaluation to try, in requests. A limit is set after consecutive engine steps run out of memory."""

    def __init__(self) -> None:
        self.most: int | None = None
        """The limit; None if there is no limit."""
        self._failed: int | None = None
        """The smallest evaluation of this engine step that ran out of memory."""
        self._failed_steps = 0
        self._steps = 0
        """Engine steps since the limit was set."""

    def allows(self, num_requests: int) -> bool:
        """Return whether to try an evaluation of `num_requests` requests; always true for a single request."""
        return self.most is None or num_requests <= max(1, self.most)

    def add_failure(self, num_requests: int) -> None:
        """Record an evaluation of `num_requests` requests that ran out of memory."""
        if self._failed is None:
            log.warning("an evaluation of %d requests ran out of memory; %s", num_requests, ADVICE)
        self._failed = min(num_requests, self._failed or num_requests)

    def end_step(self) -> None:
        """Set or lift the limit, depending on the evaluations since the last call."""
        self._steps += 1
        if self._failed is not None:
            self._failed_steps += 1
            if self._failed_steps >= FAILED_STEPS:
                self.most, self._steps = self._failed // 2, 0
        elif self.most is None:
            self._failed_steps = 0
        elif self._steps >= STEPS_UNTIL_RETRY:
            self.most = None  # _failed_steps is unchanged, so that one more failure sets the limit again.
        self._failed = None
