"""The loss as a function of the weights: a number, repeatable, without side effects."""

from __future__ import annotations

import random
import signal
import sys
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torchmetrics import MeanMetric

from lightning_stableaa.model.objective import Objective, preserve_state


def evaluate(loss_fn: Any, **options: Any) -> Tensor:
    with Objective(loss_fn, stochastic=False, **options) as objective:
        return objective()


def test_objective_is_detached_float64_scalar_with_gradients_enabled() -> None:
    x = torch.ones(3, requires_grad=True)

    def loss() -> Tensor:
        (slope,) = torch.autograd.grad((x**2).sum(), x, create_graph=True)  # as a PINN does
        return slope.sum().reshape(1)

    with torch.no_grad():
        value = evaluate(loss)
        assert not torch.is_grad_enabled()
    assert (value.item(), value.dtype, value.shape) == (6.0, torch.float64, ())
    assert not value.requires_grad
    assert x.grad is None


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (torch.zeros(2), r"got shape \(2,\); reduce it with .mean\(\)"),
        ({"loss": torch.zeros(())}, "got a dict"),
        ("0.5", "got a str"),
    ],
)
def test_objective_other_than_a_number_raises(loss: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"the loss must be a single number, {message}"):
        evaluate(lambda: loss)


@pytest.mark.parametrize("error", [ValueError("outside"), MemoryError(), torch.OutOfMemoryError()])
def test_objective_error_is_nan_and_kept(error: Exception) -> None:
    values: list[Any] = [error, torch.ones(())]

    def loss() -> Tensor:
        value = values.pop(0)
        if isinstance(value, Exception):
            raise value
        return value

    with Objective(loss, stochastic=False) as objective:
        assert objective().isnan()
        assert objective.error is error
        assert objective().item() == 1.0
        assert objective.error is None


def test_objective_error_within_collective_loss_is_raised() -> None:
    def loss() -> Tensor:
        raise RuntimeError("one rank only")

    with pytest.raises(RuntimeError, match="one rank only"):
        evaluate(loss, collective=True)


DRAWS = [random.random, np.random.rand, lambda: torch.rand(1).item(), lambda: 0.5]


@pytest.mark.parametrize("draw", DRAWS)
def test_objective_repeats_random_numbers_and_restores_generators(draw: Any) -> None:
    seen: list[float] = []
    objective = Objective(lambda: torch.tensor(seen.append(draw()) or 1.0), stochastic=False)
    with objective:
        for _ in range(3):
            objective()
    assert seen == [draw()] * 3
    assert objective.stochastic is (draw is not DRAWS[-1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_objective_precision_is_that_of_the_loss(dtype: torch.dtype) -> None:
    with Objective(lambda: torch.ones((), dtype=dtype), stochastic=False) as objective:
        objective()
    assert objective.precision == torch.finfo(dtype).eps


def test_objective_within_autocast_uses_current_weights() -> None:
    """Autocast keeps casts of weights: those of a candidate must not be used outside, or inside."""
    layer, x = nn.Linear(4, 1), torch.ones(2, 4)

    def loss() -> Tensor:
        return mse_loss(layer(x), torch.zeros(2, 1))

    with torch.autocast("cpu", torch.bfloat16):
        before = loss().item()
        with Objective(loss, stochastic=False) as objective:
            assert objective().item() == before
            with torch.no_grad():
                layer.weight.mul_(2.0)
            candidate = objective().item()
            with torch.no_grad():
                layer.weight.mul_(0.5)
            assert objective().item() == before != candidate
        assert loss().item() == before


def test_preserve_state_restores_all_but_trained_after_error() -> None:
    norm, mean = nn.BatchNorm1d(2), MeanMetric()
    module = nn.ModuleList([norm, mean])
    before = norm.running_mean.tolist()  # type: ignore[union-attr]
    with suppress(InterruptedError), preserve_state(module), torch.no_grad():
        norm(torch.randn(8, 2))
        mean(5.0)
        norm.weight.fill_(2.0)
        raise InterruptedError
    assert norm.running_mean.tolist() == before  # type: ignore[union-attr]
    assert mean.update_count == 0
    assert norm.weight.tolist() == [2.0, 2.0]


def test_exit_is_an_error_of_the_loss_unless_a_signal_asked_for_it() -> None:
    def exits() -> torch.Tensor:
        sys.exit(1)

    def is_told_to() -> torch.Tensor:
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError

    with Objective(exits, stochastic=False) as objective:
        assert objective().isnan()
        assert isinstance(objective.error, SystemExit)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with Objective(is_told_to, stochastic=False) as objective, pytest.raises(SystemExit):
            objective()
    finally:
        signal.signal(signal.SIGTERM, before)
