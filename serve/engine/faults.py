"""Errors of a device: which of them end an engine, which of them pass, and the error that a request gets.

A failed kernel ends the process's whole context on an accelerator: every later call raises, too. A call that ran out of
memory is lost alone, and a smaller one may work.
"""

from __future__ import annotations

import traceback

import torch

ADVICE = "lower max_batch, or serve a model of smaller images"
"""Where memory is short."""
OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
"""Words of the allocators, of the libraries that have workspaces of their own, and of torch's allocator on a CPU."""


class EngineError(RuntimeError):
    """This engine could not make a picture that another engine, or the same one later, can make."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller call may work."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def is_lost(error: BaseException) -> bool:
    """Whether the accelerator cannot be used again in this process."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)


def for_log(error: Exception) -> str:
    """One line about what the device did, else the whole traceback: as text, as a log record would keep the frames."""
    if is_out_of_memory(error):
        return f"{summary(error)}; {ADVICE}"
    return summary(error) if is_lost(error) else "".join(traceback.format_exception(error))


def for_request(error: Exception) -> Exception:
    """The error to give to a request: a retriable one for what the device did, else the same error.

    Either loses its traceback, whose frames hold the tensors of the call that failed: for as long as anybody held the
    error, that much memory would be missing on the device.
    """
    error.__traceback__ = error.__cause__ = error.__context__ = None
    if is_lost(error):
        return EngineError(f"the device of this engine failed: {summary(error)}")
    if is_out_of_memory(error):
        return EngineError(f"the device of this engine is out of memory: {summary(error)}")
    return error


def summary(error: BaseException) -> str:
    """The first line: torch's errors have a page of advice behind it."""
    return (str(error).splitlines() or [type(error).__name__])[0]
