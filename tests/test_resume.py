"""States saved at any step: the continuation is bitwise the uninterrupted run."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from lightning_stableaa import Smoothing, Status
from tests.helpers.histories import iterates_of
from tests.helpers.problems import (
    Quadratic,
    accepted_steps,
    assert_bitwise_equal,
)

STEPS = 36

# Candidates of every setting are accepted and rejected: without both, nothing is tested.
PROBLEM: dict[str, Any] = {
    "noise": 0.1,
    "learning_rate": 0.05,
    "momentum": 0.5,
    "store_every_n_steps": 3,
    "accelerate_every_n_steps": 6,
    "history_depth": 3,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "float32": {"dtype": torch.float32},
    "classical": {"lag_compensation": 0.0, "max_horizon": 0.0, "regularization": 1e-8},
    "no safeguard": {"safeguard": "none", "relaxation": 0.5, "max_extrapolation": 1.0},
    "averages": {"smoothing": Smoothing(rsd_threshold=0.3)},
    "iterates": {"smoothing": Smoothing(of="iterates", rsd="max", rsd_threshold=0.02)},
    "averaged weights": {"smoothing": Smoothing(rsd_threshold=0.3, apply_to="weights")},
}


def reload(problem: Quadratic, options: dict[str, Any]) -> Quadratic:
    """A new problem that continues from a file, as a new process would."""
    file = io.BytesIO()
    torch.save(problem.state_dict(), file)
    file.seek(0)
    resumed = Quadratic(**options)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    return resumed


@pytest.mark.parametrize("stochastic", [True, False], ids=["stochastic", "deterministic"])
@pytest.mark.parametrize("name", OPTIONS)
def test_resume_at_every_step_is_bitwise_the_whole_run(name: str, stochastic: bool) -> None:
    options = PROBLEM | OPTIONS[name]
    whole = Quadratic(**options)
    reports = whole.run(STEPS, stochastic=stochastic)
    expected = whole.state_dict()
    assert accepted_steps(reports) != []
    interrupted = Quadratic(**options)
    for stop in range(STEPS):
        resumed = reload(interrupted, options)
        assert_bitwise_equal(resumed.state_dict(), interrupted.state_dict())  # loaded, not in use
        resumed.run(STEPS - stop, stochastic=stochastic)
        assert_bitwise_equal(resumed.state_dict(), expected, f"stop {stop}")
        interrupted.step(stochastic=stochastic)


@pytest.mark.parametrize("placement", ["in place", "data"])
@pytest.mark.parametrize("edited_at", [13, 15, 17, 18])
def test_resume_with_an_external_write_pending_is_bitwise_the_whole_run(
    edited_at: int, placement: str
) -> None:
    """The state is saved after the write; or before it, so that the resumed run sees it."""

    def edit(problem: Quadratic) -> None:
        (weights,) = problem.parameters
        with torch.no_grad():
            (weights if placement == "in place" else weights.data).mul_(0.5)

    def run(saved_at: int | None) -> tuple[dict[str, Any], dict[Status, int]]:
        problem = Quadratic(**PROBLEM)
        for step in range(1, STEPS + 1):
            problem.train_step()
            if step == edited_at and placement == "data":  # before the accelerator's step
                edit(problem)
            problem.accelerator.step(problem.loss, stochastic=False)
            if step == edited_at and placement == "in place":
                edit(problem)
            if step == saved_at:
                problem = reload(problem, PROBLEM)
        return problem.state_dict(), problem.accelerator.outcomes

    expected, outcomes = run(None)
    # a write through .data is looked for where an extrapolation is due
    assert outcomes[Status.EXTERNAL_UPDATE] == (placement == "in place" or edited_at == 18)
    for saved_at in range(edited_at - 3, edited_at + 2):
        assert_bitwise_equal(run(saved_at)[0], expected, f"saved at {saved_at}")


def test_load_of_another_layout_drops_the_history_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    small, large = Quadratic(size=4), Quadratic(size=5, history_depth=4)
    small.run(4)
    large.accelerator.load_state_dict(small.accelerator.state_dict())
    large.step()
    assert (
        "the Anderson history of the checkpoint was dropped and restarts: it was stored with "
        "another parameter layout, weights, history_depth"
    ) in caplog.text
    state = large.accelerator.state_dict()
    assert len(iterates_of(state["iterates"])) == 2
    assert large.accelerator.optimizer_steps == 5


def test_load_of_something_else_raises() -> None:
    with pytest.raises(ValueError, match="has no version: it is none of an AndersonAccelerator"):
        Quadratic().accelerator.load_state_dict({})


def test_load_of_another_version_raises() -> None:
    problem = Quadratic()
    state = problem.accelerator.state_dict() | {"version": 99}
    with pytest.raises(ValueError, match=r"has version 99, this package reads version \d"):
        problem.accelerator.load_state_dict(state)
