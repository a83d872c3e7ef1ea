"""Whether cycles that begin with a candidate gain more than those that do not."""

from __future__ import annotations

import math
from collections.abc import Sequence

# Extrapolations after which a change counts for 1/e; how many of each kind say enough.
MEMORY = 20
ENOUGH = 2.5


class Payoff:
    """How the loss changes from one extrapolation to the next, after candidates and after none.

    A candidate can lower the loss of its batch and set training back all the same: where weights
    swing to and fro across a valley, the momentum of the optimizer carries them off at once. Then
    cycles that begin with a candidate lower the loss by less than the others do. Of all ranks that
    know the same losses, all say the same.
    """

    def __init__(self) -> None:
        self._sums = {True: 0.0, False: 0.0}  # of changes; by whether a candidate began the cycle
        self._counts = {True: 0.0, False: 0.0}
        self._last: tuple[float, bool] | None = None

    def observe(self, loss: float | None) -> None:
        """A cycle ended at so much loss, before it is decided what the next one begins with.

        ``None``, or what is not finite, says nothing.
        """
        if loss is None or not math.isfinite(loss):
            self._last = None
            return
        if self._last is not None:
            before, candidate = self._last
            for kind in (True, False):
                self._sums[kind] *= 1 - 1 / MEMORY
                self._counts[kind] *= 1 - 1 / MEMORY
            size = abs(before) + abs(loss)
            self._sums[candidate] += 2 * (loss - before) / size if size else 0.0
            self._counts[candidate] += 1
        self._last = loss, False

    def begin(self, *, candidate: bool) -> None:
        """The next cycle begins, with a candidate or with the weights as they are."""
        if self._last is not None:
            self._last = self._last[0], candidate

    @property
    def pays(self) -> bool:
        """Whether candidates gain as much as none, or more, or too little is known."""
        if min(self._counts.values()) < ENOUGH:
            return True
        gain, without = (self._sums[kind] / self._counts[kind] for kind in (True, False))
        return gain <= without

    def forget_last(self) -> None:
        """Something else than the optimizer moved the weights: the next change says nothing."""
        self._last = None

    def state_dict(self) -> list[float]:
        """Everything, in numbers: four, or six where the last loss is known."""
        last = () if self._last is None else (self._last[0], float(self._last[1]))
        return [*self._sums.values(), *self._counts.values(), *last]

    def load_state_dict(self, state: Sequence[float]) -> None:
        """Restore what ``state_dict`` returned."""
        for place, one in enumerate((self._sums, self._counts)):
            one[True], one[False] = state[2 * place : 2 * place + 2]
        last = state[4:]
        self._last = (last[0], bool(last[1])) if last and math.isfinite(last[0]) else None
