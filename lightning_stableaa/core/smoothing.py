"""The paper's moving average: streaming statistics of a window of iterates, and the switch.

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

# Elements read from the parameters at a time: the work space beside the vectors kept.
_CHUNK = 1 << 18

Read = Callable[[Tensor, int], object]
"""``read(out, start)`` copies the elements [start, start + len(out)) of the iterate to ``out``."""


class MovingAverage:
    """Mean and relative standard deviation (RSD) of a window of iterates, without storing it.

    Memory beside a bounded work space: n elements for ``rsd="norm"`` of iterates (the norm of
    sigma needs only a scalar), 2n for ``rsd="max"``, 3n for ``of="updates"``.

    Args:
        length: n, elements of an iterate (of this rank's shard, where iterates are sharded).
        dtype: precision of the iterates; sums of squares are float64, single squares float32 or
            float64.
        device: where the average lives.
        threshold: RSD above which the average is on; dimensionless.
        rsd: ``"norm"`` or ``"max"``, see :class:`~lightning_stableaa.Smoothing`.
        of: ``"iterates"`` or ``"updates"``, see :class:`~lightning_stableaa.Smoothing`.
        num_unowned: leading elements that norms leave out: another rank counts them.

    Source: arXiv:2110.14813 (the criterion); B. P. Welford 1962 (the streaming variance).
    """

    def __init__(
        self,
        *,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
        threshold: float,
        rsd: RsdKind = "norm",
        of: RsdOf = "updates",
        num_unowned: int = 0,
    ) -> None:
        self._num_unowned = num_unowned
        self._threshold = threshold
        self._kind: RsdKind = rsd
        self._of: RsdOf = of
        self.on = False
        self.count = 0
        self.mean = torch.zeros(length, dtype=dtype, device=device)
        # squares of ordinary deviations are below the range of float16
        wide = torch.promote_types(dtype, torch.float32)
        self._squares = torch.zeros_like(self.mean, dtype=wide) if rsd == "max" else None  # M2
        self._origin = torch.zeros_like(self.mean) if of == "updates" else None  # x_1
        self._previous = torch.zeros_like(self.mean) if of == "updates" else None
        # sum M2 of the iterates, or sum |u_k|^2 of the updates
        self._total = torch.zeros((), dtype=torch.float64, device=device)

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
        """(spread, level) of this rank's shard.

        ``rsd="norm"``: squared norms of sigma and mu, to be summed over shards; ``rsd="max"``:
        the maxima of sigma and |mu|. (0, 1) while the window is too short for a deviation.
        """
        samples = self.count - 1 if self._of == "updates" else self.count
        if samples < 2:
            return torch.tensor([0.0, 1.0], dtype=torch.float64, device=self.mean.device)
        if self._squares is not None:
            spread = (self._squares.max().double() / (samples - 1)).sqrt()
            return torch.stack([spread, self.mean.abs().max().double()])
        level = torch.zeros_like(self._total)
        if self._origin is not None and self._previous is not None:
            for where in self._chunks():
                level += self._squared_norm(self._previous[where] - self._origin[where], where)
            level /= samples**2
            spread = (self._total - samples * level).clamp_min(0.0) / (samples - 1)
            return torch.stack([spread, level])
        for where in self._chunks():
            level += self._squared_norm(self.mean[where], where)
        return torch.stack([self._total / (samples - 1), level])

    def switch(self, moments: Tensor) -> float:
        """End the window and turn the average on or off; waits for the device.

        Args:
            moments: those of the whole vector.

        Returns:
            The RSD: 0 where nothing varies, inf where the mean is zero and the values are not,
            NaN only where the iterates hold NaN. NaN and inf switch the average on.
        """
        spread, level = moments.tolist()
        if spread == 0:
            value = 0.0
        elif level == 0:
            value = math.inf
        else:
            value = math.sqrt(spread / level) if self._kind == "norm" else spread / level
        self.on = not value <= self._threshold
        self.reset()
        return value

    def reset(self) -> None:
        """Begin a new window; the mean stays readable until the next iterate."""
        self.count = 0
        self._total.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and CPU tensors."""
        tensors = {name: tensor.to("cpu", copy=True) for name, tensor in self._tensors().items()}
        return {"on": self.on, "count": self.count, **tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned for the same length and options."""
        self.on, self.count = bool(state["on"]), int(state["count"])
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
        elif self._of == "iterates":
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
        owned = chunk[max(0, self._num_unowned - where.start) :]
        return torch.linalg.vector_norm(owned, dtype=torch.float64).square()
