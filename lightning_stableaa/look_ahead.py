"""How far candidates go on along a drift: about as far as has paid off lately."""

from __future__ import annotations

from typing import Any

# Share that the length is multiplied by after a candidate that was accepted, and after one that did
# not lower the loss enough: as long as six of ten are accepted, it stays about the same.
LONGER, SHORTER = 1.4, 0.6
LEAST = 0.05

# Share of the longest where the loss is the same function from step to step.
OF_WHOLE = 0.5


class LookAhead:
    """A length that grows with success and shrinks with failure, as in a trust region.

    Where the loss is that of samples; a fixed one elsewhere. Neither is longer than training has
    come so far. Of all ranks that make the same decisions, all have the same.

    Args:
        longest: in cycles.
    """

    def __init__(self, longest: float) -> None:
        self._longest = longest
        self.trained = 0  # cycles so far
        self.share = 1.0  # of the longest, where a sample judges
        self.of_sample = False  # did one judge the last candidate?

    def cycles(self, *, of_sample: bool) -> float:
        """By how many the next candidate may go on.

        Args:
            of_sample: it is known already that a sample judges.
        """
        share = self.share if of_sample or self.of_sample else OF_WHOLE
        return min(self._longest * share, self.trained)

    def note_cycle(self) -> None:
        """Training has come further by one."""
        self.trained += 1

    def note(self, *, accepted: bool) -> None:
        """What became of a candidate that went on along a drift, and that a sample judged."""
        factor = LONGER if accepted else SHORTER
        self.share = min(max(self.share * factor, LEAST), 1.0)

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"trained": self.trained, "share": self.share, "of_sample": self.of_sample}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned; an empty one is that of the beginning."""
        self.trained = int(state.get("trained", 0))
        self.share = float(state.get("share", 1.0))
        self.of_sample = bool(state.get("of_sample", False))
