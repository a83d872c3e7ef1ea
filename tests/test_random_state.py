import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from lightning_stableaa.random_state import RandomState

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def generator_of_numpy() -> Iterator[None]:
    """Each test leaves it as it was, and meets one that keeps no normal variate."""
    state = np.random.get_state()
    np.random.seed(3)
    yield
    np.random.set_state(state)


def same(state: Any, other: Any) -> bool:
    return np.array_equal(state[1], other[1]) and state[2:] == other[2:]


def test_every_generator_is_restored() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), torch.rand(1).item()

    state = RandomState(CPU)
    first = draw()
    for _ in range(3):
        state.restore()
        assert draw() == first


@pytest.mark.parametrize(
    "draw",
    [
        lambda: None,
        np.random.rand,
        np.random.randn,
        lambda: (np.random.randn(), np.random.randn()),
        lambda: np.random.rand(624),
        lambda: np.random.rand(312),
        lambda: np.random.shuffle(np.arange(5)),
    ],
)
@pytest.mark.parametrize("drawn_before", [0, 1, 2])
def test_the_generator_of_numpy_is_restored(draw: Callable[[], Any], drawn_before: int) -> None:
    """Also while it keeps a normal variate, which is when an odd number of them was drawn."""
    for _ in range(drawn_before):
        np.random.randn()
    expected = np.random.get_state()
    state = RandomState(CPU)
    for _ in range(3):
        draw()
        state.restore()
        assert same(np.random.get_state(), expected)


def test_another_generator_of_numpy_is_restored() -> None:
    numpy_random: Any = np.random  # its stubs lack both functions
    before = numpy_random.get_bit_generator()
    numpy_random.set_bit_generator(np.random.PCG64(3))
    try:
        state = RandomState(CPU)
        first = np.random.rand()
        state.restore()
        assert np.random.rand() == first
    finally:
        numpy_random.set_bit_generator(before)


def test_a_generator_at_rest_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    own = np.random.set_state
    monkeypatch.setattr(np.random, "set_state", lambda state: calls.append(state) or own(state))
    state = RandomState(CPU)
    state.restore()
    assert not calls
    np.random.rand()
    state.restore()
    assert len(calls) == 1
