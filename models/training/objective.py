"""What the two phases minimise. Each is a module whose forward returns the loss, so DDP can wrap it.

B rows, S pixels a side.
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
"""As Hang et al. 2023 recommend."""


class Loss(NamedTuple):
    """The loss and what a chart shows of it."""

    total: Tensor
    """Scalar, to be differentiated."""
    bins: Tensor
    """[8]: sum of per-row losses by noise level t / t_max; detached."""
    counts: Tensor
    """[8]: rows in each bin."""


@dataclass(frozen=True, kw_only=True)
class DenoisingConfig:
    """Phase 1."""

    time_distribution: str = "logit_normal"
    """logit_normal or uniform."""
    time_mean: float = 1.5
    """t = t_max * sigmoid(mean + std * n), n standard normal (Esser et al. 2024, Eq. 19)."""
    time_std: float = 1.2
    time_min: float = 0.0
    """Smallest time; the others are pressed together between it and t_max."""
    drop_reference: float = 0.1
    """Share of rows that see the learned null in place of the reference, for classifier-free guidance."""
    loss: str = "mse"
    """mse, or huber (less weight on the few pixels that are far off)."""
    loss_weight: str = "flat"
    """flat, or min_snr: the error of x_0 times the signal-to-noise ratio, at most MIN_SNR (Hang et al. 2023)."""
    guess_weight: float = 0.5
    """Weight of the squared error of the matcher's own guess; without a matcher it has no effect."""

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
    """Phase 1: predict what the noise hid (the paper's first phase; Ho et al. 2020, Eq. 14, for any prediction)."""

    def __init__(self, denoiser: Denoiser, config: DenoisingConfig) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.config = config

    def forward(self, batch: Batch, generator: torch.Generator, step: int = 0) -> Loss:  # noqa: ARG002
        """Loss of one batch; `step` is not used here."""
        t_min, t_max = self.config.time_min, self.denoiser.path.t_max
        t = t_min + (t_max - t_min) * self._times(len(batch.target), batch.target.device, generator)
        noise = _normal(batch.target, generator)
        drawn = torch.rand(len(t), device=t.device, generator=generator)
        condition = self.denoiser.encode(batch.sketch, batch.reference, drawn >= self.config.drop_reference)
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

    def _times(self, rows: int, device: torch.device, generator: torch.Generator) -> Tensor:
        if self.config.time_distribution == "uniform":
            return torch.rand(rows, device=device, generator=generator)
        n = torch.randn(rows, device=device, generator=generator)
        return torch.sigmoid(self.config.time_mean + self.config.time_std * n)


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """Phase 2."""

    gradient_steps: int = 2
    """At most so many of the sampler's last steps are differentiated; how many is drawn per step."""
    pixel_weight: float = 1.0
    structure_weight: float = 0.2
    """Weight of the difference of gradients, which keeps edges and flat areas."""
    contrast_weight: float = 0.0
    """Weight of the difference of local contrast, which squared error alone averages away."""
    denoising_weight: float = 0.2
    """Share of the phase 1 loss, which keeps the model usable with other steps than the sampler's."""
    denoising_rows: float = 1.0
    """Share of a batch's rows that the phase 1 loss sees: fewer make a step cheaper, by up to one pass."""

    def __post_init__(self) -> None:
        if self.gradient_steps < 1:
            raise ValueError(f"gradient_steps must be at least 1, got {self.gradient_steps}")
        if not 0 < self.denoising_rows <= 1:
            raise ValueError(f"denoising_rows must be in (0, 1], got {self.denoising_rows}")


class ReconstructionObjective(nn.Module):
    """Phase 2: sample as in deployment, from pure noise, and compare with the target.

    The last K steps are differentiated (DRaFT-K, Clark et al. 2024), with checkpointing. Unlike the
    authors' code the start never sees the ground truth, and gradients pass through this forward, so
    DDP averages them. At no time is more than one pass through the network kept for its gradient.
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
        """Loss of one batch; K follows from (seed, step), equal on all ranks."""
        image = self._sample(batch, generator, self.num_gradient_steps(step))
        pixel = F.mse_loss(image, batch.target, reduction="none").mean((1, 2, 3))
        structure = structure_loss(image, batch.target)
        own = self.config.pixel_weight * pixel + self.config.structure_weight * structure
        own = own + self.config.contrast_weight * contrast_loss(image, batch.target)
        # Without its graph, which would be as large as that of phase 1's share, and be there at the same time.
        sampled = _differentiated(own.mean(), list(self.denoiser.parameters()))
        del image, pixel, structure, own
        seen = max(1, round(self.config.denoising_rows * len(batch.target)))
        phase1: Loss = self.denoising(Batch(*(part[:seen] for part in batch)), generator, step)
        total = sampled + self.config.denoising_weight * phase1.total
        return phase1._replace(total=total)

    def num_gradient_steps(self, step: int) -> int:
        """K of a training step, in 1..gradient_steps."""
        most = min(self.config.gradient_steps, self.settings.steps)
        return 1 + int(torch.randint(most, (), generator=torch.Generator().manual_seed(self.seed * 1_000_003 + step)))

    def _sample(self, batch: Batch, generator: torch.Generator, gradient_steps: int) -> Tensor:
        condition = self.denoiser.encode(batch.sketch, batch.reference)
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
    """A number whose gradients are known: backward hands them on, once."""

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
    """`loss`, its gradients taken now and its graph freed; in place of its memory stands that of the gradients.

    They still arrive by the backward of what is made from it, so DDP sees them as any others.
    """
    if not loss.requires_grad:
        return loss
    with torch.autocast(loss.device.type, enabled=False):
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    value: Tensor = _Differentiated.apply(loss.detach(), list(gradients), *parameters)  # type: ignore[no-untyped-call]
    return value


class StrictObjective(nn.Module):
    """Either phase as the authors' released code has it, bugs included (models/authors/strict.py).

    Phase 1 is a sum over rows and pixels, without dropped references; phase 2 starts from the ground truth and
    differentiates 10 steps.
    """

    def __init__(self, denoiser: Denoiser, *, reconstruction: bool) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.reconstruction = reconstruction
        self.gammas = authors.gammas(authors.require_fit(denoiser))

    def forward(self, batch: Batch, generator: torch.Generator, step: int = 0) -> Loss:  # noqa: ARG002
        """Loss of one batch; `step` is not used here."""
        condition = self.denoiser.encode(batch.sketch, batch.reference)
        predict = authors.noise_predictor(self.denoiser, condition)
        noise = _normal(batch.target, generator)
        if self.reconstruction:
            injected = [_normal(batch.target, generator) for _ in range(authors.NUM_STEPS)]
            per_row = authors.strict_reconstruction(predict, self.gammas, batch.target, noise, injected)
            return _loss(per_row.mean(), per_row, torch.ones_like(per_row))
        n = torch.randint(len(self.gammas), (len(noise),), device=noise.device, generator=generator)
        per_row = authors.strict_loss(predict, self.gammas, batch.target, noise, n)
        # They have no matcher; where there is one, its parameters are in the graph all the same, as DDP expects.
        return _loss(per_row.sum() + 0 * guess_loss(condition, batch.target), per_row, n / len(self.gammas))


def guess_loss(condition: Condition, target: Tensor) -> Tensor:
    """Squared error of the matcher's own guess, a scalar; 0 without a matcher."""
    if not condition.guess.numel():
        return condition.guess.sum()
    return F.mse_loss(condition.guess.float(), target)


def structure_loss(image: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring-pixel differences, per row [B]."""
    across = ((image.diff(dim=-1) - target.diff(dim=-1)).abs()).mean((1, 2, 3))
    down = ((image.diff(dim=-2) - target.diff(dim=-2)).abs()).mean((1, 2, 3))
    return across + down


def contrast_loss(image: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of local contrast, per row [B].

    It compares how much fine detail there is near a place, not where exactly. The average of all likely pictures, which
    the squared error asks for, has too little.
    """
    return (_local_contrast(image) - _local_contrast(target)).abs().mean((1, 2, 3))


def _local_contrast(images: Tensor) -> Tensor:
    """Root mean square, over 5 x 5 pixels, of what a mean over 3 x 3 takes away."""
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
    """Which phase, and the constants of both (phase 2 keeps a share of phase 1)."""

    name: str = "denoising"
    """denoising (phase 1) or reconstruction (phase 2)."""
    strict: bool = False
    """The phase as the authors' released code has it, bugs included; it has no other settings."""
    denoising: DenoisingConfig = field(default_factory=DenoisingConfig)
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)

    def __post_init__(self) -> None:
        if self.name not in ("denoising", "reconstruction"):
            raise ValueError(f"objective name must be denoising or reconstruction, got {self.name!r}")
        if self.strict and (self.denoising, self.reconstruction) != (DenoisingConfig(), ReconstructionConfig()):
            raise ValueError("a strict objective has no settings, but denoising or reconstruction has some")

    def build(self, denoiser: Denoiser, sampler: SamplerDefaults, seed: int) -> nn.Module:
        """The objective module."""
        if self.strict:
            return StrictObjective(denoiser, reconstruction=self.name == "reconstruction")
        if self.name == "denoising":
            return DenoisingObjective(denoiser, self.denoising)
        return ReconstructionObjective(denoiser, self.reconstruction, sampler, self.denoising, seed)
