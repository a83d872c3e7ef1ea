"""Whether candidates gain: means that forget, against the plain formula, and what they decide."""

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_stableaa import AndersonAccelerator, Status
from lightning_stableaa.payoff import Payoff
from lightning_stableaa.safeguard import WholeLoss
from tests import reference
from tests.judges import OfSample


def payoff_of(losses: list[float], candidates: list[bool]) -> Payoff:
    payoff = Payoff()
    for loss, candidate in zip(losses, candidates, strict=True):
        payoff.observe(loss)
        payoff.begin(candidate=candidate)
    return payoff


@pytest.mark.parametrize("seed", range(20))
def test_it_equals_the_formula_after_every_extrapolation(seed: int) -> None:
    draw = random.Random(seed)
    losses = [draw.choice([-1, 1]) * math.exp(draw.gauss(0, 2)) for _ in range(40)]
    candidates = [draw.random() < 0.4 for _ in losses]
    known_at = []
    for count in range(1, len(losses)):
        changes = [(candidates[k], losses[k], losses[k + 1]) for k in range(count - 1)]
        known = reference.gains(changes)
        payoff = payoff_of(losses[:count], candidates[:count])
        assert payoff.pays is (known is None or known[0] <= known[1])
        known_at.append(known is not None)
    assert not known_at[4]
    assert known_at[-1]


def test_it_tells_jumps_that_are_taken_back_from_jumps_that_stay() -> None:
    kept = [0.5 if k % 2 == 0 else 1.1 for k in range(16)]  # after a candidate, after none
    candidates = [k % 2 == 0 for k in range(17)]
    losses = [math.prod(kept[:k]) for k in range(17)]
    assert payoff_of(losses, candidates).pays
    assert not payoff_of(losses, [not one for one in candidates]).pays
    assert payoff_of(losses[:5], [not one for one in candidates[:5]]).pays, "too little is known"


def test_it_forgets_and_tries_again() -> None:
    losses = [2.0 if k % 2 else 1.0 for k in range(16)]
    payoff = payoff_of(losses, [k % 2 == 0 for k in range(16)])
    assert not payoff.pays
    waited = 0
    while not payoff.pays:
        payoff.observe(1.0)
        payoff.begin(candidate=False)
        waited += 1
    assert 5 < waited < 60


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf])
def test_a_change_across_an_interruption_says_nothing(nothing: Any) -> None:
    whole = payoff_of([4.0, 2.0, 1.0], [True, False, True])
    expected = whole.state_dict()[:4]
    whole.forget_last()
    whole.observe(1e9)
    assert whole.state_dict()[:4] == expected
    whole.observe(nothing)
    whole.begin(candidate=True)
    whole.observe(1e9)
    assert whole.state_dict()[:4] == expected


def test_it_continues_from_its_state() -> None:
    losses = [math.exp(math.sin(k)) for k in range(30)]
    candidates = [k % 3 == 0 for k in range(30)]
    for stop in (0, 1, 17):
        payoff = payoff_of(losses[:stop], candidates[:stop])
        resumed = Payoff()
        resumed.load_state_dict(payoff.state_dict())
        for one in (payoff, resumed):
            for loss, candidate in zip(losses[stop:], candidates[stop:], strict=True):
                one.observe(loss)
                one.begin(candidate=candidate)
        assert payoff.state_dict() == resumed.state_dict()


class TakenBack:
    """Orthogonal steps, as noise makes them, under losses that are written down."""

    def __init__(self, *, of_sample: bool = True, **options: Any) -> None:
        self.of_sample = of_sample
        self.x = nn.Parameter(torch.zeros(400))
        self.optimizer = torch.optim.SGD([self.x], lr=1.0)
        self.accelerator = AndersonAccelerator(
            self.optimizer, store_every_n_steps=1, accelerate_every_n_steps=1, **options
        )
        self.steps = 0
        self.losses: list[float] = []
        self.statuses: list[Status] = []

    def step(self, *, candidate_lowers: bool, level: float) -> None:
        self.x.grad = torch.zeros(400)
        self.x.grad[self.steps] = 1.0
        self.optimizer.step()
        self.steps += 1
        values = iter([level, level * (0.5 if candidate_lowers else 2.0)])
        judge = OfSample if self.of_sample else WholeLoss
        report = self.accelerator.step(
            judge(lambda: torch.tensor(next(values), dtype=torch.float64))
        )
        if report.attempted:
            self.statuses.append(report.status)

    def train(self, steps: int) -> Tensor:
        """Every other candidate lowers the loss by half; a step later it is twice what it was."""
        for _ in range(steps):
            taken_last = bool(self.statuses) and self.statuses[-1] is Status.ACCEPTED
            self.level = self.level * 2.0 if taken_last else max(self.level * 0.7, 1e-3)
            self.step(candidate_lowers=self.steps % 2 == 0, level=self.level)
        return self.x.detach().clone()

    level = 1.0


def test_training_is_left_alone_where_jumps_are_taken_back() -> None:
    run = TakenBack()
    run.train(60)
    assert Status.REJECTED_WITHOUT_PAYOFF in run.statuses[:20]
    assert Status.REJECTED_WITHOUT_PAYOFF.rejected
    assert run.statuses.count(Status.ACCEPTED) < 15
    for everything in (TakenBack(sufficient_decrease=0.0), TakenBack(of_sample=False)):
        everything.train(60)
        assert everything.statuses.count(Status.ACCEPTED) > 25
    shown = TakenBack(apply_to="both")
    shown.train(60)
    assert Status.REJECTED_WITHOUT_PAYOFF not in shown.statuses  # validation has no such worry


def test_what_is_known_of_it_survives_a_checkpoint() -> None:
    whole, first = TakenBack(), TakenBack()
    whole.train(40)
    first.train(21)
    second = TakenBack()
    with torch.no_grad():
        second.x.copy_(first.x)
    second.accelerator.load_state_dict(first.accelerator.state_dict())
    second.steps, second.level, second.statuses = first.steps, first.level, first.statuses[-1:]
    second.train(19)
    assert first.statuses[:-1] + second.statuses == whole.statuses
    assert torch.equal(second.x, whole.x)
