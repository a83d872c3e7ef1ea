"""The accelerator in a plain loop: when it acts, what it accepts, and what it leaves untouched."""

from __future__ import annotations

import functools
import itertools
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from lightning_stableaa import AndersonAccelerator, Status, StepReport
from lightning_stableaa.model.objective import preserve_state
from tests.helpers.histories import iterates_of
from tests.helpers.problems import Loop, Quadratic, accepted_steps, assert_bitwise_equal

# Two residuals each, as steps of two weights.
NOISE = [[1.0, 0.0], [0.0, 1.0]]  # independent: gain 1
DRIFT = [[1.0, 0.0], [1.0, 0.0]]  # steady: gain 2
ELIMINATED = [[1.0, 0.0], [0.5, 0.0]]  # a mixture is zero: gain 0


# --- the method ---


@pytest.mark.parametrize("safeguard", ["loss", "none"])
@pytest.mark.parametrize("every", [3, 5])
def test_accelerator_ill_conditioned_quadratic_gains_ten_thousand_over_gradient_descent(
    every: int, safeguard: Any
) -> None:
    accelerated = Quadratic(size=50, accelerate_every_n_steps=every, safeguard=safeguard)
    plain = Quadratic(size=50, warmup_steps=1000)
    accelerated.run(200, stochastic=False)
    plain.run(200)
    assert accelerated.solution().norm() < 1e-4 * plain.solution().norm()


@pytest.mark.parametrize("size", [2, 3, 6])
def test_accelerator_affine_contraction_is_solved_after_n_plus_one_maps(size: int) -> None:
    problem = Quadratic(
        size=size,
        condition=10.0,
        history_depth=size + 1,
        accelerate_every_n_steps=size + 1,
        regularization=0.0,
        max_extrapolation=math.inf,
        safeguard="none",
    )
    before = problem.solution().norm()
    assert accepted_steps(problem.run(size + 1)) == [size + 1]
    # the Gram squares the condition of the Krylov residuals, 2e5 at size 6: 16 - 11 digits left
    assert problem.solution().norm() < 1e-5 * before


# --- when it acts ---


def test_schedule_statuses_count_optimizer_steps() -> None:
    problem = Quadratic(
        store_every_n_steps=2, accelerate_every_n_steps=4, warmup_steps=9, safeguard="none"
    )
    statuses: dict[int, Status] = {}
    for step in range(1, 17):
        assert problem.accelerator.attempt_is_next is (step in (10, 14))
        report = problem.step()
        assert report.stored is (step % 2 == 0)
        statuses[step] = report.status
        assert problem.accelerator.step().status is Status.NO_OPTIMIZER_STEP
    expected = dict.fromkeys(range(1, 17, 2), Status.ACCUMULATING)
    expected |= {2: Status.STORED, 4: Status.WARMUP, 6: Status.WARMUP, 8: Status.WARMUP}
    expected |= {10: Status.ACCEPTED, 12: Status.STORED, 14: Status.ACCEPTED, 16: Status.STORED}
    assert statuses == expected
    accelerator = problem.accelerator
    assert (accelerator.optimizer_steps, accelerator.attempted, accelerator.accepted) == (16, 2, 2)
    assert accelerator.outcomes == {Status.ACCEPTED: 2}


def test_step_counter_detached_accelerator_sees_no_steps() -> None:
    problem = Quadratic(safeguard="none")
    problem.accelerator.detach()
    assert {report.status for report in problem.run(4)} == {Status.NO_OPTIMIZER_STEP}


@pytest.mark.parametrize("stochastic", [False, True])
def test_loss_evaluations_three_in_two_self_checks_and_two_afterwards(stochastic: bool) -> None:
    problem = Quadratic(noise=0.3, learning_rate=0.02, momentum=0.9, accelerate_every_n_steps=2)
    reports = [one for one in problem.run(40, stochastic=stochastic) if one.attempted]
    vetoed = [one for one in reports if one.status is Status.SKIPPED_NOISE_DOMINATED]
    evaluated = [one.loss_evaluations for one in reports if one not in vetoed]
    assert bool(vetoed) is stochastic
    assert [one.loss_evaluations for one in vetoed] == [0] * len(vetoed)
    assert evaluated == [3, 3] + [2] * (len(evaluated) - 2)
    assert len(evaluated) > 2
    assert problem.accelerator.loss_evaluations == sum(evaluated)


# --- what it leaves untouched ---


def train_with_rejections(*, accelerated: bool) -> tuple[Loop, Any]:
    """40 steps with buffers that move, random numbers of three generators, and their state."""
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(1)
    layers = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1)
    module, x, start = nn.Sequential(*layers), torch.randn(16, 3), torch.zeros(())

    def loss() -> Tensor:
        scale = 1 + 0.1 * (random.random() + np.random.random())
        return scale * (module(x) - x.sum(dim=1, keepdim=True)).square().mean()

    def distance() -> Tensor:
        with preserve_state(module):
            loss()
        return (parameters_to_vector(module.parameters()) - start).square().sum()

    options: Any = {"make_optimizer": torch.optim.Adam, "learning_rate": 0.02}
    loop = Loop(module.parameters(), loss, **options, accelerate_every_n_steps=2)
    for _ in range(40):
        loop.train_step()
        start = parameters_to_vector(module.parameters()).detach()
        if accelerated:
            loop.accelerator.step(distance)
    drawn = torch.rand(1).item(), random.random(), np.random.random()
    gradients = [one.grad for one in module.parameters()]
    return loop, (module.state_dict(), gradients, loop.optimizer.state_dict(), drawn)


def test_run_without_accepted_candidate_is_bitwise_the_plain_run() -> None:
    _, plain = train_with_rejections(accelerated=False)
    loop, observed = train_with_rejections(accelerated=True)
    assert_bitwise_equal(observed, plain)
    increases = loop.accelerator.outcomes[Status.REJECTED_LOSS_INCREASE]
    # the loss draws random numbers: noise-dominated residuals are skipped without an evaluation
    assert increases + loop.accelerator.outcomes[Status.SKIPPED_NOISE_DOMINATED] == 20
    assert increases >= 2


def test_loss_error_of_the_user_leaves_the_weights_and_the_accelerator_usable() -> None:
    problem = Quadratic(accelerate_every_n_steps=3)
    problem.run(2)
    problem.train_step()
    weights = problem.solution()
    calls = itertools.count()

    def interrupted() -> Tensor:
        if next(calls) == 2:  # at the candidate
            raise KeyboardInterrupt
        return problem.loss()

    with pytest.raises(KeyboardInterrupt):
        problem.accelerator.step(interrupted, stochastic=False)
    assert torch.equal(problem.solution(), weights)
    problem.run(1, stochastic=False)
    problem.train_step()
    with pytest.raises(ValueError, match=r"must be a single number, got shape \(20,\); reduce it"):
        problem.accelerator.step(lambda: problem.x, stochastic=False)
    # the attempt that raised is made up for at the end of the next cycle
    assert accepted_steps(problem.run(6, stochastic=False)) == [1, 4]


# --- what it accepts ---


def evaluate(
    residuals: list[list[float]],
    before: float,
    after: float,
    *,
    stochastic: bool = False,
    **options: Any,
) -> tuple[StepReport, Loop]:
    """One attempt after two given steps, between two given losses."""
    x = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    loop = Loop([x], accelerate_every_n_steps=2, **options)
    losses = iter(torch.tensor([before, before, after], dtype=torch.float64))  # of the attempt
    reports = [
        loop.step(one, loss=lambda: next(losses), stochastic=stochastic) for one in residuals
    ]
    return reports[-1], loop


@pytest.mark.parametrize(
    ("residuals", "gain", "before", "after", "stochastic", "status"),
    [
        (NOISE, 1, 1.0, 0.999, False, Status.ACCEPTED),
        (NOISE, 1, 1.0, 1.0, False, Status.REJECTED_LOSS_INCREASE),
        (NOISE, 1, 1.0, 1.0 - 1e-15, False, Status.REJECTED_LOSS_INCREASE),  # rounding errors
        (NOISE, 1, 1.0, 1.001, False, Status.REJECTED_LOSS_INCREASE),
        (NOISE, 1, -1.0, -1.001, False, Status.ACCEPTED),
        (NOISE, 1, 0.0, -1e-9, False, Status.ACCEPTED),
        (DRIFT, 2, math.nan, 0.5, False, Status.REJECTED_NON_FINITE_LOSS),
        (DRIFT, 2, 1.0, -math.inf, True, Status.REJECTED_NON_FINITE_LOSS),
        (DRIFT, 2, 1.0, 0.999, True, Status.ACCEPTED),
        (DRIFT, 2, 1.0, 1.001, True, Status.REJECTED_LOSS_INCREASE),
        (NOISE, 1, 1.0, 0.1, True, Status.SKIPPED_NOISE_DOMINATED),
        (ELIMINATED, 0, 1.0, 0.999, True, Status.ACCEPTED),
    ],
)
def test_acceptance_status_follows_losses_and_gain(
    residuals: list[list[float]],
    gain: float,
    before: float,
    after: float,
    stochastic: bool,
    status: Status,
) -> None:
    report, loop = evaluate(residuals, before, after, stochastic=stochastic, regularization=1e-8)
    assert report.status is status
    assert report.gain == pytest.approx(gain, abs=1e-6)  # the ridge of 1e-8 leaves that much
    assert report.stochastic is stochastic
    assert loop.accelerator.outcomes == {status: 1}
    own = torch.tensor(residuals, dtype=torch.float64).sum(dim=0)
    assert torch.equal(loop.parameters[0], own) is not report.accepted
    if status is Status.SKIPPED_NOISE_DOMINATED:
        assert (report.loss_evaluations, report.loss_before) == (0, None)
    else:
        finite = [one if math.isfinite(one) else None for one in (before, after)]
        assert [report.loss_before, report.loss_after] == finite


def test_acceptance_of_a_loss_that_draws_random_numbers_is_stochastic() -> None:
    """``stochastic=False`` does not hold of a loss that draws its own samples."""
    problem, reports = Quadratic(size=4, accelerate_every_n_steps=2), []
    for step in torch.eye(4, dtype=torch.float64):
        drawn: list[float] = []

        def loss(drawn: list[float] = drawn) -> Tensor:
            drawn.append(torch.rand(1).item())
            return torch.ones(())

        reports.append(problem.step(step, loss=loss, stochastic=False))
        assert len(set(drawn)) <= 1  # every evaluation sees the same random numbers
    # seen in the first evaluation, and what it shows counts beforehand from then on
    assert problem.accelerator.outcomes == {
        Status.REJECTED_LOSS_INCREASE: 1,
        Status.SKIPPED_NOISE_DOMINATED: 1,
    }
    assert [one.stochastic for one in reports] == [None, True, None, True]


def test_acceptance_without_safeguard_takes_every_finite_candidate_unevaluated() -> None:
    report, loop = evaluate(NOISE, math.nan, math.nan, safeguard="none")
    assert (report.status, report.loss_before, report.horizon) == (Status.ACCEPTED, None, 0.0)
    assert loop.accelerator.loss_evaluations == 0


def test_acceptance_of_a_maximizing_optimizer_raises_the_loss() -> None:
    maximize = functools.partial(torch.optim.SGD, maximize=True)
    x = nn.Parameter(torch.zeros(2))
    loop = Loop([x], make_optimizer=maximize, accelerate_every_n_steps=2)
    statuses = [
        loop.step([-1.0, 0.0], loss=lambda sign=sign: sign * x.sum(), stochastic=False).status
        for sign in (1.0, 1.0, -1.0, -1.0)
    ]
    assert statuses[1::2] == [Status.ACCEPTED, Status.REJECTED_LOSS_INCREASE]


# --- what is not finite, or not repeatable ---


def outside_of_domain() -> Tensor:
    raise ArithmeticError("negative density")


AGAIN = "the loss cannot be evaluated again, and raised"


@pytest.mark.parametrize(
    ("fault", "attempts_before", "reason"),
    [
        # called twice at the weights, then at the candidate
        (lambda call, loss: outside_of_domain() if call == 0 else loss, 0, None),
        (lambda call, loss: outside_of_domain() if call == 2 else loss, 0, None),
        (lambda *_: outside_of_domain(), 2, None),  # the loss has proved to be usable
        (
            lambda *_: outside_of_domain(),
            0,
            f"{AGAIN} ArithmeticError: negative density; define anderson_loss(",
        ),
        (
            lambda *_: None,
            0,
            f"{AGAIN} ValueError: the loss must be a single number, got None: ret",
        ),
        (lambda call, loss: loss + call, 0, "two losses of the same batch at the same weights di"),
    ],
    ids=["at the weights", "at the candidate", "later", "always", "none", "not repeatable"],
)
def test_loss_at_fault_rejects_or_disables_with_its_reason(
    fault: Any, attempts_before: int, reason: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    problem = Quadratic(accelerate_every_n_steps=3)
    problem.run(2 + 3 * attempts_before, stochastic=False)
    problem.train_step()
    weights, calls = problem.solution(), itertools.count()

    accelerator = problem.accelerator
    report = accelerator.step(lambda: fault(next(calls), problem.loss()), stochastic=False)
    assert report.status is (Status.DISABLED if reason else Status.REJECTED_ERROR)
    assert not report.accepted
    assert torch.equal(problem.solution(), weights)
    if reason is None:
        assert accelerator.disabled is None
        return
    assert str(accelerator.disabled).startswith(reason)
    assert f"off for the rest of this run: {accelerator.disabled}" in caplog.text
    assert accelerator.state_dict()["iterates"] is None  # the memory is given back
    assert [one.status for one in problem.run(4)] == [Status.DISABLED] * 4
    assert (accelerator.optimizer_steps, accelerator.attempt_is_next) == (7, False)

    resumed = Quadratic(accelerate_every_n_steps=3)
    resumed.load_state_dict(problem.state_dict())
    assert [one.status for one in resumed.run(4)] == [Status.DISABLED] * 4
    state = resumed.accelerator.state_dict()
    assert (state["counters"]["optimizer_steps"], state["disabled"]) == (11, accelerator.disabled)


def test_non_finite_weights_clear_the_history_and_acceleration_resumes() -> None:
    problem = Quadratic(accelerate_every_n_steps=4)
    statuses = []
    for step in range(1, 13):
        problem.train_step()
        if step == 3:
            problem.parameters[0].grad = torch.full_like(problem.x, math.nan)
            problem.optimizer.step()
        statuses.append(problem.accelerator.step(problem.loss, stochastic=False).status)
        if step == 4:
            with torch.no_grad():
                problem.parameters[0].fill_(1.0)
    attempts = {4: Status.REJECTED_NON_FINITE_HISTORY, 8: Status.ACCEPTED, 12: Status.ACCEPTED}
    assert {step: statuses[step - 1] for step in (4, 8, 12)} == attempts
    assert statuses[4] is Status.EXTERNAL_UPDATE
    assert bool(problem.solution().isfinite().all())


@pytest.mark.parametrize("safeguard", ["loss", "none"])
def test_candidate_beyond_the_precision_of_the_weights_rejects(safeguard: Any) -> None:
    """Of float16 beside float32, in which the candidate is formed."""
    x, other = nn.Parameter(torch.tensor([-5e4, 5e4]).half()), nn.Parameter(torch.zeros(3))
    options: Any = {"regularization": 1e-8, "safeguard": safeguard}
    loop = Loop([x, other], lambda: -x.float()[1], accelerate_every_n_steps=2, **options)
    reports = [  # nearly equal steps: the extrapolation goes far
        loop.step([-step, step], stochastic=False) for step in (5e4 / 15, 5e4 / 16)
    ]
    rejected = Status.REJECTED_NON_FINITE_CANDIDATE
    assert [one.status for one in reports] == [Status.STORED, rejected]
    assert bool(x.isfinite().all())


class MasterWeights(torch.optim.SGD):
    """Keeps weights in higher precision, and writes them over the model's at every step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                master = self.state[parameter].setdefault("master", parameter.float().clone())
                master.sub_(group["lr"] * parameter.grad.float())
                parameter.copy_(master)


def test_optimizer_with_master_weights_disables_before_a_candidate_is_lost() -> None:
    x = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    options: Any = {"make_optimizer": MasterWeights, "learning_rate": 0.1}
    loop = Loop([x], lambda: x.float().square().sum(), **options)
    loop.run(2)
    loop.train_step()
    own, report = x.detach().clone(), loop.accelerator.step(loop.loss, stochastic=False)
    assert (report.status, report.accepted) == (Status.DISABLED, False)
    assert str(loop.accelerator.disabled).endswith("use an optimizer without master weights")
    assert torch.equal(x, own)


# --- parameters of every kind ---


def test_complex_weights_move_as_their_real_and_imaginary_parts() -> None:
    def minimise(x: nn.Parameter) -> Any:
        scale = torch.tensor([[1.0, 0.5], [0.1, 0.02]], dtype=torch.float64)

        def loss() -> Tensor:
            return (scale * (torch.view_as_real(x) if x.is_complex() else x).square()).sum()

        loop = Loop([x], loss, learning_rate=0.5)
        loop.run(9, stochastic=False)
        return loop.accelerator.outcomes

    parts = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    x, y = nn.Parameter(torch.view_as_complex(parts.clone())), nn.Parameter(parts.clone())
    assert minimise(x) == minimise(y) == {Status.ACCEPTED: 3}
    assert torch.equal(torch.view_as_real(x.detach()), y.detach())


def test_lazy_module_is_accelerated_from_its_first_step_on() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module, x = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(8, 3)
        loss = lambda: module(x).square().mean()  # noqa: E731
        loop = Loop(module.parameters(), loss, learning_rate=0.1, safeguard="none")
        assert accepted_steps(loop.run(6)) == [3, 6]
    rows = loop.accelerator.state_dict()["iterates"]["rows"]
    assert rows.shape[1] == 3 * 4 + 4 + 4 + 1


def test_optimizers_in_turns_keep_the_parameters_that_are_frozen_meanwhile() -> None:
    """As those of a GAN: a frozen parameter that keeps its gradient moves with the next step."""
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizers = [torch.optim.SGD([one], lr=0.1) for one in weights]
    accelerator = AndersonAccelerator(
        optimizers, store_every_n_steps=2, accelerate_every_n_steps=4, safeguard="none"
    )
    reports = []
    for step in range(8):
        turn = step % 2
        weights[turn].requires_grad_(True)
        weights[turn].square().sum().backward()
        weights[1 - turn].requires_grad_(False)
        optimizers[turn].step()
        reports.append(accelerator.step())
    assert accepted_steps(reports) == [4, 8]
    assert accelerator.outcomes == {Status.ACCEPTED: 2}
    assert accelerator.state_dict()["iterates"]["rows"].shape[1] == 4


@pytest.mark.parametrize("change", ["unfrozen", "frozen", "replaced"])
def test_changed_parameters_restart_the_history(change: str) -> None:
    weights = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    weights[1].requires_grad_(change != "unfrozen")
    loop = Loop(
        weights,
        lambda: torch.stack([one.square().sum() for one in weights]).sum(),
        learning_rate=0.1,
        accelerate_every_n_steps=100,
    )
    statuses = [one.status for one in loop.run(3)]
    if change == "replaced":
        weights[1].data = weights[1].detach().clone()
    else:
        weights[1].requires_grad_(change == "unfrozen")
        weights[1].grad = None
    statuses += [one.status for one in loop.run(3)]
    assert statuses == [Status.STORED] * 3 + [Status.PARAMETERS_CHANGED] + [Status.STORED] * 2
    elements = 2 if change == "frozen" else 5
    assert iterates_of(loop.accelerator.state_dict()["iterates"]).shape == (3, elements)
    assert loop.accelerator.outcomes[Status.PARAMETERS_CHANGED] == 1


# --- errors ---


def test_repr_has_changed_options_and_counts() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    accelerator = AndersonAccelerator(optimizer, history_depth=5)
    assert repr(accelerator) == (
        "<AndersonAccelerator(history_depth=5): 0 of 0 candidates accepted>"
    )


def test_step_without_loss_raises_where_the_safeguard_needs_one() -> None:
    problem = Quadratic()
    with pytest.raises(ValueError, match="safeguard='loss' needs a loss_fn, got None: call step"):
        problem.accelerator.step()


@pytest.mark.parametrize(
    ("attribute", "library"),
    [("_fsdp_flattened", r"FullyShardedDataParallel \(FSDP1\)"), ("ds_id", "DeepSpeed")],
)
def test_weights_that_other_libraries_hide_raise(attribute: str, library: str) -> None:
    parameter = nn.Parameter(torch.ones(2))
    setattr(parameter, attribute, 1)
    with pytest.raises(ValueError, match=f"by {library} are not supported: use"):
        AndersonAccelerator(torch.optim.SGD([parameter], lr=0.1))


def test_history_that_does_not_fit_raises_with_what_to_lower() -> None:
    problem = Quadratic(history_depth=10**13)
    with pytest.raises(RuntimeError, match=r"does not fit into the memory of cpu: lower history_d"):
        problem.train_step()
