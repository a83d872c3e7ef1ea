"""Streaming mean and relative standard deviation (RSD) of a window of iterates.

Symbols: x_k iterates of the window, k = 1 .. c; u_k = x_{k+1} - x_k updates, c - 1 of them; mu
their mean; sigma the unbiased standard deviation, per parameter; M2 = sum_k (x_k - mu)^2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_stableaa.options import RsdKind, RsdOf

# The average, once on, stays on until the RSD falls below this share of the threshold.
HYSTERESIS = 0.8

# Elements read from the parameters at a time: the work space beside the vectors kept.
_CHUNK = 1 << 18

Read = Callable[[Tensor, int], object]
"""``read(out, start)`` copies the elements [start, start + len(out)) of the iterate to ``out``."""


class RunningStatistics:
    """Mean and RSD of a window of vectors, by Welford's update, without storing the window.

    Memory beside a bounded work space: n elements for ``rsd="norm"`` (the mean; the norm of sigma
    needs only a scalar), 2n for ``rsd="max"``, 3n for ``of="updates"``.

    Args:
        length: n, elements of a vector (of this rank's slice, where vectors are sharded).
        dtype: precision of the vectors; sums of squares are float64, single squares float32 or
            float64.
        device: where the vectors live.
        rsd: ``"norm"`` or ``"max"``, see :class:`~lightning_stableaa.Smoothing`.
        of: ``"iterates"`` or ``"updates"``, see :class:`~lightning_stableaa.Smoothing`.
        skipped: leading elements that norms leave out: another process counts them.

    Source: B. P. Welford, Note on a method for calculating corrected sums of squares (1962).
    """

    def __init__(
        self,
        *,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
        rsd: RsdKind = "norm",
        of: RsdOf = "iterates",
        skipped: int = 0,
    ) -> None:
        self._skipped = skipped
        self.rsd: RsdKind = rsd
        self.of: RsdOf = of
        self.count = 0
        self.mean = torch.zeros(length, dtype=dtype, device=device)
        # squares of ordinary deviations are below the range of float16
        wide = torch.promote_types(dtype, torch.float32)
        self._squares = torch.zeros_like(self.mean, dtype=wide) if rsd == "max" else None  # M2
        self._origin = torch.zeros_like(self.mean) if of == "updates" else None  # x_1
        self._previous = torch.zeros_like(self.mean) if of == "updates" else None
        # sum M2 of the iterates, or sum |u_k|^2 of the updates
        self._total = torch.zeros((), dtype=torch.float64, device=device)

    def reset(self) -> None:
        """Begin a new window."""
        self.count = 0
        self._total.zero_()

    def observe(self, read: Read) -> None:
        """Take the current iterate into the window; never waits for the device."""
        self.count += 1
        for where in self._chunks():
            iterate = torch.empty_like(self.mean[where])
            read(iterate, where.start)
            if self._origin is not None and self._previous is not None:
                self._absorb_update(iterate, where, self._origin[where], self._previous[where])
            self._absorb_iterate(iterate, where)

    def moments(self) -> Tensor:  # (2,) float64
        """(spread, level) of this rank's slice.

        ``rsd="norm"``: squared norms of sigma and mu, to be summed over slices; ``rsd="max"``:
        the maxima of sigma and |mu|. (0, 1) while the window is too short for a deviation.
        """
        samples = self.count - 1 if self.of == "updates" else self.count
        if samples < 2:
            return torch.tensor([0.0, 1.0], dtype=torch.float64, device=self.mean.device)
        if self._squares is not None:
            spread = (self._squares.max().double() / (samples - 1)).sqrt()
            return torch.stack([spread, self.mean.abs().max().double()])
        if self._origin is not None and self._previous is not None:
            level = torch.zeros_like(self._total)
            for where in self._chunks():
                level += self._squared_norm(self._previous[where] - self._origin[where], where)
            level /= samples**2
            spread = (self._total - samples * level).clamp_min(0.0) / (samples - 1)
            return torch.stack([spread, level])
        level = torch.zeros_like(self._total)
        for where in self._chunks():
            level += self._squared_norm(self.mean[where], where)
        return torch.stack([self._total / (samples - 1), level])

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and CPU tensors."""
        tensors = {name: tensor.to("cpu", copy=True) for name, tensor in self._tensors().items()}
        return {"count": self.count, **tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned for the same length and options."""
        self.count = int(state["count"])
        for name, tensor in self._tensors().items():
            tensor.copy_(state[name])

    def _tensors(self) -> dict[str, Tensor]:
        optional = {
            "squares": self._squares,
            "origin": self._origin,
            "previous": self._previous,
        }
        kept = {name: tensor for name, tensor in optional.items() if tensor is not None}
        return {"mean": self.mean, "total": self._total, **kept}

    def _chunks(self) -> Iterator[slice]:
        length = self.mean.numel()
        for low in range(0, length, _CHUNK):
            yield slice(low, min(low + _CHUNK, length))

    def _absorb_iterate(self, iterate: Tensor, where: slice) -> None:
        mean = self.mean[where]
        if self.count == 1:
            mean.copy_(iterate)
            if self._squares is not None:
                self._squares[where].zero_()
            return
        deviation = iterate.sub_(mean)
        mean.add_(deviation, alpha=1 / self.count)
        # (x - mu_old)(x - mu_new) = (x - mu_old)^2 (c - 1) / c
        share = (self.count - 1) / self.count
        if self._squares is not None:
            deviation = deviation.to(self._squares.dtype)
            self._squares[where].addcmul_(deviation, deviation, value=share)
        elif self.of == "iterates":
            self._total += share * self._squared_norm(deviation, where)

    def _absorb_update(
        self, iterate: Tensor, where: slice, origin: Tensor, previous: Tensor
    ) -> None:
        if self.count == 1:
            origin.copy_(iterate)
        else:
            self._total += self._squared_norm(iterate - previous, where)
        previous.copy_(iterate)

    def _squared_norm(self, chunk: Tensor, where: slice) -> Tensor:  # float64 scalar
        counted = chunk[max(0, self._skipped - where.start) :]
        return torch.linalg.vector_norm(counted, dtype=torch.float64).square()


def relative_standard_deviation(moments: Tensor, *, rsd: RsdKind) -> float:
    """RSD from (spread, level) of the whole vector; waits for the device.

    0 where nothing varies, inf where the mean is zero and the values are not, NaN only where the
    iterates hold NaN.
    """
    spread, level = moments.tolist()
    if spread == 0:
        return 0.0
    if level == 0:
        return math.inf
    return math.sqrt(spread / level) if rsd == "norm" else spread / level


class Switch:
    """On above a threshold, off below ``HYSTERESIS`` times it, unchanged between."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self.on = False

    def update(self, value: float) -> bool:
        """Take in a new RSD and return whether smoothing is on; NaN and inf switch it on."""
        if not value <= self._threshold:
            self.on = True
        elif value < HYSTERESIS * self._threshold or value == 0:
            self.on = False
        return self.on
