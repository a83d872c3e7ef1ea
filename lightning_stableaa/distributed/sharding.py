"""Sharded histories: where one lives, and its state as a whole and by shards.

In a full state vectors are complete, and what every rank had summed over its own shard is kept for
each of them. So a history continues bitwise on as many ranks, and to rounding on more or fewer, or
on ranks that keep replicas.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_stableaa.distributed.communicator import Communicator
from lightning_stableaa.options import HistoryPlacement

# Replicas send nothing and are combined without waiting for others: worth this much memory.
REPLICA_SHARE = 0.1

# Keys of state dicts, by what a rank holds under them.
_SHARDED = frozenset({"rows", "mean", "squares", "origin", "previous"})  # (..., length)
_PARTIAL_SUMS = frozenset({"products", "total"})  # over the rank's shard

_GB = 1e9


def choose_placement(
    placement: HistoryPlacement,
    *,
    num_bytes: int,
    device: torch.device,
    communicator: Communicator,
    sharded_weights: bool,
) -> tuple[bool, str]:
    """Whether the history is sharded, the same on all ranks, and the reason in a sentence.

    ``"auto"`` takes replicas while they fit into a tenth of the memory of every rank. A collective
    call where it is ``"auto"`` and there are several ranks.

    Args:
        placement: the option ``history``.
        num_bytes: of a replica.
        device: where the history lives.
        communicator: ranks that share the weights.
        sharded_weights: whether every rank holds but a shard of the weights, which decides it.

    Raises:
        ValueError: every rank should keep a replica of what none of them holds.
    """
    world = communicator.world_size
    if sharded_weights and placement == "replicated":
        raise ValueError(
            "history='replicated' needs the full weights in every process, and these are sharded "
            "(DTensors): use history='auto'"
        )
    if sharded_weights:
        return True, f"the weights are sharded over {world} processes, and the history too"
    if world == 1:
        return False, "one process: the history is not sharded"
    if placement != "auto":
        return placement == "sharded", f"history={placement!r}"
    available = memory_of_process(device)
    sharded = communicator.any(num_bytes > REPLICA_SHARE * available, device)
    size = f"a replica takes {num_bytes / _GB:.3g} GB in each of {world} processes"
    limit = f"{REPLICA_SHARE:.0%} of the memory of one ({available / _GB:.3g} GB)"
    if sharded:
        return True, f"history='auto' is sharded: {size}, more than {limit}"
    return False, f"history='auto' is replicated: {size}, at most {limit}"


def memory_of_process(device: torch.device) -> int:
    """Bytes that one process can count on: its device's, or its share of the host's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.cpu_count() or 1)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // processes


def gather_state(
    state: Mapping[str, Any], *, length: int, communicator: Communicator, device: torch.device
) -> dict[str, Any]:
    """The full state on the first rank, CPU tensors; a collective call.

    Vectors travel one at a time: the first rank needs room for one more of them on ``device``.

    Args:
        state: nested; its leaves are this rank's.
        length: elements of a full vector.
        communicator: the ranks that hold shards; a single process holds all.
        device: where the process group communicates.

    Returns:
        The full state on the first rank; on others the same keys, and tensors without elements.
    """

    def leaf(name: str, value: Any) -> Any:
        if name in _SHARDED and communicator.is_single_process:
            return value
        if name in _SHARDED:
            rows = value.reshape(-1, value.shape[-1])
            full = torch.empty(len(rows), length if communicator.rank == 0 else 0, device="cpu")
            full = full.to(value.dtype)
            for row, target in zip(rows, full, strict=True):
                parts = communicator.gather_to_first(row.to(device))
                if parts:
                    target.copy_(torch.cat(parts)[:length])
            return full.reshape(*value.shape[:-1], full.shape[-1])
        if name in _PARTIAL_SUMS:
            parts = communicator.gather_to_first(value.to(device))
            return torch.stack(parts).cpu() if parts else torch.empty(0, device="cpu")
        return value

    return _map(state, leaf)


def shard_state(
    state: Mapping[str, Any], *, start: int, length: int, communicator: Communicator
) -> dict[str, Any]:
    """This rank's part of a full state.

    Args:
        state: what ``gather_state`` returned on the first rank.
        start: first element of the rank's shard.
        length: elements of the shard; beyond the end of a vector there are zeros.
        communicator: the ranks that share the vectors; a single process where each has them all.
    """
    rank, world = communicator.rank, communicator.world_size

    def leaf(name: str, value: Any) -> Any:
        if name in _SHARDED:
            part = value[..., start : start + length]
            return torch.nn.functional.pad(part, (0, length - part.shape[-1]))
        if name in _PARTIAL_SUMS:
            if len(value) == world:
                return value[rank]
            total = value.sum(dim=0)  # of other shards than these: the first rank holds it all
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
