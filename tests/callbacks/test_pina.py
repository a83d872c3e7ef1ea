"""Acceleration beside PINA: its solvers, its data, its optimizers switched in mid-run."""

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "`torch.jit")  # by torch_geometric, which PINA imports
    import pina
    from pina.callback import SwitchOptimizer
    from pina.model import FeedForward
    from pina.optim import TorchOptimizer
    from pina.problem.zoo import Poisson2DSquareProblem
    from pina.solver import (
        PhysicsInformedEnsembleSolver,
        PhysicsInformedSingleModelSolver,
        RBAPhysicsInformedSingleModelSolver,
        SelfAdaptivePhysicsInformedSolver,
    )

from lightning_stableaa import AndersonCallback
from tests.helpers.problems import assert_bitwise_equal
from tests.helpers.regression import QUIET, Reports, SaveAt, counters, outcomes

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")

PINN, RBA = PhysicsInformedSingleModelSolver, RBAPhysicsInformedSingleModelSolver
POINTS = 64


def solver_of(kind: Any) -> Any:
    """A solver with a small network, on fixed random points."""
    lightning.pytorch.seed_everything(0, verbose=False)
    problem: Any = Poisson2DSquareProblem()
    problem.discretise_domain(POINTS, "random", domains=["D"])
    boundary = [one for one in problem.domains if one != "D"]
    problem.discretise_domain(POINTS, "random", domains=boundary)
    network = FeedForward(2, 1, layers=[8, 8], func=torch.nn.Tanh)
    if kind is PhysicsInformedEnsembleSolver:
        second = FeedForward(2, 1, layers=[8, 8], func=torch.nn.Tanh)
        return kind(problem, [network, second], optimizers=[adam(), adam()])
    options = {} if kind is SelfAdaptivePhysicsInformedSolver else {"optimizer": adam()}
    return kind(problem, network, **options)


def adam() -> Any:
    return TorchOptimizer(torch.optim.Adam, lr=5e-3)


def fit(
    solver: Any,
    *callbacks: Any,
    steps: int = 120,
    batch: int | None = None,
    ckpt_path: Path | None = None,
) -> dict[str, Any]:
    """Train, and return weights and buffers."""
    options = QUIET | {"max_steps": steps, "max_epochs": -1, "callbacks": list(callbacks)}
    trainer: Any = pina.Trainer(solver, batch_size=batch, **options)
    trainer.train(ckpt_path=ckpt_path) if ckpt_path else trainer.train()
    assert trainer.global_step == steps
    return solver.state_dict()


@pytest.mark.parametrize("batch", [None, 16])
@pytest.mark.parametrize("kind", [PINN, RBA])
def test_callback_that_never_fires_is_bitwise_the_plain_run(kind: Any, batch: int | None) -> None:
    never = AndersonCallback(warmup_steps=10**9)
    plain, beside = (fit(solver_of(kind), *one, steps=45, batch=batch) for one in ([], [never]))
    assert_bitwise_equal(plain, beside)
    assert counters(never)["optimizer_steps"] == 45


@pytest.mark.parametrize("batch", [None, 16])
@pytest.mark.parametrize("kind", [PINN, RBA])
def test_rejected_candidates_leave_the_plain_run(kind: Any, batch: int | None) -> None:
    """Attempts with a step capped to nothing: none is accepted, whatever else was evaluated."""
    capped = AndersonCallback(max_extrapolation=1e-30, stochastic=False)
    plain, beside = (fit(solver_of(kind), *one, steps=65, batch=batch) for one in ([], [capped]))
    assert_bitwise_equal(plain, beside)
    assert counters(capped)["attempted"] == 3
    assert counters(capped)["accepted"] == 0
    assert capped.state_dict()["disabled"] is None  # the loss repeats itself


@pytest.mark.parametrize("kind", [PINN, RBA])
@pytest.mark.parametrize(("batch", "stochastic"), [(None, False), (16, True)])
def test_default_detects_samples_and_is_repeatable(
    kind: Any, batch: int | None, stochastic: bool
) -> None:
    callback = AndersonCallback()
    reports = Reports(callback)
    fit(solver_of(kind), callback, reports, batch=batch)
    assert len(reports.attempted) == 6
    assert {one.stochastic for one in reports.attempted} == {stochastic}
    assert callback.state_dict()["disabled"] is None
    assert "rejected_error" not in outcomes(callback)
    assert stochastic or reports.accepted_steps


def test_switch_to_lbfgs_pauses_with_one_warning_and_training_goes_on() -> None:
    callback = AndersonCallback()
    lbfgs = TorchOptimizer(torch.optim.LBFGS, lr=0.1, max_iter=2)
    switch = SwitchOptimizer(lbfgs, epoch_switch=50)  # an epoch is one step
    with pytest.warns(UserWarning, match="pauses until .*, got LBFGS") as warned:
        fit(solver_of(PINN), switch, callback, steps=60)
    assert sum("pauses" in str(one.message) for one in warned) == 1
    assert counters(callback)["optimizer_steps"] == 50
    assert counters(callback)["attempted"] == 2


def test_self_adaptive_solver_trains_without_acceleration() -> None:
    """Its two optimizers pull in opposite directions."""
    callback = AndersonCallback()
    kind = SelfAdaptivePhysicsInformedSolver
    plain, beside = (fit(solver_of(kind), *one) for one in ([], [callback]))
    assert_bitwise_equal(plain, beside)
    assert "2 optimizers that follow 2 losses" in callback.state_dict()["disabled"]


def test_ensemble_solver_is_accelerated() -> None:
    callback = AndersonCallback()
    fit(solver_of(PhysicsInformedEnsembleSolver), callback)
    assert counters(callback)["attempted"] == 6
    assert counters(callback)["accepted"] >= 1
    assert callback.state_dict()["disabled"] is None


@pytest.mark.parametrize("kind", [PINN, RBA])
def test_resume_in_mid_run_is_bitwise_the_uninterrupted_run(kind: Any, tmp_path: Path) -> None:
    checkpoint = tmp_path / "mid.ckpt"
    full, resumed = AndersonCallback(), AndersonCallback()
    expected = fit(solver_of(kind), full, SaveAt(55, checkpoint))
    result = fit(solver_of(kind), resumed, ckpt_path=checkpoint)
    assert_bitwise_equal(result, expected)
    assert counters(resumed) == counters(full)
    assert counters(full)["accepted"] >= 1
