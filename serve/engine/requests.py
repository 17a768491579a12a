"""What an engine is asked, what it answers and what it counts.

QueueFullError   too many requests wait already, or too much work for this one's deadline
DeadlineError    the request was not, or cannot be, finished by its deadline
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from animediffusion.models.bundle import Bundle, SamplerDefaults
from animediffusion.serve.engine.admission import Claim
from animediffusion.serve.engine.batch import Row

Progress = Callable[[int, int, NDArray[np.uint8]], None]
"""(steps done, steps in all, estimate of the picture); called on the engine's thread, so it must return at once."""


class QueueFullError(Exception):
    """Too many requests wait already, or too much work for this one's deadline."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        """When what is here now should be done."""


class DeadlineError(Exception):
    """The request was not, or cannot be, finished by its deadline."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One picture to make. What is None comes from the bundle's sampler defaults."""

    sketch: Tensor
    """[1, S, S] in [-1, 1]."""
    reference: Tensor
    """[3, S, S] in [-1, 1]."""
    seed: int
    steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    deadline: float | None = None
    """Give up at this time of time.monotonic()."""
    key: str = ""
    """Who asks; places in the batch are shared fairly between keys."""
    on_progress: Progress | None = None


class Turn(NamedTuple):
    """What happened in a turn; requests by the number of their submission."""

    number: int
    seconds: float
    running: tuple[int, ...]
    """Requests that were evaluated."""
    waiting: tuple[int, ...]
    """Requests that had no place."""
    num_evaluated: int
    """Rows of the network, guidance and filling included."""


@dataclass
class Counts:
    """What an engine has done since it was made."""

    submitted: int = 0
    refused: int = 0
    """QueueFullError; not among the submitted."""
    finished: int = 0
    cancelled: int = 0
    late: int = 0
    failed: int = 0
    turns: int = 0
    turn_seconds: float = 0.0
    rows_evaluated: int = 0
    """Rows of the network in all turns."""
    reference_hits: int = 0
    """Requests whose reference was encoded already."""
    reference_misses: int = 0


@dataclass(eq=False)
class Ticket:
    """A request from submission to its end."""

    request: Request
    row: Row
    number: int = -1
    """Of all that were accepted."""
    future: Future[NDArray[np.uint8]] = field(default_factory=Future)

    @property
    def claim(self) -> Claim:
        """What it takes of the batch until it is finished."""
        return self.row.places, self.row.num_left

    def fail(self, error: Exception) -> None:
        """Give an error, if somebody still waits."""
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)

    def finish(self, picture: NDArray[np.uint8]) -> None:
        """Give the picture, if somebody still waits."""
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_result(picture)


def settings_for(
    bundle: Bundle, *, sampler: str | None = None, steps: int | None = None, guidance_scale: float | None = None
) -> SamplerDefaults:
    """The bundle's sampler defaults with what was asked for in their place.

    Raises:
        ValueError: naming the one that is out of range.
    """
    own = bundle.config.sampler
    return replace(
        own,
        name=own.name if sampler is None else sampler,
        steps=own.steps if steps is None else steps,
        guidance_scale=own.guidance_scale if guidance_scale is None else guidance_scale,
    )
