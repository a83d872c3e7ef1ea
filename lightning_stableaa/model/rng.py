"""Generators of random numbers: those that every program shares, and how one is put back."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch


def global_generators(device: torch.device) -> list[Any]:
    """Those of Python, of NumPy where it is imported, of the CPU and of the device."""
    generators: list[Any] = [random.random.__self__, torch.default_generator]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        generators.append(numpy.random.mtrand._rand)
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index])
    return generators


def is_generator(value: Any) -> bool:
    """Whether it is a generator of torch, NumPy or Python."""
    if isinstance(value, random.Random | torch.Generator):
        return True
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(
        value, numpy.random.Generator | numpy.random.RandomState | numpy.random.BitGenerator
    )


def read_generator(generator: Any) -> Any:
    """Its state: a tensor, a tuple, or nested dicts of numbers and arrays."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if hasattr(generator, "get_state"):  # a RandomState
        return generator.get_state(legacy=False)
    return getattr(generator, "bit_generator", generator).state


def write_generator(generator: Any, state: Any) -> bool:
    """Put back a state where it is another one now, and return whether it is."""
    if _same(read_generator(generator), state):
        return False  # to set that of NumPy takes as long as a few layers of a small network
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "set_state"):
        generator.set_state(state)
    else:
        getattr(generator, "bit_generator", generator).state = state
    return True


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    equal = one == other
    return equal if isinstance(equal, bool) else bool(equal.all())
