"""The optimizer AdamW, with the fused kernel of torch.optim.AdamW and the same results, bit by bit.

torch.optim.AdamW imports torch's compiler as soon as an optimizer is made, which takes every training process 1.3
seconds, also if it compiles nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

EPSILON = 1e-8


class AdamW:
    """The AdamW optimizer.

    Args:
        parameters: the parameters to train, of one dtype and on one device.
        betas: decay of the averages of the gradients and of their squares, each in [0, 1).
        weight_decay: decoupled weight decay.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], betas: tuple[float, float], weight_decay: float) -> None:
        self.betas, self.weight_decay = betas, weight_decay
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {parameter: {} for parameter in parameters}
        """The tensors `step`, `exp_avg` and `exp_avg_sq` of each parameter that has been updated."""

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update the parameters that have gradients."""
        trained = [parameter for parameter in self.state if parameter.grad is not None]
        if not trained:
            return
        states = [self.state[parameter] for parameter in trained]
        for parameter, state in zip(trained, states, strict=True):
            if not state:
                state["step"] = torch.zeros((), device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        steps, averages, squares = ([state[name] for state in states] for name in ("step", "exp_avg", "exp_avg_sq"))
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            [*trained],
            [parameter.grad for parameter in trained if parameter.grad is not None],
            averages,
            squares,
            [],
            steps,
            amsgrad=False,
            lr=learning_rate,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=self.weight_decay,
            eps=EPSILON,
            maximize=False,
        )
