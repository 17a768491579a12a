"""What the authors' released code computes, number for number, so that it can be compared with and trained.

Source: models/diffusion.py and process/ft_animediffusion.py of their repository (Cao et al. 2024), bugs included: the
strict mode. Here time is their integer n in 0..999, not t = n / 1000. Not here: what replaces these bugs
(objective.py, sampler.py), their weights (authors_weights.py), their warp (authors_warp.py).

B rows, H/W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from animediffusion.models.diffusion.denoiser import Denoiser
from animediffusion.models.diffusion.path import LinearPath, PathConfig, spread
from animediffusion.models.network.condition import Condition
from animediffusion.models.tensors import onto

NUM_STEPS = 10
"""Network evaluations of their sampler, in phase 2 as at test."""

PredictNoise = Callable[[Tensor, Tensor | None], Tensor]
"""(x_n [B, 3, H, W], n int64 [B], or None for "no time") -> the noise in x_n."""


def require_fit(denoiser: Denoiser) -> PathConfig:
    """The path of a model that strict mode is for.

    Raises:
        ValueError: if it predicts something else than noise, or on another path.
    """
    if denoiser.prediction != "eps":
        raise ValueError(f"strict mode needs prediction 'eps', got {denoiser.prediction!r}")
    path = denoiser.path
    if not isinstance(path, LinearPath) or len(path.table) != 1000 or path.config.zero_terminal:
        raise ValueError("strict mode needs path 'linear' with 1000 timesteps, not stretched by zero_terminal")
    return path.config


def noise_predictor(denoiser: Denoiser, condition: Condition) -> PredictNoise:
    """The network as they call it."""

    def predict(x: Tensor, n: Tensor | None) -> Tensor:
        # In float32 1000 (n / 1000) is not always n, and the time embedding sees the difference.
        return denoiser.network.denoise(x, None if n is None else n.double() / 1000, condition).float()

    return predict


def gammas(config: PathConfig) -> Tensor:
    """Their cumulated products of 1 - beta, [1000]: alpha^2, made in float32 from the start.

    In the first entries float32 is some hundredths off 1 - alpha^2; LinearPath has them in float64.
    """
    num = config.num_train_timesteps
    betas = torch.linspace(config.beta_start, config.beta_end, num, dtype=torch.float32, device="cpu")
    return torch.cumprod(1 - betas, 0)


def strict_loss(predict: PredictNoise, gamma: Tensor, x_0: Tensor, noise: Tensor, n: Tensor) -> Tensor:
    """Phase 1 of each row [B]; their loss is the sum over rows and pixels (GaussianDiffusion.forward).

    Args:
        predict: the network.
        gamma: from `gammas`.
        x_0: target in [-1, 1].
        noise: standard normal, as x_0.
        n: int64 [B] in 0..999.
    """
    share = _at(gamma, n)
    x_n = share.sqrt() * x_0 + (1 - share).sqrt() * noise
    return F.mse_loss(predict(x_n, n), noise, reduction="none").sum((1, 2, 3))


def strict_sample(
    predict: PredictNoise, gamma: Tensor, x: Tensor, injected: Sequence[Tensor], eta: float = 1.0
) -> Tensor:
    """Their sampler (inference_ddim): 10 steps at n = 901, 801, ..., 1, the last one ending at n = 0.

    Song et al. 2021, Eq. 12 and 16, but x_0 is clamped while the noise it was made from is used as it is.

    Args:
        predict: the network.
        gamma: from `gammas`.
        x: where it starts, [B, 3, H, W]; they give pure noise though x_901 would hold 13 % of the image.
        injected: 10 tensors like x, standard normal, the noise that each step adds.
        eta: 1 in all of their code, 0 is deterministic.
    """
    for (n, n_next), noise in zip(reversed(_steps()), injected, strict=True):
        now, after = _at(gamma, _full(x, n)), _at(gamma, _full(x, n_next))
        eps = predict(x, _full(x, n))
        x_0 = ((x - (1 - now).sqrt() * eps) / now.sqrt()).clamp(-1, 1)
        sigma = eta * ((1 - after) / (1 - now) * (1 - now / after)).sqrt()
        x = after.sqrt() * x_0 + (1 - after - sigma**2).sqrt() * eps + sigma * noise
    return x


@torch.no_grad()
def fix_forward(predict: PredictNoise, gamma: Tensor, x_0: Tensor, noise: Tensor) -> Tensor:
    """Where their phase 2 starts: the ground truth walked to n = 901 in 10 steps, [B, 3, H, W].

    The first step takes `noise`; the other nine take the network's, which is asked without the time.
    """
    x, eps, estimate = x_0, noise, x_0
    for step, (n_next, n) in enumerate(_steps()):
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
    """Their phase 2 of each row [B], as a mean over pixels: fix_forward, then all 10 steps with gradients."""
    image = strict_sample(predict, gamma, fix_forward(predict, gamma, x_0, noise), injected)
    return F.mse_loss(image, x_0, reduction="none").mean((1, 2, 3))


def _steps() -> list[tuple[int, int]]:
    """(n, the next lower n) of each step, rising: (1, 0), (101, 1), ..., (901, 801)."""
    visited = [n + 1 for n in range(0, 1000, 1000 // NUM_STEPS)]
    return list(zip(visited, [0, *visited[:-1]], strict=True))


def _full(like: Tensor, n: int) -> Tensor:
    return torch.full((len(like),), n, dtype=torch.int64, device=like.device)


def _at(gamma: Tensor, n: Tensor) -> Tensor:
    """Entries [B, 1, 1, 1] of the table."""
    return spread(onto(gamma, n)[n])
