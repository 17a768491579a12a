"""Apply torch.compile to a network: fewer, larger kernels, but a minute or more of compilation before the first step.

The setting `compile` of a training run and of a deployment turns it on.
"""

from __future__ import annotations

import copy

import torch

from animediffusion.models.diffusion.denoiser import Denoiser

METHODS = ("encode", "encode_reference", "combine", "denoise")
"""Methods of a network that other modules call."""


def compiled(denoiser: Denoiser, *, backend: str = "inductor", dynamic: bool | None = False) -> Denoiser:
    """Make the denoiser's network compile itself on its first call with each shape; return the same denoiser.

    Args:
        denoiser: a denoiser that is already on its device.
        backend: the backend of torch.compile.
        dynamic: the argument of torch.compile: False compiles each shape separately, True compiles once for all shapes.

    Raises:
        ValueError: if no compiler works on this machine; the denoiser is then unchanged.
    """
    _check(next(denoiser.parameters()).device, backend)
    for name in METHODS:
        method = getattr(denoiser.network, name)
        setattr(denoiser.network, name, torch.compile(method, backend=backend, dynamic=dynamic))
    return denoiser


def plain_copy(denoiser: Denoiser) -> Denoiser:
    """Return a deep copy that is not compiled; a copied compiled method would keep using the original's weights."""
    made = copy.deepcopy(denoiser)
    for name in METHODS:
        made.network.__dict__.pop(name, None)
    return made


def _check(device: torch.device, backend: str) -> None:
    """Compile a small function, because torch detects a missing compiler only on the first call."""
    try:
        torch.compile(lambda x: x.sin() + 1, backend=backend)(torch.zeros(8, device=device))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        message = f"compile on {device.type}: no compiler works here ({reason}); install a C++ compiler, or turn it off"
        raise ValueError(message) from error
