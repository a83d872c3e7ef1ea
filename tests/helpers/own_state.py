"""State of a project of one's own, in modules beside that of the LightningModule."""

from tests.helpers import own_counters

SEEN = 0


class Meter:
    total = 0


def bump() -> None:
    """Counts here, and in a module that only this one names."""
    global SEEN
    SEEN += 1
    own_counters.COUNTS.append(SEEN)
