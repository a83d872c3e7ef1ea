"""A candidate on a drift goes on about as far as has paid off lately."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_stableaa import AndersonAccelerator, Status, StepReport
from lightning_stableaa.look_ahead import LEAST, LONGER, SHORTER, LookAhead
from lightning_stableaa.safeguard import WholeLoss
from tests.judges import OfSample

DRIFT = torch.tensor([[1.0, 0.1], [1.0, -0.1]])  # with some noise
NOISE = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
BETTER, WORSE, UNKNOWN = 0.5, 2.0, float("nan")  # losses of candidates; before it is 1
CYCLES = 10.0


class Walk:
    """A weight that goes the same two steps again and again, and losses that are given."""

    def __init__(
        self, steps: Tensor = DRIFT, judge: Any = OfSample, *, trained: int = 20, **options: Any
    ) -> None:
        self.steps = steps
        self.judge = judge
        self.x = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.optimizer = torch.optim.SGD([self.x], lr=1.0)
        self.options = {
            "history_depth": 2,
            "store_every_n_steps": 1,
            "accelerate_every_n_steps": 2,
            "look_ahead_cycles": CYCLES,
            "lag_compensation": 0.0,
            "warmup_steps": trained + len(steps),
            **options,
        }
        self.accelerator = AndersonAccelerator(self.optimizer, **self.options)
        for step in self.steps.repeat(trained // len(steps), 1):
            self._step(step, lambda: torch.tensor(1.0))

    def extrapolate(self, after: float) -> tuple[StepReport, float]:
        """Two steps, and by how much further than the newest point the candidate was."""
        seen: list[Tensor] = []

        def loss() -> Tensor:
            seen.append(self.x.detach().clone())
            return torch.tensor(1.0 if len(seen) == 1 else after)

        report = StepReport(status=Status.NO_OPTIMIZER_STEP)
        for step in self.steps:
            report = self._step(step, loss)
        newest, candidate = seen
        return report, float(candidate[0] - newest[0])

    def _step(self, step: Tensor, loss: Callable[[], Tensor]) -> StepReport:
        self.x.grad = -step.double()
        self.optimizer.step()
        return self.accelerator.step(self.judge(loss))

    def reaches(self, losses: Iterable[float]) -> list[float]:
        return [self.extrapolate(after)[1] for after in losses]

    def resumed(self) -> Walk:
        """Another engine that goes on from a file."""
        file = io.BytesIO()
        torch.save(self.accelerator.state_dict(), file)
        file.seek(0)
        self.accelerator.detach()
        self.accelerator = AndersonAccelerator(self.optimizer, **self.options)
        self.accelerator.load_state_dict(torch.load(file, weights_only=True))
        return self


def cycles_of(reaches: list[float]) -> list[float]:
    """In shares of the first."""
    behind = 0.5  # a mixture of two points lies behind the newest one by half a step
    return [(one + behind) / (reaches[0] + behind) for one in reaches]


def test_it_goes_less_far_after_a_rejection_and_further_after_an_acceptance() -> None:
    walk = Walk()
    report, first = walk.extrapolate(WORSE)
    assert first == pytest.approx(0.98 * CYCLES - 0.5, rel=0.02)
    assert not report.looked_ahead
    # an acceptance ends the history: the next attempt has two residuals again
    reaches = [first, *walk.reaches([UNKNOWN, BETTER, BETTER, BETTER, WORSE])]
    assert cycles_of(reaches) == pytest.approx([1, 0.6, 0.36, 0.504, 0.7056, 0.98784], rel=1e-3)


def test_it_never_goes_further_than_it_may_nor_less_far_than_a_twentieth() -> None:
    assert cycles_of(Walk().reaches([BETTER] * 4)) == pytest.approx([1] * 4, rel=1e-6)
    *_, last = cycles_of(Walk().reaches([WORSE] * 9))
    assert last == pytest.approx(LEAST, rel=1e-3)


@pytest.mark.parametrize("accepted", [True, False])
def test_the_share_stays_between_its_bounds(accepted: bool) -> None:
    ahead = LookAhead(CYCLES)
    shares = []
    for _ in range(20):
        ahead.note(accepted=accepted)
        shares.append(ahead.share)
    assert shares[-1] == (1.0 if accepted else LEAST)
    assert ahead.cycles(of_sample=True) == 0
    for _ in range(int(CYCLES)):
        ahead.note_cycle()
    assert ahead.cycles(of_sample=True) == CYCLES * shares[-1]
    assert SHORTER < 1 < LONGER


def test_noise_says_nothing_about_it() -> None:
    walk = Walk(NOISE)
    walk.reaches([WORSE] * 3)
    assert walk.accelerator.state_dict()["look_ahead"]["share"] == 1.0


def test_where_the_loss_is_the_whole_it_is_half_as_far_whatever_happens() -> None:
    reaches = Walk(judge=WholeLoss).reaches([WORSE, BETTER, WORSE, WORSE])
    assert reaches == pytest.approx([0.98 * CYCLES / 2 - 0.5] * 4, rel=0.02)


@pytest.mark.parametrize("judge", [OfSample, WholeLoss])
def test_it_never_goes_further_than_training_has_come(judge: Any) -> None:
    reaches = Walk(judge=judge, trained=0, look_ahead_cycles=8.0).reaches([BETTER] * 6)
    most = 8.0 if judge is OfSample else 4.0
    cycles = [min(trained, most) for trained in (2, 4, 6, 8, 10, 12)]
    assert reaches == pytest.approx([0.98 * one - 0.5 for one in cycles], rel=0.02)


class KnownLater(OfSample):
    """Says so after the first loss alone, as a watch of batches does."""

    def __call__(self) -> Tensor:
        self.told = True
        return super().__call__()

    @property
    def of_sample(self) -> bool:
        return getattr(self, "told", False)

    @property
    def surely_of_sample(self) -> bool:
        return False


class KnownToOne(KnownLater):
    """One rank's batches tell; not all ranks could know before they share it."""

    @property
    def of_sample(self) -> bool:
        return True


def test_what_one_rank_says_counts_for_all_of_them_or_for_none() -> None:
    assert Walk(judge=KnownToOne).reaches([BETTER]) == Walk(judge=KnownLater).reaches([BETTER])


def test_what_is_too_little_for_training_shortens_it_whoever_sees_candidates() -> None:
    losses = [0.999, BETTER, 0.999, 0.999, BETTER]
    reaches = {
        apply_to: Walk(sufficient_decrease=0.9, apply_to=apply_to).reaches(losses)
        for apply_to in ("training", "both", "evaluation")
    }
    assert cycles_of(reaches["training"])[1] == pytest.approx(0.6, rel=1e-3)
    assert reaches["both"] == reaches["training"]
    assert cycles_of(reaches["evaluation"])[1] == pytest.approx(1.0, rel=1e-3), "none is too little"


def test_what_is_known_late_counts_from_the_next_candidate_on() -> None:
    first, *others = Walk(judge=KnownLater).reaches([BETTER] * 3)
    assert first == pytest.approx(0.98 * CYCLES / 2 - 0.5, rel=0.02)
    assert others == pytest.approx([0.98 * CYCLES - 0.5] * 2, rel=0.02)


@pytest.mark.parametrize("trained", [0, 20])
def test_a_continuation_goes_as_far(trained: int) -> None:
    losses = [WORSE, BETTER, WORSE, WORSE, BETTER]
    whole, broken = Walk(trained=trained), Walk(trained=trained)
    expected = whole.reaches(losses)
    found = broken.reaches(losses[:3]) + broken.resumed().reaches(losses[3:])
    assert found == expected


def test_a_state_from_before_there_was_a_length_begins_anew() -> None:
    walk = Walk()
    walk.reaches([WORSE])
    state = walk.accelerator.state_dict()
    del state["look_ahead"]
    other = AndersonAccelerator(walk.optimizer, **walk.options)
    other.load_state_dict(state)
    walk.accelerator.detach()
    walk.accelerator = other
    assert walk.reaches([WORSE])[0] == pytest.approx(0.98 * len(walk.steps) - 0.5, rel=0.02)
