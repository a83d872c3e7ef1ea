"""How far candidates go on along a drift: about as far as has paid off lately."""

from __future__ import annotations

# Share that the length is multiplied by after a candidate that was accepted, and after one that did
# not lower the loss enough: as long as six of ten are accepted, it stays about the same.
LONGER, SHORTER = 1.4, 0.6
LEAST = 0.05


class LookAhead:
    """A length that grows with success and shrinks with failure, as in a trust region.

    Of all ranks that make the same decisions, all have the same.

    Args:
        longest: in cycles; also that of the first candidate.
    """

    def __init__(self, longest: float) -> None:
        self._longest = longest
        self.share = 1.0  # of the longest

    @property
    def cycles(self) -> float:
        """By how many the next candidate may go on."""
        return self._longest * self.share

    def note(self, *, accepted: bool) -> None:
        """What became of a candidate that went on along a drift."""
        factor = LONGER if accepted else SHORTER
        self.share = min(max(self.share * factor, LEAST), 1.0)
