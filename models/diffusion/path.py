"""The Gaussian path x_t = alpha(t) x_0 + sigma(t) eps, from the image (t = 0) to noise (t = t_max).

Times are floats in [0, t_max]; a network's time embedding gets 1000 t. Training draws times in
models/training/objective.py; sampling spaces them in sampler.py.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PathConfig:
    """Name and constants of a path."""

    name: str = "flow"
    """linear, cosine or flow."""
    shift: float = 1.0
    """flow only: t' = s t / (1 + (s - 1) t); a shift above 1 moves times toward noise (Esser et al. 2024, Eq. 23)."""
    sigma_max: float | None = None
    """flow only: ratio sigma / alpha at the end of the path (EDM's sigma_max); None ends in pure noise."""
    num_train_timesteps: int = 1000
    """linear only: length of the table."""
    beta_start: float = 1e-6
    beta_end: float = 1e-2
    zero_terminal: bool = False
    """linear only: stretch the table so that it ends in pure noise (Lin et al. 2024, Algorithm 1)."""

    def __post_init__(self) -> None:
        if self.name not in ("linear", "cosine", "flow"):
            raise ValueError(f"path name must be linear, cosine or flow, got {self.name!r}")
        if self.shift <= 0:
            raise ValueError(f"path shift must be above 0, got {self.shift}")
        if self.sigma_max is not None and (self.name != "flow" or self.sigma_max <= 0):
            raise ValueError(f"sigma_max must be above 0 and on path flow, got {self.sigma_max} on {self.name!r}")
        if self.zero_terminal and self.name != "linear":
            raise ValueError(f"zero_terminal is for path linear, got {self.name!r}")
        if self.num_train_timesteps < 2:
            raise ValueError(f"num_train_timesteps must be at least 2, got {self.num_train_timesteps}")
        largest = self.beta_end * 1000 / self.num_train_timesteps
        if not 0 < self.beta_start <= self.beta_end or largest >= 1:
            raise ValueError(f"betas must rise within (0, 1), got {self.beta_start} to {self.beta_end}")


class Path(ABC):
    """alpha(t), sigma(t) and their derivatives; t is a tensor of any shape."""

    t_max: float = 1.0

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Return the factor of the image in x_t."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Return the factor of the noise in x_t."""

    @abstractmethod
    def velocity(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha'(t), sigma'(t)), so that dx/dt = alpha' x_0 + sigma' eps."""

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t for x_0 and noise [B, C, H, W] at times [B]."""
        t = per_image(t)
        return self.alpha(t) * x_0 + self.sigma(t) * noise

    def start(self, noise: Tensor) -> Tensor:
        """Return the start of sampling, x at t_max without an image, from standard normal noise."""
        return noise


class FlowPath(Path):
    """The path alpha = 1 - t', sigma = t' (Liu et al. 2023), with shifted time t'.

    At time t, shift s gives sigma / alpha = s t / (1 - t); with s = 0.3 and uniform t this is SSIMBaD's
    phi(sigma) = sigma / (sigma + 0.3). The path equals EDM's x_0 + sigma eps, divided by 1 + sigma.
    """

    def __init__(self, shift: float = 1.0, sigma_max: float | None = None) -> None:
        self.shift = shift
        self.sigma_max = sigma_max
        if sigma_max is not None:
            self.t_max = sigma_max / (sigma_max + shift)

    def start(self, noise: Tensor) -> Tensor:
        # With sigma_max, start like EDM at sigma_max eps (divided by 1 + sigma_max, as the whole path is).
        return noise if self.sigma_max is None else noise * (self.sigma_max / (1 + self.sigma_max))

    def sigma(self, t: Tensor) -> Tensor:
        return self.shift * t / (1 + (self.shift - 1) * t)

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - self.sigma(t)

    def velocity(self, t: Tensor) -> tuple[Tensor, Tensor]:
        slope = self.shift / (1 + (self.shift - 1) * t) ** 2
        return -slope, slope


class CosinePath(Path):
    """The path alpha = cos(pi t / 2), sigma = sin(pi t / 2) (Nichol & Dhariwal 2021, without their offset)."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(t * (math.pi / 2))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(t * (math.pi / 2))

    def velocity(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -math.pi / 2 * self.sigma(t), math.pi / 2 * self.alpha(t)


class LinearPath(Path):
    """The paper's table: beta linear in the timestep n, alpha^2(n) = prod(1 - beta), t = n / N.

    Between two entries alpha is interpolated linearly. As published, alpha(t_max) is 0.08, not 0, so a network trained
    on this path expects a trace of the image at the start of sampling; zero_terminal removes it.
    """

    def __init__(self, config: PathConfig) -> None:
        self.config = config
        num = config.num_train_timesteps
        scale = 1000 / num
        betas = torch.linspace(
            config.beta_start * scale, config.beta_end * scale, num, dtype=torch.float64, device="cpu"
        )
        self.table = torch.cumprod(1 - betas, 0).sqrt()
        if config.zero_terminal:
            first, last = self.table[0], self.table[-1]
            self.table = (self.table - last) * first / (first - last)
        self.t_max = (num - 1) / num
        self._copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def _table(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the table on that device, cached: a copy makes the host wait and breaks the capture of CUDA graphs."""
        if (device, dtype) not in self._copies:
            with torch.inference_mode(False):  # Training may also use the cached tensor.
                self._copies[device, dtype] = self.table.to(device, dtype)
        return self._copies[device, dtype]

    def _neighbors(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the entries of alpha before and after t, and the weight of the later one."""
        table = self._table(t.device, t.dtype)
        entry = (t * len(table)).clamp(0, len(table) - 1)
        # In float32, t = n / N may fall slightly off entry n; snap to the entry.
        entry = torch.where((entry - entry.round()).abs() < 1e-3, entry.round(), entry)
        lower = entry.floor().long().clamp(max=len(table) - 2)
        return table[lower], table[lower + 1], entry - lower

    def alpha(self, t: Tensor) -> Tensor:
        lower, upper, weight = self._neighbors(t)
        return lower + (upper - lower) * weight

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - self.alpha(t) ** 2).clamp(min=0).sqrt()

    def velocity(self, t: Tensor) -> tuple[Tensor, Tensor]:
        lower, upper, _ = self._neighbors(t)
        slope = (upper - lower) * len(self.table)
        return slope, -self.alpha(t) * slope / self.sigma(t).clamp(min=1e-4)


def build_path(config: PathConfig) -> Path:
    """Build the path of a configuration."""
    if config.name == "linear":
        return LinearPath(config)
    return CosinePath() if config.name == "cosine" else FlowPath(config.shift, config.sigma_max)


def per_image(t: Tensor) -> Tensor:
    """Reshape times [B] to [B, 1, 1, 1], so that they broadcast over images."""
    return t.reshape(-1, 1, 1, 1)
