"""Measure a model with given sampler settings: color rows with fixed noise and compare them with the truth.

pipelines/evaluation/evaluate.py computes all metrics of a finished model, with baselines.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from animediffusion.models.augmentation.augment import Batch, fixed_batch
from animediffusion.models.bundle import Bundle, SamplerDefaults
from animediffusion.models.colorize import colorize, network_rows
from animediffusion.models.tensors import to_uint8
from animediffusion.pipelines.data.manifest import Manifest
from animediffusion.pipelines.data.stream import read_split
from animediffusion.pipelines.evaluation.metrics import psnr, sharpness

_ROWS_PER_BATCH = 16


@dataclass(frozen=True, slots=True)
class Measurement:
    """Settings of a sampler, and the quality and cost of a model with them."""

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
        """Return the measurement from the result of asdict(), directly or after a JSON round trip."""
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


@dataclass(frozen=True)
class MeasuredRows:
    """Rows on which settings are measured."""

    searched: Batch
    unseen: Batch | None
    """The same number of further rows, which confirm the choice; None if the split is too small."""
    key: str
    """Identifier of the rows: equal keys mean equal rows."""


def load_rows(data: str, split: str, num_images: int) -> MeasuredRows:
    """Load the cross-reference track of the first rows of a split, and of the same number of rows after them."""
    manifest = Manifest.load(data)
    arrays = {key: value for key, value in read_split(data, split, 2 * num_images).items() if key != "id"}

    def track(part: slice) -> Batch:
        tensors = {name: torch.from_numpy(array[part]) for name, array in arrays.items()}
        return fixed_batch(tensors, "cross", torch.Generator().manual_seed(0))

    enough = len(arrays["target"]) >= 2 * num_images
    key = f"{manifest.content_hash} {split} {num_images}"
    return MeasuredRows(track(slice(num_images)), track(slice(num_images, None)) if enough else None, key)


@torch.no_grad()
def measure(bundle: Bundle, batch: Batch, sampler: SamplerDefaults, ema_length: float | None = None) -> Measurement:
    """Color the rows with these settings and compare them with the truth; row i has noise seed i.

    Args:
        bundle: the model.
        batch: the rows.
        sampler: settings that replace the bundle's defaults.
        ema_length: EMA length of the bundle's weights, which the result repeats.
    """
    started = time.perf_counter()
    images = []
    for start in range(0, len(batch.target), _ROWS_PER_BATCH):
        rows = slice(start, start + _ROWS_PER_BATCH)
        seeds = range(start, min(start + _ROWS_PER_BATCH, len(batch.target)))
        images.append(colorize(bundle, batch.sketch[rows], batch.reference[rows], seeds=seeds, sampler=sampler).cpu())
    seconds = time.perf_counter() - started
    result, truth = (to_uint8(image).numpy() for image in (torch.cat(images), batch.target))
    return Measurement(
        sampler=sampler.name,
        steps=sampler.steps,
        guidance_scale=sampler.guidance_scale,
        psnr=float(psnr(result, truth).mean()),
        sharpness=float(sharpness(result, truth).mean()),
        evaluations=network_rows(bundle.denoiser.path, sampler),
        seconds_per_image=seconds / len(batch.target),
        shift=sampler.shift,
        guidance_interval=sampler.guidance_interval,
        ema_length=ema_length,
    )
