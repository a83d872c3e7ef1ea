"""Networks of the small recipes."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import nn

_ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}


def mlp(widths: Sequence[int], activation: Literal["relu", "tanh"]) -> nn.Sequential:
    """Fully connected network; ``widths`` counts inputs, hidden layers and outputs.

    Raises:
        ValueError: fewer than two widths, a width below one, or an unknown activation.
    """
    whole = all(isinstance(width, int) for width in widths)
    if not whole or len(widths) < 2 or min(widths) < 1:
        raise ValueError(f"widths must be two or more positive integers, got {list(widths)}")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(_ACTIVATIONS)}, got {activation!r}")
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), _ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])
