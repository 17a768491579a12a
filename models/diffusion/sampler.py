"""Deterministic samplers turn noise into an image in a few network evaluations.

Each sampler consists of three pure functions over a `State` of batched tensors, so a training loop, a plain
`sample()` and a server with rows at different steps can use the same code:

    state = sampler.start(noise, times)
    while not sampler.done(state).all():
        x, t = sampler.query(state)
        state = sampler.advance(state, denoise(x, t))

This module sets neither grad mode nor dtype, device or seed. Shapes: B rows, N steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from animediffusion.models.diffusion.path import Path, per_image

Denoise = Callable[[Tensor, Tensor], Tensor]
"""Function (x_t [B, 3, H, W], t [B]) -> estimate of x_0 [B, 3, H, W]."""


class State(NamedTuple):
    """State of the rows being sampled; rows can be selected and concatenated freely."""

    x: Tensor
    """[B, 3, H, W]: the image at times[step]."""
    times: Tensor
    """[B, N + 1]: decreasing, ends in 0; shorter rows are padded with 0."""
    step: Tensor
    """int64 [B]: number of finished steps."""
    stage: Tensor
    """int64 [B]: index of the step's next network evaluation (heun has two)."""
    x_0: Tensor
    """[B, 3, H, W]: the last estimate of the image."""
    x_trial: Tensor
    """[B, 3, H, W]: heun: result of the first-order step; other samplers: same as x."""


class Sampler(ABC):
    """A solver of a path's probability-flow ODE."""

    stages = 1
    """Network evaluations of a step; the last step may need fewer."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def num_evaluations(self, steps: int) -> int:
        """Return the number of network evaluations per image, without those for guidance."""
        return steps

    def evaluation_times(self, times: Tensor) -> Tensor:
        """Return the time of each network evaluation, in order: [num_evaluations] for times [N + 1]."""
        return times[:-1]

    def start(self, noise: Tensor, times: Tensor) -> State:
        """Return the state at the first time, t_max: pure noise, or the path's nearest equivalent.

        Args:
            noise: standard normal, [B, 3, H, W].
            times: [B, N + 1] or [N + 1], decreasing to 0.
        """
        times = times.expand(len(noise), -1) if times.ndim == 1 else times
        zeros = torch.zeros(len(noise), dtype=torch.int64, device=noise.device)
        x = self.path.start(noise)
        return State(x, times, zeros, zeros, torch.zeros_like(x), x)

    def query(self, state: State) -> tuple[Tensor, Tensor]:
        """Return the input of the next network evaluation: (x [B, 3, H, W], t [B])."""
        return state.x, _time(state, 0)

    @abstractmethod
    def advance(self, state: State, x_0: Tensor) -> State:
        """Return the state after an estimate of x_0 at `query(state)`; finished rows stay as they are."""

    def done(self, state: State) -> Tensor:
        """Return bool [B]: whether each row's image (state.x) is finished."""
        return _time(state, 0) <= 0

    def _toward(self, x: Tensor, x_0: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """Take the step that is exact for a constant estimate: DDIM (Song et al. 2021, Eq. 12 with eta = 0)."""
        t, t_next = per_image(t), per_image(t_next)
        ratio = self.path.sigma(t_next) / self.path.sigma(t)
        return self.path.alpha(t_next) * x_0 + ratio * (x - self.path.alpha(t) * x_0)


class Euler(Sampler):
    """DDIM (Song et al. 2021, Eq. 12), which is Euler's method on the path."""

    def advance(self, state: State, x_0: Tensor) -> State:
        x = self._toward(state.x, x_0, _time(state, 0), _time(state, 1))
        return _next(state, self.done(state), x, x_0)


class DPMPP2M(Sampler):
    """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2); the first and last steps are first order."""

    def advance(self, state: State, x_0: Tensor) -> State:
        before, now, after = _time(state, -1), _time(state, 0), _time(state, 1)
        h, h_before = self._log_snr(after) - self._log_snr(now), self._log_snr(now) - self._log_snr(before)
        # If h_before is infinite (start in pure noise) or h is (end in the image), x_0 is used as it is.
        weight = torch.where((state.step > 0) & (after > 0), 0.5 * h / h_before, 0.0)
        weight = per_image(weight.nan_to_num(0.0, 0.0, 0.0))
        x = self._toward(state.x, x_0 + weight * (x_0 - state.x_0), now, after)
        return _next(state, self.done(state), x, x_0)

    def _log_snr(self, t: Tensor) -> Tensor:
        return self.path.alpha(t).log() - self.path.sigma(t).log()


class Heun(Sampler):
    """Heun's second-order method on dx/dt = alpha' x_0 + sigma' eps; the last step is first order."""

    stages = 2

    def num_evaluations(self, steps: int) -> int:
        return 2 * steps - 1

    def evaluation_times(self, times: Tensor) -> Tensor:
        return times[:-1].repeat_interleave(2)[1:]

    def query(self, state: State) -> tuple[Tensor, Tensor]:
        second = state.stage == 1
        return torch.where(per_image(second), state.x_trial, state.x), torch.where(
            second, _time(state, 1), _time(state, 0)
        )

    def advance(self, state: State, x_0: Tensor) -> State:
        now, after = _time(state, 0), _time(state, 1)
        second = state.stage == 1
        trial = self._toward(state.x, x_0, now, after)
        slope = self._slope(state.x, state.x_0, now) + self._slope(state.x_trial, x_0, after)
        corrected = state.x + per_image(after - now) * 0.5 * slope
        finished_step = second | (after <= 0)
        moved = _next(state, self.done(state), torch.where(per_image(second), corrected, trial), x_0)
        waiting = state._replace(stage=torch.ones_like(state.stage), x_0=x_0, x_trial=trial)
        return _where(finished_step | self.done(state), moved, waiting)

    def _slope(self, x: Tensor, x_0: Tensor, t: Tensor) -> Tensor:
        t = per_image(t)
        alpha_dot, sigma_dot = self.path.velocity(t)
        eps = (x - self.path.alpha(t) * x_0) / self.path.sigma(t).clamp(min=1e-12)
        return alpha_dot * x_0 + sigma_dot * eps


_CLASSES: dict[str, type[Sampler]] = {"euler": Euler, "heun": Heun, "dpmpp_2m": DPMPP2M}
SAMPLERS = tuple(_CLASSES)


def build_sampler(name: str, path: Path) -> Sampler:
    """Build the named sampler for a path.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in _CLASSES:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {name!r}")
    return _CLASSES[name](path)


def sample_times(path: Path, steps: int, *, shift: float = 1.0) -> Tensor:
    """Return decreasing times from t_max to 0, [steps + 1].

    With shift 1 they are evenly spaced; with a shift above 1 more of them are near noise (as in PathConfig.shift).

    Raises:
        ValueError: if steps is below 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    even = torch.linspace(1, 0, steps + 1)
    return path.t_max * shift * even / (1 + (shift - 1) * even)


def sample(sampler: Sampler, denoise: Denoise, noise: Tensor, times: Tensor) -> Tensor:
    """Return images [B, 3, H, W] from noise of that shape; call it in torch.no_grad() if no gradients are needed."""
    state = sampler.start(noise, times)
    # Count the evaluations instead of calling `done`, which would make the host wait for the device in every step.
    for _ in range(sampler.num_evaluations(times.shape[-1] - 1)):
        state = sampler.advance(state, denoise(*sampler.query(state)))
    return state.x


def cat_states(states: Sequence[State]) -> State:
    """Concatenate the rows of several states of one sampler; times are padded with 0."""
    longest = max(state.times.shape[1] for state in states)
    padded = (s._replace(times=torch.nn.functional.pad(s.times, (0, longest - s.times.shape[1]))) for s in states)
    return State(*(torch.cat(parts) for parts in zip(*padded, strict=True)))


def select_states(state: State, index: Tensor | slice) -> State:
    """Select rows by `index` (a slice, a bool mask [B] or row numbers)."""
    return State(*(part[index] for part in state))


def _time(state: State, offset: int) -> Tensor:
    """Return [B]: the time `offset` steps after each row's current time."""
    index = (state.step + offset).clamp(0, state.times.shape[1] - 1)
    return state.times.gather(1, index[:, None])[:, 0]


def _next(state: State, done: Tensor, x: Tensor, x_0: Tensor) -> State:
    zero = torch.zeros_like(state.stage)
    return _where(done, state, State(x, state.times, state.step + 1, zero, x_0, x))


def _where(mask: Tensor, yes: State, no: State) -> State:
    return State(*(torch.where(mask.reshape(-1, *[1] * (a.ndim - 1)), a, b) for a, b in zip(yes, no, strict=True)))
