"""Whether a loss is a leap, against the plain formula, and what that decides."""

import io
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_stableaa import AndersonAccelerator, MiniBatchLoss, Status
from lightning_stableaa.losses import RecentLosses
from tests import reference
from tests.judges import OfSample


def recent(*losses: float) -> RecentLosses:
    found = RecentLosses()
    for loss in losses:
        found.observe(loss)
    return found


@pytest.mark.parametrize("seed", range(20))
def test_it_equals_the_formula_after_every_extrapolation(seed: int) -> None:
    draw = random.Random(seed)
    losses = [math.exp(draw.gauss(0, 2)) for _ in range(40)]
    found = RecentLosses()
    mended = 0
    for count, loss in enumerate(losses):
        before, after = loss * math.exp(draw.gauss(0, 0.1)), draw.choice(losses)
        found.observe(loss)
        expected = reference.mends(before, after, losses[:count], loss)
        assert found.are_mended_by(before, after) is expected
        assert found.leapt is (reference.leap(loss, losses[:count]) is not None)
        mended += found.are_mended_by(before, after)
    assert mended < 20


def test_only_more_than_ten_times_a_positive_mean_is_a_leap() -> None:
    assert not recent(5.0).leapt, "the first one"
    assert not recent(1.0, 10.0).leapt
    assert recent(1.0, 10.1).leapt
    assert not recent(1.0, 10.1, 1.0).leapt
    assert recent(20.0, 1.0, 1.0, 1.0, 1.0, 20.1).leapt
    assert not recent(20.0, 1.0, 1.0, 1.0, 1.0, 20.0).leapt, "not all that was gained is lost"
    assert not recent(-1.0, 1e9).leapt, "its size says nothing where it has a sign"


def test_it_is_mended_by_what_is_as_usual() -> None:
    leapt = recent(1.0, 3.0, 21.0)
    assert leapt.are_mended_by(21.0, 2.0)
    assert not leapt.are_mended_by(21.0, 2.1), "a sample that is hard for all"
    assert leapt.are_mended_by(2.1, 0.2), "the judge has another scale than training"
    assert not leapt.are_mended_by(2.1, 0.21)
    assert not leapt.are_mended_by(21.0, math.nan)
    assert not leapt.are_mended_by(math.nan, 2.0)
    assert not leapt.are_mended_by(None, None)


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf])
def test_what_is_not_finite_says_nothing(nothing: Any) -> None:
    found = recent(1.0, 2.0, 50.0)
    assert found.leapt
    found.observe(nothing)
    assert not found.leapt
    assert found.state_dict()["recent"] == [1.0, 2.0, 50.0]


def test_they_are_forgotten_and_continued() -> None:
    found = recent(9.0, 1.0, 2.0, 3.0, 4.0)
    found.amid_noise = True
    other = RecentLosses()
    other.load_state_dict(found.state_dict())
    known = {"first": 9.0, "recent": [1.0, 2.0, 3.0, 4.0], "amid_noise": True}
    assert other.state_dict() == known
    found.forget()
    assert found.amid_noise, "the noise of residuals is the optimizer's, whoever moves the weights"
    found.observe(1e9)
    assert not found.leapt
    assert found.state_dict()["recent"] == [1e9]
    other.load_state_dict({})
    assert other.state_dict() == RecentLosses().state_dict()


class Held(OfSample):
    """Validation is worse than at its best, and may say so before anybody is asked."""

    certain = False

    @property
    def validation_got_worse(self) -> bool:
        return True

    @property
    def asked_in_vain(self) -> bool:
        return self.certain


class HeldForSure(Held):
    certain = True


class Leaps:
    """Steps under losses of a sample that are written down.

    Args:
        drift: share of all steps; the rest is orthogonal, as noise makes them.
    """

    def __init__(self, *, drift: float = 0.0, **options: Any) -> None:
        self.x = nn.Parameter(torch.zeros(200))
        self.optimizer = torch.optim.SGD([self.x], lr=1.0)
        self.options: dict[str, Any] = {"store_every_n_steps": 1, "accelerate_every_n_steps": 4}
        self.options |= options
        self.accelerator = AndersonAccelerator(self.optimizer, **self.options)
        self.drift = drift
        self.steps = 0
        self.asked = 0

    def extrapolate(
        self,
        before: float,
        after: float,
        judge: type[OfSample] = OfSample,
        training_loss: float | None = None,
    ) -> Status:
        status = Status.NO_OPTIMIZER_STEP
        for _ in range(4):
            self.x.grad = torch.zeros(200)
            self.x.grad[1 + self.steps] = 1.0
            self.x.grad[0] = self.drift
            self.optimizer.step()
            self.steps += 1
            values = iter([before, after])

            def loss(values: Any = values) -> Tensor:
                self.asked += 1
                return torch.tensor(next(values), dtype=torch.float64)

            asked_before = self.asked
            report = self.accelerator.step(judge(loss, training_loss=training_loss))
            status = report.status
            assert (report.loss_before is not None) is (self.asked > asked_before)
        return status


def test_where_residuals_are_noise_candidates_mend_leaps_and_nothing_else() -> None:
    run = Leaps()
    assert run.extrapolate(1.0, 0.5) is Status.REJECTED_NOISE
    assert Status.REJECTED_NOISE.rejected
    assert run.extrapolate(9.0, 0.5) is Status.REJECTED_NOISE
    assert run.extrapolate(90.0, 0.5) is Status.ACCEPTED
    assert run.extrapolate(90.0, 0.5) is Status.REJECTED_NOISE, "no longer one"
    assert run.extrapolate(9000.0, 90.0) is Status.REJECTED_NOISE, "hard for all"
    assert run.extrapolate(90000.0, 99999.0) is Status.REJECTED_LOSS
    for everything in (Leaps(sufficient_decrease=0.0), Leaps(drift=3.0)):
        assert everything.extrapolate(1.0, 0.5) is Status.ACCEPTED
    shown = Leaps(apply_to="both")
    assert shown.extrapolate(1.0, 0.5) is Status.ACCEPTED, "validation has no such worry"
    assert bool((shown.x[1 : 1 + shown.steps] == -1.0).all()), "and training is left alone"


def test_validation_does_not_keep_out_what_mends_a_leap() -> None:
    run = Leaps(drift=3.0)
    assert run.extrapolate(1.0, 0.5, Held) is Status.REJECTED_BY_VALIDATION
    assert run.extrapolate(9.0, 0.5, Held) is Status.REJECTED_BY_VALIDATION
    assert run.extrapolate(90.0, 0.5, Held) is Status.ACCEPTED
    assert run.extrapolate(9000.0, 90.0, Held) is Status.REJECTED_BY_VALIDATION, "hard"


def test_nobody_is_asked_amid_noise_until_the_loss_of_training_leaps() -> None:
    run = Leaps()
    assert run.extrapolate(1.0, 0.5, training_loss=1.0) is Status.REJECTED_NOISE
    assert run.asked == 2, "it was not known yet"
    for _ in range(3):
        assert run.extrapolate(1.0, 0.5, training_loss=2.0) is Status.REJECTED_NOISE
    assert run.asked == 2
    assert run.extrapolate(3.0, 0.1, training_loss=30.0) is Status.ACCEPTED
    assert run.asked == 4
    assert run.extrapolate(1.0, 0.5, training_loss=1.0) is Status.REJECTED_NOISE
    run.drift = 3.0
    statuses = [run.extrapolate(1.0, 0.5, training_loss=1.0) for _ in range(6)]
    assert statuses[-1] is Status.ACCEPTED
    assert run.asked == 4 + 2 * statuses.count(Status.ACCEPTED)


def test_they_are_asked_where_the_loss_of_training_is_not_known() -> None:
    run = Leaps()
    for count, loss in enumerate([None, 1.0, math.nan, 1.0], start=1):
        assert run.extrapolate(1.0, 0.5, training_loss=loss) is Status.REJECTED_NOISE
        assert run.asked == 2 * min(count, 2) + 2 * (count == 4)
    for apply_to in ("evaluation", "both"):
        shown = Leaps(apply_to=apply_to)
        for _ in range(3):
            assert shown.extrapolate(1.0, 0.5, training_loss=1.0) is Status.ACCEPTED
        assert shown.asked == 6


def test_a_leap_is_seen_while_validation_holds_candidates_back() -> None:
    run = Leaps(drift=3.0)
    for _ in range(2):
        status = run.extrapolate(1.0, 0.5, HeldForSure, training_loss=1.0)
        assert status is Status.REJECTED_BY_VALIDATION
    assert run.asked == 0
    assert run.extrapolate(60.0, 0.5, HeldForSure, training_loss=50.0) is Status.ACCEPTED
    assert run.asked == 2


def confirmed_by(*losses: float) -> Any:
    """A judge whose whole batch says so, of the weights before and of the candidate."""

    def judge(loss: Any, **known: Any) -> OfSample:
        values = iter(losses)
        return OfSample(loss, lambda: torch.tensor(next(values)), **known)

    return judge


def test_the_whole_batch_confirms_that_a_leap_is_mended() -> None:
    statuses = []
    for confirmed in (0.5, 30.0):
        run = Leaps()
        run.extrapolate(1.0, 2.0)
        statuses.append(run.extrapolate(90.0, 0.5, confirmed_by(90.0, confirmed)))
    assert statuses == [Status.ACCEPTED, Status.REJECTED_NOISE], "a third less is no way back"
    shown = Leaps(apply_to="both")
    shown.extrapolate(1.0, 2.0)
    assert shown.extrapolate(90.0, 0.5, confirmed_by(90.0, 30.0)) is Status.ACCEPTED
    assert bool((shown.x[1 : 1 + shown.steps] == -1.0).all()), "for validation alone"


@pytest.mark.parametrize(("confirmed", "mended"), [(0.5, True), (30.0, False)])
def test_what_the_whole_batch_does_not_call_mended_keeps_its_momentum(
    confirmed: float, mended: bool
) -> None:
    run = Leaps(drift=30.0)
    run.optimizer.param_groups[0]["momentum"] = 0.5
    run.extrapolate(1.0, 2.0)
    assert run.extrapolate(90.0, 0.5, confirmed_by(90.0, confirmed)) is Status.ACCEPTED
    buffer = run.optimizer.state[run.x]["momentum_buffer"]
    assert bool((buffer == 0).all()) is mended


def test_outcomes_of_an_earlier_version_are_forgotten() -> None:
    run = Leaps()
    run.extrapolate(1.0, 0.5)
    state = run.accelerator.state_dict()
    state["outcomes"]["rejected_without_payoff"] = 3
    run.accelerator.load_state_dict(state)
    assert run.accelerator.outcomes[Status.REJECTED_NOISE] == 1
    assert set(run.accelerator.outcomes) <= set(Status)


@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("training_loss", [None, 1.0])
def test_a_continuation_knows_what_is_a_leap_and_an_edit_forgets_it(
    edited: bool, training_loss: float | None
) -> None:
    run = Leaps()
    run.extrapolate(1.0, 2.0, training_loss=training_loss)
    file = io.BytesIO()
    torch.save(run.accelerator.state_dict(), file)
    file.seek(0)
    run.accelerator.detach()
    run.accelerator = AndersonAccelerator(run.optimizer, **run.options)
    run.accelerator.load_state_dict(torch.load(file, weights_only=True))
    run.x.grad = torch.zeros(200)
    if edited:
        with torch.no_grad():
            run.x.add_(1.0)
    expected = Status.REJECTED_NOISE if edited else Status.ACCEPTED
    leapt = None if training_loss is None else 90.0
    assert run.extrapolate(90.0, 0.5, training_loss=leapt) is expected


@pytest.mark.parametrize("leapt", [False, True])
def test_momentum_that_carried_training_off_is_set_to_zero(leapt: bool) -> None:
    run = Leaps(sufficient_decrease=0.0)
    run.optimizer.param_groups[0]["momentum"] = 0.5
    run.extrapolate(1.0, 2.0)
    assert run.extrapolate(90.0 if leapt else 9.0, 0.5) is Status.ACCEPTED
    buffer = run.optimizer.state[run.x]["momentum_buffer"]
    assert bool((buffer == 0).all()) is leapt


def train_amid_noise(
    judge: Callable[..., Any], **options: Any
) -> tuple[Tensor, AndersonAccelerator]:
    """SGD on |x - z|^2 / 2 with another z at every step; ``judge(loss, trained)``."""
    generator = torch.Generator().manual_seed(0)
    x = nn.Parameter(torch.zeros(20, dtype=torch.float64))
    optimizer = torch.optim.SGD([x], lr=0.05)
    engine = AndersonAccelerator(optimizer, **options)
    for _ in range(400):
        z = torch.randn(20, generator=generator, dtype=torch.float64)

        def loss(z: Tensor = z) -> Tensor:
            return ((x - z) ** 2).sum() / 2

        optimizer.zero_grad()
        trained = loss()
        trained.backward()
        optimizer.step()
        engine.step(judge(loss, trained))
    return x.detach(), engine


def test_a_loop_of_ones_own_says_that_its_losses_are_those_of_mini_batches() -> None:
    plain, idle = train_amid_noise(MiniBatchLoss, warmup_steps=401)
    assert idle.attempted == 0
    known, engine = train_amid_noise(MiniBatchLoss)
    assert torch.equal(known, plain)
    assert engine.outcomes[Status.REJECTED_NOISE] > 15
    assert engine.loss_evaluations < 8, "no longer asked for once residuals are known for noise"
    untold, asked = train_amid_noise(lambda loss, _: MiniBatchLoss(loss))
    assert torch.equal(untold, plain)
    assert asked.loss_evaluations >= 2 * asked.attempted, "a leap could not be seen otherwise"
    taken_for_all, fooled = train_amid_noise(lambda loss, _: loss)
    assert fooled.accepted > 0
    assert not torch.equal(taken_for_all, plain)
