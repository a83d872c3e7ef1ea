"""The few collectives, and nothing else that knows about ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_stableaa.memory import first_line, out_of_memory

# Elements, of all ranks together, that ``gather`` has in flight where it cannot work in place.
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
        self.shortage = ""  # what the error said, where this rank ran out of memory in step

    @classmethod
    def alone(cls) -> Communicator:
        """One that has nobody to communicate with."""
        communicator = cls()
        communicator.world_size, communicator.rank = 1, 0
        return communicator

    def sum(self, tensor: Tensor) -> None:
        """Sum over ranks, in place."""
        self._reduce(tensor, dist.ReduceOp.SUM)

    def max(self, tensor: Tensor) -> None:
        """Maximum over ranks, in place."""
        self._reduce(tensor, dist.ReduceOp.MAX)

    def any(self, flag: bool | Tensor, device: torch.device) -> bool:
        """Whether the flag is set on any rank; the same answer on all of them."""
        if self.world_size == 1:
            return bool(flag)
        answer = torch.as_tensor(flag, dtype=torch.float32, device=device)
        self.max(answer)
        return bool(answer)

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Work of this rank inside; of several ranks, one that runs out of memory goes on.

        The others will wait for it in the next collective. What it lacked is kept in ``shortage``,
        and what the work should have given is undefined.
        """
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if self.world_size == 1 or not out_of_memory(error):
                raise
            self.shortage = first_line(error)  # the error itself would hold on to what is taken

    def any_shortage(self, device: torch.device) -> bool:
        """Whether any rank ran out of memory; a collective call."""
        return self.any(bool(self.shortage), device)

    def mean(self, tensor: Tensor) -> None:
        """Mean over ranks, in place; a NaN on one rank is a NaN on all."""
        if self.world_size > 1:
            self.sum(tensor)
            tensor /= self.world_size

    def from_first(self, tensor: Tensor) -> None:
        """Give every rank the values of the group's first rank, in place."""
        if self.world_size > 1:
            dist.broadcast(tensor, src=self._first, group=self._group)

    def gather(self, whole: Tensor, device: torch.device) -> None:
        """Complete ``whole``, (n,), of which every rank has filled its slice, (n / P,).

        In place and at once on a GPU. Elsewhere in pieces of at most ``GATHERED_AT_ONCE`` elements,
        whose copies (one here, one inside of gloo) are all the extra memory that it takes.

        Args:
            whole: equal slices, one a rank.
            device: where the process group communicates.
        """
        if self.world_size == 1:
            return
        slices = whole.view(self.world_size, -1)
        if whole.device == device and device.type == "cuda":
            dist.all_gather_into_tensor(whole, slices[self.rank], group=self._group)
            return
        for piece in slices.split(max(1, GATHERED_AT_ONCE // self.world_size), dim=1):
            gathered = torch.empty(piece.shape, dtype=whole.dtype, device=device)
            own = piece[self.rank].to(device)
            dist.all_gather_into_tensor(gathered.view(-1), own, group=self._group)
            piece.copy_(gathered)

    def to_first(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks on the group's first rank, nothing on the others."""
        if self.world_size == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        first = self.rank == 0
        dist.gather(tensor, parts if first else None, dst=self._first, group=self._group)
        return parts if first else []

    def _reduce(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
        if self.world_size == 1:
            return
        sent = tensor if self._device is None else tensor.to(self._device)
        dist.all_reduce(sent, op=operation, group=self._group)
        if sent is not tensor:
            tensor.copy_(sent)

    def shard(self, length: int) -> tuple[int, int]:
        """First element and size of this rank's equal slice of ``length``; the last overhangs."""
        size = -(-length // self.world_size)
        return self.rank * size, size
