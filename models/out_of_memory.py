"""Which errors say that memory is short: not all that do are a torch.OutOfMemoryError."""

from __future__ import annotations

import torch

WORDS = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
"""Of the allocators, of the libraries that have workspaces of their own, and of torch's allocator on a CPU."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller call may work."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)
