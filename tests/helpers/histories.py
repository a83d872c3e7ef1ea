"""What the state of a history holds."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def iterates_of(state: dict[str, Any]) -> Tensor:  # (k, n)
    """The iterates of a history's state, oldest first; exact where no difference was formed."""
    iterates = state["rows"].clone()
    for position in reversed(range(state["num_differenced"])):
        iterates[position] = iterates[position + 1] - iterates[position]
    return iterates
