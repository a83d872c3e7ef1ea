"""The state of the random number generators that a training step may draw from."""

from __future__ import annotations

import ctypes
import random
import sys
from typing import Any

import torch

# Words of NumPy's default generator, MT19937: 624 of its key, and the place in it.
_MT19937_WORDS = 625


class RandomState:
    """The state of the generators of Python, NumPy and torch, where they were constructed.

    Args:
        device: whose generator of torch counts beside that of the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._python = random.getstate()
        self._numpy = _NumpyState() if "numpy" in sys.modules else None
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Put every generator back to the captured state."""
        random.setstate(self._python)
        torch.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)
        if self._numpy is not None:
            self._numpy.restore()


class _NumpyState:
    """The state of NumPy's global generator.

    NumPy takes as long as a few layers of a small network to set it. So what was drawn from it is
    told from its words in memory, and where nothing was, nothing is set. (A normal variate that it
    keeps for the next call moves no word; where there is one, it is set every time.)
    """

    def __init__(self) -> None:
        self._state = sys.modules["numpy"].random.get_state(legacy=False)
        words = None if self._state["has_gauss"] else _words_of_numpy()
        self._words = None if words is None or not _are_of(words, self._state) else words.copy()

    def restore(self) -> None:
        words = None if self._words is None else _words_of_numpy()
        if words is None or not bool((words == self._words).all()):
            sys.modules["numpy"].random.set_state(self._state)


def _words_of_numpy() -> Any:  # (625,) uint32, in place; None of another generator than MT19937
    numpy: Any = sys.modules["numpy"]
    generator = numpy.random.get_bit_generator()
    if not isinstance(generator, numpy.random.MT19937):
        return None
    words = (ctypes.c_uint32 * _MT19937_WORDS).from_address(generator.ctypes.state_address)
    return numpy.ctypeslib.as_array(words)


def _are_of(words: Any, state: dict[str, Any]) -> bool:
    key, place = state["state"]["key"], state["state"]["pos"]
    return words[-1] == place and bool((words[:-1] == key).all())
