"""Whether a loss is a leap, against the plain formula, and what that decides."""

import io
import math
import random
from typing import Any

import pytest
import torch
from torch import nn

from lightning_stableaa import AndersonAccelerator, Status
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
        after = draw.choice(losses)
        found.observe(loss)
        assert found.are_mended_by(after) is reference.mends(loss, after, losses[:count])
        mended += found.are_mended_by(after)
    assert mended < 20


def test_only_more_than_ten_times_a_positive_mean_is_a_leap() -> None:
    assert not recent(5.0).are_mended_by(0.0), "the first one"
    assert not recent(1.0, 10.0).are_mended_by(0.0)
    assert recent(1.0, 10.1).are_mended_by(0.0)
    assert not recent(1.0, 10.1, 1.0).are_mended_by(0.0)
    assert not recent(-1.0, 1e9).are_mended_by(-2.0), "its size says nothing where it has a sign"


def test_it_is_mended_by_what_is_as_usual() -> None:
    leapt = recent(1.0, 3.0, 21.0)
    assert leapt.are_mended_by(2.0)
    assert not leapt.are_mended_by(2.1), "a sample that is hard for all"
    assert not leapt.are_mended_by(math.nan)
    assert not leapt.are_mended_by(None)


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf])
def test_what_is_not_finite_says_nothing(nothing: Any) -> None:
    found = recent(1.0, 2.0, 50.0)
    assert found.are_mended_by(1.5)
    found.observe(nothing)
    assert not found.are_mended_by(1.5)
    assert found.state_dict() == [1.0, 2.0, 50.0]


def test_they_are_forgotten_and_continued() -> None:
    found = recent(9.0, 1.0, 2.0, 3.0, 4.0)
    other = RecentLosses()
    other.load_state_dict(found.state_dict())
    assert other.state_dict() == [1.0, 2.0, 3.0, 4.0]
    found.forget()
    found.observe(1e9)
    assert not found.are_mended_by(0.0)
    assert found.state_dict() == [1e9]


class Leaps:
    """Orthogonal steps, as noise makes them, under losses of a sample that are written down."""

    def __init__(self, **options: Any) -> None:
        self.x = nn.Parameter(torch.zeros(100))
        self.optimizer = torch.optim.SGD([self.x], lr=1.0)
        self.options: dict[str, Any] = {"store_every_n_steps": 1, "accelerate_every_n_steps": 2}
        self.options |= options
        self.accelerator = AndersonAccelerator(self.optimizer, **self.options)
        self.steps = 0

    def extrapolate(self, before: float, after: float, *, held: bool) -> Status:
        status = Status.NO_OPTIMIZER_STEP
        for _ in range(2):
            self.x.grad = torch.zeros(100)
            self.x.grad[self.steps] = 1.0
            self.optimizer.step()
            self.steps += 1
            values = iter([before, after])
            judge = (Held if held else OfSample)(lambda values=values: torch.tensor(next(values)))
            status = self.accelerator.step(judge).status
        return status


class Held(OfSample):
    """Validation is worse than at its best."""

    @property
    def validation_got_worse(self) -> bool:
        return True


def test_validation_does_not_keep_out_what_mends_a_leap() -> None:
    run = Leaps()
    assert run.extrapolate(1.0, 0.5, held=True) is Status.REJECTED_BY_VALIDATION
    assert run.extrapolate(9.0, 0.5, held=True) is Status.REJECTED_BY_VALIDATION
    assert run.extrapolate(90.0, 0.5, held=True) is Status.ACCEPTED
    assert run.extrapolate(90.0, 0.5, held=True) is Status.REJECTED_BY_VALIDATION, "no longer one"
    assert run.extrapolate(9000.0, 90.0, held=True) is Status.REJECTED_BY_VALIDATION, "hard"
    assert run.extrapolate(90000.0, 99999.0, held=True) is Status.REJECTED_LOSS


def test_nor_do_candidates_that_did_not_pay_off() -> None:
    run = Leaps()
    statuses = [run.extrapolate(2.0**k, 2.0**k / 3, held=False) for k in range(1, 5)]
    for k in range(5, 1, -1):
        statuses.append(run.extrapolate(2.0**k, 2.0**k, held=False))  # lower without candidates
    assert statuses == [Status.ACCEPTED] * 4 + [Status.REJECTED_LOSS] * 4
    assert run.extrapolate(8.0, 1.0, held=False) is Status.REJECTED_WITHOUT_PAYOFF
    assert run.extrapolate(800.0, 1.0, held=False) is Status.ACCEPTED


@pytest.mark.parametrize("edited", [False, True])
def test_a_continuation_knows_what_is_a_leap_and_an_edit_forgets_it(edited: bool) -> None:
    run = Leaps()
    run.extrapolate(1.0, 2.0, held=True)
    file = io.BytesIO()
    torch.save(run.accelerator.state_dict(), file)
    file.seek(0)
    run.accelerator.detach()
    run.accelerator = AndersonAccelerator(run.optimizer, **run.options)
    run.accelerator.load_state_dict(torch.load(file, weights_only=True))
    run.x.grad = torch.zeros(100)
    if edited:
        with torch.no_grad():
            run.x.add_(1.0)
    expected = Status.REJECTED_BY_VALIDATION if edited else Status.ACCEPTED
    assert run.extrapolate(90.0, 0.5, held=True) is expected


@pytest.mark.parametrize("leapt", [False, True])
def test_momentum_that_carried_training_off_is_set_to_zero(leapt: bool) -> None:
    run = Leaps(sufficient_decrease=0.0)
    run.optimizer.param_groups[0]["momentum"] = 0.5
    run.extrapolate(1.0, 2.0, held=False)
    assert run.extrapolate(90.0 if leapt else 9.0, 0.5, held=False) is Status.ACCEPTED
    buffer = run.optimizer.state[run.x]["momentum_buffer"]
    assert bool((buffer == 0).all()) is leapt
