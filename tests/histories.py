"""What a stored history says, in points."""

from typing import Any

from torch import Tensor


def points_of(state: dict[str, Any]) -> Tensor:  # (k, n)
    """The points of a history's state, oldest first; exact where no difference was formed."""
    points = state["rows"].clone()
    for position in reversed(range(state["formed"])):
        points[position] = points[position + 1] - points[position]
    return points
