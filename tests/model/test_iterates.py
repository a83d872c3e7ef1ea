"""Weights in, candidates out; trials that leave no bit changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_stableaa.distributed.communicator import Communicator
from lightning_stableaa.model.iterates import IterateStore


def store_of(*weights: Tensor, depth: int = 3, **options: Any) -> IterateStore:
    return IterateStore(weights, depth=depth, communicator=Communicator(), **options)


def random_weights(dtypes: list[torch.dtype], seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(3, generator=generator).to(dtype)) for dtype in dtypes]


def train(store: IterateStore, steps: int) -> list[Tensor]:
    """Pushes the weights after each of some random steps, and returns what they were."""
    generator, seen = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        with torch.no_grad():
            for one in store.parameters:
                one += torch.randn(one.shape, generator=generator).to(one.dtype)
        store.push_weights()
        seen.append(torch.cat([one.detach().flatten().double() for one in store.parameters]))
    return seen


DTYPES = [[torch.float64], [torch.float32, torch.float32], [torch.float16, torch.float32]]


@pytest.mark.parametrize("dtypes", DTYPES)
def test_candidate_is_combination_of_pushed_weights(dtypes: list[torch.dtype]) -> None:
    store = store_of(*random_weights(dtypes))
    iterates = torch.stack(train(store, 4))
    differences = iterates.diff(dim=0)
    precision = 32 * torch.finfo(store.weights.dtype).eps  # sums of a few numbers of order one
    gram = differences @ differences.T
    np.testing.assert_allclose(store.gram(), gram, rtol=precision, atol=precision)
    gamma = np.array([0.5, -1.0, 2.0])
    store.form_candidate(gamma)
    expected = iterates[-1] + torch.from_numpy(gamma) @ differences
    np.testing.assert_allclose(store.candidate, expected, rtol=precision, atol=precision)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("newest_is_current", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_trial_shows_candidate_and_restores_bitwise(
    dtypes: list[torch.dtype], newest_is_current: bool, fails: bool
) -> None:
    weights = random_weights(dtypes)
    store = store_of(*weights)
    train(store, 3)
    if not newest_is_current:
        store.restart()
        with torch.no_grad():
            weights[-1][1] = torch.nan  # whose payload float16 does not keep
    store.form_candidate(np.array([1.0, -0.5]))
    before = [one.detach().clone() for one in weights]
    parts = store.candidate.clone().split(3)
    candidate = [part.to(one.dtype) for part, one in zip(parts, weights, strict=True)]
    assert not any(torch.equal(a, b) for a, b in zip(candidate, before, strict=True))
    try:
        with store.trial():
            assert all(torch.equal(a, b) for a, b in zip(weights, candidate, strict=True))
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    for one, expected in zip(weights, before, strict=True):
        assert torch.equal(one.view(torch.uint8), expected.view(torch.uint8))
    store.weights.write(store.candidate)  # the candidate is there to be accepted
    assert all(torch.equal(a, b) for a, b in zip(weights, candidate, strict=True))


def test_trial_restores_weights_that_share_memory() -> None:
    memory = torch.randn(4, generator=torch.Generator().manual_seed(0))
    store = store_of(nn.Parameter(memory), nn.Parameter(memory.view(2, 2)))
    before = memory.clone()
    store.push(torch.ones(8))  # an average: the weights are exchanged with the candidate
    store.candidate.copy_(torch.arange(8.0))
    with store.trial():
        assert not torch.equal(memory, before)
    assert torch.equal(memory, before)
