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
def test_run_without_accepted_candidate_is_bitwise_the_plain_run(
    kind: Any, batch: int | None
) -> None:
    """Without attempts, and with steps capped to nothing, whatever else was evaluated."""
    never = AndersonCallback(warmup_steps=10**9)
    capped = AndersonCallback(max_extrapolation=1e-30, stochastic=False)
    plain = fit(solver_of(kind), steps=45, batch=batch)
    for callback, attempted in ((never, 0), (capped, 2)):
        assert_bitwise_equal(fit(solver_of(kind), callback, steps=45, batch=batch), plain)
        assert counters(callback)["optimizer_steps"] == 45
        assert counters(callback)["attempted"] == attempted
        assert counters(callback)["accepted"] == 0
        assert callback.state_dict()["disabled"] is None  # the loss repeats itself


def assert_accelerated(callback: Any, reports: Reports, *, stochastic: bool) -> None:
    """120 steps by the defaults."""
    assert len(reports.attempted) == 6
    assert {one.stochastic for one in reports.attempted} == {stochastic}
    assert callback.state_dict()["disabled"] is None
    assert "rejected_error" not in outcomes(callback)
    assert stochastic or reports.accepted_steps


@pytest.mark.parametrize("kind", [PINN, RBA])
def test_default_detects_samples(kind: Any) -> None:
    reports = Reports(AndersonCallback())
    fit(solver_of(kind), reports.callback, reports, batch=16)
    assert_accelerated(reports.callback, reports, stochastic=True)


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
    plain, beside = (fit(solver_of(kind), *one, steps=45) for one in ([], [callback]))
    assert_bitwise_equal(plain, beside)
    assert "2 optimizers that follow 2 losses" in callback.state_dict()["disabled"]


def test_ensemble_solver_is_accelerated() -> None:
    callback = AndersonCallback()
    fit(solver_of(PhysicsInformedEnsembleSolver), callback)
    assert counters(callback)["attempted"] == 6
    assert counters(callback)["accepted"] >= 1
    assert callback.state_dict()["disabled"] is None


@pytest.mark.parametrize("kind", [PINN, RBA])
def test_accelerated_run_resumed_in_its_middle_is_bitwise_the_whole_run(
    kind: Any, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "mid.ckpt"
    full, resumed = AndersonCallback(), AndersonCallback()
    reports = Reports(full)
    expected = fit(solver_of(kind), full, reports, SaveAt(55, checkpoint))
    assert_accelerated(full, reports, stochastic=False)
    assert_bitwise_equal(fit(solver_of(kind), resumed, ckpt_path=checkpoint), expected)
    assert counters(resumed) == counters(full)
