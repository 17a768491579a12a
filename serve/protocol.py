"""Messages between the HTTP side and the engines: plain data that can be pickled between processes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from animediffusion.models.sampler_options import SamplerOptions

Pixels = NDArray[np.uint8]
HintPoint = tuple[int, int, tuple[int, int, int]]
"""x and y of a hint in pixels of the drawing, and its color as 8-bit RGB."""


@dataclass(frozen=True, kw_only=True)
class ColorizeJob:
    """One picture to make."""

    lines: Pixels
    """[H, W]: black lines on white, of any size."""
    references: tuple[Pixels, ...]
    """1 to MAX_REFERENCES pictures [H, W, 3], each of any size."""
    options: SamplerOptions
    hints: tuple[HintPoint, ...] = ()
    """Hints that color all that looks alike, in pixels of `lines`."""
    timeout_s: float = 60.0
    key: str = ""
    """Name of the API key, by which the queue is fair."""
    wants_doubt: bool = False
    """Whether the answer should contain the doubt about the picture."""


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Progress of a job."""

    step: int
    total: int
    picture: Pixels
    """[S, S, 3]: the current estimate of the picture."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The result of a job."""

    picture: Pixels
    """[S, S, 3]: the letterboxed sketch, colored."""
    model_version: str
    """Registry number, `sha256:` and 12 hex digits, or `starter`."""
    doubt: Pixels | None = None
    """[S, S]: where the picture is likely to be wrong, if the job wants it (models/doubt.py, 255 times); None if the
    model has no matcher."""
    saw_hints: bool = False
    """Whether the network saw the hints of the job; false if it had none, or if the model cannot see hints."""


@dataclass(frozen=True, kw_only=True)
class ReplicaStatus:
    """State of one engine replica: an entry of /v1/models."""

    id: str
    versions: list[str]
    """Loaded versions, also those that only finish their requests."""
    state: Literal["loading", "ready", "failed"]
    device: str
    attention: str
    """Implementation of attention, see models/network/attention.py."""
    running: int
    """Requests in a running batch."""
    queued: int
    """Requests that wait for a slot."""
    error: str | None
    """The reason why a desired version does not answer."""


@dataclass(frozen=True, kw_only=True)
class ModelsStatus:
    """The body of /v1/models."""

    desired: dict[str, str | None]
    """Alias -> version."""
    traffic: dict[str, float]
    """Version -> share of the requests."""
    replicas: list[ReplicaStatus]


@dataclass(frozen=True, kw_only=True)
class EngineStatus:
    """State of an engine replica, and its view of the registry."""

    replica: ReplicaStatus
    shares: dict[str, float]
    """Version -> share of new requests of this replica."""
    desired: dict[str, str | None]
    """Alias -> version, when the replica last polled the registry."""
    age_s: float
    """Seconds since that poll."""


class Backend(Protocol):
    """Interface of the engines to the HTTP side: one replica in this process, or many behind Ray Serve."""

    async def colorize(self, job: ColorizeJob) -> Answer:
        """Return the picture, or raise a ServeError. Canceling the call frees the slot of the job."""

    def stream(self, job: ColorizeJob) -> AsyncIterator[Preview | Answer]:
        """Yield previews, then the answer. Errors and canceling work as in colorize."""

    async def models(self) -> ModelsStatus:
        """Return the body of /v1/models."""

    async def is_ready(self) -> bool:
        """Return whether a picture can be made now."""
