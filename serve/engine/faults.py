"""Classification of device errors: fatal for the engine or temporary, and the error that a request gets.

A failed kernel destroys the context of the process on an accelerator, so that every later call raises an error. A call
that runs out of memory fails alone, and a smaller call may work.
"""

from __future__ import annotations

import traceback

import torch

from animediffusion.models.out_of_memory import is_out_of_memory
from animediffusion.platform.errors import UnavailableError

ADVICE = "lower max_batch, or serve a model of smaller images"
"""Advice in messages about a lack of memory."""


def is_device_lost(error: BaseException) -> bool:
    """Return whether this process can no longer use the accelerator."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)


def for_log(error: Exception) -> str:
    """Return one line for an error of the device, else the whole traceback.

    The traceback is text, because a log record with the error would keep its frames in memory.
    """
    if is_out_of_memory(error):
        return f"{summary(error)}; {ADVICE}"
    return summary(error) if is_device_lost(error) else "".join(traceback.format_exception(error))


def for_request(error: Exception) -> Exception:
    """Return the error for a request: an UnavailableError for a device error, else `error` itself.

    The function removes the traceback of `error`. The frames of the traceback hold the tensors of the failed call,
    whose memory would stay allocated on the device as long as the error exists.
    """
    error.__traceback__ = error.__cause__ = error.__context__ = None
    if is_device_lost(error):
        return UnavailableError(f"the device of this engine failed: {summary(error)}")
    if is_out_of_memory(error):
        return UnavailableError(f"the device of this engine is out of memory: {summary(error)}")
    return error


def summary(error: BaseException) -> str:
    """Return the first line of an error, because torch's errors continue with a page of advice."""
    return (str(error).splitlines() or [type(error).__name__])[0]
