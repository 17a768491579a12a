"""Messages between the HTTP side and the engines: plain data that can be pickled between processes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from animediffusion.models.sampler_options import SamplerOptions

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class ColorizeJob:
    """One picture to make."""

    lines: Pixels
    """[H, W]: black lines on white, of any size."""
    reference: Pixels
    """[H, W, 3], of any size."""
    options: SamplerOptions
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
