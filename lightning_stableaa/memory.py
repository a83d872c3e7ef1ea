"""Running out of memory, told from other errors."""

from __future__ import annotations

import torch

# CUDA raises an error of its own, pinned memory and the allocator of the CPU a RuntimeError.
_PHRASES = ("out of memory", "can't allocate memory", "not enough memory")


def out_of_memory(error: BaseException) -> bool:
    """Whether a tensor did not fit into the memory of its device."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _PHRASES)
    )


def first_line(error: BaseException) -> str:
    """What the error says, without the statistics of an allocator."""
    return (str(error) or type(error).__name__).splitlines()[0]
