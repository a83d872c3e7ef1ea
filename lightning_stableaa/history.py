"""Bounded window of points: push, Gram of the differences, combination.

A point is the flat vector of all weights (or this rank's slice of it). Points chain: the residual
of a cycle is the difference of two consecutive points. ``break_chain`` says that something else
moved the weights; no residual is ever formed across a break.

A push copies a point and nothing else. The next Gram replaces every point but the newest by its
difference to the following one, while both are in the cache anyway; what it needs of older ones, it
has formed and multiplied before. So it reads the window once, and so does a combination.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_stableaa.memory import out_of_memory
from lightning_stableaa.offload import HostCopies

# Elements of one vector per chunk. Smaller ones would stay in the cache of a core, but where other
# processes keep all cores busy every parallel kernel waits for a thread: few chunks, few waits.
_CPU_CHUNK = 1 << 18
_GPU_CHUNK = 1 << 22
_SMALLEST_CHUNK = 1 << 14  # where memory is short

# Long float32 vectors on a CPU: products are summed in single precision over short runs, and the
# sums in float64. The error grows with a run and falls as the root of their number; with runs in
# proportion to the root of the length it stays below 1e-8 of |r_i||r_j| from this length on
# (tested), about what the rounding of the points leaves. Shorter vectors cost little in float64.
_SINGLE_PRECISION_FROM = 1 << 18


class History:
    """Ring buffer of at most ``depth + 1`` points of ``length`` elements.

    Memory: (depth + 1) * length elements, allocated at construction, plus work space bounded by
    the chunk size.

    Args:
        depth: residuals kept at most, m >= 2.
        length: elements of a point.
        dtype: storage precision; that of the weights.
        device: where the points live.
        skipped: leading elements that inner products leave out: another process counts them.
        copies: how points come here from a GPU; ``None``: they are written in place.
    """

    def __init__(
        self,
        *,
        depth: int,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
        skipped: int = 0,
        copies: HostCopies | None = None,
    ) -> None:
        self._copies = copies
        # empty: pages that no point was written to cost no memory
        self._rows = (
            torch.empty(depth + 1, length, dtype=dtype, device=device)
            if copies is None
            else copies.allocate(depth + 1)
        )
        self._skipped = skipped
        self._first = 0  # physical row of the oldest point
        self._links: list[bool] = []  # per point: is it the end of a cycle begun at the previous?
        self._chained = False  # will the next point be linked to the newest?
        self._formed = 0  # the oldest so many rows hold differences, the others still points
        self._laid_out = (-1, -1)  # first row and number of the differences seen in ``_views``
        self._views: list[tuple[Tensor, slice]] = []
        self._products = torch.zeros(  # of formed differences, by physical row
            depth + 1, depth + 1, dtype=torch.float64, device=device
        )

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
        self._settle()
        return self._rows[self._row(len(self) - 1)]

    def push(self, write: Callable[[Tensor], object]) -> None:
        """Append a point; ``write`` fills the row, (length,), that it is given."""
        if len(self) == self._rows.shape[0]:
            self._drop_oldest()
        self._links.append(self._chained)
        self._chained = True  # also where ``write`` fails: all ranks keep the same links
        row = self._rows[self._row(len(self) - 1)]
        if self._copies is None:
            write(row)
        else:
            self._copies.start(write, row)

    def break_chain(self) -> None:
        """Form no residual between the newest point and the next one."""
        if self._links and not self._links[-1]:
            self._links.pop()  # a start without an end belongs to no residual
            self._unform(len(self) - 1)
        self._chained = False

    def unlink_newest(self) -> None:
        """The newest point is where a cycle begins; none ended there after all."""
        self._links[-1] = False

    def clear(self) -> None:
        """Forget all points."""
        self._links.clear()
        self._chained = False
        self._formed = 0

    def gram(self) -> Tensor:  # (q, q) float64, q = len(self) - 1
        """Inner products of all consecutive differences, oldest first.

        Differences are formed first, in storage precision; the Gram of raw points would cancel
        (measured: 6200 % error in float32). Products are summed in float64, those of float32 on
        the CPU over short runs in single precision first.
        """
        self._form_differences()
        return self._products_of_formed()

    def combine(self, jump: Tensor, out: Tensor) -> None:
        """Write newest + sum_k jump_k delta_k to ``out``.

        Args:
            jump: (q,), q = len(self) - 1, oldest first.
            out: (length,), in the dtype and on the device of the points.
        """
        self._form_differences()
        weights = jump.to(self._rows.device, self._rows.dtype)
        newest, terms = self.newest, [(rows, weights[which]) for rows, which in self._runs()]
        if len(out) <= self._chunk:  # most of the time of a short one is that of its views
            _add_up(newest, terms, out)
            return
        for low in range(0, len(out), self._chunk):  # so that ``out`` is written to memory once
            where = slice(low, low + self._chunk)
            parts = [(rows[where], factors) for rows, factors in terms]
            _add_up(newest[where], parts, out[where])

    def state_dict(self) -> dict[str, Any]:
        """Rows on the CPU, oldest first, the links between points, and their place in the ring.

        The first ``formed`` rows are differences, the others points. The place is kept because a
        matrix product may round by the position of a row: only from the same place does a
        continuation give the same bits. The same holds of products already formed.
        """
        self._settle()
        order = [self._row(k) for k in range(len(self))]
        return {
            "first": self._first,
            "rows": self._rows[order].cpu(),
            "formed": self._formed,
            "products": self._products_of_formed().cpu(),
            "links": list(self._links),
            "chained": self._chained,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Raises:
            ValueError: the points have another length, or are more than fit.
        """
        self._settle()
        rows: Tensor = state["rows"]
        capacity, length = self._rows.shape
        if rows.shape[1] != length or rows.shape[0] > capacity:
            raise ValueError(
                f"history holds up to {capacity} points of {length} elements, "
                f"got {rows.shape[0]} of {rows.shape[1]}"
            )
        self._first = int(state["first"]) % capacity
        order = [self._row(k) for k in range(rows.shape[0])]
        self._rows[order] = rows.to(self._rows.device, self._rows.dtype)
        self._formed = int(state["formed"])
        of_formed = torch.tensor(order[: self._formed], dtype=torch.long, device="cpu")
        self._products[of_formed[:, None], of_formed] = state["products"].to(self._rows.device)
        self._links = [bool(link) for link in state["links"]]
        self._chained = bool(state["chained"])

    @property
    def _chunk(self) -> int:
        return _CPU_CHUNK if self._rows.device.type == "cpu" else _GPU_CHUNK

    def _row(self, position: int) -> int:
        """Physical row of the point at ``position``, 0 = oldest."""
        return (self._first + position) % self._rows.shape[0]

    def _runs(self) -> list[tuple[Tensor, slice]]:
        """The differences as columns, and their positions: one run, or two round the end."""
        count, capacity = len(self) - 1, self._rows.shape[0]
        if self._laid_out != (self._first, count):
            self._laid_out = (self._first, count)
            before = min(count, capacity - self._first)
            rows = self._rows[self._first : self._first + before]
            self._views = [(rows.T, slice(0, before))]
            if count > before:
                self._views.append((self._rows[: count - before].T, slice(before, count)))
        return self._views

    def _settle(self) -> None:
        """Wait for points that are on their way from a GPU."""
        if self._copies is not None:
            self._copies.finish()

    def _drop_oldest(self) -> None:
        self._drop_first()
        while len(self._links) > 1 and not self._links[1]:  # its residual went with its start
            self._drop_first()
        if self._links:
            self._links[0] = False

    def _drop_first(self) -> None:
        self._first = self._row(1)
        self._formed = max(0, self._formed - 1)
        del self._links[0]

    def _form_differences(self) -> None:
        """Replace points that have a successor by the difference to it, and multiply."""
        positions = range(self._formed, len(self) - 1)
        new = [self._row(position) for position in positions]
        self._settle()
        if not new:
            return
        length, run = self._rows.shape[1], _single_precision_run(self._rows)
        columns: list[Tensor] = []
        for low in range(0, length, self._chunk):
            chunk = self._rows if length <= self._chunk else self._rows[:, low : low + self._chunk]
            for position in positions:
                point = chunk[self._row(position)]
                torch.sub(chunk[self._row(position + 1)], point, out=point)
            counted = chunk if low >= self._skipped else chunk[:, self._skipped - low :]
            columns = _sums(columns, _products_in_memory(counted, new, run))
        for row, column in zip(new, columns, strict=True):
            self._products[:, row] = column  # what rows without a difference get is never read
            self._products[row] = column
        self._formed = len(self) - 1

    def _products_of_formed(self) -> Tensor:  # (formed, formed) float64, oldest first
        by_age = self._products.roll((-self._first, -self._first), (0, 1))
        return by_age[: self._formed, : self._formed].contiguous()

    def _unform(self, position: int) -> None:
        """Make the newest row a point again, where its successor was taken away."""
        if position < 0 or self._formed <= position:
            return
        self._settle()
        row = self._rows[self._row(position)]
        torch.sub(self._rows[self._row(position + 1)], row, out=row)
        self._formed = position


def _add_up(newest: Tensor, terms: list[tuple[Tensor, Tensor]], out: Tensor) -> None:
    """Write newest + sum_k w_k delta_k to ``out``; the terms are (n, k) and (k,)."""
    for differences, weights in terms:
        torch.addmv(newest, differences, weights, out=out)
        newest = out


def _sums(before: list[Tensor], more: list[Tensor]) -> list[Tensor]:
    return [one + other for one, other in zip(before, more, strict=True)] if before else more


def _products_in_memory(rows: Tensor, new: list[int], run: int) -> list[Tensor]:
    """``_products`` by halves where the work space for the whole does not fit."""
    try:
        return _products(rows, new, run)
    except (RuntimeError, MemoryError) as error:
        length = rows.shape[1]
        if not out_of_memory(error) or length <= _SMALLEST_CHUNK:
            raise
    low = _products_in_memory(rows[:, : length // 2], new, run)
    high = _products_in_memory(rows[:, length // 2 :], new, run)
    return _sums(low, high)


def _products(rows: Tensor, new: list[int], run: int) -> list[Tensor]:  # len(new) of (rows,)
    """Inner products, float64, of all rows, (rows, length), with each of those at ``new``.

    In float64, but for runs of ``run`` elements, within which the precision is that of the rows.
    """
    whole = rows.shape[1] - rows.shape[1] % run if run else 0
    if whole < rows.shape[1]:
        rest = (rows[:, whole:] if whole else rows).to(torch.float64)
        columns = [torch.mv(rest, rest[row]) for row in new]
    else:
        columns = [torch.zeros(len(rows), dtype=torch.float64, device=rows.device) for _ in new]
    if whole:
        runs = rows[:, :whole].unflatten(1, (-1, run))
        for column, row in zip(columns, new, strict=True):
            # a row times a tall matrix takes half the time of a wide matrix times a column
            of_runs = torch.bmm(runs[row, :, None], runs.permute(1, 2, 0))
            column += of_runs.sum(dim=(0, 1), dtype=torch.float64)
    return columns


def _single_precision_run(rows: Tensor) -> int:
    """Elements whose products are summed in the precision of the rows; 0 for none.

    256 of 2^18, 512 of 2^20, 1024 of 2^22 elements, and so on.
    """
    length = rows.shape[1]
    if length < _SINGLE_PRECISION_FROM or not _single_precision_will_do(rows):
        return 0
    return 1 << ((length.bit_length() - 1) // 2 - 1)


def _single_precision_will_do(rows: Tensor) -> bool:
    """Not where the user lets matrix products in float32 round to bfloat16 or TF32."""
    if rows.dtype != torch.float32 or rows.device.type != "cpu":
        return False
    backend = getattr(torch.backends.mkldnn, "matmul", None)  # torch >= 2.9
    if backend is None:
        return torch.get_float32_matmul_precision() == "highest"
    return backend.fp32_precision in ("none", "ieee")
