"""Something other than the optimizer writes to the weights: no residual spans the write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_stableaa import Status
from tests.helpers.histories import iterates_of
from tests.helpers.problems import Quadratic, accepted_steps

OPTIONS: dict[str, Any] = {
    "store_every_n_steps": 3,
    "accelerate_every_n_steps": 6,
    "learning_rate": 0.1,
}


def scale(problem: Quadratic) -> None:
    with torch.no_grad():
        problem.parameters[0].mul_(0.9)


def scale_data(problem: Quadratic) -> None:
    problem.parameters[0].data.mul_(0.9)


def load(problem: Quadratic) -> None:
    holder = nn.ParameterList(problem.parameters)
    holder.load_state_dict({"0": 0.9 * problem.solution()})


@pytest.mark.parametrize("write", [scale, load])
@pytest.mark.parametrize("before_step", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("step", [7, 8, 9, 10, 11, 12])
def test_external_write_restarts_the_sequence_at_the_end_of_its_cycle(
    step: int, before_step: bool, write: Callable[[Quadratic], None]
) -> None:
    """Before or after the accelerator's step; extrapolation is due after steps 6, 12, 18."""
    problem = Quadratic(**OPTIONS)
    reports = []
    for number in range(1, 25):
        problem.train_step()
        if number == step and before_step:
            write(problem)
        reports.append(problem.accelerator.step(problem.loss, stochastic=False))
        if number == step and not before_step:
            write(problem)
    seen_at = 3 * ((step + 2) // 3) if before_step or step % 3 else step + 3
    statuses = {number: report.status for number, report in enumerate(reports, start=1)}
    assert [n for n, one in statuses.items() if one is Status.EXTERNAL_UPDATE] == [seen_at]
    assert not reports[seen_at - 1].stored
    # an extrapolation that the restart prevents is made up for at the end of the next cycle
    assert accepted_steps(reports) == ([6, 15, 21] if seen_at == 12 else [6, 12, 18, 24])


def test_external_write_leaves_earlier_residuals_and_forms_none_across_it() -> None:
    problem = Quadratic(store_every_n_steps=2, accelerate_every_n_steps=100)
    problem.run(3)
    scale(problem)
    problem.run(4)
    state = problem.accelerator.state_dict()
    assert state["iterates"]["ends_cycle"] == [False, True, False, True]
    iterates = iterates_of(state["iterates"])
    # float64; two steps of gradient descent lead from one iterate to the next
    shrunk = (1 - problem.spectrum) ** 2
    torch.testing.assert_close(iterates[1], shrunk * iterates[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(iterates[3], shrunk * iterates[2], rtol=1e-12, atol=1e-14)


def test_external_write_through_data_is_seen_where_an_extrapolation_is_due() -> None:
    problem = Quadratic(**OPTIONS)
    statuses = []
    for number in range(1, 10):
        problem.train_step()
        if number == 6:
            scale_data(problem)
        statuses.append(problem.accelerator.step(problem.loss, stochastic=False).status)
    assert statuses[2::3] == [Status.STORED, Status.EXTERNAL_UPDATE, Status.ACCEPTED]


@contextmanager
def averaged(problem: Quadratic, average: Tensor, *, restore: bool) -> Iterator[None]:
    """Inside, the weights hold an average, as callbacks do for a validation."""
    (weights,) = problem.parameters
    own = problem.solution()
    with torch.no_grad():
        weights.copy_(average)
    yield
    with torch.no_grad():
        weights.copy_(own if restore else 0.5 * own)


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("restore", [True, False])
def test_backup_recognizes_weights_that_were_swapped_out_and_in_again(
    restore: bool, saved: bool
) -> None:
    problem = Quadratic(**OPTIONS)
    problem.run(7, stochastic=False)
    problem.accelerator.backup_weights()
    with averaged(problem, torch.zeros(20, dtype=torch.float64), restore=restore):
        pass
    if saved:  # in the middle of it, as a checkpoint of a validation is
        state = problem.accelerator.state_dict()
        assert bool(state["events"]) is not restore
    problem.accelerator.recognize_weights()
    reports = problem.run(5, stochastic=False)
    at_end_of_cycle = Status.STORED if restore else Status.EXTERNAL_UPDATE
    assert [reports[1].status, reports[4].status] == [at_end_of_cycle, Status.ACCEPTED]
