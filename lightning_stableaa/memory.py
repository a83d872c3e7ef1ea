"""Running out of memory, told from other errors."""

from __future__ import annotations

import torch

# CUDA raises an error of its own; the allocator of the CPU a RuntimeError with this in its text.
_CPU_ALLOCATOR = "can't allocate memory"


def out_of_memory(error: BaseException) -> bool:
    """Whether a tensor did not fit into the memory of its device."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and _CPU_ALLOCATOR in str(error)
    )
