"""One measurement: sampler settings and what a model gave with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from animediffusion.models.bundle import SamplerDefaults


@dataclass(frozen=True)
class Point:
    """One trial: settings and what they gave."""

    sampler: str
    steps: int
    guidance_scale: float
    psnr: float
    """dB, mean over images of the cross-reference track."""
    sharpness: float
    """High-frequency energy as a share of the truth's; 1 is as sharp as the truth."""
    evaluations: int
    """Network rows per image: guidance other than 1 costs two per evaluation."""
    seconds_per_image: float
    shift: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    ema_length: float | None = None
    """Of the weights' average, a share of the run (models/training/ema.py); None is the one that training chose."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The point that asdict() was made of, also after JSON."""
        return cls(**{**values, "guidance_interval": tuple(values["guidance_interval"])})

    @property
    def settings(self) -> SamplerDefaults:
        """What a bundle would hold."""
        return SamplerDefaults(
            name=self.sampler,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            shift=self.shift,
            guidance_interval=self.guidance_interval,
        )
