"""torch.compile for a network: fewer and larger kernels, at the price of a minute or more before the first step.

Not here: who asks for it, see the key `compile` of a training run and of a deployment.
"""

from __future__ import annotations

import copy

import torch

from animediffusion.models.diffusion.denoiser import Denoiser

METHODS = ("encode", "encode_reference", "combine", "denoise")
"""Methods of a network that are called from outside."""


def compiled(denoiser: Denoiser, *, backend: str = "inductor", dynamic: bool | None = False) -> Denoiser:
    """The same denoiser; its network compiles itself at the first call with each shape.

    Args:
        denoiser: on its device.
        backend: of torch.compile.
        dynamic: whether one compilation is for all shapes; False compiles each shape by itself.

    Raises:
        ValueError: no compiler works on this machine; the denoiser is unchanged.
    """
    _check(next(denoiser.parameters()).device, backend)
    for name in METHODS:
        method = getattr(denoiser.network, name)
        setattr(denoiser.network, name, torch.compile(method, backend=backend, dynamic=dynamic))
    return denoiser


def plain_copy(denoiser: Denoiser) -> Denoiser:
    """A deep copy that is not compiled: a compiled method would go on using the weights of the original."""
    made = copy.deepcopy(denoiser)
    for name in METHODS:
        made.network.__dict__.pop(name, None)
    return made


def _check(device: torch.device, backend: str) -> None:
    """Compile one small function, since torch finds out at the first call that a compiler is missing."""
    try:
        torch.compile(lambda x: x.sin() + 1, backend=backend)(torch.zeros(8, device=device))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        message = f"compile on {device.type}: no compiler works here ({reason}); install a C++ compiler, or turn it off"
        raise ValueError(message) from error
