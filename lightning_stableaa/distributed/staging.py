"""Iterates that live in the memory of the host while the weights are on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class PinnedStaging:
    """Copies vectors to pinned memory of the host, beside the training that goes on.

    A vector is first copied to a buffer on the GPU, at the GPU's own speed, and from there to the
    host on a stream of its own: what happens to the weights meanwhile does not touch it, and
    nothing waits until the iterate is read or the next one comes. Costs n elements on the GPU.

    Args:
        length: n, elements of a vector.
        dtype: of the vectors.
        device: the GPU.
    """

    def __init__(self, *, length: int, dtype: torch.dtype, device: torch.device) -> None:
        self._device = device
        self._buffer = torch.empty(length, dtype=dtype, device=device)
        self._stream = torch.cuda.Stream(device)

    def allocate(self, count: int) -> Tensor:  # (count, n)
        """Pinned memory for so many vectors; torch rounds it up to a power of two of bytes."""
        return torch.empty(
            count, len(self._buffer), dtype=self._buffer.dtype, device="cpu", pin_memory=True
        )

    def copy_async(self, write: Callable[[Tensor], object], row: Tensor) -> None:
        """Begin to copy what ``write`` puts into the vector, (n,), that it is given, to ``row``."""
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)  # the buffer may be on its way to an earlier row
        write(self._buffer)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            row.copy_(self._buffer, non_blocking=True)

    def synchronize(self) -> None:
        """Wait until the rows hold what was copied to them."""
        self._stream.synchronize()
