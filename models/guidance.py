"""Classifier-free guidance on the reference (Ho & Salimans 2022); the sketch is always given."""

from __future__ import annotations

import torch
from torch import Tensor

from animediffusion.models.condition import Condition, cat_conditions
from animediffusion.models.denoiser import Denoiser
from animediffusion.models.sampler import Denoise


def guided(
    denoiser: Denoiser,
    condition: Condition,
    null_condition: Condition | None = None,
    scale: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Denoise:
    """A function (x_t, t) -> x_0 for a sampler; guidance happens on x_0.

    Args:
        denoiser: the model.
        condition: of B rows.
        null_condition: the same sketches without reference; needed unless scale is 1.
        scale: 1 is plain conditioning and costs one row per image, else two; above 1 is toward the reference.
        interval: guide only for t in it (Kynkaanniemi et al. 2024).
    """
    if scale == 1:
        return lambda x_t, t: denoiser(x_t, t, condition)
    if null_condition is None:
        raise ValueError(f"guidance scale {scale} needs the condition without reference")
    both = cat_conditions([null_condition, condition])

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        without, with_reference = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return mix(without, with_reference, torch.full_like(t, scale), t, interval)

    return denoise


def mix(without: Tensor, with_reference: Tensor, scale: Tensor, t: Tensor, interval: tuple[float, float]) -> Tensor:
    """The guided estimate of each row, for scales [B] at times [B]."""
    weight = torch.where(is_guided(t, interval), scale, 1.0).reshape(-1, 1, 1, 1)
    return without + weight * (with_reference - without)


def is_guided(t: Tensor, interval: tuple[float, float]) -> Tensor:
    """bool [B]: the times [B] at which guidance acts."""
    return (t >= interval[0]) & (t <= interval[1])
