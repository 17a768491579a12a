"""Limit of requests in one network evaluation, learned from the evaluations that run out of memory.

A turn is one network evaluation for every running request. With the limit, a turn consists of several evaluations.
"""

from __future__ import annotations

import logging

from animediffusion.serve.engine.faults import ADVICE

BAD_TURNS = 2
"""Number of consecutive turns out of memory after which evaluations are limited; loading a version may cause one."""
TURNS_UNTIL_RETRY = 1000
"""Number of turns within the limit after which the limit is lifted to try a larger evaluation again."""

log = logging.getLogger(__name__)


class Room:
    """The largest evaluation to try, in requests. There is no limit until several turns in a row run out of memory."""

    def __init__(self) -> None:
        self.most: int | None = None
        """The limit; None if there is no limit."""
        self._failed: int | None = None
        """The smallest evaluation of this turn that ran out of memory."""
        self._bad_turns = 0
        self._turns = 0
        """Turns since the limit was set."""

    def has(self, num_requests: int) -> bool:
        """Return whether to try an evaluation of `num_requests` requests; always true for a single request."""
        return self.most is None or num_requests <= max(1, self.most)

    def failed(self, num_requests: int) -> None:
        """Record an evaluation of `num_requests` requests that ran out of memory."""
        if self._failed is None:
            log.warning("the device has no memory for %d requests in one evaluation; %s", num_requests, ADVICE)
        self._failed = min(num_requests, self._failed or num_requests)

    def end_turn(self) -> None:
        """Set or lift the limit, depending on the evaluations since the last call."""
        self._turns += 1
        if self._failed is not None:
            self._bad_turns += 1
            if self._bad_turns >= BAD_TURNS:
                self.most, self._turns = self._failed // 2, 0
        elif self.most is None:
            self._bad_turns = 0
        elif self._turns >= TURNS_UNTIL_RETRY:
            self.most = None  # _bad_turns is unchanged, so that one more failure sets the limit again.
        self._failed = None
