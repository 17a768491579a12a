"""Messages and errors between the HTTP side and the engines: plain data that can be pickled between processes.

ServeError
    BusyError           the queue is full; try again later
    UnavailableError    this engine cannot make the picture now; another engine can, or this one later
        NoModelError    no version is loaded
    LateError           the picture was not finished by the deadline
    UnusableError       a parameter is not usable, and only the model could check it
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
    """One picture to make. A field that is None means the default of the model."""

    lines: Pixels
    """[H, W]: black lines on white, of any size."""
    reference: Pixels
    """[H, W, 3], of any size."""
    seed: int
    steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    timeout_s: float = 60.0
    key: str = ""
    """Name of the API key, by which the queue is fair."""


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Progress of a job."""

    step: int
    total: int
    picture: Pixels
    """[S, S, 3]: the current estimate of the picture."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Result of a job."""

    picture: Pixels
    """[S, S, 3]: the letterboxed sketch, colored."""
    model_version: str
    """Registry number, or `sha256:` and 12 hex digits."""


class ServeError(Exception):
    """Base class. The arguments are plain values, so that an error can be pickled between processes."""


class BusyError(ServeError):
    """The queue is full. Arguments: (reason, seconds after which to retry); the seconds may be left out."""

    @property
    def retry_after_s(self) -> int | None:
        """Whole seconds after which to retry; None if unknown."""
        return int(self.args[1]) if len(self.args) > 1 else None


class UnavailableError(ServeError):
    """An engine cannot make the picture now. Argument: the reason. A retry on another engine, or later, can work."""


class NoModelError(UnavailableError):
    """No version is loaded. Argument: the reason."""


class LateError(ServeError):
    """The picture was not finished by the deadline."""


class UnusableError(ServeError):
    """A parameter is not usable. Arguments: (field, found, allowed)."""


class Backend(Protocol):
    """Interface of the engines to the HTTP side: one replica in this process, or many behind Ray Serve."""

    async def colorize(self, job: ColorizeJob) -> Answer:
        """Return the picture, or raise a ServeError. Canceling the call frees the slot of the job."""

    def stream(self, job: ColorizeJob) -> AsyncIterator[Preview | Answer]:
        """Yield previews, then the answer. Errors and canceling work as in colorize."""

    async def models(self) -> dict[str, Any]:
        """Return the body of /v1/models."""

    async def is_ready(self) -> bool:
        """Return whether a picture can be made now."""
