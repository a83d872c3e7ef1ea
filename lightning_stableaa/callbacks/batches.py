"""Whether batches are the same from one extrapolation to the next."""

from __future__ import annotations

from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

# Share of the sum of magnitudes by which sums differ where samples do. Rounding, and another order
# of the same samples, change them by less; other samples by one over the root of their number.
TOLERANCE = 1e-4


class BatchWatch:
    """Sees the batch of every extrapolation, and tells whether each is another one.

    A PINN whose points are drawn once, or every few hundred steps, minimises the same function
    from step to step; one that draws new points at every step sees samples of it, and its loader
    does not tell. The device is not waited for.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # (2, k) float64, of k tensors and of their magnitudes
        self._changed: bool | Tensor = True

    def see(self, batch: Any) -> bool | Tensor:  # or () bool
        """Whether this batch differs from the last one, and that from the one before it, if any."""
        before, self._sums = self._sums, _sums(batch)
        if before is None or self._sums is None:
            self._changed = True
            return False
        changed_before, self._changed = self._changed, True
        if before.shape == self._sums.shape:
            change = (self._sums[0] - before[0].to(self._sums.device)).abs()
            self._changed = (change > TOLERANCE * self._sums[1]).any()
        return self._changed & changed_before

    def state_dict(self) -> dict[str, Any]:
        """What was seen, in plain numbers."""
        sums = None if self._sums is None else self._sums.tolist()
        return {"sums": sums, "changed": bool(self._changed)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` returned; an empty one is that of the beginning."""
        sums = state.get("sums")
        self._sums = None if sums is None else torch.tensor(sums, dtype=torch.float64)
        self._changed = state.get("changed", True)


@torch.no_grad()
def _sums(batch: Any) -> Tensor | None:  # (2, k) float64
    found: list[Tensor] = []

    def add(one: Tensor) -> None:
        if not one.is_complex() and one.layout is torch.strided:
            values = one.to(torch.float64)
            found.append(torch.stack([values.sum(), values.abs().sum()]))

    apply_to_collection(batch, Tensor, add)
    return torch.stack(found, dim=1) if found else None
