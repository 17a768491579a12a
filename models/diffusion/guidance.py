"""Classifier-free guidance on the reference (Ho & Salimans 2022); the sketch is always given."""

from __future__ import annotations

import torch
from torch import Tensor

from animediffusion.models.diffusion.denoiser import Denoiser
from animediffusion.models.diffusion.sampler import Denoise
from animediffusion.models.network.condition import Condition, cat_conditions

EVERYWHERE = (0.0, 1.0)
"""The interval that holds all times."""


def guided(
    denoiser: Denoiser,
    condition: Condition,
    null_condition: Condition | None = None,
    scale: float = 1.0,
    interval: tuple[float, float] = EVERYWHERE,
) -> Denoise:
    """A function (x_t, t) -> x_0 for a sampler; guidance happens on x_0.

    Args:
        denoiser: the model.
        condition: of B rows.
        null_condition: the same sketches without reference; needed unless scale is 1.
        scale: 1 is plain conditioning and costs one row per image, else two; above 1 is toward the reference.
        interval: guide only for t in it (Kynkaanniemi et al. 2024); where no row of the batch is in it, each costs one.
    """
    if scale == 1:
        return lambda x_t, t: denoiser(x_t, t, condition)
    if null_condition is None:
        raise ValueError(f"guidance scale {scale} needs the condition without reference")
    both = cat_conditions([null_condition, condition])

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        # A look at the device, which waits for it; so only where there is something to save.
        if interval != EVERYWHERE and not bool(is_guided(t, interval).any()):
            plain: Tensor = denoiser(x_t, t, condition)
            return plain
        without, with_reference = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return mix(without, with_reference, torch.full_like(t, scale), t, interval)

    return denoise


def mix(without: Tensor, with_reference: Tensor, scale: Tensor, t: Tensor, interval: tuple[float, float]) -> Tensor:
    """The guided estimate of each row, for scales [B] at times [B]."""
    weight = torch.where(is_guided(t, interval), scale, 1.0).reshape(-1, 1, 1, 1)
    return without + weight * (with_reference - without)


def is_guided(t: Tensor, interval: tuple[float, float]) -> Tensor:
    """bool [B]: which of the times [B] guidance applies at."""
    return (t >= interval[0]) & (t <= interval[1])
