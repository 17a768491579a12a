"""Objectives of the two training phases, as modules whose forward returns the loss, so that DDP can wrap them.

Shapes: B rows, S pixels per side.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from animediffusion.models.augmentation.augment import Batch
from animediffusion.models.authors import strict as authors
from animediffusion.models.bundle import SamplerDefaults
from animediffusion.models.diffusion.denoiser import Denoiser
from animediffusion.models.diffusion.sampler import build_sampler, sample_times
from animediffusion.models.network.condition import Condition
from animediffusion.models.tensors import onto

NUM_BINS = 8
MIN_SNR = 5.0
"""Upper limit of the min-SNR weight, as recommended by Hang et al. 2023."""


class Loss(NamedTuple):
    """The loss, and its distribution over noise levels for charts."""

    total: Tensor
    """Scalar to differentiate."""
    bins: Tensor
    """[8]: sum of per-row losses by noise level t / t_max; detached."""
    counts: Tensor
    """[8]: number of rows in each bin."""


@dataclass(frozen=True, kw_only=True)
class DenoisingConfig:
    """Settings of phase 1."""

    time_distribution: str = "logit_normal"
    """logit_normal or uniform."""
    time_mean: float = 1.5
    """logit_normal only: t = t_max * sigmoid(mean + std * n), n standard normal (Esser et al. 2024, Eq. 19)."""
    time_std: float = 1.2
    time_min: float = 0.0
    """Smallest time; drawn times are mapped linearly from [0, t_max] to [time_min, t_max]."""
    drop_reference: float = 0.1
    """Share of rows that get the learned null reference instead of their own, for classifier-free guidance."""
    loss: str = "mse"
    """mse, or huber, which gives less weight to the few pixels with large errors."""
    loss_weight: str = "flat"
    """flat, or min_snr: weights the error of x_0 by the signal-to-noise ratio, at most MIN_SNR (Hang et al. 2023)."""
    guess_weight: float = 0.5
    """Weight of the squared error of the matcher's own estimate of the image; no effect without a matcher."""

    def __post_init__(self) -> None:
        if self.time_distribution not in ("logit_normal", "uniform"):
            raise ValueError(f"time_distribution must be logit_normal or uniform, got {self.time_distribution!r}")
        if not 0 <= self.time_min < 0.5:
            raise ValueError(f"time_min must be in [0, 0.5), got {self.time_min}")
        if self.loss not in ("mse", "huber"):
            raise ValueError(f"loss must be mse or huber, got {self.loss!r}")
        if self.loss_weight not in ("flat", "min_snr"):
            raise ValueError(f"loss_weight must be flat or min_snr, got {self.loss_weight!r}")
        if not 0 <= self.drop_reference < 1:
            raise ValueError(f"drop_reference must be in [0, 1), got {self.drop_reference}")


class DenoisingObjective(nn.Module):
    """Phase 1: denoising at random times (the paper's first phase; Ho et al. 2020, Eq. 14, for any prediction type)."""

    def __init__(self, denoiser: Denoiser, config: DenoisingConfig) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.config = config

    def forward(self, batch: Batch, generator: torch.Generator, step: int = 0) -> Loss:  # noqa: ARG002
        """Return the loss of one batch; `step` is unused."""
        t_min, t_max = self.config.time_min, self.denoiser.path.t_max
        t = t_min + (t_max - t_min) * self.draw_times(len(batch.target), batch.target.device, generator)
        noise = _normal(batch.target, generator)
        drawn = torch.rand(len(t), device=t.device, generator=generator)
        keep = drawn >= self.config.drop_reference
        condition = self.denoiser.encode(batch.sketch, batch.references, keep, batch.hints)
        output, target = self.denoiser.loss_pair(batch.target, noise, t, condition)
        if self.config.loss == "huber":
            each = F.huber_loss(output, target, reduction="none", delta=0.3) / 0.3
        else:
            each = F.mse_loss(output, target, reduction="none")
        per_row = each.mean((1, 2, 3))
        guess = guess_loss(condition, batch.target)
        weighted = per_row
        if self.config.loss_weight == "min_snr":
            weighted = per_row * self.denoiser.snr_weight(t, MIN_SNR)
        return _loss(weighted.mean() + self.config.guess_weight * guess, per_row, t / t_max)

    def draw_times(self, rows: int, device: torch.device, generator: torch.Generator) -> Tensor:
        """Return random times [rows] in [0, 1), as shares of t_max."""
        if self.config.time_distribution == "uniform":
            return torch.rand(rows, device=device, generator=generator)
        n = torch.randn(rows, device=device, generator=generator)
        return torch.sigmoid(self.config.time_mean + self.config.time_std * n)


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """Settings of phase 2."""

    gradient_steps: int = 2
    """Largest number of the sampler's last steps that are differentiated; each training step draws the number."""
    pixel_weight: float = 1.0
    structure_weight: float = 0.2
    """Weight of structure_loss(), which preserves edges and flat areas."""
    contrast_weight: float = 0.0
    """Weight of contrast_loss(), which preserves the local contrast that squared error alone averages out."""
    denoising_weight: float = 0.2
    """Weight of the phase 1 loss, which keeps the model usable with other step counts than the sampler's."""
    denoising_rows: float = 1.0
    """Share of a batch's rows in the phase 1 loss; a smaller share makes a step cheaper, by up to one network pass."""

    def __post_init__(self) -> None:
        if self.gradient_steps < 1:
            raise ValueError(f"gradient_steps must be at least 1, got {self.gradient_steps}")
        if not 0 < self.denoising_rows <= 1:
            raise ValueError(f"denoising_rows must be in (0, 1], got {self.denoising_rows}")


class ReconstructionObjective(nn.Module):
    """Phase 2: sample from pure noise as in deployment, and compare the image with the target.

    The last K steps are differentiated (DRaFT-K, Clark et al. 2024) with gradient checkpointing. Unlike in the authors'
    code, the start of sampling does not contain the ground truth, and all gradients come from this module's forward, so
    DDP averages them. The activations of at most one network pass are in memory at a time.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        config: ReconstructionConfig,
        sampler: SamplerDefaults,
        denoising: DenoisingConfig,
        seed: int,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.config = config
        self.settings = sampler
        self.seed = seed
        self.denoising = DenoisingObjective(denoiser, denoising)

    def forward(self, batch: Batch, generator: torch.Generator, step: int = 0) -> Loss:
        """Return the loss of one batch; K depends only on (seed, step) and is equal on all ranks."""
        image = self.sample(batch, generator, self.num_gradient_steps(step))
        pixel = F.mse_loss(image, batch.target, reduction="none").mean((1, 2, 3))
        structure = structure_loss(image, batch.target)
        own = self.config.pixel_weight * pixel + self.config.structure_weight * structure
        own = own + self.config.contrast_weight * contrast_loss(image, batch.target)
        # Free this graph now; otherwise it would be in memory together with the equally large graph of phase 1.
        sampled = _differentiated(own.mean(), list(self.denoiser.parameters()))
        del image, pixel, structure, own
        seen = max(1, round(self.config.denoising_rows * len(batch.target)))
        phase1: Loss = self.denoising(batch.rows(slice(seen)), generator, step)
        total = sampled + self.config.denoising_weight * phase1.total
        return phase1._replace(total=total)

    def num_gradient_steps(self, step: int) -> int:
        """Return K of a training step, in 1..gradient_steps and at most the number of sampler steps."""
        most = min(self.config.gradient_steps, self.settings.steps)
        return 1 + int(torch.randint(most, (), generator=torch.Generator().manual_seed(self.seed * 1_000_003 + step)))

    def sample(self, batch: Batch, generator: torch.Generator, gradient_steps: int) -> Tensor:
        """Return images [B, 3, S, S] sampled from noise; the last `gradient_steps` steps are differentiated."""
        condition = self.denoiser.encode(batch.sketch, batch.references, hints=batch.hints)
        sampler = build_sampler(self.settings.name, self.denoiser.path)
        times = sample_times(self.denoiser.path, self.settings.steps, shift=self.settings.shift)
        state = sampler.start(_normal(batch.target, generator), onto(times, batch.target))
        num = sampler.num_evaluations(self.settings.steps)
        first_with_gradient = num - sampler.num_evaluations(gradient_steps)
        for evaluation in range(num):
            x, t = sampler.query(state)
            if evaluation < first_with_gradient:
                with torch.no_grad():
                    x_0 = self.denoiser(x, t, condition)
            elif evaluation < num - 1:
                x_0 = checkpoint(self.denoiser, x, t, condition, use_reentrant=False)
            else:
                x_0 = self.denoiser(x, t, condition)
            state = sampler.advance(state, x_0)
        return state.x


class _Differentiated(torch.autograd.Function):
    """A scalar with precomputed gradients, which backward scales and returns; backward works once."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor | None], *_parameters: nn.Parameter) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gradients, ctx.gradients = ctx.gradients, None
        torch._foreach_mul_([g for g in gradients if g is not None], gradient)
        return None, None, *gradients


def _differentiated(loss: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """Compute the gradients of `loss` now, which frees its graph, and return an equal scalar that carries them.

    The gradients still reach the parameters through backward, so DDP handles them like any others.
    """
    if not loss.requires_grad:
        return loss
    with torch.autocast(loss.device.type, enabled=False):
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    value: Tensor = _Differentiated.apply(loss.detach(), list(gradients), *parameters)  # type: ignore[no-untyped-call]
    return value


class StrictObjective(nn.Module):
    """Either phase as in the authors' released code, bugs included (models/authors/strict.py).

    The phase 1 loss is a sum over rows and pixels, without dropped references. Phase 2 starts from the noised ground
    truth and differentiates 10 steps.
    """

    def __init__(self, denoiser: Denoiser, *, reconstruction: bool) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.reconstruction = reconstruction
        self.gammas = authors.gammas(authors.require_fit(denoiser))

    def forward(self, batch: Batch, generator: torch.Generator, step: int = 0) -> Loss:  # noqa: ARG002
        """Return the loss of one batch; `step` is unused."""
        condition = self.denoiser.encode(batch.sketch, batch.reference)
        predict = authors.noise_predictor(self.denoiser, condition)
        noise = _normal(batch.target, generator)
        if self.reconstruction:
            injected = [_normal(batch.target, generator) for _ in range(authors.NUM_STEPS)]
            per_row = authors.strict_reconstruction(predict, self.gammas, batch.target, noise, injected)
            return _loss(per_row.mean(), per_row, torch.ones_like(per_row))
        n = torch.randint(len(self.gammas), (len(noise),), device=noise.device, generator=generator)
        per_row = authors.strict_loss(predict, self.gammas, batch.target, noise, n)
        # The authors have no matcher; the term 0 * guess_loss keeps its parameters in the graph, as DDP expects.
        return _loss(per_row.sum() + 0 * guess_loss(condition, batch.target), per_row, n / len(self.gammas))


def guess_loss(condition: Condition, target: Tensor) -> Tensor:
    """Return the squared error of the matcher's own estimate of the image, a scalar; 0 without a matcher."""
    if not condition.guess.numel():
        return condition.guess.sum()
    return F.mse_loss(condition.guess.float(), target)


def structure_loss(image: Tensor, target: Tensor) -> Tensor:
    """Return the mean absolute difference of neighboring-pixel differences, per row [B]."""
    across = ((image.diff(dim=-1) - target.diff(dim=-1)).abs()).mean((1, 2, 3))
    down = ((image.diff(dim=-2) - target.diff(dim=-2)).abs()).mean((1, 2, 3))
    return across + down


def contrast_loss(image: Tensor, target: Tensor) -> Tensor:
    """Return the mean absolute difference of local contrast, per row [B].

    It compares the amount of fine detail near a position, not the exact place of the detail. Squared error alone favors
    the average of all likely images, which has too little detail.
    """
    return (_local_contrast(image) - _local_contrast(target)).abs().mean((1, 2, 3))


def _local_contrast(images: Tensor) -> Tensor:
    """Return the root mean square, over 5 x 5 pixels, of the detail that a 3 x 3 mean removes."""
    fine = images - F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    return (F.avg_pool2d(fine.square(), 5, 1, 2, count_include_pad=False) + 1e-4).sqrt()


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, device=like.device, dtype=like.dtype, generator=generator)


def _loss(total: Tensor, per_row: Tensor, level: Tensor) -> Loss:
    index = (level * NUM_BINS).long().clamp(0, NUM_BINS - 1)
    zeros = torch.zeros(NUM_BINS, device=per_row.device)
    bins = zeros.scatter_add(0, index, per_row.detach().float())
    return Loss(total, bins, zeros.scatter_add(0, index, torch.ones_like(level)))


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The phase, and the settings of both phases (phase 2 includes the phase 1 loss)."""

    name: str = "denoising"
    """denoising (phase 1) or reconstruction (phase 2)."""
    strict: bool = False
    """Use the phase as in the authors' released code, bugs included; it has no other settings."""
    denoising: DenoisingConfig = field(default_factory=DenoisingConfig)
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)

    def __post_init__(self) -> None:
        if self.name not in ("denoising", "reconstruction"):
            raise ValueError(f"objective name must be denoising or reconstruction, got {self.name!r}")
        if self.strict and (self.denoising, self.reconstruction) != (DenoisingConfig(), ReconstructionConfig()):
            raise ValueError("a strict objective has no settings, but denoising or reconstruction has some")

    def build(self, denoiser: Denoiser, sampler: SamplerDefaults, seed: int) -> nn.Module:
        """Build the objective module."""
        if self.strict:
            return StrictObjective(denoiser, reconstruction=self.name == "reconstruction")
        if self.name == "denoising":
            return DenoisingObjective(denoiser, self.denoising)
        return ReconstructionObjective(denoiser, self.reconstruction, sampler, self.denoising, seed)
