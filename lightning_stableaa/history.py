"""Bounded window of points: push, Gram of the differences, combination.

A point is the flat vector of all weights (or this rank's slice of it). Points chain: the residual
of a cycle is the difference of two consecutive points. ``break_chain`` says that something else
moved the weights; no residual is ever formed across a break.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Elements of one vector per chunk. Smaller ones would stay in the cache of a core, but where other
# processes keep all cores busy every parallel kernel waits for a thread: few chunks, few waits.
_CPU_CHUNK = 1 << 17
_GPU_CHUNK = 1 << 22


class History:
    """Ring buffer of at most ``depth + 1`` points of ``length`` elements.

    Memory: (depth + 1) * length elements, allocated at construction, plus work space bounded by
    the chunk size.

    Args:
        depth: residuals kept at most, m >= 2.
        length: elements of a point.
        dtype: storage precision; that of the weights.
        device: where the points live.
    """

    def __init__(
        self, *, depth: int, length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        # empty: pages that no point was written to cost no memory
        self._rows = torch.empty(depth + 1, length, dtype=dtype, device=device)
        self._first = 0  # physical row of the oldest point
        self._links: list[bool] = []  # per point: is it the end of a cycle begun at the previous?
        self._chained = False  # will the next point be linked to the newest?

    def __len__(self) -> int:
        """Number of stored points."""
        return len(self._links)

    @property
    def linked(self) -> list[bool]:
        """For each consecutive difference, oldest first: is it a residual?"""
        return self._links[1:]

    @property
    def residual_count(self) -> int:
        return sum(self.linked)

    @property
    def chained(self) -> bool:
        """Whether a point pushed now closes a cycle that began at the newest point."""
        return self._chained

    @property
    def newest(self) -> Tensor:  # (length,)
        """The newest point, a view."""
        return self._rows[self._row(len(self) - 1)]

    def push(self, write: Callable[[Tensor], object]) -> None:
        """Append a point; ``write`` fills the row, (length,), that it is given."""
        if len(self) == self._rows.shape[0]:
            self._drop_oldest()
        self._links.append(self._chained)
        write(self.newest)
        self._chained = True

    def break_chain(self) -> None:
        """Form no residual between the newest point and the next one."""
        if self._links and not self._links[-1]:
            self._links.pop()  # a start without an end belongs to no residual
        self._chained = False

    def clear(self) -> None:
        """Forget all points."""
        self._links.clear()
        self._chained = False

    def gram(self) -> Tensor:  # (q, q) float64, q = len(self) - 1
        """Inner products of all consecutive differences, oldest first.

        Differences are formed first, in storage precision, and multiplied in float64: the Gram of
        raw points would cancel (measured: 6200 % error in float32).
        """
        rows = self._rows
        capacity, length = rows.shape
        gram = torch.zeros(capacity, capacity, dtype=torch.float64, device=rows.device)
        for low in range(0, length, self._chunk):
            delta = self._differences(low, min(low + self._chunk, length)).to(torch.float64)
            gram += delta @ delta.T
        order = [self._row(k) for k in range(len(self) - 1)]
        index = torch.tensor(order, dtype=torch.long, device=rows.device)
        return gram[index][:, index]

    def combine(self, jump: Tensor, out: Tensor) -> None:
        """Write newest + sum_k jump_k delta_k to ``out``.

        Args:
            jump: (q,), q = len(self) - 1, oldest first.
            out: (length,), in the dtype and on the device of the points.
        """
        weights = jump.to(self._rows.device, self._rows.dtype)
        newest = self.newest
        for low in range(0, newest.numel(), self._chunk):
            high = min(low + self._chunk, newest.numel())
            delta = self._differences(low, high)
            total = newest[low:high]
            for rows, positions in self._runs():
                total = torch.addmv(total, delta[rows].T, weights[positions])
            out[low:high] = total

    def state_dict(self) -> dict[str, Any]:
        """Points on the CPU, oldest first, the links between them, and their place in the ring.

        The place is kept because a matrix product may round by the position of a row: only from
        the same place does a continuation give the same bits.
        """
        order = [self._row(k) for k in range(len(self))]
        return {
            "first": self._first,
            "points": self._rows[order].cpu(),
            "links": list(self._links),
            "chained": self._chained,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Raises:
            ValueError: the points have another length, or are more than fit.
        """
        points: Tensor = state["points"]
        capacity, length = self._rows.shape
        if points.shape[1] != length or points.shape[0] > capacity:
            raise ValueError(
                f"history holds up to {capacity} points of {length} elements, "
                f"got {points.shape[0]} of {points.shape[1]}"
            )
        self._first = int(state["first"]) % capacity
        order = [self._row(k) for k in range(points.shape[0])]
        self._rows[order] = points.to(self._rows.device, self._rows.dtype)
        self._links = [bool(link) for link in state["links"]]
        self._chained = bool(state["chained"])

    @property
    def _chunk(self) -> int:
        return _CPU_CHUNK if self._rows.device.type == "cpu" else _GPU_CHUNK

    def _row(self, position: int) -> int:
        """Physical row of the point at ``position``, 0 = oldest."""
        return (self._first + position) % self._rows.shape[0]

    def _runs(self) -> list[tuple[slice, slice]]:
        """Physical rows of the differences, and their positions: one run, or two round the end."""
        count, capacity = len(self) - 1, self._rows.shape[0]
        before = min(count, capacity - self._first)
        runs = [(slice(self._first, self._first + before), slice(0, before))]
        if count > before:
            runs.append((slice(0, count - before), slice(before, count)))
        return runs

    def _drop_oldest(self) -> None:
        self._first = self._row(1)
        del self._links[0]
        while len(self._links) > 1 and not self._links[1]:  # its residual went with its start
            self._first = self._row(1)
            del self._links[0]
        if self._links:
            self._links[0] = False

    def _differences(self, low: int, high: int) -> Tensor:  # (depth + 1, high - low)
        """Physical row k holds the difference from row k to the next one, around the ring.

        Rows that are not a difference of two stored neighbours hold anything, zero included.
        """
        block = self._rows[:, low:high]
        delta = torch.empty_like(block, memory_format=torch.contiguous_format)
        torch.sub(block[1:], block[:-1], out=delta[:-1])
        torch.sub(block[0], block[-1], out=delta[-1])
        return delta
