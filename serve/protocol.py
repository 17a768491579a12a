"""What the HTTP side and the engine side of serving say to each other. Plain data: it crosses processes.

ServeError
    BusyError           no place in the queue: try again later
    UnavailableError    an engine cannot make the picture now: another one, or the same one later, can
        NoModelError    no version is loaded
    LateError           not finished by the deadline
    UnusableError       a parameter that only the model can judge
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class ColorizeJob:
    """One picture to make. What is None is the model's own default."""

    lines: Pixels
    """[H, W] black lines on white, of any size."""
    reference: Pixels
    """[H, W, 3] of any size."""
    seed: int
    steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    timeout_s: float = 60.0
    key: str = ""
    """Who asks, for fairness."""


@dataclass(frozen=True, kw_only=True)
class Preview:
    """How far a job is."""

    step: int
    total: int
    picture: Pixels
    """[S, S, 3]: the picture as estimated now."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the network made of a job."""

    picture: Pixels
    """[S, S, 3], the letterboxed sketch colored."""
    model_version: str
    """Registry number, or `sha256:` and 12 hex digits."""


class ServeError(Exception):
    """Base class; the arguments are plain, so that it survives pickling between processes."""


class BusyError(ServeError):
    """The queue is full: (why, seconds after which to come back); the seconds may be left out."""

    @property
    def retry_after_s(self) -> int | None:
        """Whole seconds, None if nobody can tell."""
        return int(self.args[1]) if len(self.args) > 1 else None


class UnavailableError(ServeError):
    """An engine cannot make the picture now, for the reason given. The same request works on another, or later."""


class NoModelError(UnavailableError):
    """No version is loaded, for the reason given."""


class LateError(ServeError):
    """The deadline passed first."""


class UnusableError(ServeError):
    """A parameter is not usable: (field, found, allowed)."""


class Backend(Protocol):
    """What the HTTP side needs: a replica in this process, or many behind Ray Serve."""

    async def colorize(self, job: ColorizeJob) -> Answer:
        """The picture, or a ServeError. Cancelling the call frees the job's place."""

    def stream(self, job: ColorizeJob) -> AsyncIterator[Preview | Answer]:
        """Previews, then the answer; errors and cancelling as for colorize."""

    async def models(self) -> dict[str, Any]:
        """The body of /v1/models."""

    async def is_ready(self) -> bool:
        """True if a picture can be made now."""
