"""Whether training has leapt away, by its losses at extrapolations."""

from __future__ import annotations

import math
import statistics
from typing import Any

# Losses that are remembered, and how many times their mean is no noise any longer.
REMEMBERED = 4
LEAP = 10.0


class RecentLosses:
    """Losses of training at extrapolations. Of all ranks that know the same, all say the same."""

    def __init__(self) -> None:
        self._first: float | None = None
        self._recent: list[float] = []
        self._excess: float | None = None  # of the last one over the mean before it, where it leapt
        self.amid_noise = False  # so that candidates only mend leaps

    def observe(self, loss: float | None) -> None:
        """An extrapolation is due at this loss; ``None``, or what is not finite, says nothing.

        It leapt where it is far above the last ones, and all that training had gained is lost:
        smaller leaps end by themselves, and sooner than with a candidate.
        """
        self._excess = None
        if loss is None or not math.isfinite(loss):
            return
        if self._first is None:
            self._first = loss
        usual = statistics.fmean(self._recent) if self._recent else 0.0
        if usual > 0 and loss > max(LEAP * usual, self._first):
            self._excess = loss / usual
        self._recent = [*self._recent, loss][-REMEMBERED:]

    @property
    def leapt(self) -> bool:
        """Whether the last one did."""
        return self._excess is not None

    def are_mended_by(self, before: float | None, after: float | None) -> bool:
        """Whether the last one was a leap, and a candidate takes as much off the loss again.

        What is large because of a sample is large with a candidate too.

        Args:
            before: what the judge said of the weights as they are.
            after: what it said of the candidate.
        """
        if self._excess is None or before is None or after is None:
            return False
        return after * self._excess <= before

    def forget(self) -> None:
        """Something else than the optimizer moved the weights."""
        self._first, self._recent, self._excess = None, [], None

    def state_dict(self) -> dict[str, Any]:
        """Plain values; the losses oldest first."""
        recent = list(self._recent)
        return {"first": self._first, "recent": recent, "amid_noise": self.amid_noise}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned; an empty one is that of the beginning."""
        self._first = state.get("first")
        self._recent, self._excess = list(state.get("recent", ())), None
        self.amid_noise = bool(state.get("amid_noise", False))
