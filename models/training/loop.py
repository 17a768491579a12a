"""The training loop of all runs; it uses only torch, and neither reads a clock nor does I/O.

Apart from the state, a step depends only on (seed, step, rank) and its rows, so a run that was killed and resumed ends
with the same weights as an uninterrupted run. pipelines/data/stream.py provides the data; pipelines/training/driver.py
handles processes, checkpoints on storage and logging.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from animediffusion.models.augmentation.augment import AugmentConfig, make_batch
from animediffusion.models.compile import plain_copy
from animediffusion.models.diffusion.denoiser import Denoiser
from animediffusion.models.training.adamw import AdamW
from animediffusion.models.training.cpu_precision import has_bfloat16
from animediffusion.models.training.ema import exponent
from animediffusion.models.training.muon import Muon
from animediffusion.models.training.objective import Loss

Rows = Mapping[str, Tensor]

WEIGHTS, NUMBERS = "state.safetensors", "state.json"
"""File names of a saved state."""
OLD_UNKNOWN_LENGTH = 1 << 40
"""The max_steps that version 0.1 saved while the length of the run was unknown."""

MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
"""Environment variables of a training process: glibc keeps freed memory for the next step instead of requesting zeroed
pages from the kernel again, which would take 3 to 4 % of a step on a CPU."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Settings of AdamW (optionally with Muon), warm-up, cosine decay, clipping and the weights' moving average."""

    learning_rate: float = 1e-3
    final_learning_rate: float = 0.02
    """Learning rate of the last step, as a fraction of learning_rate."""
    warmup_steps: int = 50
    cosine_after_warmup: bool = False
    """If true, the warm-up starts from the final rate and the cosine covers the remaining steps, as in the authors'
    code (base/optimizer_handler.py). If false, the warm-up multiplies a cosine over the whole run."""
    muon_learning_rate: float | None = None
    """Learning rate of Muon (Jordan et al. 2024: orthogonalized momentum), which trains the hidden layers' matrices and
    kernels in fewer steps; AdamW trains the rest, or everything if this is None. Warm-up and decay apply to both."""
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    max_grad_norm: float | None = 1.0
    """Largest gradient norm; None disables clipping."""
    ema_decay: float = 0.995
    """Decay of the weights' moving average; 0 disables the average and uses the last weights."""
    ema_lengths: tuple[float, ...] = ()
    """Lengths of additional averages; after the run, one of them or any length between two of them can be chosen. A
    length is the standard deviation of the profile as a fraction of the run (models/training/ema.py). Each average
    enlarges a checkpoint by the size of the weights."""
    precision: str = "bf16"
    """bf16 (autocast, used only on devices that support it, see models/training/cpu_precision.py) or fp32."""

    def __post_init__(self) -> None:
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"precision must be bf16 or fp32, got {self.precision!r}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        for length in self.ema_lengths:
            exponent(length)
        if len(set(self.ema_lengths)) != len(self.ema_lengths):
            raise ValueError(f"ema_lengths must differ, got {self.ema_lengths}")
        if self.learning_rate <= 0 or (self.max_grad_norm is not None and self.max_grad_norm <= 0):
            raise ValueError(
                f"learning_rate and max_grad_norm must be above 0, got {self.learning_rate} and {self.max_grad_norm}"
            )
        if self.muon_learning_rate is not None and self.muon_learning_rate <= 0:
            raise ValueError(f"muon_learning_rate must be above 0, got {self.muon_learning_rate}")
        if self.warmup_steps < 0 or self.weight_decay < 0 or not 0 <= self.final_learning_rate <= 1:
            raise ValueError("warmup_steps and weight_decay must not be negative, final_learning_rate in 0..1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {self.betas}")


class Step(NamedTuple):
    """Results of a finished step."""

    step: int
    """Number of finished steps, this one included."""
    loss: Loss
    grad_norm: Tensor
    learning_rate: float


class Snapshot(NamedTuple):
    """A copy of the state at one step, which further training does not change."""

    tensors: dict[str, Tensor]
    """Tensors in the host's memory, by their names in the file."""
    numbers: dict[str, int | None]
    """The values of step and max_steps."""


class TrainState:
    """The state that must survive a restart: weights, their averages, optimizer, step.

    Args:
        denoiser: the model to train, already on its device.
        config: optimizer settings.
        max_steps: length of the run, which the learning rate's schedule needs; None while it is unknown.
    """

    def __init__(self, denoiser: Denoiser, config: OptimizerConfig, max_steps: int | None) -> None:
        self.denoiser = denoiser
        self.config = config
        self.max_steps = max_steps
        self.step = 0
        self.names = [name for name, _ in denoiser.named_parameters()]
        self.parameters = list(denoiser.parameters())
        # If no average is kept, `average` shares memory with the weights.
        self.average = [p.detach().clone() if config.ema_decay else p.detach() for p in self.parameters]
        self.kept = {length: [p.detach().clone() for p in self.parameters] for length in config.ema_lengths}
        hidden = denoiser.network.hidden_weights() if config.muon_learning_rate else []
        dtype = torch.bfloat16 if has_bfloat16(self.parameters[0].device) else torch.float32
        self.muon = Muon(hidden, config.weight_decay, dtype) if hidden else None
        self.momentum = self.muon.momentum if self.muon is not None else {}
        rest = [parameter for parameter in self.parameters if parameter not in self.momentum]
        self.optimizer = AdamW(rest, config.betas, config.weight_decay)

    def learning_rate(self) -> float:
        """Return AdamW's learning rate in the next step."""
        return self.config.learning_rate * self._decay()

    def _decay(self) -> float:
        """Return the next step's fraction of the highest learning rate."""
        c = self.config
        if c.cosine_after_warmup:
            return c.final_learning_rate + (1 - c.final_learning_rate) * self._share()
        warm = min(1.0, (self.step + 1) / max(1, c.warmup_steps))
        cosine = 0.5 * (1 + math.cos(math.pi * self._done()))
        return warm * (c.final_learning_rate + (1 - c.final_learning_rate) * cosine)

    def _share(self) -> float:
        """Return a number that rises from 0 to 1 in the warm-up and then falls to 0."""
        warmup = self.config.warmup_steps
        if self.step < warmup:
            return self.step / warmup
        return 0.5 * (1 + math.cos(math.pi * self._done(warmup)))

    def _done(self, begin: int = 0) -> float:
        """Return the fraction of the steps from `begin` on that are done; 0 while the length is unknown."""
        if self.max_steps is None:
            return 0.0
        return min(1.0, (self.step - begin) / max(1, self.max_steps - begin))

    def apply_gradients(self, loss: Tensor | None = None) -> Tensor:
        """Clip the gradients, step the optimizers and update the averages; return the gradient norm before clipping.

        Args:
            loss: the loss that the gradients belong to, which is also checked to be finite.

        Raises:
            FloatingPointError: if loss or norm is not finite; weights, averages and optimizers are then unchanged.
        """
        norm = self._clip()
        self._require_finite(({} if loss is None else {"loss": loss}) | {"norm of the gradients": norm})
        self.optimizer.step(self.learning_rate())
        if self.muon is not None:
            self.muon.step((self.config.muon_learning_rate or 0.0) * self._decay())
        for parameter in self.parameters:
            parameter.grad = None
        self.step += 1
        self._update_averages()
        return norm

    def _require_finite(self, scalars: dict[str, Tensor]) -> None:
        # The host waits for the GPU here in every step, so read all values in one transfer.
        numbers = torch.stack([scalar.detach().float() for scalar in scalars.values()]).tolist()
        for name, number in zip(scalars, numbers, strict=True):
            if not math.isfinite(number):
                raise FloatingPointError(f"step {self.step}: the {name} is {number:g}")

    def _update_averages(self) -> None:
        weights = [p.detach() for p in self.parameters]
        if self.config.ema_decay:
            # A smaller decay in the first steps keeps the initial weights from lingering in the average.
            decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self.average, weights, 1 - decay)
        for length, average in self.kept.items():
            # The weights of step t get a share proportional to t^exponent (Karras et al. 2024, section 3).
            decay = (1 - 1 / self.step) ** (exponent(length) + 1)
            torch._foreach_lerp_(average, weights, 1 - decay)

    def _clip(self) -> Tensor:
        limit = self.config.max_grad_norm
        if limit is not None:
            return nn.utils.clip_grad_norm_(self.parameters, limit)
        return nn.utils.get_total_norm(p.grad for p in self.parameters if p.grad is not None)

    def _optimizer_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return the optimizer's tensors for a parameter, by their names in torch."""
        if parameter in self.momentum:
            return {"momentum_buffer": self.momentum[parameter]}
        return self.optimizer.state[parameter]

    def averaged(self) -> Denoiser:
        """Return a copy of the denoiser with the averaged weights, in eval mode."""
        model = plain_copy(self.denoiser)
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), self.average, strict=True):
                parameter.copy_(value)
        model.eval().requires_grad_(False)
        return model

    def save(self, folder: Path) -> None:
        """Write the state to a folder, see write()."""
        write(self.snapshot(), folder)

    def snapshot(self) -> Snapshot:
        """Copy the state to the host's memory, independent of further training."""
        copies = _to_host(self._tensors())
        return Snapshot(copies, {"step": self.step, "max_steps": self.max_steps})

    def _tensors(self) -> dict[str, Tensor]:
        """Return all tensors of the state by their names in the file, without copying them."""
        tensors: dict[str, Tensor] = {}
        for name, parameter, average in zip(self.names, self.parameters, self.average, strict=True):
            tensors[f"model.{name}"] = parameter.detach()
            tensors[f"average.{name}"] = average
            for key, value in self._optimizer_state(parameter).items():
                tensors[f"optimizer.{key}.{name}"] = value
        for length, kept in self.kept.items():
            tensors |= {f"{_prefix(length)}{name}": tensor for name, tensor in zip(self.names, kept, strict=True)}
        return tensors

    def restore(self, folder: Path) -> None:
        """Load a state that `save` wrote, so that training resumes exactly from there.

        Raises:
            ValueError: if the tensors do not fit this network or optimizer, or lack an average of `ema_lengths`.
        """
        tensors = load_file(folder / WEIGHTS)
        numbers = json.loads((folder / NUMBERS).read_text())
        self.step, length = numbers["step"], numbers["max_steps"]
        self.max_steps = None if length == OLD_UNKNOWN_LENGTH else length
        with torch.no_grad():
            for name, parameter, average in zip(self.names, self.parameters, self.average, strict=True):
                if f"model.{name}" not in tensors or tensors[f"model.{name}"].shape != parameter.shape:
                    raise ValueError(f"{folder}: the checkpoint is from another network: {name} does not fit")
                parameter.copy_(tensors[f"model.{name}"])
                average.copy_(tensors[f"average.{name}"])
                self._restore_optimizer(name, parameter, tensors)
            for length, kept in self.kept.items():
                for name, average in zip(self.names, kept, strict=True):
                    if _prefix(length) + name not in tensors:
                        raise ValueError(f"{folder}: the checkpoint has no average of length {length:g}")
                    average.copy_(tensors[_prefix(length) + name])

    def _restore_optimizer(self, name: str, parameter: nn.Parameter, tensors: dict[str, Tensor]) -> None:
        keys = ("momentum_buffer",) if parameter in self.momentum else ("exp_avg", "exp_avg_sq")
        found = {key: tensors[f"optimizer.{key}.{name}"] for key in keys if f"optimizer.{key}.{name}" in tensors}
        if self.step and len(found) < len(keys):
            raise ValueError(f"the checkpoint is from another optimizer: it has no state for {name}")
        if parameter in self.momentum:
            for value in found.values():
                self.momentum[parameter].copy_(value)
            return
        state = self.optimizer.state[parameter]
        state |= {key: value.to(parameter.device, copy=True) for key, value in found.items()}
        if f"optimizer.step.{name}" in tensors:
            state["step"] = tensors[f"optimizer.step.{name}"].to(parameter.device)


def write(snapshot: Snapshot, folder: Path) -> None:
    """Write state.safetensors and state.json to a folder; any thread may call this function."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(snapshot.tensors, folder / WEIGHTS)
    (folder / NUMBERS).write_text(json.dumps(snapshot.numbers))


def _to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to contiguous host memory, waiting for a GPU once instead of once per tensor."""
    copies: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        # A GPU can write asynchronously only to page-locked memory.
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
        copies[name] = host.copy_(tensor.detach(), non_blocking=True)
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.current_stream().synchronize()
    return copies


def averaged_weights(folder: Path) -> dict[str, Tensor]:
    """Read the averaged weights of a saved state, by their names in the denoiser."""
    return _tensors(folder, "average.")


def kept_averages(folder: Path, lengths: Iterable[float]) -> dict[float, dict[str, Tensor]]:
    """Read the additional averages of a saved state, by length and then by their names in the denoiser."""
    return {length: _tensors(folder, _prefix(length)) for length in lengths}


def _prefix(length: float) -> str:
    return f"average_{length:g}."


def _tensors(folder: Path, prefix: str) -> dict[str, Tensor]:
    """Read only the tensors whose names have this prefix, and remove the prefix."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 - not a dictionary
        return {name.removeprefix(prefix): file.get_tensor(name) for name in names}


def fit(
    state: TrainState,
    objective: nn.Module,
    batches: Iterable[Rows],
    until_step: int | None,
    on_step: Callable[[Step], bool | None],
    *,
    augment: AugmentConfig,
    seed: int,
    rank: int = 0,
) -> None:
    """Train until `until_step` (None: no limit), until `batches` ends, or until `on_step` returns True.

    Args:
        state: the state to train, updated in place.
        objective: a module whose forward returns a Loss; DDP may wrap it.
        batches: decoded rows, their pictures on the state's device, beginning with those of step `state.step`.
        until_step: the number of finished steps at which to stop.
        on_step: function that is called after each step.
        augment: settings for making a batch from rows.
        seed: seed of the run.
        rank: rank of this process; each rank draws its own random numbers.

    Raises:
        FloatingPointError: if loss or gradients are not finite; the message names the step, and the state is as before
            it. Under DDP all ranks raise at the same step, because the averaged gradients are not finite on any rank.
    """
    device = state.parameters[0].device
    reduced = state.config.precision == "bf16" and has_bfloat16(device)
    for rows in batches:
        if until_step is not None and state.step >= until_step:
            return
        drawn = step_generator(seed, state.step, rank)
        batch = make_batch(rows, augment, drawn)
        generator = drawn if device.type == "cpu" else step_generator(seed, state.step, rank, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=reduced):
            loss: Loss = objective(batch, generator, state.step)
        # Run backward even if the loss is not finite, because the other ranks wait for these gradients. The factor is
        # then NaN (inf * 0) and otherwise 1; it makes all gradients NaN on all ranks, so they stop at the same step.
        # Given to backward() as the incoming gradient, it would make torch import sympy, which takes half a second.
        (loss.total * (0 * loss.total.detach() + 1)).backward()  # type: ignore[no-untyped-call]
        learning_rate = state.learning_rate()
        norm = state.apply_gradients(loss.total)
        if on_step(Step(state.step, loss, norm, learning_rate)) or state.step == until_step:
            return


def step_generator(seed: int, step: int, rank: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return the generator of all random numbers of one step on one rank."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) % 2**63
    return torch.Generator(device).manual_seed(mixed)
