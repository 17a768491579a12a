"""Strict mode reproduces the authors' released code number for number, bugs included, for comparison and training.

Source: models/diffusion.py and process/ft_animediffusion.py of their repository (Cao et al. 2024). In this module time
is their integer n in 0..999, not t = n / 1000. Versions without these bugs are in models/training/objective.py and
models/diffusion/sampler.py; weights.py imports the authors' weights, and warp.py contains their warp.

Shapes: B rows, H/W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from animediffusion.models.diffusion.denoiser import Denoiser
from animediffusion.models.diffusion.path import LinearPath, PathConfig, per_image
from animediffusion.models.network.condition import Condition
from animediffusion.models.tensors import onto

NUM_STEPS = 10
"""Network evaluations of the authors' sampler, both in phase 2 and at test time."""

PredictNoise = Callable[[Tensor, Tensor | None], Tensor]
"""Function (x_n [B, 3, H, W], n int64 [B] or None to omit the time) -> the predicted noise in x_n."""


def require_fit(denoiser: Denoiser) -> PathConfig:
    """Return the path configuration of a model that strict mode supports.

    Raises:
        ValueError: if the model does not predict noise, or has another path than the authors' (linear, 1000 timesteps).
    """
    if denoiser.prediction != "eps":
        raise ValueError(f"strict mode needs prediction 'eps', got {denoiser.prediction!r}")
    path = denoiser.path
    if not isinstance(path, LinearPath) or len(path.table) != 1000 or path.config.zero_terminal:
        raise ValueError("strict mode needs path 'linear' with 1000 timesteps, not stretched by zero_terminal")
    return path.config


def noise_predictor(denoiser: Denoiser, condition: Condition) -> PredictNoise:
    """Wrap the network so that it is called as in the authors' code."""

    def predict(x: Tensor, n: Tensor | None) -> Tensor:
        # In float32, 1000 (n / 1000) is not always n, and the time embedding would show the difference.
        return denoiser.network.denoise(x, None if n is None else n.double() / 1000, condition).float()

    return predict


def gammas(config: PathConfig) -> Tensor:
    """Return the authors' cumulative products of 1 - beta, [1000], which are alpha^2, computed in float32.

    In the first entries float32 gives 1 - alpha^2 a relative error of some hundredths; LinearPath uses float64.
    """
    num = config.num_train_timesteps
    betas = torch.linspace(config.beta_start, config.beta_end, num, dtype=torch.float32, device="cpu")
    return torch.cumprod(1 - betas, 0)


def strict_loss(predict: PredictNoise, gamma: Tensor, x_0: Tensor, noise: Tensor, n: Tensor) -> Tensor:
    """Return the phase 1 loss of each row [B]; the authors sum over rows and pixels (GaussianDiffusion.forward).

    Args:
        predict: the network.
        gamma: the table from `gammas`.
        x_0: target in [-1, 1].
        noise: standard normal, same shape as x_0.
        n: int64 [B] in 0..999.
    """
    share = _at(gamma, n)
    x_n = share.sqrt() * x_0 + (1 - share).sqrt() * noise
    return F.mse_loss(predict(x_n, n), noise, reduction="none").sum((1, 2, 3))


def strict_sample(
    predict: PredictNoise, gamma: Tensor, x: Tensor, injected: Sequence[Tensor], eta: float = 1.0
) -> Tensor:
    """Sample with the authors' sampler (inference_ddim): 10 steps at n = 901, 801, ..., 1, ending at n = 0.

    The steps follow Song et al. 2021, Eq. 12 and 16, but x_0 is clamped and the predicted noise is not adjusted to the
    clamped x_0.

    Args:
        predict: the network.
        gamma: the table from `gammas`.
        x: start of sampling, [B, 3, H, W]; the authors pass pure noise, although x_901 would hold 13 % of the image.
        injected: the noise that each step adds: 10 standard normal tensors shaped like x.
        eta: 1 everywhere in the authors' code; 0 is deterministic.
    """
    for (n, n_next), noise in zip(reversed(sampling_steps()), injected, strict=True):
        now, after = _at(gamma, _full(x, n)), _at(gamma, _full(x, n_next))
        eps = predict(x, _full(x, n))
        x_0 = ((x - (1 - now).sqrt() * eps) / now.sqrt()).clamp(-1, 1)
        sigma = eta * ((1 - after) / (1 - now) * (1 - now / after)).sqrt()
        x = after.sqrt() * x_0 + (1 - after - sigma**2).sqrt() * eps + sigma * noise
    return x


@torch.no_grad()
def fix_forward(predict: PredictNoise, gamma: Tensor, x_0: Tensor, noise: Tensor) -> Tensor:
    """Return the start of the authors' phase 2: the ground truth noised to n = 901 in 10 steps, [B, 3, H, W].

    The first step adds `noise`; the other nine use the noise that the network predicts without the time.
    """
    x, eps, estimate = x_0, noise, x_0
    for step, (n_next, n) in enumerate(sampling_steps()):
        if step:
            now = _at(gamma, _full(x, n))
            eps = predict(x, None)
            estimate = ((x - (1 - now).sqrt() * eps) / now.sqrt()).clamp(-1, 1)
        after = _at(gamma, _full(x, n_next))
        x = after.sqrt() * estimate + (1 - after).sqrt() * eps
    return x


def strict_reconstruction(
    predict: PredictNoise, gamma: Tensor, x_0: Tensor, noise: Tensor, injected: Sequence[Tensor]
) -> Tensor:
    """Return the authors' phase 2 loss of each row [B], a mean over pixels.

    fix_forward gives the start; all 10 sampling steps pass gradients.
    """
    image = strict_sample(predict, gamma, fix_forward(predict, gamma, x_0, noise), injected)
    return F.mse_loss(image, x_0, reduction="none").mean((1, 2, 3))


def sampling_steps() -> list[tuple[int, int]]:
    """Return (n, the next lower n) of each step in rising order: (1, 0), (101, 1), ..., (901, 801)."""
    visited = [n + 1 for n in range(0, 1000, 1000 // NUM_STEPS)]
    return list(zip(visited, [0, *visited[:-1]], strict=True))


def _full(like: Tensor, n: int) -> Tensor:
    return torch.full((len(like),), n, dtype=torch.int64, device=like.device)


def _at(gamma: Tensor, n: Tensor) -> Tensor:
    """Look up the table's entries for n, [B, 1, 1, 1]."""
    return per_image(onto(gamma, n)[n])
