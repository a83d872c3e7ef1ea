"""The points of one rank: weights in, candidates out, wherever the history lives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_stableaa.distributed import Communicator
from lightning_stableaa.dtensors import arranged, is_split, share_of
from lightning_stableaa.history import History
from lightning_stableaa.offload import host_copies
from lightning_stableaa.options import HistoryPlacement
from lightning_stableaa.placement import choose_placement
from lightning_stableaa.weights import FlatTensors, momentum_tensors


class PointStore:
    """History of the weights, and one vector in which a candidate is formed.

    Replicated: every rank keeps (m + 2) n elements and sends nothing. Sharded: every rank keeps
    its slice of every point, (m + 1) n / P, and the n elements of the gathered candidate; to gather
    them takes no more memory on a GPU, and a few MiB elsewhere. Where the weights themselves are
    split (DTensors), every rank keeps (m + 2) points of its own part.

    Args:
        parameters: the weights, see :func:`~lightning_stableaa.weights.trainable_parameters`.
        depth: residuals kept at most, m.
        communicator: collectives over the ranks that share the weights.
        placement: replicas or slices, see :func:`~lightning_stableaa.placement.choose_placement`.
        device: where points live; ``None`` takes that of the weights.
        optimizers: where the momentum is found, to be mixed; none leaves it alone.

    Raises:
        ValueError: the ranks do not hold every element of split weights, or count one twice.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        *,
        depth: int,
        communicator: Communicator,
        placement: HistoryPlacement = "replicated",
        device: torch.device | None = None,
        optimizers: Sequence[Optimizer] = (),
    ) -> None:
        share = share_of(parameters, communicator)
        self.parameters = share.parameters
        self.skipped = share.skipped
        self.communicator = communicator
        self._optimizers = optimizers
        self.weights = FlatTensors(self.parameters)
        self.device = device or self.weights.device
        self.split = is_split(parameters)
        self.sharded, self.placement_reason = choose_placement(
            placement,
            points=depth + 2,
            point_bytes=self.weights.length * self.weights.dtype.itemsize,
            device=self.weights.device,
            communicator=communicator,
            split=self.split,
        )
        self.start, self.length = (
            communicator.shard(share.length)
            if self.sharded and not self.split
            else (0, share.length)
        )
        self.history = self._new_history(depth)
        self._depth = depth
        self._momentum: History | None = None
        self._gathers = self.sharded and not self.split
        self._newest_is_whole = False  # does the newest point hold all of the current weights?
        size = self.length * communicator.world_size if self._gathers else self.length
        self.candidate = torch.zeros(
            size,
            dtype=self.weights.dtype,
            device=self.device,
            pin_memory=self.device.type == "cpu" and self.weights.device.type == "cuda",
        )

    def still_fits(self, parameters: Sequence[Tensor]) -> bool:
        """Whether the parameters are those of construction, in the same memory."""
        return self.weights.aliases(arranged(parameters))

    def read(self, out: Tensor, start: int) -> None:
        """Copy elements of the current weights, counted from this rank's first one."""
        self.weights.read(out, start=self.start + start)

    def push_weights(self) -> None:
        """Append the current weights to the history."""
        self._newest_is_whole = not self._gathers
        with self.communicator.in_step():
            self.history.push(lambda row: self.read(row, 0))
            self._push_momentum()

    def push(self, point: Tensor) -> None:
        """Append ``point``, (length,), this rank's slice, to the history."""
        self._newest_is_whole = False
        with self.communicator.in_step():
            self.history.push(lambda row: row.copy_(point))
            self._push_momentum()

    def break_chain(self) -> None:
        """The weights were moved by something else than the optimizer."""
        self.history.break_chain()
        if self._momentum is not None:
            self._momentum.break_chain()

    def unlink_newest(self) -> None:
        """The newest point is where a cycle begins; none ended there after all."""
        self.history.unlink_newest()
        if self._momentum is not None:
            self._momentum.unlink_newest()

    def clear(self) -> None:
        """Forget all points."""
        self.history.clear()
        self._momentum = None

    def agree(self, jump: Tensor) -> Tensor:
        """The first rank's jump, on every rank, so that all write the same bits."""
        jump = jump.to(self.weights.device, copy=True)
        self.communicator.from_first(jump)
        return jump

    def gram(self) -> Tensor:  # (q, q) float64
        """Inner products of all consecutive differences, over all ranks' slices."""
        gram = None
        with self.communicator.in_step():
            gram = self.history.gram()
        if gram is None:
            size = (len(self.history) - 1,) * 2
            gram = torch.full(size, math.nan, dtype=torch.float64, device=self.device)
        if self.sharded:
            gram = gram.to(self.weights.device)  # where the process group communicates
            self.communicator.sum(gram)
        return gram

    @property
    def keeps_last_trial(self) -> bool:
        """Whether the last trial is left in ``candidate``, bitwise the same on every rank."""
        return self._gathers or self.communicator.world_size == 1

    def form(self, jump: Tensor) -> None:
        """Write the newest point plus the jump, (q,), to ``candidate``, on every rank."""
        self._combine(self.history, jump)

    def candidate_is_finite(self, reach: float) -> bool:
        """Whether ``candidate``, as the weights hold it, has neither NaN nor inf on any rank.

        Nor has any run out of memory where it was formed. Of one rank, it is looked at only where
        ``reach``, the longest that any sum of the terms of its jump can be, leaves a doubt.
        """
        if self.communicator.world_size == 1 and reach < self.weights.largest_safe_change:
            return True
        return self._is_finite_in(self.weights)

    def load(self, point: Tensor) -> None:
        """Write this rank's slice of a vector into ``candidate``, on every rank."""
        self._own_slice.copy_(point)
        self._gather()

    @contextmanager
    def trials(self) -> Iterator[Callable[[Tensor], None]]:
        """Inside, a function puts the candidate that ``form`` makes of a jump into the weights.

        Outside they hold what they held before, also after an error. To be entered after a push,
        before anything else moves the weights. Overwrites ``candidate``.
        """
        if self._newest_is_whole and not self.communicator.shortage:  # it keeps what they held
            try:
                yield self._form_and_write
            finally:
                self.weights.write(self.history.newest)
            return
        work_space = None
        with self.communicator.in_step():
            work_space = self.weights.work_space()  # before anything moves: it may not fit
        swapped = False

        def swap() -> None:
            nonlocal swapped
            if work_space is None:
                return
            self.weights.swap(self.candidate, work_space, back=swapped)
            swapped = not swapped

        def form_and_swap(jump: Tensor) -> None:
            if swapped:
                swap()
            self.form(jump)
            swap()

        try:
            yield form_and_swap
        finally:
            if swapped:
                swap()

    @contextmanager
    def candidate_in_place(self, *, already: bool = False) -> Iterator[None]:
        """The weights hold the candidate inside, and what they held before outside.

        Args:
            already: inside of another one: it is undone for a while.
        """
        work_space = self.weights.work_space()  # before anything moves: it may not fit
        self.weights.swap(self.candidate, work_space, back=already)
        try:
            yield
        finally:
            self.weights.swap(self.candidate, work_space, back=not already)

    def mix_momentum(self, jump: Tensor) -> None:
        """Move the momentum buffers by the same mixture; overwrites ``candidate``.

        A mixture beyond the precision of the buffers is left alone: the momentum stays.
        """
        momenta = momentum_tensors(self._optimizers, self.parameters)
        if self._momentum is None or not momenta:
            return
        self._combine(self._momentum, jump)
        flat = FlatTensors(momenta)
        if self._is_finite_in(flat):
            flat.write(self.candidate)

    def _is_finite_in(self, tensors: FlatTensors) -> bool:
        unfit: Tensor | bool = True
        with self.communicator.in_step():
            unfit = tensors.cannot_hold(self.candidate)
        if self.communicator.shortage:
            unfit = True
        return not self.communicator.any(unfit, self.weights.device)

    def state_dict(self) -> dict[str, Any]:
        """The points of this rank, on the CPU."""
        momentum = None if self._momentum is None else self._momentum.state_dict()
        return {"history": self.history.state_dict(), "momentum": momentum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.history.load_state_dict(state["history"])
        if state["momentum"] is not None:
            self._momentum = self._new_history(self._depth)
            self._momentum.load_state_dict(state["momentum"])

    @property
    def whole_length(self) -> int:
        """Elements of a vector of all ranks: the weights, or their parts one after another."""
        if self.split:
            return self.communicator.world_size * self.length
        return self.weights.length

    @property
    def whole_start(self) -> int:
        """Where this rank's elements begin in it."""
        return self.communicator.rank * self.length if self.split else self.start

    @property
    def _own_slice(self) -> Tensor:
        return self.candidate[self.start : self.start + self.length]

    def _new_history(self, depth: int) -> History:
        return History(
            depth=depth,
            length=self.length,
            dtype=self.weights.dtype,
            device=self.device,
            skipped=self.skipped,
            copies=host_copies(
                length=self.length,
                dtype=self.weights.dtype,
                source=self.weights.device,
                target=self.device,
            ),
        )

    def _form_and_write(self, jump: Tensor) -> None:
        self.form(jump)
        self.weights.write(self.candidate)

    def _combine(self, history: History, jump: Tensor) -> None:
        with self.communicator.in_step():
            history.combine(jump, out=self._own_slice)
        self._gather()

    def _gather(self) -> None:
        if self._gathers:
            self.communicator.gather(self.candidate, self.weights.device)

    def _push_momentum(self) -> None:
        if not self._optimizers:
            return
        momenta = momentum_tensors(self._optimizers, self.parameters)
        if self._momentum is None:
            self._momentum = self._new_history(self._depth)
        if not momenta:  # before the first step there is none: it starts from zero
            self._momentum.push(lambda row: row.zero_())
        else:
            flat = FlatTensors(momenta)
            self._momentum.push(lambda row: flat.read(row, start=self.start))
