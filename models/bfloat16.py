"""Training where a CPU has no instructions for bfloat16: torch's loops for it take up to 40 times as long as float32.

Not here: the training loop, which asks, see models/training.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is worth its while there: on a CPU where oneDNN has kernels for it, on all else always."""
    if device.type != "cpu":
        return True
    there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(there and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Float32Muon(torch.optim.Muon):
    """torch's Muon (Jordan et al. 2024), which orthogonalizes in bfloat16 whatever the device, in float32."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        slot = self.state[parameter]
        if "momentum_buffer" not in slot:
            slot["momentum_buffer"] = torch.zeros_like(gradient, memory_format=torch.preserve_format)
        momentum = slot["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        update = orthogonalize(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
        rows, columns = parameter.shape
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))


def orthogonalize(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """The matrix [rows, columns] with its singular values brought near 1, by a quintic Newton-Schulz iteration."""
    tall = matrix.shape[0] > matrix.shape[1]
    wide: Tensor = matrix.T if tall else matrix  # the smaller of the two products is formed
    wide = wide.float() / wide.float().norm().clamp(min=eps)
    first, third, fifth = coefficients
    for _ in range(steps):
        square = wide @ wide.T
        wide = first * wide + (third * square + fifth * (square @ square)) @ wide
    return wide.T if tall else wide
