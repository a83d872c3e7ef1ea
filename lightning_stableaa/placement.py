"""Where the history lives when the user leaves it to us: a replica on every rank, or a slice."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from lightning_stableaa.distributed import Communicator
from lightning_stableaa.options import HistoryPlacement

# Replicas send nothing and are combined without waiting for others: worth this much memory.
REPLICA_SHARE = 0.1

_GB = 1e9


class Placement(NamedTuple):
    """The decision, the same on all ranks, and the reason in a sentence."""

    sharded: bool
    reason: str


def choose_placement(
    asked: HistoryPlacement,
    *,
    points: int,
    point_bytes: int,
    device: torch.device,
    communicator: Communicator,
    split: bool = False,
) -> Placement:
    """``"auto"`` takes replicas while they fit into a tenth of the memory of every rank.

    A collective call where ``asked`` is ``"auto"`` and there are several ranks.

    Args:
        asked: the option ``history``.
        points: vectors that a replica keeps, m + 2.
        point_bytes: of one of them.
        device: where the history lives.
        communicator: ranks that share the weights.
        split: whether every rank holds but a part of the weights, which decides it.
    """
    world = communicator.world_size
    if split:
        return Placement(True, f"the weights are split over {world} processes, and the history too")
    if world == 1:
        return Placement(False, "one process: the history is whole")
    if asked != "auto":
        return Placement(asked == "sharded", f"history={asked!r} was asked for")
    needed, available = points * point_bytes, memory_of_process(device)
    sharded = communicator.any(needed > REPLICA_SHARE * available, device)
    size = f"a replica takes {needed / _GB:.3g} GB in each of {world} processes"
    limit = f"{REPLICA_SHARE:.0%} of the memory of one ({available / _GB:.3g} GB)"
    if sharded:
        return Placement(True, f"history='auto' is sharded: {size}, more than {limit}")
    return Placement(False, f"history='auto' is replicated: {size}, at most {limit}")


def memory_of_process(device: torch.device) -> int:
    """Bytes that one process can count on: its device's, or its share of the host's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.cpu_count() or 1)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // processes


def check_placement(asked: HistoryPlacement, *, split: bool) -> None:
    """Stop where every process should keep a replica of what none of them holds.

    Raises:
        ValueError: names the option and the way out.
    """
    if split and asked == "replicated":
        raise ValueError(
            "history='replicated' needs the whole weights in every process, and these are split "
            "over several (DTensors): use history='auto'"
        )
