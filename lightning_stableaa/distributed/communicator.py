"""The few collectives, and nothing else that knows about ranks."""

from __future__ import annotations

import zlib

import torch
import torch.distributed as dist
from torch import Tensor

# Elements, of all ranks together, that ``all_gather`` has in flight where it cannot work in place.
GATHERED_AT_ONCE = 1 << 19


class Communicator:
    """Collectives over one process group; every method does nothing in a single process.

    Args:
        process_group: ``None`` takes the default group, where ``torch.distributed`` runs at all.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        self._group = process_group
        running = dist.is_available() and dist.is_initialized()
        self.world_size = dist.get_world_size(process_group) if running else 1
        self.rank = dist.get_rank(process_group) if running else 0
        self._first = dist.get_global_rank(process_group, 0) if running and process_group else 0
        nccl = running and dist.get_backend(process_group) == "nccl"  # sees GPUs only
        self._device = torch.device("cuda", torch.cuda.current_device()) if nccl else None

    @classmethod
    def single_process(cls) -> Communicator:
        """One that has nobody to communicate with."""
        communicator = cls()
        communicator.world_size, communicator.rank = 1, 0
        return communicator

    @property
    def is_single_process(self) -> bool:
        """Whether there is but one rank."""
        return self.world_size == 1

    def sum(self, tensor: Tensor) -> None:
        """Sum over ranks, in place; a NaN on one rank is a NaN on all."""
        self._reduce(tensor, dist.ReduceOp.SUM)

    def max(self, tensor: Tensor) -> None:
        """Maximum over ranks, in place."""
        self._reduce(tensor, dist.ReduceOp.MAX)

    def any(self, flag: bool | Tensor, device: torch.device) -> bool:
        """Whether the flag is set on any rank; the same answer on all of them."""
        if self.is_single_process:
            return bool(flag)
        answer = torch.as_tensor(flag, dtype=torch.float32, device=device)
        self.max(answer)
        return bool(answer)

    def equal(self, device: torch.device, *texts: str) -> bool:
        """Whether the texts are the same on all ranks."""
        if self.is_single_process:
            return True
        codes = [float(zlib.crc32(text.encode())) for text in texts]
        bounds = torch.tensor([codes, [-one for one in codes]], dtype=torch.float64, device=device)
        self.max(bounds)
        return bool((bounds[0] == -bounds[1]).all())

    def all_gather(self, full: Tensor, device: torch.device) -> None:
        """Complete ``full``, (n,), of which every rank has filled its slice, (n / P,).

        In place and at once on a GPU. Elsewhere in pieces of at most ``GATHERED_AT_ONCE`` elements,
        whose copies (one here, one inside of gloo) are all the extra memory that it takes.

        Args:
            full: equal slices, one a rank.
            device: where the process group communicates.
        """
        if self.is_single_process:
            return
        slices = full.view(self.world_size, -1)
        if full.device == device and device.type == "cuda":
            dist.all_gather_into_tensor(full, slices[self.rank], group=self._group)
            return
        for piece in slices.split(max(1, GATHERED_AT_ONCE // self.world_size), dim=1):
            gathered = torch.empty(piece.shape, dtype=full.dtype, device=device)
            own = piece[self.rank].to(device)
            dist.all_gather_into_tensor(gathered.view(-1), own, group=self._group)
            piece.copy_(gathered)

    def gather_to_first(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks on the group's first rank, nothing on the others."""
        if self.is_single_process:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        first = self.rank == 0
        dist.gather(tensor, parts if first else None, dst=self._first, group=self._group)
        return parts if first else []

    def shard(self, length: int) -> tuple[int, int]:
        """First element and size of this rank's equal slice of ``length``; the last overhangs."""
        size = -(-length // self.world_size)
        return self.rank * size, size

    def _reduce(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
        if self.is_single_process:
            return
        sent = tensor if self._device is None else tensor.to(self._device)
        dist.all_reduce(sent, op=operation, group=self._group)
        if sent is not tensor:
            tensor.copy_(sent)
