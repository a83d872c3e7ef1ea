"""The iterates of one rank: weights in, candidates out, wherever the history lives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_stableaa.core.anderson import Array
from lightning_stableaa.core.history import History
from lightning_stableaa.distributed.communicator import Communicator
from lightning_stableaa.distributed.dtensor import is_sharded, local_shard, sort_by_replication
from lightning_stableaa.distributed.sharding import choose_placement
from lightning_stableaa.distributed.staging import PinnedStaging
from lightning_stableaa.model.parameters import FlatView
from lightning_stableaa.options import HistoryPlacement


class IterateStore:
    """History of the weights, and one vector in which a candidate is formed.

    Replicated: every rank keeps (m + 2) n elements and sends nothing. Sharded: every rank keeps
    its shard of every iterate, (m + 1) n / P, and the n elements of the gathered candidate; to
    gather them takes no more memory on a GPU, and a few MiB elsewhere. Where the weights themselves
    are sharded (DTensors), every rank keeps (m + 2) vectors of its own shard.

    Args:
        parameters: the weights, see ``trainable_parameters``.
        depth: residuals kept at most, m.
        communicator: collectives over the ranks that share the weights.
        placement: replicas or shards, see ``choose_placement``.
        device: where iterates live; ``None`` takes that of the weights.

    Raises:
        ValueError: the ranks do not hold every element of sharded weights, or count one twice.
        RuntimeError: the history does not fit into memory.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        *,
        depth: int,
        communicator: Communicator,
        placement: HistoryPlacement = "replicated",
        device: torch.device | None = None,
    ) -> None:
        shard = local_shard(parameters, communicator)
        self.parameters = shard.parameters
        self.num_unowned = shard.num_unowned
        self.communicator = communicator
        self.weights = FlatView(self.parameters)
        self.device = device or self.weights.device
        self.sharded_weights = is_sharded(parameters)
        num_bytes = (depth + 2) * self.weights.length * self.weights.dtype.itemsize
        self.sharded, self.placement_reason = choose_placement(
            placement,
            num_bytes=num_bytes,
            device=self.weights.device,
            communicator=communicator,
            sharded_weights=self.sharded_weights,
        )
        self._gathers = self.sharded and not self.sharded_weights
        self.start, self.length = (
            communicator.shard(shard.length) if self._gathers else (0, shard.length)
        )
        from_gpu = self.weights.device.type == "cuda" and self.device.type == "cpu"
        size = self.length * communicator.world_size if self._gathers else self.length
        try:
            self.history = History(
                depth=depth,
                length=self.length,
                dtype=self.weights.dtype,
                device=self.device,
                num_unowned=self.num_unowned,
                staging=PinnedStaging(
                    length=self.length, dtype=self.weights.dtype, device=self.weights.device
                )
                if from_gpu
                else None,
            )
            self.candidate = torch.zeros(
                size, dtype=self.weights.dtype, device=self.device, pin_memory=from_gpu
            )
        except (RuntimeError, MemoryError) as error:
            raise RuntimeError(
                f"the Anderson history of {num_bytes / 1e9:.3g} GB does not fit into the memory of "
                f"{self.device}: lower history_depth ({depth}), set history_device='cpu', or "
                "history='sharded' where there are several processes"
            ) from error
        self._newest_is_current = False  # does the newest iterate hold all of the current weights?

    def is_current(self, parameters: Sequence[Tensor]) -> bool:
        """Whether the parameters are those of construction, in the same memory."""
        return self.weights.aliases(sort_by_replication(parameters))

    def read(self, out: Tensor, start: int) -> None:
        """Copy elements of the current weights, counted from this rank's first one."""
        self.weights.read(out, start=self.start + start)

    def copy_weights(self) -> None:
        """Copy the weights to ``candidate``, for ``is_unchanged``."""
        self.weights.read(self.candidate)

    def is_unchanged(self) -> bool:
        """Whether the weights are bitwise those of ``copy_weights``."""
        return self.weights.equals(self.candidate)

    def push_weights(self) -> None:
        """Append the current weights to the history."""
        self._newest_is_current = not self._gathers
        self.history.push(lambda row: self.read(row, 0))

    def push(self, iterate: Tensor) -> None:
        """Append ``iterate``, (length,), this rank's shard, to the history."""
        self._newest_is_current = False
        self.history.push(lambda row: row.copy_(iterate))

    def gram(self) -> Array:  # (q, q) float64
        """Inner products of all consecutive differences, over all ranks' shards, on the host."""
        gram = self.history.gram()
        if self.sharded:
            gram = gram.to(self.weights.device)  # where the process group communicates
            self.communicator.sum(gram)
        return gram.cpu().numpy()

    def form_candidate(self, coefficients: Array) -> None:
        """Write the newest iterate plus the step, (q,), to ``candidate``, on every rank."""
        own = self.candidate[self.start : self.start + self.length]
        self.history.combine(torch.from_numpy(np.ascontiguousarray(coefficients)), out=own)
        if self._gathers:
            self.communicator.all_gather(self.candidate, self.weights.device)

    def write_average(self, average: Tensor) -> None:
        """Write this rank's shard of a vector over the weights, on every rank."""
        self.candidate[self.start : self.start + self.length].copy_(average)
        if self._gathers:
            self.communicator.all_gather(self.candidate, self.weights.device)
        self.weights.write(self.candidate)

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Inside, the weights hold ``candidate``; outside, bitwise what they held before."""
        backed_up = self._newest_is_current
        if backed_up:
            self.weights.write(self.candidate)
        else:
            self.weights.swap(self.candidate)
        try:
            yield
        finally:
            if backed_up:
                self.weights.write(self.history.newest)
            else:
                self.weights.swap(self.candidate, reverse=True)

    def keep_weights(self) -> Callable[[], None]:
        """Returns what puts back what an evaluation wrote to the weights.

        Where the newest iterate does not hold them, as an average does not, a copy does; nothing
        is put back where the history is sharded to save the memory of one.
        """
        if self._newest_is_current:
            kept = self.history.newest
        elif self._gathers:
            return lambda: None
        else:
            kept = torch.empty_like(self.candidate)
            self.weights.read(kept)

        def undo_writes() -> None:
            if self.weights.device.type != "cpu" or not self.weights.equals(kept):
                self.weights.write(kept)

        return undo_writes

    def restart(self) -> None:
        """Something other than the optimizer moved the weights."""
        self.history.restart()
        self._newest_is_current = False

    def state_dict(self) -> dict[str, Any]:
        """The iterates of this rank, on the CPU."""
        return self.history.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.history.load_state_dict(state)
        self._newest_is_current = False

    @property
    def full_length(self) -> int:
        """Elements of a vector of all ranks: the weights, or their shards one after another."""
        if self.sharded_weights:
            return self.communicator.world_size * self.length
        return self.weights.length

    @property
    def full_start(self) -> int:
        """Where this rank's elements begin in it."""
        return self.communicator.rank * self.length if self.sharded_weights else self.start
