"""Classifier-free guidance on the reference (Ho & Salimans 2022); the sketch is never dropped."""

from __future__ import annotations

import torch
from torch import Tensor

from animediffusion.models.diffusion.denoiser import Denoiser
from animediffusion.models.diffusion.sampler import Denoise
from animediffusion.models.network.condition import Condition, cat_conditions

EVERYWHERE = (0.0, 1.0)
"""The interval that contains all times."""


def guided(
    denoiser: Denoiser,
    condition: Condition,
    null_condition: Condition | None = None,
    scale: float = 1.0,
    interval: tuple[float, float] = EVERYWHERE,
) -> Denoise:
    """Return a function (x_t, t) -> x_0 for a sampler; guidance is applied to x_0.

    Args:
        denoiser: the model.
        condition: the condition of B rows.
        null_condition: the same sketches without reference; required unless scale is 1.
        scale: 1 is plain conditioning and costs one row per image; any other scale costs two. A scale above 1
            strengthens the reference.
        interval: guidance applies only to t in this interval (Kynkaanniemi et al. 2024). If no row of the batch is in
            it, each image costs one row.

    Raises:
        ValueError: if scale is not 1 and null_condition is missing.
    """
    if scale == 1:
        return lambda x_t, t: denoiser(x_t, t, condition)
    if null_condition is None:
        raise ValueError(f"guidance scale {scale} needs the condition without reference")
    both = cat_conditions([null_condition, condition])

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        # bool() waits for the device, so check only if the interval can save evaluations.
        if interval != EVERYWHERE and not bool(is_guided(t, interval).any()):
            plain: Tensor = denoiser(x_t, t, condition)
            return plain
        without, with_reference = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return mix(without, with_reference, torch.full_like(t, scale), t, interval)

    return denoise


def mix(without: Tensor, with_reference: Tensor, scale: Tensor, t: Tensor, interval: tuple[float, float]) -> Tensor:
    """Return the guided estimate of each row, for scales [B] at times [B]."""
    weight = torch.where(is_guided(t, interval), scale, 1.0).reshape(-1, 1, 1, 1)
    return without + weight * (with_reference - without)


def is_guided(t: Tensor, interval: tuple[float, float]) -> Tensor:
    """Return bool [B]: whether guidance applies at each of the times [B]."""
    return (t >= interval[0]) & (t <= interval[1])
