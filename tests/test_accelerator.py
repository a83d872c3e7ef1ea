import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_stableaa import AndersonAccelerator, Smoothing, Status, StepReport
from lightning_stableaa.safeguard import WholeLoss
from lightning_stableaa.weights import FlatTensors
from tests.histories import points_of
from tests.judges import OfSample
from tests.reference import ReferenceAccelerator, Vector

NOTHING = StepReport(status=Status.NO_OPTIMIZER_STEP)


class Quadratic:
    """Gradient descent on 1/2 x^T A x, A diagonal with the given condition number."""

    def __init__(self, *, size: int = 20, condition: float = 1e3, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        exponents = torch.linspace(0, -math.log10(condition), size, dtype=torch.float64)
        self.spectrum = 10**exponents
        self.x = nn.Parameter(torch.randn(size, generator=generator, dtype=torch.float64))
        self.optimizer = torch.optim.SGD([self.x], lr=1.0)

    def loss(self) -> Tensor:
        return 0.5 * (self.spectrum * self.x * self.x).sum()

    def train_step(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def plain_step(self, x: Vector) -> Vector:
        return x - self.spectrum.numpy() * x

    def plain_loss(self, x: Vector) -> float:
        return 0.5 * float((self.spectrum.numpy() * x * x).sum())


def stored_points(accelerator: AndersonAccelerator) -> Tensor:
    return points_of(accelerator.state_dict()["points"]["history"])


@pytest.mark.parametrize(
    ("depth", "relaxation", "regularization", "guarded"),
    [
        *itertools.product([2, 5, 10], [0.3, 1.0], [(1e-8,), (1e-3,), (1e-6, 1e-2)], [True]),
        *itertools.product([2, 5, 10], [0.3, 1.0], [(1e-8,), (1e-3,)], [False]),
    ],
)
def test_engine_equals_the_reference(
    depth: int, relaxation: float, regularization: tuple[float, ...], guarded: bool
) -> None:
    problem = Quadratic(condition=50.0)
    accelerator = AndersonAccelerator(
        problem.optimizer,
        history_depth=depth,
        store_every_n_steps=2,
        accelerate_every_n_steps=6,
        warmup_steps=7,
        relaxation=relaxation,
        regularization=regularization,
        max_extrapolation=5.0,
        safeguard="loss" if guarded else "none",
    )
    twin = ReferenceAccelerator(
        history_depth=depth,
        store_every_n_steps=2,
        accelerate_every_n_steps=6,
        warmup_steps=7,
        relaxation=relaxation,
        regularization=regularization,
        max_extrapolation=5.0,
    )
    x = problem.x.detach().numpy().copy()
    twin.start(x)
    decisions = []
    for step in range(1, 61):
        # every other judge wants the loss to rise, so that candidates are also rejected
        sign = 1.0 if step % 12 == 8 else -1.0
        problem.train_step()
        report = accelerator.step((lambda s=sign: s * problem.loss()) if guarded else None)
        if report.attempted:
            decisions.append(report.accepted)
        x = twin.step(
            problem.plain_step(x),
            (lambda x, s=sign: s * problem.plain_loss(x)) if guarded else None,
        )
        # 1e-9: float64, a condition of the solve up to 1e8, and mixtures that go on by ten cycles
        np.testing.assert_allclose(problem.x.detach().numpy(), x, rtol=0, atol=1e-9)
    assert decisions == twin.decisions
    assert len(decisions) == 9
    assert not guarded or {True, False} == set(decisions)
    np.testing.assert_allclose(stored_points(accelerator).numpy(), twin.points, atol=1e-9)


@pytest.mark.parametrize("guarded", [True, False])
@pytest.mark.parametrize("every", [3, 5])
def test_an_ill_conditioned_quadratic_is_solved_ten_thousand_times_better(
    every: int, guarded: bool
) -> None:
    problem = Quadratic(size=50, condition=1e3)
    accelerator = AndersonAccelerator(
        problem.optimizer,
        history_depth=10,
        store_every_n_steps=1,
        accelerate_every_n_steps=every,
        safeguard="loss" if guarded else "none",
    )
    plain = problem.x.detach().numpy().copy()
    for _ in range(200):
        problem.train_step()
        accelerator.step(problem.loss if guarded else None)
        plain = problem.plain_step(plain)
    assert problem.x.detach().norm().item() < 1e-4 * np.linalg.norm(plain)


@pytest.mark.parametrize("size", [2, 3, 6])
def test_an_affine_contraction_is_solved_after_n_plus_one_maps(size: int) -> None:
    problem = Quadratic(size=size, condition=10.0)
    accelerator = AndersonAccelerator(
        problem.optimizer,
        history_depth=size + 1,
        store_every_n_steps=1,
        accelerate_every_n_steps=size + 1,
        regularization=0.0,
        max_extrapolation=math.inf,
        safeguard="none",
    )
    before, report = problem.x.detach().norm(), NOTHING
    for _ in range(size + 1):
        problem.train_step()
        report = accelerator.step()
    assert report.accepted
    # the Gram squares the condition of the Krylov residuals, 2e5 at size 6: 16 - 11 digits left
    assert problem.x.detach().norm() < 1e-5 * before


def test_the_schedule_counts_optimizer_steps() -> None:
    problem = Quadratic()
    accelerator = AndersonAccelerator(
        problem.optimizer,
        store_every_n_steps=2,
        accelerate_every_n_steps=4,
        warmup_steps=9,
        safeguard="none",
    )
    log = []
    for step in range(1, 17):
        problem.train_step()
        report = accelerator.step()
        assert report.stored == (step % 2 == 0)
        if report.stored:
            log.append((step, report.status))
        assert accelerator.step().status is Status.NO_OPTIMIZER_STEP
    assert log == [
        (2, Status.STORED),
        (4, Status.WARMUP),
        (6, Status.WARMUP),
        (8, Status.WARMUP),
        (10, Status.ACCEPTED),
        (12, Status.STORED),
        (14, Status.ACCEPTED),
        (16, Status.STORED),
    ]
    assert (accelerator.optimizer_steps, accelerator.attempted, accelerator.accepted) == (16, 2, 2)


def test_one_residual_is_too_short_a_history() -> None:
    problem = Quadratic()
    accelerator = AndersonAccelerator(
        problem.optimizer, store_every_n_steps=1, accelerate_every_n_steps=1, safeguard="none"
    )
    statuses = []
    for _ in range(3):
        problem.train_step()
        statuses.append(accelerator.step().status)
    assert statuses == [Status.HISTORY_TOO_SHORT, Status.ACCEPTED, Status.ACCEPTED]


@pytest.mark.parametrize(
    ("options", "candidates"), [({}, 1), ({"regularization": [1e-8, 1e-2, 1.0]}, 3)]
)
def test_a_rejected_candidate_leaves_everything_bitwise(
    options: dict[str, Any], candidates: int
) -> None:
    problem = Quadratic()
    accelerator = AndersonAccelerator(
        problem.optimizer, store_every_n_steps=1, accelerate_every_n_steps=3, **options
    )
    for _ in range(2):
        problem.train_step()
        assert not accelerator.step(problem.loss).attempted
    problem.train_step()
    weights, random = problem.x.detach().clone(), torch.get_rng_state()
    assert problem.x.grad is not None
    gradient = problem.x.grad.clone()
    calls = []

    def worse_elsewhere() -> Tensor:
        calls.append(1)
        torch.rand(3)  # a loss with dropout draws random numbers
        return (problem.x - weights).square().sum()

    report = accelerator.step(worse_elsewhere)
    assert report.status is Status.REJECTED_LOSS
    assert (report.loss_before, len(calls)) == (0.0, 1 + candidates)
    assert report.loss_after is not None
    assert report.loss_after > 0
    assert torch.equal(problem.x, weights)
    assert torch.equal(problem.x.grad, gradient)
    assert torch.equal(torch.get_rng_state(), random)
    assert accelerator.loss_evaluations == 1 + candidates


def test_every_candidate_sees_the_same_random_numbers() -> None:
    problem = Quadratic()
    accelerator = AndersonAccelerator(
        problem.optimizer,
        store_every_n_steps=1,
        accelerate_every_n_steps=2,
        regularization=[1e-8, 1e-2, 1.0],
    )
    drawn: list[float] = []

    def loss() -> Tensor:
        drawn.append(torch.rand(1).item())
        return problem.loss()

    for _ in range(2):
        problem.train_step()
        accelerator.step(loss)
    assert len(drawn) == 4
    assert len(set(drawn)) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["before", "after"])
def test_a_loss_that_is_not_finite_is_rejected(bad: float, where: str) -> None:
    problem = Quadratic()
    accelerator = AndersonAccelerator(
        problem.optimizer, store_every_n_steps=1, accelerate_every_n_steps=2
    )
    weights, report = torch.empty(0), NOTHING
    for _ in range(2):
        problem.train_step()
        losses = iter([torch.tensor(bad if where == "before" else 1.0)])
        weights = problem.x.detach().clone()
        report = accelerator.step(lambda losses=losses: next(losses, torch.tensor(bad)))
    assert report.status is Status.REJECTED_NON_FINITE_LOSS
    assert torch.equal(problem.x, weights)


def test_one_finite_candidate_among_others_is_taken() -> None:
    problem = Quadratic()
    accelerator = AndersonAccelerator(
        problem.optimizer,
        store_every_n_steps=1,
        accelerate_every_n_steps=2,
        regularization=[1e-8, 1e-3, 1.0],
    )
    report = NOTHING
    for _ in range(2):
        problem.train_step()
        losses = iter([2.0, math.nan, 1.0, math.inf, 1.5])
        report = accelerator.step(lambda losses=losses: torch.tensor(next(losses)))
    assert (report.status, report.regularization) == (Status.ACCEPTED, 1e-3)
    assert (report.loss_before, report.loss_after) == (2.0, 1.0)


def test_weights_that_are_not_finite_clear_the_history_and_training_goes_on() -> None:
    problem = Quadratic()
    accelerator = AndersonAccelerator(
        problem.optimizer,
        store_every_n_steps=1,
        accelerate_every_n_steps=4,
        regularization=[1e-8, 1e-2, 1.0],
    )
    statuses = []
    for step in range(1, 13):
        problem.train_step()
        if step == 3:
            with torch.no_grad():
                problem.x[0] = math.nan
        if step == 5:
            with torch.no_grad():
                problem.x[0] = 1.0
        report = accelerator.step(problem.loss)
        if report.attempted:
            statuses.append((step, report.status))
    assert statuses == [
        (4, Status.REJECTED_NON_FINITE_HISTORY),
        (8, Status.ACCEPTED),
        (12, Status.ACCEPTED),
    ]
    assert bool(problem.x.isfinite().all())


def test_weights_that_do_not_move_are_reported() -> None:
    problem = Quadratic()
    problem.optimizer.param_groups[0]["lr"] = 0.0
    accelerator = AndersonAccelerator(
        problem.optimizer, store_every_n_steps=1, accelerate_every_n_steps=3
    )
    report = NOTHING
    for _ in range(3):
        problem.train_step()
        report = accelerator.step(problem.loss)
    assert report.status is Status.REJECTED_STAGNATION
    assert "learning rate" in report.status.remedy


def test_a_change_from_outside_breaks_the_chain() -> None:
    problem = Quadratic()
    accelerator = AndersonAccelerator(
        problem.optimizer, store_every_n_steps=2, accelerate_every_n_steps=100, safeguard="none"
    )
    for step in range(1, 8):
        problem.train_step()
        accelerator.step()
        if step == 3:  # in the middle of the second cycle
            with torch.no_grad():
                problem.x.mul_(0.5)
    state = accelerator.state_dict()["points"]["history"]
    assert state["links"] == [False, True, False, True, True]
    points = points_of(state)
    torch.testing.assert_close(points[3], points[2] * (1 - problem.spectrum) ** 2)


def test_steps_without_a_gradient_do_not_count() -> None:
    problem = Quadratic()
    accelerator = AndersonAccelerator(
        problem.optimizer, store_every_n_steps=1, accelerate_every_n_steps=100, safeguard="none"
    )
    statuses = []
    for step in range(4):
        problem.optimizer.zero_grad()
        if step != 1:
            problem.loss().backward()
        problem.optimizer.step()
        statuses.append(accelerator.step().status)
    assert statuses == [Status.STORED, Status.NO_OPTIMIZER_STEP, Status.STORED, Status.STORED]
    assert len(stored_points(accelerator)) == 4


def test_a_parameter_that_is_unfrozen_starts_a_new_history() -> None:
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3), requires_grad=False)
    optimizer = torch.optim.SGD([first, second], lr=0.1)
    accelerator = AndersonAccelerator(
        optimizer, store_every_n_steps=1, accelerate_every_n_steps=100, safeguard="none"
    )
    statuses = []
    for step in range(6):
        if step == 3:
            second.requires_grad_(True)
        loss = first.square().sum() + second.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        statuses.append(accelerator.step().status)
    assert statuses[3] is Status.PARAMETERS_CHANGED
    assert [one for k, one in enumerate(statuses) if k != 3] == [Status.STORED] * 5
    assert stored_points(accelerator).shape == (3, 5)


def noisy_problem(
    seed: int = 0, amplitude: float = 0.3
) -> tuple[nn.Parameter, torch.optim.Optimizer, Callable]:
    generator = torch.Generator().manual_seed(seed)
    x = nn.Parameter(torch.ones(6, dtype=torch.float64))
    optimizer = torch.optim.SGD([x], lr=0.1, momentum=0.9)

    def train_step() -> None:
        noise = torch.randn(6, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        (0.5 * x.square().sum() + amplitude * (noise * x).sum()).backward()
        optimizer.step()

    return x, optimizer, train_step


def test_averages_enter_the_history_while_smoothing_is_on() -> None:
    x, optimizer, train_step = noisy_problem()
    accelerator = AndersonAccelerator(
        optimizer,
        store_every_n_steps=4,
        accelerate_every_n_steps=400,
        safeguard="none",
        smoothing=Smoothing(rsd_threshold=0.0, average_window=3),
    )
    iterates, reports = [x.detach().clone()], []
    for _ in range(12):
        train_step()
        reports.append(accelerator.step())
        iterates.append(x.detach().clone())
    window = torch.stack(iterates)
    averages = [window[end - 2 : end + 1].mean(dim=0) for end in (4, 8, 12)]
    state = accelerator.state_dict()["points"]["history"]
    assert state["links"] == [False, True, True]
    torch.testing.assert_close(points_of(state), torch.stack(averages), rtol=1e-14, atol=1e-14)
    deviation = window[2:5].std(dim=0).norm() / window[2:5].mean(dim=0).norm()
    assert reports[3].rsd == pytest.approx(deviation.item(), rel=1e-12)
    assert reports[3].smoothing_on is True


def test_smoothing_of_the_weights_overwrites_them() -> None:
    x, optimizer, train_step = noisy_problem()
    accelerator = AndersonAccelerator(
        optimizer,
        store_every_n_steps=4,
        accelerate_every_n_steps=400,
        safeguard="none",
        smoothing=Smoothing(rsd_threshold=0.0, apply_to="weights"),
    )
    iterates = []
    for _ in range(4):
        train_step()
        iterates.append(x.detach().clone())
        accelerator.step()
    torch.testing.assert_close(x.detach(), torch.stack(iterates).mean(dim=0), rtol=1e-14, atol=0)


def test_a_change_of_smoothing_breaks_the_chain() -> None:
    _, optimizer, train_step = noisy_problem(amplitude=100.0)
    accelerator = AndersonAccelerator(
        optimizer,
        store_every_n_steps=4,
        accelerate_every_n_steps=400,
        safeguard="none",
        smoothing=Smoothing(rsd_threshold=0.2),
    )
    switched = []
    for step in range(32):
        if step == 16:
            optimizer.param_groups[0]["lr"] = 1e-9
            optimizer.param_groups[0]["momentum"] = 0.0
        train_step()
        report = accelerator.step()
        if report.stored:
            switched.append(report.smoothing_on)
    links = accelerator.state_dict()["points"]["history"]["links"]
    assert switched == [True] * 4 + [False] * 4
    assert links == [False, True, True, True, False, True, True, True]


@pytest.mark.parametrize("optimizer_state", ["keep", "mix", "reset"])
def test_momentum_on_acceptance(optimizer_state: str) -> None:
    problem = Quadratic()
    problem.optimizer = torch.optim.SGD([problem.x], lr=0.1, momentum=0.9)
    accelerator = AndersonAccelerator(
        problem.optimizer,
        store_every_n_steps=1,
        accelerate_every_n_steps=3,
        safeguard="none",
        regularization=1e-2,
        optimizer_state=optimizer_state,  # type: ignore[arg-type]
        max_extrapolation=math.inf,
    )
    buffer, report = torch.empty(0), NOTHING
    points, momenta = [problem.x.detach().clone()], [torch.zeros_like(problem.x)]
    for _ in range(3):
        problem.train_step()
        buffer = problem.optimizer.state[problem.x]["momentum_buffer"]
        points.append(problem.x.detach().clone())
        momenta.append(buffer.clone())
        report = accelerator.step()
    assert report.accepted
    if optimizer_state == "keep":
        assert torch.equal(buffer, momenta[-1])
    elif optimizer_state == "reset":
        assert torch.equal(buffer, torch.zeros_like(buffer))
    else:
        # the mixture that made the weights, solved for, makes the momentum
        moves = torch.stack(points).diff(dim=0)
        jump = torch.linalg.lstsq(moves.T, (problem.x.detach() - points[-1])[:, None]).solution[
            :, 0
        ]
        expected = momenta[-1] + jump @ torch.stack(momenta).diff(dim=0)
        torch.testing.assert_close(buffer, expected, rtol=1e-8, atol=1e-10)


def test_evaluation_weights_are_seen_only_inside_the_context() -> None:
    problem = Quadratic()
    accelerator = AndersonAccelerator(
        problem.optimizer,
        store_every_n_steps=1,
        accelerate_every_n_steps=6,
        apply_to="evaluation",
    )
    plain, report = problem.x.detach().numpy().copy(), NOTHING
    for _ in range(6):
        problem.train_step()
        plain = problem.plain_step(plain)
        report = accelerator.step(problem.loss)
    assert report.accepted
    assert np.array_equal(problem.x.detach().numpy(), plain), "training must go on untouched"
    own = problem.x.detach().clone()

    def evaluate_and_fail() -> None:
        with accelerator.evaluation_weights():
            assert problem.loss().item() == report.loss_after
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        evaluate_and_fail()
    assert torch.equal(problem.x, own)
    problem.train_step()
    accelerator.step(problem.loss)
    assert accelerator.state_dict()["points"]["history"]["links"] == [False] + [True] * 7


def assert_bitwise_equal(one: Any, other: Any, path: str = "state") -> None:
    assert type(one) is type(other), path
    if isinstance(one, Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key, value in one.items():
            assert_bitwise_equal(value, other[key], f"{path}.{key}")
    else:
        assert one == other, path


@pytest.mark.parametrize("stop", [1, 3, 4, 6, 11, 12, 18])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer_state": "mix"},
        {"smoothing": Smoothing(rsd_threshold=0.3)},
        {"smoothing": Smoothing(of="updates", apply_to="weights", rsd_threshold=0.3)},
        {"apply_to": "evaluation"},
    ],
)
def test_a_saved_state_continues_bitwise(options: dict[str, Any], stop: int, tmp_path: Any) -> None:
    def run(steps: range, seeds: int, weights: Any = None, state: Any = None) -> tuple[Any, Any]:
        x = nn.Parameter(torch.ones(6, dtype=torch.float64))
        optimizer = torch.optim.SGD([x], lr=0.1, momentum=0.9)
        accelerator = AndersonAccelerator(
            optimizer, store_every_n_steps=3, accelerate_every_n_steps=6, **options
        )
        if state is not None:
            x.data.copy_(weights["x"])
            optimizer.load_state_dict(weights["optimizer"])
            accelerator.load_state_dict(state)
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            noise = torch.randn(6, generator=generator, dtype=torch.float64)

            def loss(noise: Tensor = noise) -> Tensor:
                return 0.5 * x.square().sum() + 0.3 * (noise * x).sum()

            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
            accelerator.step(loss)
        weights = {"x": x.detach().clone(), "optimizer": optimizer.state_dict()}
        return weights, accelerator.state_dict()

    whole, whole_state = run(range(24), seeds=0)
    torch.save(run(range(stop), seeds=0), tmp_path / "state.pt")
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed, resumed_state = run(range(stop, 24), seeds=0, weights=weights, state=state)
    assert whole_state["counters"]["accepted"] > 0, "no candidate was accepted: nothing tested"
    assert torch.equal(resumed["x"], whole["x"])
    assert_bitwise_equal(resumed_state, whole_state)


def test_a_history_of_other_weights_is_dropped_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    small, large = Quadratic(size=4), Quadratic(size=5)
    first = AndersonAccelerator(small.optimizer, store_every_n_steps=1, accelerate_every_n_steps=9)
    for _ in range(4):
        small.train_step()
        first.step(small.loss)
    second = AndersonAccelerator(large.optimizer, store_every_n_steps=1, accelerate_every_n_steps=9)
    second.load_state_dict(first.state_dict())
    large.train_step()
    second.step(large.loss)
    assert "was dropped and starts anew: it was stored with another parameter layout" in caplog.text
    assert len(stored_points(second)) == 2
    assert second.optimizer_steps == 5


def test_a_state_of_a_newer_version_is_refused() -> None:
    problem = Quadratic()
    accelerator = AndersonAccelerator(problem.optimizer)
    state = accelerator.state_dict() | {"version": 99}
    with pytest.raises(ValueError, match="version 99, this package reads up to 2: update"):
        accelerator.load_state_dict(state)


def test_the_safeguard_needs_a_loss() -> None:
    problem = Quadratic()
    accelerator = AndersonAccelerator(problem.optimizer)
    with pytest.raises(ValueError, match="safeguard='loss' needs a loss_fn, got None"):
        accelerator.step()


def test_lbfgs_and_things_that_are_no_optimizer_are_refused() -> None:
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="got LBFGS, which iterates inside its step"):
        AndersonAccelerator(torch.optim.LBFGS([weight]))
    with pytest.raises(TypeError, match=r"must be a torch.optim.Optimizer, got str"):
        AndersonAccelerator(["sgd"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="got an empty list"):
        AndersonAccelerator([])


def test_detached_hooks_see_no_steps() -> None:
    problem = Quadratic()
    accelerator = AndersonAccelerator(problem.optimizer, safeguard="none")
    accelerator.detach()
    problem.train_step()
    assert accelerator.step().status is Status.NO_OPTIMIZER_STEP


def test_a_history_may_live_on_a_device_of_its_own() -> None:
    problem = Quadratic()
    here = AndersonAccelerator(
        problem.optimizer,
        store_every_n_steps=1,
        accelerate_every_n_steps=2,
        safeguard="none",
        history_device="cpu",
    )
    report = NOTHING
    for _ in range(2):
        problem.train_step()
        report = here.step()
    assert report.accepted


def test_without_a_safeguard_nobody_judges() -> None:
    problem = Quadratic()
    accelerator = AndersonAccelerator(
        problem.optimizer, store_every_n_steps=1, accelerate_every_n_steps=2, safeguard="none"
    )
    calls = []

    def worst() -> Tensor:
        calls.append(1)
        return torch.tensor(math.nan)

    report = NOTHING
    for _ in range(2):
        problem.train_step()
        report = accelerator.step(worst)
    assert (report.status, calls, report.loss_before) == (Status.ACCEPTED, [], None)
    assert accelerator.loss_evaluations == 0


def test_a_state_saved_after_a_change_from_outside_knows_of_it(tmp_path: Any) -> None:
    problem = Quadratic()
    options: dict[str, Any] = {
        "store_every_n_steps": 2,
        "accelerate_every_n_steps": 100,
        "safeguard": "none",
    }
    accelerator = AndersonAccelerator(problem.optimizer, **options)
    for _ in range(3):
        problem.train_step()
        accelerator.step()
    with torch.no_grad():
        problem.x.mul_(0.5)
    torch.save(accelerator.state_dict(), tmp_path / "state.pt")
    accelerator.detach()
    resumed = AndersonAccelerator(problem.optimizer, **options)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    statuses = []
    for _ in range(2):
        problem.train_step()
        statuses.append(resumed.step().status)
    assert statuses == [Status.CYCLE_OPEN, Status.STORED]
    state = resumed.state_dict()["points"]["history"]
    assert state["links"] == [False, True, False, True]
    assert resumed.outcomes[Status.WEIGHTS_CHANGED] == 1


@pytest.mark.parametrize("safeguard", ["loss", "none"])
@pytest.mark.parametrize(
    ("dtype", "edge", "others"),
    [
        (torch.float32, 3e38, []),
        (torch.float16, 5e4, [torch.float32]),  # the candidate itself is in float32
        (torch.bfloat16, 3e38, [torch.float64]),
    ],
)
def test_a_candidate_beyond_the_precision_of_the_weights_is_rejected(
    safeguard: Any, dtype: torch.dtype, edge: float, others: list[torch.dtype]
) -> None:
    x = nn.Parameter(torch.tensor([-edge, edge], dtype=dtype))
    beside = [nn.Parameter(torch.zeros(3, dtype=other)) for other in others]
    optimizer = torch.optim.SGD([*beside, x], lr=1.0)
    accelerator = AndersonAccelerator(
        optimizer,
        store_every_n_steps=1,
        accelerate_every_n_steps=2,
        regularization=1e-8,
        max_extrapolation=math.inf,
        safeguard=safeguard,
    )
    report = NOTHING
    for step in (edge / 15, edge / 16):  # nearly equal steps: the extrapolation goes far
        x.grad = torch.tensor([step, -step], dtype=dtype)
        optimizer.step()
        # a judge that likes every other loss better than the first, whatever the weights are
        losses = iter([1.0])
        report = accelerator.step(lambda losses=losses: torch.tensor(next(losses, 0.0)))
    assert report.status is Status.REJECTED_NON_FINITE_CANDIDATE
    assert "lower max_extrapolation" in report.status.remedy
    assert bool(x.isfinite().all())


# two residuals of a walk
NOISE = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
DRIFT = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
ELIMINATED = torch.tensor([[1.0, 0.0], [0.5, 0.0]])


def judged(
    residuals: Tensor, before: float, after: float, *, of_sample: bool = False, **options: Any
) -> tuple[AndersonAccelerator, StepReport, nn.Parameter]:
    """One extrapolation of two steps that are given, between losses that are given."""
    x = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([x], lr=1.0)
    accelerator = AndersonAccelerator(
        optimizer, store_every_n_steps=1, accelerate_every_n_steps=2, **options
    )
    losses = iter([before])
    report = NOTHING
    for residual in residuals:
        x.grad = -residual
        optimizer.step()
        judge = OfSample if of_sample else WholeLoss
        report = accelerator.step(
            judge(lambda: torch.tensor(next(losses, after), dtype=torch.float64))
        )
    return accelerator, report, x


@pytest.mark.parametrize(
    ("share", "before", "after", "accepted"),
    [
        (0.0, 1.0, 0.999, True),
        (0.03, 1.0, 0.98, False),
        (0.03, 1.0, 0.96, True),
        (0.03, -1.0, -1.02, False),
        (0.03, -1.0, -1.04, True),
        (0.5, 0.0, -1e-9, True),
    ],
)
def test_where_residuals_are_noise_a_candidate_has_to_lower_the_loss_by_a_share_of_it(
    share: float, before: float, after: float, accepted: bool
) -> None:
    _, report, x = judged(NOISE, before, after, sufficient_decrease=share)
    assert report.noisiness == pytest.approx(1.0)
    assert report.accepted is report.replaced is accepted
    assert accepted or report.status is Status.REJECTED_SMALL_DECREASE
    assert bool((x == 1.0).all()) is not accepted


@pytest.mark.parametrize("residuals", [DRIFT, ELIMINATED], ids=["drift", "eliminated"])
def test_where_they_are_not_noise_every_decrease_will_do(residuals: Tensor) -> None:
    _, report, _ = judged(residuals, 1.0, 0.999, sufficient_decrease=0.5)
    assert report.noisiness == pytest.approx(0.0, abs=1e-9)
    assert report.accepted
    _, report, _ = judged(residuals, 1.0, 1.0)
    assert report.status is Status.REJECTED_LOSS


@pytest.mark.parametrize(
    ("losses", "status"),
    [
        ((1.0, 0.5), Status.ACCEPTED),
        ((1.0, 0.99), Status.REJECTED_SMALL_DECREASE),
        ((1.0, 1.1), Status.REJECTED_LOSS),
        ((1.0, math.nan), Status.REJECTED_NON_FINITE_LOSS),
    ],
)
def test_what_a_part_of_the_batch_lets_in_has_to_be_confirmed(
    losses: tuple[float, float], status: Status
) -> None:
    def judge_by(values: tuple[float, float]) -> Callable[[], Tensor]:
        remaining = iter(values)
        return lambda: torch.tensor(next(remaining), dtype=torch.float64)

    problem = Quadratic()
    accelerator = AndersonAccelerator(
        problem.optimizer,
        history_depth=2,
        store_every_n_steps=1,
        accelerate_every_n_steps=2,
        regularization=1.0,
    )
    for _ in range(3):
        problem.train_step()
        accelerator.step(OfSample(judge_by((1.0, 2.0))))
    problem.train_step()
    before = problem.x.detach().clone()
    report = accelerator.step(OfSample(judge_by((3.0, 1.0)), judge_by(losses)))
    assert report.status is status
    assert torch.equal(problem.x, before) is not report.accepted
    assert (report.loss_before, report.loss_after) == pytest.approx(losses, nan_ok=True)
    assert accelerator.loss_evaluations == 6

    for _ in range(2):
        problem.train_step()
        judge = OfSample(judge_by((1.0, 2.0)), judge_by((1.0, 0.5)))
        report = accelerator.step(judge)
        assert not judge.asked, "what is rejected need not be confirmed"
    assert report.status is Status.REJECTED_LOSS


@pytest.mark.parametrize(
    ("share", "of_sample", "accepted"),
    [(None, True, False), (None, False, True), (0.0, True, True), (0.1, False, False)],
)
def test_a_part_of_the_batch_has_to_see_a_large_decrease_unless_it_is_said(
    share: float | None, of_sample: bool, accepted: bool
) -> None:
    _, report, _ = judged(NOISE, 1.0, 0.95, of_sample=of_sample, sufficient_decrease=share)
    assert report.accepted is accepted
    assert accepted or report.status is Status.REJECTED_SMALL_DECREASE


@pytest.mark.parametrize("apply_to", ["evaluation", "both"])
def test_what_noise_leaves_to_averages_is_evaluated_and_not_trained_on(apply_to: Any) -> None:
    accelerator, report, x = judged(NOISE, 1.0, 0.98, apply_to=apply_to, sufficient_decrease=0.1)
    assert report.accepted
    assert not report.replaced
    assert bool((x == 1.0).all())
    with accelerator.evaluation_weights():
        assert not bool((x == 1.0).any())
    _, report, x = judged(NOISE, 1.0, 0.5, apply_to=apply_to, sufficient_decrease=0.1)
    assert report.replaced is (apply_to == "both")


@pytest.mark.parametrize("safeguard", ["loss", "none"])
def test_a_candidate_that_cannot_be_infinite_is_not_looked_at(
    safeguard: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take a pass over the weights, and wait for the device."""
    monkeypatch.delattr(FlatTensors, "cannot_hold")
    problem = Quadratic()
    accelerator = AndersonAccelerator(
        problem.optimizer,
        store_every_n_steps=1,
        accelerate_every_n_steps=2,
        safeguard=safeguard,
        sufficient_decrease=0.0,
    )
    for _ in range(4):
        problem.train_step()
        accelerator.step(problem.loss)
    assert accelerator.accepted == 2


@pytest.mark.parametrize(("dtype", "edge"), [(torch.float32, 3e38), (torch.float16, 6e4)])
def test_a_momentum_beyond_its_precision_is_not_mixed(dtype: torch.dtype, edge: float) -> None:
    x = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([x], lr=1.0)
    accelerator = AndersonAccelerator(
        optimizer,
        store_every_n_steps=1,
        accelerate_every_n_steps=2,
        regularization=1e-8,
        optimizer_state="mix",
        safeguard="none",
    )
    report = NOTHING
    for gradient, momentum in ((1.0, edge), (0.9, -edge)):  # alpha is about (-9, 10)
        x.grad = torch.full((2,), gradient)
        optimizer.step()
        optimizer.state[x]["momentum_buffer"] = torch.full((2,), momentum, dtype=dtype)
        report = accelerator.step()
    assert report.accepted
    expected = torch.full((2,), -edge, dtype=dtype)
    assert torch.equal(optimizer.state[x]["momentum_buffer"], expected)
