"""One measurement of a model: sampler settings and results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from animediffusion.models.bundle import SamplerDefaults


@dataclass(frozen=True)
class Point:
    """Settings and results of one trial."""

    sampler: str
    steps: int
    guidance_scale: float
    psnr: float
    """PSNR in dB, mean over images of the cross-reference track."""
    sharpness: float
    """High-frequency energy divided by that of the truth; 1 is as sharp as the truth."""
    evaluations: int
    """Network rows per image; an evaluation with guidance other than 1 takes two rows."""
    seconds_per_image: float
    shift: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    ema_length: float | None = None
    """EMA length of the weights, as a share of the run (models/training/ema.py); None means training's choice."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Return the point from the result of asdict(), directly or after a JSON round trip."""
        return cls(**{**values, "guidance_interval": tuple(values["guidance_interval"])})

    @property
    def settings(self) -> SamplerDefaults:
        """Sampler defaults of a bundle with these settings."""
        return SamplerDefaults(
            name=self.sampler,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            shift=self.shift,
            guidance_interval=self.guidance_interval,
        )
