"""Sharded weights: the DTensors of FSDP2 and of tensor parallelism.

Every rank works on the memory of its local shard. An element that several ranks hold is moved by
all of them and counted by the first: such tensors come first in the flat vector, so that what a
rank leaves out of its sums is a number of leading elements.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_stableaa.distributed.communicator import Communicator


class LocalShard(NamedTuple):
    """What this rank holds of the weights."""

    parameters: list[Tensor]  # in the order of the flat vector
    length: int  # of the flat vector, with padding: equal on all ranks, at least one
    num_unowned: int  # leading elements that another rank counts


def is_dtensor(tensor: Tensor) -> bool:
    """Whether other ranks hold parts or replicas of this tensor."""
    # a DTensor exists only where its module was imported already; that takes a while
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_sharded(parameters: Iterable[Tensor]) -> bool:
    """Whether any of the parameters is a DTensor."""
    return any(is_dtensor(one) for one in parameters)


def to_local(tensor: Any) -> Tensor:
    """What this rank holds of the tensor, in the same memory; the tensor itself if plain."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():  # not a view: writes to it are counted in one place
        return tensor.to_local()


def full_tensor(tensor: Any) -> Tensor:
    """All of the tensor on every rank; a collective call for a DTensor."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def sort_by_replication(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The parameters, those with the most replicas first; the same order on every rank."""
    return sorted(parameters, key=_num_replicas, reverse=True)


def local_shard(parameters: Sequence[Tensor], communicator: Communicator) -> LocalShard:
    """What this rank holds of the weights, and counts; a collective call if they are sharded.

    Raises:
        ValueError: the ranks together do not hold every element, or count one twice.
    """
    ordered = sort_by_replication(parameters)
    parts = [2 if one.is_complex() else 1 for one in ordered]  # a complex number is two elements
    sizes = [to_local(one).numel() * k for one, k in zip(ordered, parts, strict=True)]
    if not is_sharded(ordered):
        return LocalShard(ordered, sum(sizes), 0)
    owned = [_owns(one, communicator) for one in ordered]
    first = owned.index(True) if True in owned else len(owned)
    device = to_local(ordered[0]).device
    length = torch.tensor(sum(sizes), dtype=torch.int64, device=device)
    total = torch.tensor(sum(sizes[first:]), dtype=torch.int64, device=device)
    communicator.max(length)
    communicator.sum(total)
    expected = sum(one.numel() * k for one, k in zip(ordered, parts, strict=True))
    if int(total) != expected or communicator.any(not all(owned[first:]), device):
        raise ValueError(
            f"the {communicator.world_size} processes of process_group hold {int(total)} elements "
            f"of {expected} sharded weights: pass the group over whose processes they are sharded"
        )
    return LocalShard(ordered, max(1, int(length)), sum(sizes[:first]))


def sharding_spec(parameters: Sequence[Tensor], communicator: Communicator) -> list[Any] | None:
    """How the weights are sharded, for comparison; ``None`` where every rank holds all."""
    if not is_sharded(parameters):
        return None
    placements = [str(getattr(one, "placements", None)) for one in parameters]
    return [communicator.world_size, placements]


def reshard_fsdp_modules() -> None:
    """Make every module of FSDP2 gather its weights again at the next forward pass.

    After a forward pass without a backward pass the outermost module keeps what it has gathered,
    and would go on with it after the weights have been written.
    """
    if "torch.distributed.tensor" not in sys.modules:
        return
    from torch.distributed._composable_state import _module_state_mapping

    for module in list(_module_state_mapping):
        reshard = getattr(module, "reshard", None)  # of FSDPModule
        if reshard is not None:
            reshard()


def check_supported_parameters(parameters: Iterable[Any]) -> None:
    """Stop where a parameter is not what it seems to be.

    Raises:
        ValueError: of FSDP1 or of DeepSpeed.
    """
    for one in parameters:
        if getattr(one, "_fsdp_flattened", False) or type(one).__name__ == "FlatParameter":
            raise ValueError(
                "weights sharded by FullyShardedDataParallel (FSDP1) are not supported: use "
                "torch.distributed.fsdp.fully_shard (FSDP2)"
            )
        if hasattr(one, "ds_id"):
            raise ValueError(
                "weights partitioned by DeepSpeed are not supported: use DDP, or "
                "torch.distributed.fsdp.fully_shard (FSDP2)"
            )


def _num_replicas(parameter: Any) -> float:
    if not is_dtensor(parameter):
        return math.inf
    sizes = zip(parameter.device_mesh.mesh.shape, parameter.placements, strict=True)
    return math.prod(size for size, placement in sizes if placement.is_replicate())


def _owns(parameter: Any, communicator: Communicator) -> bool:
    """Whether this rank is the first of those that hold the same part."""
    if not is_dtensor(parameter):
        return communicator.rank == 0
    coordinate = parameter.device_mesh.get_coordinate()
    if coordinate is None:
        return False
    dimensions = zip(coordinate, parameter.placements, strict=True)
    return all(at == 0 for at, placement in dimensions if placement.is_replicate())
