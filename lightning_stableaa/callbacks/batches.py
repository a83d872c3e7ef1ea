"""Whether batches are the same from one extrapolation to the next."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_stableaa.callbacks.samples import tensors_in
from lightning_stableaa.weights import is_dense

# Entries of a tensor that are looked at, its first ones.
LOOKED_AT = 1 << 16

# Turns of a phase over a value of mean size: the values of two draws end in unrelated phases.
TURNS = 1e6

# By so much a sample do marks differ where samples do. Another order of the same ones changes them
# by rounding alone, other ones by about one over the root of their number.
TOLERANCE = 1e-6


class BatchWatch:
    """Sees the batch of every extrapolation, and tells whether each is another one.

    A PINN whose points are drawn once, or every few hundred steps, minimises the same function
    from step to step; one that draws new points at every step sees samples of it, and its loader
    does not tell. The device is not waited for.
    """

    def __init__(self) -> None:
        self._marks: Tensor | None = None  # (k,) float64, of k tensors
        self._changed: bool | Tensor = True

    def see(self, batch: Any) -> bool | Tensor:  # or () bool
        """Whether this batch differs from the last one, and that from the one before it, if any."""
        before, self._marks = self._marks, _marks(batch)
        if before is None or self._marks is None:
            self._changed = True
            return False
        changed_before, self._changed = self._changed, True
        if before.shape == self._marks.shape:
            change = (self._marks - before.to(self._marks.device)).abs()
            self._changed = (~(change <= TOLERANCE)).any()  # also where a mark is NaN
        return self._changed & changed_before

    def state_dict(self) -> dict[str, Any]:
        """What was seen, in plain numbers."""
        marks = None if self._marks is None else self._marks.tolist()
        return {"marks": marks, "changed": bool(self._changed)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` returned; an empty one is that of the beginning."""
        marks = state.get("marks")
        self._marks = (
            None if marks is None else torch.tensor(marks, dtype=torch.float64, device="cpu")
        )
        self._changed = state.get("changed", True)


@torch.no_grad()
def _marks(batch: Any) -> Tensor | None:  # (k,) float64
    marks: list[Tensor] = []
    for one in tensors_in(batch):
        if one.numel() and is_dense(one) and not one.is_complex():
            mark = _mark(one)
            marks.append(mark.to(marks[0].device) if marks else mark)
    return torch.stack(marks) if marks else None


def _mark(tensor: Tensor) -> Tensor:  # () float64
    """A number that the rows decide, whatever their order: the mean of sines of them.

    A row is one number here, its entries weighted unlike; scaled by the mean of all, so that rows
    which differ by a ten-thousandth of it end elsewhere. Sums of the values themselves are alike
    for samples that are spread evenly, such as those of a Latin hypercube.
    """
    rows = tensor.reshape(len(tensor), -1) if tensor.ndim else tensor.reshape(1, 1)
    rows = rows[: max(1, LOOKED_AT // rows.shape[1]), :LOOKED_AT].to(torch.float64)
    columns = torch.arange(1, rows.shape[1] + 1, dtype=torch.float64, device=rows.device)
    values = rows @ (1.0 + (columns * math.sqrt(2)).frac())
    # rounded up to a power of two, or a single row would always have the same phase
    exponent = values.abs().mean().frexp().exponent
    return (TURNS * torch.ldexp(values, -exponent) + 1.0).sin().mean()
