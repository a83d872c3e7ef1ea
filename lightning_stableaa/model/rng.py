"""The generators of random numbers that every program shares."""

from __future__ import annotations

import functools
import operator
import random
import sys
from collections.abc import Callable
from typing import Any

import torch


class RNGSnapshot:
    """The state of the global generators that a training step may draw from.

    Args:
        device: whose generator of torch counts beside that of the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._python = random.getstate()
        self._numpy = _numpy_state()
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> bool:
        """Put every generator back, and return whether any had moved since the snapshot."""
        moved = [
            _put_back(torch.get_rng_state(), self._torch, torch.equal, torch.set_rng_state),
            _put_back(random.getstate(), self._python, operator.eq, random.setstate),
        ]
        if self._numpy is not None:  # setting it takes as long as a few layers of a small network
            write = sys.modules["numpy"].random.set_state
            moved.append(_put_back(_numpy_state(), self._numpy, _same, write))
        if self._cuda is not None:
            read, write = torch.cuda.get_rng_state, torch.cuda.set_rng_state
            of_device = functools.partial(write, device=self._device)
            moved.append(_put_back(read(self._device), self._cuda, torch.equal, of_device))
        return any(moved)


def is_generator(value: Any) -> bool:
    """Whether it is one of random numbers: of torch, NumPy or Python."""
    if isinstance(value, random.Random | torch.Generator):
        return True
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(
        value, numpy.random.Generator | numpy.random.RandomState | numpy.random.BitGenerator
    )


def _put_back(
    state: Any, before: Any, same: Callable[[Any, Any], bool], write: Callable[[Any], object]
) -> bool:
    """Write the state of before where it is another one now; whether it is."""
    if same(state, before):
        return False
    write(before)
    return True


def _numpy_state() -> Any:
    numpy = sys.modules.get("numpy")
    return None if numpy is None else numpy.random.get_state(legacy=False)


def _same(one: Any, other: Any) -> bool:
    """Of two states of NumPy's generator: nested dicts of numbers and arrays."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    equal = one == other
    return equal if isinstance(equal, bool) else bool(equal.all())
