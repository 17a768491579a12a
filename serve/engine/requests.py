"""Requests to an engine, and the counters of an engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from animediffusion.models.sampler_options import SamplerOptions

Progress = Callable[[int, int, NDArray[np.uint8]], None]
"""Callback(finished steps, total steps, estimate of the picture); it runs on the engine's thread and must not block."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One picture to make."""

    sketch: Tensor
    """[1, S, S] in [-1, 1]."""
    references: tuple[Tensor, ...]
    """1 to MAX_REFERENCES pictures, each [3, S, S] in [-1, 1]; the first one counts most, see join_references()."""
    options: SamplerOptions
    hints: Tensor | None = None
    """[4, S, S], see models/network/hints.py. What looks alike gets their colors, see models/hint_spread.py."""
    deadline: float | None = None
    """Time of the engine's clock, by default time.monotonic(), at which the request fails."""
    key: str = ""
    """Name of the API key. The slots of the batch are shared fairly between keys."""
    on_progress: Progress | None = None
    on_doubt: Callable[[NDArray[np.uint8]], None] | None = None
    """Callback with the doubt about the picture, uint8 [S, S] (models/doubt.py, 255 times), before the future ends.
    It runs on the engine's thread and must not block; a model without a matcher does not call it."""


class EngineStep(NamedTuple):
    """Record of one network evaluation for every running request. Requests are given by number."""

    number: int
    seconds: float
    running: tuple[int, ...]
    """Requests that were evaluated."""
    waiting: tuple[int, ...]
    """Requests that waited for a slot."""
    num_evaluated: int
    """Evaluated rows of the network, including guidance and padding."""


@dataclass
class Counts:
    """Counters of an engine since its start."""

    submitted: int = 0
    rejected: int = 0
    """Requests that raised BusyError in submit(); they do not count as submitted."""
    finished: int = 0
    cancelled: int = 0
    late: int = 0
    failed: int = 0
    steps: int = 0
    """Engine steps."""
    step_seconds: float = 0.0
    rows_evaluated: int = 0
    """Evaluated rows of the network in all engine steps."""
    reference_hits: int = 0
    """Requests whose reference was encoded already."""
    reference_misses: int = 0
    """Requests whose reference had to be encoded."""
