"""Ring of iterates: push, Gram matrix of the differences, combination.

An iterate is the flat vector of all weights, or this rank's shard of it. The sequence of iterates
is contiguous as long as optimizer steps alone lead from one to the next; ``restart`` says that
something else moved the weights, and no residual is ever formed across a restart.

A push copies an iterate and nothing else. The next Gram matrix replaces every iterate but the
newest by its difference to the following one, while both are in the cache anyway, and multiplies
only what is new. So it reads the window once, and so does a combination.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

# Elements of one vector per chunk. Smaller ones would stay in the cache of a core, but where other
# processes keep all cores busy every parallel kernel waits for a thread: few chunks, few waits.
_CPU_CHUNK = 1 << 18
_GPU_CHUNK = 1 << 22

# Long float32 vectors on a CPU: products are summed in single precision over short runs, and the
# sums in float64. The error grows with a run and falls as the root of their number; with runs in
# proportion to the root of the length it stays below 1e-8 of |r_i||r_j| from this length on
# (tested), about what the rounding of the iterates leaves. Shorter vectors cost little in float64.
_SINGLE_PRECISION_FROM = 1 << 18


class Staging(Protocol):
    """Copies vectors to rows that live in the memory of the host."""

    def allocate(self, count: int) -> Tensor: ...
    def copy_async(self, write: Callable[[Tensor], object], row: Tensor) -> None: ...
    def synchronize(self) -> None: ...


class History:
    """Ring buffer of at most ``depth + 1`` iterates of ``length`` elements.

    Memory: (depth + 1) * length elements, allocated at construction, plus work space bounded by
    the chunk size.

    Args:
        depth: residuals kept at most, m >= 2.
        length: elements of an iterate.
        dtype: storage precision; that of the weights.
        device: where the iterates live.
        num_unowned: leading elements that inner products leave out: another rank counts them.
        staging: how iterates come here from a GPU; ``None``: they are written in place.

    Attributes:
        contiguous: whether an iterate pushed now ends a cycle that began at the newest one.
    """

    def __init__(
        self,
        *,
        depth: int,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
        num_unowned: int = 0,
        staging: Staging | None = None,
    ) -> None:
        self._staging = staging
        # empty: pages that no iterate was written to cost no memory
        self._rows = (
            torch.empty(depth + 1, length, dtype=dtype, device=device)
            if staging is None
            else staging.allocate(depth + 1)
        )
        self._num_unowned = num_unowned
        self._first = 0  # physical row of the oldest iterate
        self._ends_cycle: list[bool] = []  # per iterate: did a cycle lead here from the previous?
        self.contiguous = False
        self._num_differenced = 0  # the oldest so many rows hold differences, the others iterates
        self._products = torch.zeros(  # of differences, by physical row
            depth + 1, depth + 1, dtype=torch.float64, device=device
        )

    def __len__(self) -> int:
        """Number of stored iterates."""
        return len(self._ends_cycle)

    @property
    def is_residual(self) -> list[bool]:
        """For each consecutive difference, oldest first."""
        return self._ends_cycle[1:]

    @property
    def num_residuals(self) -> int:
        """Residuals in the window, at most ``depth``."""
        return sum(self.is_residual)

    @property
    def newest(self) -> Tensor:  # (length,)
        """The newest iterate, a view."""
        self._sync()
        return self._rows[self._row(len(self) - 1)]

    def push(self, write: Callable[[Tensor], object]) -> None:
        """Append an iterate; ``write`` fills the row, (length,), that it is given."""
        if len(self) == self._rows.shape[0]:
            self._drop_oldest()
        self._ends_cycle.append(self.contiguous)
        self.contiguous = True
        row = self._rows[self._row(len(self) - 1)]
        if self._staging is None:
            write(row)
        else:
            self._staging.copy_async(write, row)

    def restart(self) -> None:
        """Form no residual between the newest iterate and the next one."""
        if self._ends_cycle and not self._ends_cycle[-1]:
            self._ends_cycle.pop()  # a start without an end belongs to no residual
            self._undo_difference(len(self) - 1)
        self.contiguous = False

    def clear(self) -> None:
        """Forget all iterates."""
        self._ends_cycle.clear()
        self.contiguous = False
        self._num_differenced = 0

    def gram(self) -> Tensor:  # (q, q) float64, q = len(self) - 1
        """Inner products of all consecutive differences, oldest first.

        Differences are formed first, in storage precision; the Gram matrix of raw iterates would
        cancel (measured: 6200 % error in float32). Products are summed in float64, those of
        float32 on the CPU over short runs in single precision first.
        """
        self._form_differences()
        return self._products_of_differences()

    def combine(self, coefficients: Tensor, out: Tensor) -> None:
        """Write newest + sum_k coefficients_k d_k to ``out``.

        Args:
            coefficients: (q,), q = len(self) - 1, oldest first.
            out: (length,), in the dtype and on the device of the iterates.
        """
        self._form_differences()
        coefficients = coefficients.to(self._rows.device, self._rows.dtype)
        newest = self.newest
        terms = [(rows, coefficients[which]) for rows, which in self._segments()]
        if len(out) <= self._chunk:  # most of the time of a short one is that of its views
            _addmv_chain(newest, terms, out)
            return
        for low in range(0, len(out), self._chunk):  # so that ``out`` is written to memory once
            where = slice(low, low + self._chunk)
            parts = [(rows[where], factors) for rows, factors in terms]
            _addmv_chain(newest[where], parts, out[where])

    def state_dict(self) -> dict[str, Any]:
        """Rows on the CPU, oldest first, and their place in the ring.

        The place is kept because a matrix product may round by the position of a row: only from
        the same place does a continuation give the same bits. The same holds of products already
        formed.
        """
        self._sync()
        order = [self._row(k) for k in range(len(self))]
        return {
            "first": self._first,
            "rows": self._rows[order].cpu(),
            "num_differenced": self._num_differenced,
            "products": self._products_of_differences().cpu(),
            "ends_cycle": list(self._ends_cycle),
            "contiguous": self.contiguous,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Raises:
            ValueError: the iterates have another length, or are more than fit.
        """
        self._sync()
        rows: Tensor = state["rows"]
        capacity, length = self._rows.shape
        if rows.shape[1] != length or rows.shape[0] > capacity:
            raise ValueError(
                f"history holds up to {capacity} iterates of {length} elements, "
                f"got {rows.shape[0]} of {rows.shape[1]}"
            )
        self._first = int(state["first"]) % capacity
        order = [self._row(k) for k in range(rows.shape[0])]
        self._rows[order] = rows.to(self._rows.device, self._rows.dtype)
        self._num_differenced = int(state["num_differenced"])
        rows_with_products = torch.tensor(
            order[: self._num_differenced], dtype=torch.long, device="cpu"
        )
        self._products[rows_with_products[:, None], rows_with_products] = state["products"].to(
            self._rows.device
        )
        self._ends_cycle = [bool(one) for one in state["ends_cycle"]]
        self.contiguous = bool(state["contiguous"])

    @property
    def _chunk(self) -> int:
        return _CPU_CHUNK if self._rows.device.type == "cpu" else _GPU_CHUNK

    def _row(self, position: int) -> int:
        """Physical row of the iterate at ``position``, 0 = oldest."""
        return (self._first + position) % self._rows.shape[0]

    def _segments(self) -> list[tuple[Tensor, slice]]:
        """The differences as columns, and their positions: one segment, or two round the end."""
        count = len(self) - 1
        before = min(count, self._rows.shape[0] - self._first)
        segments = [(self._rows[self._first : self._first + before].T, slice(0, before))]
        if count > before:
            segments.append((self._rows[: count - before].T, slice(before, count)))
        return segments

    def _sync(self) -> None:
        """Wait for iterates that are on their way from a GPU."""
        if self._staging is not None:
            self._staging.synchronize()

    def _drop_oldest(self) -> None:
        count = 1
        while count + 1 < len(self) and not self._ends_cycle[count + 1]:
            count += 1  # of no residual any longer
        self._first = self._row(count)
        self._num_differenced = max(0, self._num_differenced - count)
        self._ends_cycle[: count + 1] = [False]

    def _form_differences(self) -> None:
        """Replace iterates that have a successor by the difference to it, and multiply."""
        positions = range(self._num_differenced, len(self) - 1)
        new = [self._row(position) for position in positions]
        self._sync()
        if not new:
            return
        length, run = self._rows.shape[1], _single_precision_run(self._rows)
        columns: list[Tensor] = []
        for low in range(0, length, self._chunk):
            chunk = self._rows if length <= self._chunk else self._rows[:, low : low + self._chunk]
            for position in positions:
                iterate = chunk[self._row(position)]
                torch.sub(chunk[self._row(position + 1)], iterate, out=iterate)
            owned = chunk if low >= self._num_unowned else chunk[:, self._num_unowned - low :]
            products = _products(owned, new, run)
            columns = (
                [a + b for a, b in zip(columns, products, strict=True)] if columns else products
            )
        for row, column in zip(new, columns, strict=True):
            self._products[:, row] = column  # what rows without a difference get is never read
            self._products[row] = column
        self._num_differenced = len(self) - 1

    def _products_of_differences(self) -> Tensor:  # float64, oldest first
        by_age = self._products.roll((-self._first, -self._first), (0, 1))
        return by_age[: self._num_differenced, : self._num_differenced].contiguous()

    def _undo_difference(self, position: int) -> None:
        """Make the newest row an iterate again, where its successor was taken away."""
        if position < 0 or self._num_differenced <= position:
            return
        self._sync()
        row = self._rows[self._row(position)]
        torch.sub(self._rows[self._row(position + 1)], row, out=row)
        self._num_differenced = position


def _addmv_chain(newest: Tensor, terms: list[tuple[Tensor, Tensor]], out: Tensor) -> None:
    """Write newest + sum_k w_k d_k to ``out``; the terms are (n, k) and (k,)."""
    for differences, coefficients in terms:
        torch.addmv(newest, differences, coefficients, out=out)
        newest = out


def _products(rows: Tensor, new: list[int], run: int) -> list[Tensor]:  # len(new) of (rows,)
    """Inner products, float64, of all rows, (rows, length), with each of those at ``new``.

    In float64, but for runs of ``run`` elements, within which the precision is that of the rows.
    """
    in_runs = rows.shape[1] - rows.shape[1] % run if run else 0
    if in_runs < rows.shape[1]:
        rest = (rows[:, in_runs:] if in_runs else rows).to(torch.float64)
        columns = [torch.mv(rest, rest[row]) for row in new]
    else:
        columns = [torch.zeros(len(rows), dtype=torch.float64, device=rows.device) for _ in new]
    if in_runs:
        runs = rows[:, :in_runs].unflatten(1, (-1, run))
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
    if length < _SINGLE_PRECISION_FROM or not _fp32_products_ok(rows):
        return 0
    return 1 << ((length.bit_length() - 1) // 2 - 1)


def _fp32_products_ok(rows: Tensor) -> bool:
    """Not where the user lets matrix products in float32 round to bfloat16 or TF32."""
    if rows.dtype != torch.float32 or rows.device.type != "cpu":
        return False
    backend = getattr(torch.backends.mkldnn, "matmul", None)  # torch >= 2.9
    if backend is None:
        return torch.get_float32_matmul_precision() == "highest"
    return backend.fp32_precision in ("none", "ieee")
