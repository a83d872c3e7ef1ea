"""Whether batches are the same from one extrapolation to the next."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
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
    does not tell. A device is not waited for.
    """

    def __init__(self) -> None:
        self._marks: list[float] | Tensor | None = None  # (k,), of k tensors
        self._changed: bool | Tensor = True

    def see(self, batch: Any) -> bool | Tensor:  # or () bool
        """Whether this batch differs from the last one, and that from the one before it, if any.

        A batch that no earlier one is known of is taken for another one.
        """
        before, self._marks = self._marks, _marks(batch)
        if before is None or self._marks is None:
            self._changed = True
            return self._marks is not None
        changed_before, self._changed = self._changed, _differ(before, self._marks)
        return self._changed & changed_before

    def state_dict(self) -> dict[str, Any]:
        """What was seen, in plain numbers."""
        marks = self._marks.tolist() if isinstance(self._marks, Tensor) else self._marks
        return {"marks": marks, "changed": bool(self._changed)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` returned; an empty one is that of the beginning."""
        self._marks = state.get("marks")
        self._changed = state.get("changed", True)


def _differ(before: list[float] | Tensor, after: list[float] | Tensor) -> bool | Tensor:
    """Also where one is NaN."""
    if len(before) != len(after):
        return True
    if isinstance(after, Tensor):
        change = after - torch.as_tensor(before, dtype=after.dtype, device=after.device)
        return (~(change.abs() <= TOLERANCE)).any()
    pairs = zip(before, after, strict=True)
    return not all(abs(float(one) - other) <= TOLERANCE for one, other in pairs)


@torch.no_grad()
def _marks(batch: Any) -> list[float] | Tensor | None:  # (k,) float64
    """Of every tensor that can have one; on the host, in NumPy, whose kernels start sooner."""
    tensors = [
        one for one in tensors_in(batch) if one.numel() and is_dense(one) and not one.is_complex()
    ]
    device = next((one.device for one in tensors if one.device.type != "cpu"), None)
    if device is None:
        return [mark_on_host(one) for one in tensors] or None
    return torch.stack([mark(one).to(device, non_blocking=True) for one in tensors])


def mark(tensor: Tensor) -> Tensor:  # () float64
    """A number that the rows decide, whatever their order: the mean of sines of them.

    A row is one number here, its entries weighted unlike; scaled by the mean of all, so that rows
    which differ by a ten-thousandth of it end elsewhere. Sums of the values themselves are alike
    for samples that are spread evenly, such as those of a Latin hypercube.
    """
    rows = _looked_at(tensor)
    values = rows @ torch.from_numpy(_weights(rows.shape[1])).to(rows.device, non_blocking=True)
    # rounded up to a power of two, or a single row would always have the same phase
    exponent = values.abs().mean().frexp().exponent
    return (TURNS * torch.ldexp(values, -exponent) + 1.0).sin().mean()


def mark_on_host(tensor: Tensor) -> float:
    """``mark`` in NumPy, up to rounding."""
    rows = _looked_at(tensor).numpy()
    with np.errstate(all="ignore"):  # NaN is a mark as well
        values = rows @ _weights(rows.shape[1])
        _, exponent = np.frexp(np.abs(values).mean())
        return float(np.sin(TURNS * np.ldexp(values, -exponent) + 1.0).mean())


def _looked_at(tensor: Tensor) -> Tensor:  # (rows, columns) float64
    rows = tensor.reshape(len(tensor), -1) if tensor.ndim else tensor.reshape(1, 1)
    return rows[: max(1, LOOKED_AT // rows.shape[1]), :LOOKED_AT].to(torch.float64)


@functools.lru_cache(maxsize=8)  # of the tensors of a batch
def _weights(columns: int) -> np.ndarray[Any, np.dtype[np.float64]]:  # (columns,)
    return 1.0 + np.modf(np.arange(1.0, columns + 1) * math.sqrt(2))[0]
