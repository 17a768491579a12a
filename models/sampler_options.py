"""Sampler settings that a request may choose: one definition for the HTTP API, the engine, the commands and exports.

This module needs only the standard library, because `--help` and exported models use it without torch or pydantic.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from animediffusion.models.bundle import SamplerDefaults

SamplerName = Literal["euler", "heun", "dpmpp_2m"]

MAX_SEED = 2**32 - 1
MAX_STEPS = 1000
MAX_GUIDANCE_SCALE = 20
MAX_REFERENCES = 4
ALLOWED = {
    "seed": f"a whole number from 0 to {MAX_SEED}",
    "steps": f"a whole number from 1 to {MAX_STEPS}",
    "guidance_scale": f"a number from 0 to {MAX_GUIDANCE_SCALE}",
    "sampler": "euler, heun or dpmpp_2m",
}
"""The allowed values of each field of SamplerOptions, as error messages state them."""

_WHOLE = re.compile(r"-?[0-9]{1,20}")
_NUMBER = re.compile(r"-?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]{1,3})?")


@dataclass(frozen=True, kw_only=True)
class SamplerOptions:
    """Sampler settings of one request. None means the default of the model.

    Raises:
        ValueError: a number is out of range. apply_to() checks the name of the sampler.
    """

    seed: int = 0
    """Seed of the noise, 0 to MAX_SEED."""
    steps: int | None = None
    """Number of sampler steps, 1 to MAX_STEPS."""
    guidance_scale: float | None = None
    """Scale of classifier-free guidance, 0 to MAX_GUIDANCE_SCALE; 1 disables guidance."""
    sampler: str | None = None
    """A SamplerName."""

    def __post_init__(self) -> None:
        self._check("seed", 0, MAX_SEED)
        self._check("steps", 1, MAX_STEPS)
        self._check("guidance_scale", 0, MAX_GUIDANCE_SCALE)

    def _check(self, name: str, least: int, most: int) -> None:
        value = getattr(self, name)
        if value is not None and not least <= value <= most:
            raise ValueError(f"{name} must be {ALLOWED[name]}, got {value}")

    def apply_to(self, defaults: SamplerDefaults) -> SamplerDefaults:
        """Return the defaults of a model, replaced by the settings that are not None.

        Raises:
            ValueError: the sampler is unknown.
        """
        chosen: dict[str, Any] = {"name": self.sampler, "steps": self.steps, "guidance_scale": self.guidance_scale}
        return replace(defaults, **{name: value for name, value in chosen.items() if value is not None})


def whole_number(text: str) -> int:
    """Return the number that ASCII digits stand for; int() would also accept " 5 ", "1_0" and digits of any script.

    Raises:
        ValueError: the text has other characters or more than 20 digits.
    """
    if not _WHOLE.fullmatch(text):
        raise ValueError(f"must be a whole number, got {text!r}")
    return int(text)


def number(text: str) -> float:
    """Return the finite number that a decimal such as 1.5 or 2e-1 stands for; float() would also accept "1_0" and nan.

    Raises:
        ValueError: the text has another form, or the number is too large.
    """
    if not _NUMBER.fullmatch(text) or math.isinf(float(text)):
        raise ValueError(f"must be a number, got {text!r}")
    return float(text)
