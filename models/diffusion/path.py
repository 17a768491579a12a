"""The Gaussian path x_t = alpha(t) x_0 + sigma(t) eps, from the image (t = 0) to noise (t = t_max).

Times are floats in [0, t_max]; a network sees 1000 t. Not here: how times are drawn in
training (objective.py) or visited in sampling (sampler.py).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PathConfig:
    """Which path, and its constants."""

    name: str = "flow"
    """linear, cosine or flow."""
    shift: float = 1.0
    """flow only: t' = s t / (1 + (s - 1) t); above 1 is toward noise (Esser et al. 2024, Eq. 23)."""
    sigma_max: float | None = None
    """flow only: the path ends where noise / image is this (EDM's sigma_max); None is pure noise."""
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
        """Share of the image in x_t."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Share of the noise in x_t."""

    @abstractmethod
    def velocity(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha'(t), sigma'(t)), so that dx/dt = alpha' x_0 + sigma' eps."""

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t for x_0 and noise [B, C, H, W] at times [B]."""
        t = spread(t)
        return self.alpha(t) * x_0 + self.sigma(t) * noise

    def start(self, noise: Tensor) -> Tensor:
        """Where sampling begins: x at t_max without an image in it, from standard normal noise."""
        return noise


class FlowPath(Path):
    """alpha = 1 - t', sigma = t' (Liu et al. 2023), with a shift of the time.

    A uniform t with shift s visits sigma / alpha = s t / (1 - t): with s = 0.3 that is SSIMBaD's
    phi(sigma) = sigma / (sigma + 0.3). This path is EDM's x_0 + sigma eps, divided by 1 + sigma.
    """

    def __init__(self, shift: float = 1.0, sigma_max: float | None = None) -> None:
        self.shift = shift
        self.sigma_max = sigma_max
        if sigma_max is not None:
            self.t_max = sigma_max / (sigma_max + shift)

    def start(self, noise: Tensor) -> Tensor:
        # EDM starts at sigma_max eps; the other paths keep the variance at 1.
        return noise if self.sigma_max is None else noise * (self.sigma_max / (1 + self.sigma_max))

    def sigma(self, t: Tensor) -> Tensor:
        return self.shift * t / (1 + (self.shift - 1) * t)

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - self.sigma(t)

    def velocity(self, t: Tensor) -> tuple[Tensor, Tensor]:
        slope = self.shift / (1 + (self.shift - 1) * t) ** 2
        return -slope, slope


class CosinePath(Path):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2) (Nichol & Dhariwal 2021, without their offset)."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(t * (math.pi / 2))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(t * (math.pi / 2))

    def velocity(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -math.pi / 2 * self.sigma(t), math.pi / 2 * self.alpha(t)


class LinearPath(Path):
    """The paper's table: beta linear in the timestep n, alpha^2(n) = prod(1 - beta), t = n / N.

    Between two entries alpha is interpolated linearly. As published, alpha(t_max) = 0.08 is not 0: a network
    trained on that expects some image in what sampling starts from; zero_terminal ends this.
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
        """The table there, copied from the host once: a copy would wait for a GPU, and end the capture of a graph."""
        if (device, dtype) not in self._copies:
            with torch.inference_mode(False):  # training may use it, too
                self._copies[device, dtype] = self.table.to(device, dtype)
        return self._copies[device, dtype]

    def _neighbours(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        table = self._table(t.device, t.dtype)
        place = (t * len(table)).clamp(0, len(table) - 1)
        # A time made from n / N in float32 may lie just beside n: take the entry itself.
        place = torch.where((place - place.round()).abs() < 1e-3, place.round(), place)
        lower = place.floor().long().clamp(max=len(table) - 2)
        return table[lower], table[lower + 1], place - lower

    def alpha(self, t: Tensor) -> Tensor:
        lower, upper, weight = self._neighbours(t)
        return lower + (upper - lower) * weight

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - self.alpha(t) ** 2).clamp(min=0).sqrt()

    def velocity(self, t: Tensor) -> tuple[Tensor, Tensor]:
        lower, upper, _ = self._neighbours(t)
        slope = (upper - lower) * len(self.table)
        return slope, -self.alpha(t) * slope / self.sigma(t).clamp(min=1e-4)


def build_path(config: PathConfig) -> Path:
    """The path that a config names."""
    if config.name == "linear":
        return LinearPath(config)
    return CosinePath() if config.name == "cosine" else FlowPath(config.shift, config.sigma_max)


def spread(t: Tensor) -> Tensor:
    """Times [B] as [B, 1, 1, 1], to multiply images."""
    return t.reshape(-1, 1, 1, 1)
