"""Scaled dot-product attention: xformers on CUDA if it has a kernel for the inputs, otherwise torch's SDPA.

Shapes: B rows, M query tokens, N key tokens, H heads, K channels per head.
"""

from __future__ import annotations

import functools
import logging
import re
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Backend = Literal["auto", "xformers", "sdpa"]

PLAIN_LIMIT = 2**18
"""Largest M * N for which a CPU computes the full matrix of attention weights."""
REASON = r"`(\S+)` is not supported because:\n\s*(.+?)(?: but your GPU.*| \(supported: .*)?$"
"""Matches a kernel and its first reason in the error message of xformers' dispatcher."""
EXPLAINED = (torch.float32, torch.bfloat16)

_choice: Backend = "auto"
_used: set[str] = set()
_unsupported: dict[tuple[Any, ...], str | None] = {}
"""Cache of _why_unsupported() by all inputs of xformers' dispatcher, which takes longer than a small kernel."""


def use_attention(backend: Backend) -> None:
    """Choose the attention backend of this process.

    Raises:
        ValueError: if the name is unknown, or if it is `xformers` and xformers cannot run in this process.
    """
    global _choice
    if backend not in ("auto", "xformers", "sdpa"):
        raise ValueError(f"attention must be auto, xformers or sdpa, got {backend!r}")
    problem = _xformers_problem() if backend == "xformers" else None
    if problem is not None:
        raise _unusable(problem)
    _choice = backend


def chosen_attention() -> Backend:
    """Return the argument of the last call of use_attention(), which other processes of a run need, too."""
    return _choice


def attention_used() -> str:
    """Return the backends used so far in this process: `xformers`, `sdpa` or `sdpa+xformers`.

    Before the first call of attention() it is the expected backend.
    """
    return "+".join(sorted(_used)) if _used else expected_attention()


def expected_attention() -> str:
    """Return the backend that is tried first: `xformers` or `sdpa`."""
    return "xformers" if _choice != "sdpa" and _xformers_problem() is None else "sdpa"


def explain_attention() -> str:
    """Return one line: the backends of float32 and bfloat16 training, and the reason if xformers is not used."""
    if _choice == "sdpa":
        return "sdpa"
    problem = _xformers_problem()
    if problem is not None:
        return f"sdpa (not xformers: {problem})"
    small = [torch.zeros(1, 64, 1, 64, dtype=dtype, device="cuda", requires_grad=True) for dtype in EXPLAINED]
    reasons = {str(x.dtype).removeprefix("torch."): _why_unsupported(x, x, x) for x in small}
    unsupported = [f"not xformers in {dtype}: {reason}" for dtype, reason in reasons.items() if reason is not None]
    used = sorted({"sdpa" if reason else "xformers" for reason in reasons.values()})
    return "+".join(used) + (f" ({'; '.join(unsupported)})" if unsupported else "")


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute softmax(Q K^T / sqrt(K)) V on tensors in xformers' layout.

    Args:
        query: [B, M, H, K].
        key: [B, N, H, K].
        value: [B, N, H, K].

    Returns:
        [B, M, H, K].

    Raises:
        ValueError: if `xformers` was chosen and cannot run on these tensors.
    """
    if query.device.type == "cuda" and _is_for_xformers(query, key, value):
        _used.add("xformers")
        return _fmha().memory_efficient_attention(query, key, value)  # type: ignore[no-any-return]
    _used.add("sdpa")
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if query.device.type == "cpu" and query.shape[2] * key.shape[2] <= PLAIN_LIMIT:
        return _plain(query, key, value).transpose(1, 2)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def _plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute attention [B, H, M, K] as two matrix products.

    For up to a few hundred tokens, this is 2 to 3 times faster on a CPU than SDPA.
    """
    weights = torch.softmax((query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2), dim=-1)
    return weights @ value


def _is_for_xformers(*qkv: Tensor) -> bool:
    if _choice == "sdpa":
        return False
    if torch.compiler.is_compiling():  # The compiler fuses SDPA with its neighbors and cannot trace the query.
        return _choice == "xformers"
    reason = _why_unsupported(*qkv)
    if reason is not None and _choice == "xformers":
        raise _unusable(reason)
    if reason is not None:
        _report(reason)
    return reason is None


def _why_unsupported(*qkv: Tensor) -> str | None:
    """Return why xformers cannot run on these tensors (with backward, if they need gradients), or None if it can."""
    problem = _xformers_problem()
    if problem is not None:
        return problem
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in qkv)
    deterministic = torch.are_deterministic_algorithms_enabled()
    inputs = (trained, deterministic, *((x.device, x.dtype, x.shape, x.stride()) for x in qkv))
    if inputs not in _unsupported:
        _unsupported[inputs] = _query_dispatcher(trained, *qkv)
    return _unsupported[inputs]


def _query_dispatcher(trained: bool, *qkv: Tensor) -> str | None:
    """Query xformers' dispatcher for the forward and, if trained, the backward pass; return why it has no kernel.

    Without this query the error would be raised by the call of the operator, or only in the backward pass.
    """
    fmha = _fmha()
    inputs = fmha.Inputs(*qkv)
    try:
        inputs.validate_inputs()
        fmha.dispatch._dispatch_fw(inputs, trained)
        if trained:
            fmha.dispatch._dispatch_bw(inputs, None)
    except (NotImplementedError, ValueError, KeyError) as error:  # The dispatcher raises KeyError for float64.
        return _short(str(error))
    return None


def _short(message: str) -> str:
    """Return the first reason of each kernel, without tensor shapes so that equal reasons give equal texts."""
    kernels = re.findall(REASON, message, flags=re.MULTILINE)
    return ", ".join(f"{name}: {reason}" for name, reason in kernels) or message.splitlines()[0]


def _unusable(problem: str) -> ValueError:
    return ValueError(f"attention is 'xformers', which cannot run: {problem}; use auto or sdpa")


@functools.cache
def _report(reason: str) -> None:
    """Log a warning, once per reason."""
    logging.getLogger(__name__).warning("attention runs on torch's SDPA, not on xformers: %s", reason)


@functools.cache
def _xformers_problem() -> str | None:
    """Return why xformers cannot run at all in this process, or None if it can."""
    if not torch.cuda.is_available():
        return "it needs CUDA, which torch does not find here"
    # Without its compiled library xformers still imports, logs a page of warnings and has no kernels. Silence the
    # warnings, because this function returns the reason in one line.
    logging.getLogger("xformers").setLevel(logging.ERROR)
    try:
        _fmha()
        from xformers import _cpp_lib
    except Exception as error:  # A package with incompatible dependencies may raise more than ImportError.
        return f"it cannot be imported ({type(error).__name__}: {_first_line(error)})"
    failure = _cpp_lib._cpp_library_load_exception
    if failure is None:
        return None
    return f"its library does not load with torch {torch.__version__} ({_first_line(failure)})"


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or [""])[0]


@functools.cache
def _fmha() -> Any:
    # Import xformers only if CUDA is available: on a CPU it has no kernels and prints a warning.
    from xformers.ops import fmha

    return fmha
