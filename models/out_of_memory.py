"""Recognize errors that mean a lack of memory; torch does not raise torch.OutOfMemoryError for all of them."""

from __future__ import annotations

import torch

WORDS = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
"""Words in messages of CUDA's allocators, of libraries with their own workspaces, and of torch's CPU allocator."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error means a lack of memory, so that the same call with fewer rows may succeed."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)
