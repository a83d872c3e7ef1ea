"""Whether training has leapt away from where it was, by the losses at the last extrapolations."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

# Losses that are remembered, and how many times their mean is no noise any longer.
REMEMBERED = 4
LEAP = 10.0


class RecentLosses:
    """Losses before candidates were formed. Of all ranks that know the same, all say the same."""

    def __init__(self) -> None:
        self._recent: list[float] = []
        self._usual: float | None = None  # mean of those before the last, where that is far above

    def observe(self, loss: float | None) -> None:
        """An extrapolation is due at this loss; ``None``, or what is not finite, says nothing."""
        self._usual = None
        if loss is None or not math.isfinite(loss):
            return
        usual = statistics.fmean(self._recent) if self._recent else 0.0
        if usual > 0 and loss > LEAP * usual:
            self._usual = usual
        self._recent = [*self._recent, loss][-REMEMBERED:]

    def are_mended_by(self, loss: float | None) -> bool:
        """Whether the last one was a leap, and this one, of a candidate, is as usual again.

        What is large because of a sample is large with a candidate too.
        """
        return self._usual is not None and loss is not None and loss <= self._usual

    def forget(self) -> None:
        """Something else than the optimizer moved the weights."""
        self._recent, self._usual = [], None

    def state_dict(self) -> list[float]:
        """The losses, oldest first."""
        return list(self._recent)

    def load_state_dict(self, state: Sequence[float]) -> None:
        """Restore what ``state_dict`` returned."""
        self._recent, self._usual = list(state), None
