"""Colorize a sketch with the colors of one or more reference images, and of hints."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from animediffusion.models.bundle import Bundle, SamplerDefaults
from animediffusion.models.diffusion.denoiser import Denoiser
from animediffusion.models.diffusion.guidance import guided, is_guided
from animediffusion.models.diffusion.path import Path
from animediffusion.models.diffusion.sampler import build_sampler, sample, sample_times
from animediffusion.models.hint_spread import spread_hints


@torch.no_grad()
def colorize(
    bundle: Bundle,
    sketch: Tensor,
    reference: Tensor | Sequence[Tensor],
    *,
    seeds: Sequence[int],
    sampler: SamplerDefaults | None = None,
    hints: Tensor | None = None,
) -> Tensor:
    """Return colored images [B, 3, S, S] in [-1, 1], on the bundle's device.

    Args:
        bundle: the model.
        sketch: [B, 1, S, S] in [-1, 1], dark lines on white.
        reference: [B, 3, S, S] in [-1, 1], or several such references.
        seeds: one seed per row; an image depends only on its own row and seed.
        sampler: sampler settings that replace the bundle's defaults.
        hints: [B, 4, S, S] from hint_planes(). They are spread, see hint_spread.py; a network that was trained with
            hints sees them before that.
    """
    device = next(bundle.denoiser.parameters()).device
    noise = torch.stack([noise_for(seed, sketch.shape[-1]) for seed in seeds]).to(device)
    settings = sampler or bundle.config.sampler
    references = [one.to(device) for one in ([reference] if isinstance(reference, Tensor) else reference)]
    planes = None if hints is None else hints.to(device)
    sketch = sketch.to(device)
    image = sample_images(bundle.denoiser, sketch, references, noise, settings, planes).clamp(-1, 1)
    return image if planes is None else spread_hints(bundle.denoiser, sketch, image, planes).clamp(-1, 1)


def sample_images(
    denoiser: Denoiser,
    sketch: Tensor,
    reference: Tensor | Sequence[Tensor],
    noise: Tensor,
    settings: SamplerDefaults,
    hints: Tensor | None = None,
) -> Tensor:
    """Return images for the given noise [B, 3, S, S], neither clamped nor detached from the autograd graph."""
    condition = denoiser.encode(sketch, reference, hints=hints)
    null = None
    if settings.guidance_scale != 1:
        nothing = torch.zeros(len(sketch), dtype=torch.bool, device=sketch.device)
        null = denoiser.encode(sketch, reference, nothing, hints)
    denoise = guided(denoiser, condition, null, settings.guidance_scale, settings.guidance_interval)
    times = sample_times(denoiser.path, settings.steps, shift=settings.shift).to(noise.device)
    return sample(build_sampler(settings.name, denoiser.path), denoise, noise, times)


def guided_evaluations(path: Path, settings: SamplerDefaults) -> list[bool]:
    """Return for each network evaluation of one image, in order, whether it is guided and costs two rows, not one."""
    sampler = build_sampler(settings.name, path)
    times = sampler.evaluation_times(sample_times(path, settings.steps, shift=settings.shift))
    if settings.guidance_scale == 1:
        return [False] * len(times)
    return [bool(inside) for inside in is_guided(times, settings.guidance_interval)]


def network_rows(path: Path, settings: SamplerDefaults) -> int:
    """Return the number of rows that the network evaluates for one image."""
    return sum(2 if guided else 1 for guided in guided_evaluations(path, settings))


def noise_for(seed: int, size: int) -> Tensor:
    """Return standard normal noise [3, S, S] on the CPU, which depends on the seed alone."""
    return torch.randn(3, size, size, generator=torch.Generator().manual_seed(seed))
