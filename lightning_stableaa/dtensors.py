"""Weights of which every process holds a part: the DTensors of FSDP2 and of tensor parallelism.

Every process works on the memory of its own part. An element that several processes hold is moved
by all of them and counted by the first: such tensors come first in the flat vector, so that what a
process leaves out of its sums is a number of leading elements.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_stableaa.distributed import Communicator


class Share(NamedTuple):
    """What this process holds of the weights."""

    parameters: list[Tensor]  # in the order of the flat vector
    length: int  # of the flat vector, with padding: equal on all processes, at least one
    skipped: int  # leading elements that another process counts


def is_dtensor(tensor: Tensor) -> bool:
    """Whether other processes hold parts or replicas of this tensor."""
    # a DTensor exists only where its module was imported already; that takes a while
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_split(parameters: Iterable[Tensor]) -> bool:
    """Whether any of the parameters lies on several processes."""
    return any(is_dtensor(one) for one in parameters)


def local_part(tensor: Any) -> Tensor:
    """What this process holds of the tensor, in the same memory; the tensor itself if plain."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():  # not a view: writes to it are counted in one place
        return tensor.to_local()


def with_local_part(part: Tensor, like: Any) -> Tensor:
    """A tensor laid out over the processes as ``like``, of which this one holds ``part``."""
    if not is_dtensor(like):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )


def whole(tensor: Any) -> Tensor:
    """All of the tensor on every process; a collective call for a DTensor."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def write_whole(target: Any, value: Tensor) -> None:
    """Copy a whole tensor into ``target``, of which this process may hold a part."""
    if not is_dtensor(target) or is_dtensor(value):
        target.copy_(value)
        return
    from torch.distributed.tensor import distribute_tensor

    value = value.to(target.device)
    target.copy_(distribute_tensor(value, target.device_mesh, target.placements))


def arranged(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The parameters, those with the most replicas first; the same order on every process."""
    return sorted(parameters, key=_replicas, reverse=True)


def share_of(parameters: Sequence[Tensor], communicator: Communicator) -> Share:
    """What this process holds of the weights, and counts; a collective call if they are split.

    Raises:
        ValueError: the processes together do not hold every element, or count one twice.
    """
    ordered = arranged(parameters)
    sizes = [local_part(one).numel() for one in ordered]
    if not is_split(ordered):
        return Share(ordered, sum(sizes), 0)
    counted = [_is_counted_here(one, communicator) for one in ordered]
    first = counted.index(True) if True in counted else len(counted)
    here = [sum(sizes), sum(sizes[first:])]
    device = local_part(ordered[0]).device
    length = torch.tensor(here[0], dtype=torch.int64, device=device)
    total = torch.tensor(here[1], dtype=torch.int64, device=device)
    communicator.max(length)
    communicator.sum(total)
    expected = sum(one.numel() for one in ordered)
    if int(total) != expected or communicator.any(not all(counted[first:]), device):
        raise ValueError(
            f"the {communicator.world_size} processes of process_group hold {int(total)} elements "
            f"of {expected} sharded weights: pass the group over whose processes they are sharded"
        )
    return Share(ordered, max(1, int(length)), sum(sizes[:first]))


def division(parameters: Sequence[Tensor], communicator: Communicator) -> list[Any] | None:
    """How the weights are split, for comparison; ``None`` where every process holds all."""
    if not is_split(parameters):
        return None
    placements = [str(getattr(one, "placements", None)) for one in parameters]
    return [communicator.world_size, placements]


def drop_gathered() -> None:
    """Make every module of FSDP2 gather its weights anew at the next forward pass.

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


def refuse_hidden_weights(parameters: Iterable[Any]) -> None:
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


def _replicas(parameter: Any) -> float:
    if not is_dtensor(parameter):
        return math.inf
    sizes = zip(parameter.device_mesh.mesh.shape, parameter.placements, strict=True)
    return math.prod(size for size, placement in sizes if placement.is_replicate())


def _is_counted_here(parameter: Any, communicator: Communicator) -> bool:
    """Whether this process is the first of those that hold the same part."""
    if not is_dtensor(parameter):
        return communicator.rank == 0
    coordinate = parameter.device_mesh.get_coordinate()
    if coordinate is None:
        return False
    dimensions = zip(coordinate, parameter.placements, strict=True)
    return all(at == 0 for at, placement in dimensions if placement.is_replicate())
