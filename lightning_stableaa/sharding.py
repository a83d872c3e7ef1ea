"""Sharded state: from the slices of all ranks to one whole, and from a whole to any rank's slice.

In a whole state vectors are complete, and what every rank had summed over its own slice is kept for
each of them. So a history continues bitwise on as many ranks, and to rounding on more or fewer, or
on ranks that keep replicas.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_stableaa.distributed import Communicator

# Keys of state dicts, by what a rank holds under them.
_SLICES = frozenset(  # (..., length)
    {"rows", "mean", "squares", "origin", "previous", "evaluation"}
)
_PARTIAL_SUMS = frozenset({"products", "total"})  # over the rank's slice


def gather(
    state: Mapping[str, Any], *, length: int, communicator: Communicator, device: torch.device
) -> dict[str, Any]:
    """The whole state on the first rank, CPU tensors; a collective call.

    Vectors travel one at a time: the first rank needs room for one more of them on ``device``.

    Args:
        state: nested; its leaves are this rank's.
        length: elements of a whole vector.
        communicator: the ranks that hold slices; one that does not communicate has the whole.
        device: where the process group communicates.

    Returns:
        The whole on the first rank; on others the same keys, and tensors without elements.
    """

    def leaf(name: str, value: Any) -> Any:
        if name in _SLICES and communicator.world_size == 1:
            return value
        if name in _SLICES:
            rows = value.reshape(-1, value.shape[-1])
            whole = torch.empty(len(rows), length if communicator.rank == 0 else 0, device="cpu")
            whole = whole.to(value.dtype)
            for row, target in zip(rows, whole, strict=True):
                parts = communicator.to_first(row.to(device))
                if parts:
                    target.copy_(torch.cat(parts)[:length])
            return whole.reshape(*value.shape[:-1], whole.shape[-1])
        if name in _PARTIAL_SUMS:
            parts = communicator.to_first(value.to(device))
            return torch.stack(parts).cpu() if parts else torch.empty(0, device="cpu")
        return value

    return _map(state, leaf)


def cut(
    state: Mapping[str, Any], *, start: int, length: int, communicator: Communicator | None
) -> dict[str, Any]:
    """This rank's part of a whole state.

    Args:
        state: what ``gather`` returned on the first rank.
        start: first element of the rank's slice.
        length: elements of the slice; beyond the end of a vector there are zeros.
        communicator: the ranks that share the vectors; ``None`` where each has them whole.
    """
    rank, world = (communicator.rank, communicator.world_size) if communicator else (0, 1)

    def leaf(name: str, value: Any) -> Any:
        if name in _SLICES:
            part = value[..., start : start + length]
            return torch.nn.functional.pad(part, (0, length - part.shape[-1]))
        if name in _PARTIAL_SUMS:
            if len(value) == world:
                return value[rank]
            total = value.sum(dim=0)  # of other slices than these: the first rank holds it all
            return total if rank == 0 else torch.zeros_like(total)
        return value

    return _map(state, leaf)


def _map(state: Mapping[str, Any], leaf: Any) -> dict[str, Any]:
    return {
        name: _map(value, leaf)
        if isinstance(value, Mapping)
        else leaf(name, value)
        if isinstance(value, Tensor)
        else value
        for name, value in state.items()
    }
