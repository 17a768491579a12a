"""How many requests fit into one network evaluation, found out from the evaluations that run out of memory."""

from __future__ import annotations

import logging

from animediffusion.serve.engine.faults import ADVICE

BAD_TURNS = 2
"""Turns in a row that run out of memory before evaluations are limited; a version that loads may cause one."""
TURNS_UNTIL_RETRY = 1000
"""Turns within the limit before a larger evaluation is tried again."""

log = logging.getLogger(__name__)


class Room:
    """The largest evaluation that is tried, in requests; without a limit until turns keep running out of memory."""

    def __init__(self) -> None:
        self.most: int | None = None
        """The limit; None where there is none."""
        self._failed: int | None = None
        """The smallest evaluation of this turn that ran out of memory."""
        self._bad_turns = 0
        self._turns = 0
        """Turns since the limit was set."""

    def has(self, num_requests: int) -> bool:
        """Whether an evaluation of so many is to be tried; one of a single request always is."""
        return self.most is None or num_requests <= max(1, self.most)

    def failed(self, num_requests: int) -> None:
        """Note an evaluation that ran out of memory."""
        if self._failed is None:
            log.warning("the device has no memory for %d requests in one evaluation; %s", num_requests, ADVICE)
        self._failed = min(num_requests, self._failed or num_requests)

    def end_turn(self) -> None:
        """Set or lift the limit, from what happened since the last turn."""
        self._turns += 1
        if self._failed is not None:
            self._bad_turns += 1
            if self._bad_turns >= BAD_TURNS:
                self.most, self._turns = self._failed // 2, 0
        elif self.most is None:
            self._bad_turns = 0
        elif self._turns >= TURNS_UNTIL_RETRY:
            self.most = None  # one more failure, and the limit is back
        self._failed = None
