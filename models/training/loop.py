"""The one training loop of the repository: torch only, no clock, no I/O of its own.

Everything a step does depends on (seed, step, rank) and the rows it is given, so a run that was
killed and restored ends with the weights of one that was not. Not here: data (pipelines/data/dataset.py),
processes, checkpoints on storage and logging (pipelines/training/driver.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from animediffusion.models.augmentation.augment import AugmentConfig, make_batch
from animediffusion.models.compile import plain_copy
from animediffusion.models.diffusion.denoiser import Denoiser
from animediffusion.models.training.cpu_precision import has_bfloat16
from animediffusion.models.training.ema import exponent
from animediffusion.models.training.muon import Muon
from animediffusion.models.training.objective import Loss

Rows = Mapping[str, Tensor]

WEIGHTS, NUMBERS = "state.safetensors", "state.json"
"""Files of a saved state."""

MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
"""For the environment of a process that trains: glibc keeps what a step frees for the next one, and does
not ask the kernel for zeroed pages each time, 3 to 4 % of a step on a CPU."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, or AdamW and Muon, with warm-up, cosine decay, clipping and a moving average of the weights."""

    learning_rate: float = 1e-3
    final_learning_rate: float = 0.02
    """At the last step, as a share of learning_rate."""
    warmup_steps: int = 50
    cosine_after_warmup: bool = False
    """Warm-up from the final rate, then the cosine over the steps that are left, as the authors do
    (base/optimizer_handler.py of their code); else both at once."""
    muon_learning_rate: float | None = None
    """Of Muon (Jordan et al. 2024: momentum, orthogonalized) for the hidden layers' matrices and kernels, which it
    trains in fewer steps; AdamW has the rest, or everything if None. Same warm-up and decay."""
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    max_grad_norm: float | None = 1.0
    """None is no clipping."""
    ema_decay: float = 0.995
    """0 is no average: the last weights."""
    ema_lengths: tuple[float, ...] = ()
    """Averages that are kept beside it, so that one of them, or any length between two, can be chosen after the run:
    standard deviations of their profiles as shares of the run, see models/training/ema.py. Each makes a checkpoint
    larger by the size of the weights."""
    precision: str = "bf16"
    """bf16 (autocast, on a CPU only where it has instructions for it, see bfloat16.py) or fp32."""

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
    """What a finished step shows."""

    step: int
    """How many steps are done now."""
    loss: Loss
    grad_norm: Tensor
    learning_rate: float


class Snapshot(NamedTuple):
    """A state at one step, apart from the training that goes on."""

    tensors: dict[str, Tensor]
    """In the host's memory, by their names in the file."""
    numbers: dict[str, int]
    """step and max_steps."""


class TrainState:
    """All that must survive a restart: weights, their averages, optimizer, step.

    Args:
        denoiser: on its device.
        config: optimizer settings.
        max_steps: length of the run, for the learning rate.
    """

    def __init__(self, denoiser: Denoiser, config: OptimizerConfig, max_steps: int) -> None:
        self.denoiser = denoiser
        self.config = config
        self.max_steps = max_steps
        self.step = 0
        self.names = [name for name, _ in denoiser.named_parameters()]
        self.parameters = list(denoiser.parameters())
        # Without an average it is the weights themselves.
        self.average = [p.detach().clone() if config.ema_decay else p.detach() for p in self.parameters]
        self.kept = {length: [p.detach().clone() for p in self.parameters] for length in config.ema_lengths}
        hidden = denoiser.network.hidden_weights() if config.muon_learning_rate else []
        dtype = torch.bfloat16 if has_bfloat16(self.parameters[0].device) else torch.float32
        self.muon = Muon(hidden, config.weight_decay, dtype) if hidden else None
        self.momentum = self.muon.momentum if self.muon is not None else {}
        rest = [parameter for parameter in self.parameters if parameter not in self.momentum]
        self.optimizer = torch.optim.AdamW(
            rest, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )

    def learning_rate(self) -> float:
        """AdamW's, of the next step."""
        return self.config.learning_rate * self._decay()

    def _decay(self) -> float:
        """The share of the highest rate; depends on the step alone."""
        c = self.config
        if c.cosine_after_warmup:
            return c.final_learning_rate + (1 - c.final_learning_rate) * self._share()
        warm = min(1.0, (self.step + 1) / max(1, c.warmup_steps))
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, self.step / max(1, self.max_steps))))
        return warm * (c.final_learning_rate + (1 - c.final_learning_rate) * cosine)

    def _share(self) -> float:
        """0 to 1 in the warm-up, then down to 0."""
        warmup = self.config.warmup_steps
        if self.step < warmup:
            return self.step / warmup
        done = min(1.0, (self.step - warmup) / max(1, self.max_steps - warmup))
        return 0.5 * (1 + math.cos(math.pi * done))

    def apply_gradients(self, loss: Tensor | None = None) -> Tensor:
        """Clip, step the optimizer, move the average; returns the gradient norm before clipping.

        Args:
            loss: what the gradients are of, to be named where it is not finite.

        Raises:
            FloatingPointError: the loss or the norm is not finite; weights, average and optimizer are as before.
        """
        norm = self._clip()
        self._require_finite(({} if loss is None else {"loss": loss}) | {"norm of the gradients": norm})
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.step()
        if self.muon is not None:
            self.muon.step((self.config.muon_learning_rate or 0.0) * self._decay())
        for parameter in self.parameters:
            parameter.grad = None
        self.step += 1
        self._average()
        return norm

    def _require_finite(self, scalars: dict[str, Tensor]) -> None:
        # All in one read: the host waits for a GPU here, in each step.
        numbers = torch.stack([scalar.detach().float() for scalar in scalars.values()]).tolist()
        for name, number in zip(scalars, numbers, strict=True):
            if not math.isfinite(number):
                raise FloatingPointError(f"step {self.step}: the {name} is {number:g}")

    def _average(self) -> None:
        weights = [p.detach() for p in self.parameters]
        if self.config.ema_decay:
            # A young run has a short memory, else its first weights would stay in the average.
            decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self.average, weights, 1 - decay)
        for length, average in self.kept.items():
            # Gives the weights of step t the share t^exponent: Karras et al. 2024, section 3.
            decay = (1 - 1 / self.step) ** (exponent(length) + 1)
            torch._foreach_lerp_(average, weights, 1 - decay)

    def _clip(self) -> Tensor:
        limit = self.config.max_grad_norm
        if limit is not None:
            return nn.utils.clip_grad_norm_(self.parameters, limit)
        return nn.utils.get_total_norm(p.grad for p in self.parameters if p.grad is not None)

    def _slots(self, parameter: nn.Parameter) -> dict[str, Any]:
        """What its optimizer remembers of a parameter."""
        if parameter in self.momentum:
            return {"momentum_buffer": self.momentum[parameter]}
        slot: dict[str, Any] = self.optimizer.state[parameter]
        return slot

    def averaged(self) -> Denoiser:
        """The denoiser with the averaged weights, in eval mode; a copy."""
        model = plain_copy(self.denoiser)
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), self.average, strict=True):
                parameter.copy_(value)
        model.eval().requires_grad_(False)
        return model

    def save(self, folder: Path) -> None:
        """Write the state into a folder, see write()."""
        write(self.snapshot(), folder)

    def snapshot(self) -> Snapshot:
        """A copy of the state in the host's memory, which training no longer changes."""
        copies = _to_host(self._tensors())
        return Snapshot(copies, {"step": self.step, "max_steps": self.max_steps})

    def _tensors(self) -> dict[str, Tensor]:
        """All tensors of a state by their names in the file, not copied."""
        tensors: dict[str, Tensor] = {}
        for name, parameter, average in zip(self.names, self.parameters, self.average, strict=True):
            tensors[f"model.{name}"] = parameter.detach()
            tensors[f"average.{name}"] = average
            for key, value in self._slots(parameter).items():
                tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
        for length, kept in self.kept.items():
            tensors |= {f"{_prefix(length)}{name}": tensor for name, tensor in zip(self.names, kept, strict=True)}
        return tensors

    def restore(self, folder: Path) -> None:
        """Continue exactly where `save` was.

        Raises:
            ValueError: if the tensors do not fit this network or optimizer.
        """
        tensors = load_file(folder / WEIGHTS)
        numbers = json.loads((folder / NUMBERS).read_text())
        self.step, self.max_steps = numbers["step"], numbers["max_steps"]
        with torch.no_grad():
            for name, parameter, average in zip(self.names, self.parameters, self.average, strict=True):
                if f"model.{name}" not in tensors or tensors[f"model.{name}"].shape != parameter.shape:
                    raise ValueError(f"{folder}: the checkpoint is of another network, {name} does not fit")
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
            raise ValueError(f"the checkpoint is of another optimizer, it has no memory of {name}")
        if parameter in self.momentum:
            for value in found.values():
                self.momentum[parameter].copy_(value)
            return
        slot = self.optimizer.state[parameter]
        slot |= {key: value.to(parameter.device, copy=True) for key, value in found.items()}
        if f"optimizer.step.{name}" in tensors:
            slot["step"] = tensors[f"optimizer.step.{name}"].to(parameter.device)


def write(snapshot: Snapshot, folder: Path) -> None:
    """state.safetensors and state.json; readable with safetensors alone. Any thread may call it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(snapshot.tensors, folder / WEIGHTS)
    (folder / NUMBERS).write_text(json.dumps(snapshot.numbers))


def _to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies; the host waits for a GPU once, not for each tensor."""
    copies: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        # Page-locked memory is what a GPU writes without the host's help.
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
        copies[name] = host.copy_(tensor.detach(), non_blocking=True)
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.current_stream().synchronize()
    return copies


def averaged_weights(folder: Path) -> dict[str, Tensor]:
    """The averaged weights of a saved state, by the denoiser's names."""
    return _tensors(folder, "average.")


def kept_averages(folder: Path, lengths: Iterable[float]) -> dict[float, dict[str, Tensor]]:
    """The averages that a saved state keeps beside it, by length and the denoiser's names."""
    return {length: _tensors(folder, _prefix(length)) for length in lengths}


def _prefix(length: float) -> str:
    return f"average_{length:g}."


def _tensors(folder: Path, prefix: str) -> dict[str, Tensor]:
    """Those with this prefix; the rest of the file, optimizer and all, is not read."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 - no dictionary
        return {name.removeprefix(prefix): file.get_tensor(name) for name in names}


def fit(
    state: TrainState,
    objective: nn.Module,
    batches: Iterable[Rows],
    until_step: int,
    on_step: Callable[[Step], bool | None],
    *,
    augment: AugmentConfig,
    seed: int,
    rank: int = 0,
) -> None:
    """Train until `until_step`, until `batches` ends, or until `on_step` returns True.

    Args:
        state: what is trained; moved on in place.
        objective: the module whose forward returns a Loss; may be wrapped by DDP.
        batches: decoded rows on the state's device, beginning with those of step `state.step`.
        until_step: stop when so many steps are done.
        on_step: called after each step.
        augment: how rows become a batch.
        seed: of the run.
        rank: of this process; each rank draws its own noise.

    Raises:
        FloatingPointError: loss or gradients are not finite; names the step. The state is as before that step. Under
            DDP all ranks raise at the same step, since one bad row makes the averaged gradients bad on all of them.
    """
    device = state.parameters[0].device
    reduced = state.config.precision == "bf16" and has_bfloat16(device)
    for rows in batches:
        if state.step >= until_step:
            return
        drawn = step_generator(seed, state.step, rank)
        batch = make_batch(rows, augment, drawn)
        generator = drawn if device.type == "cpu" else step_generator(seed, state.step, rank, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=reduced):
            loss: Loss = objective(batch, generator, state.step)
        # Backward, finite or not: the other ranks wait there for these gradients. A loss that is not finite makes them
        # all NaN, since inf * 0 is, and so those of the other ranks, which stop at the same step.
        torch.autograd.backward(loss.total, 0 * loss.total.detach() + 1)
        learning_rate = state.learning_rate()
        norm = state.apply_gradients(loss.total)
        if on_step(Step(state.step, loss, norm, learning_rate)) or state.step >= until_step:
            return


def step_generator(seed: int, step: int, rank: int, device: torch.device | str = "cpu") -> torch.Generator:
    """All randomness of step `step` on rank `rank`."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) % 2**63
    return torch.Generator(device).manual_seed(mixed)
