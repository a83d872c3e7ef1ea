"""Who wrote to the weights: nothing goes unnoticed, no optimizer is blamed for its own steps."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer

from lightning_stableaa import watch
from lightning_stableaa.watch import StepWatch

COUNT = 40  # more than are glanced at
LONG = 3 * watch._LEARNED_AFTER

MAKERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "SGD foreach": lambda weights: SGD(weights, lr=0.1, foreach=True),
    "SGD fused": lambda weights: SGD(weights, lr=0.1, fused=True),
    "SGD for-loop": lambda weights: SGD(weights, lr=0.1, momentum=0.9, foreach=False),
    "Adam foreach": lambda weights: Adam(weights, lr=0.1, foreach=True),
    "Adam fused": lambda weights: Adam(weights, lr=0.1, fused=True),
    "Adam for-loop": lambda weights: Adam(weights, lr=0.1, foreach=False),
    "AdamW": lambda weights: AdamW(weights, lr=0.1),
}


class SlowWeights(SGD):
    """Goes back half the way every 15th step, as Lookahead does."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__(parameters, lr=0.1)
        self.slow = [one.detach().clone() for one in parameters]
        self.count = 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().step(closure)
        self.count += 1
        if self.count % 15 == 0:
            for group in self.param_groups:
                for one, slow in zip(group["params"], self.slow, strict=True):
                    one.lerp_(slow, 0.5)


class Watched:
    """A watch, and what it saw before every step."""

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = optimizers
        self.parameters = [p for o in optimizers for g in o.param_groups for p in g["params"]]
        self.seen: list[int] = []
        self.steps = 0
        self.watch = StepWatch(optimizers, self._before)
        self.watch.follow(self.parameters)

    def _before(self) -> None:
        if self.watch.seems_disturbed:
            self.seen.append(self.steps)
            self.watch.mark()

    def step(self, *, without_gradient: Sequence[int] = (), which: int = 0) -> None:
        for index, one in enumerate(self.parameters):
            one.grad = None if index in without_gradient else torch.ones_like(one)
        self.optimizers[which].step()
        self.steps += 1


def weights(count: int = COUNT) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2)) for _ in range(count)]


@torch.no_grad()
def write(*tensors: Tensor) -> None:
    for one in tensors:
        one.mul_(0.5)


@pytest.mark.parametrize("name", MAKERS)
def test_an_optimizer_is_never_blamed_for_its_own_steps(name: str) -> None:
    watched = Watched(MAKERS[name](weights()))
    chance = random.Random(name)
    for step in range(2 * LONG):
        few = chance.sample(range(COUNT), 3) if step >= LONG and chance.random() < 0.3 else []
        watched.step(without_gradient=few)
        assert not watched.watch.disturbed
    assert watched.seen == []


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("index", [0, 7, COUNT - 1])
def test_a_write_to_a_single_tensor_shows_in_a_full_look(name: str, index: int) -> None:
    watched = Watched(MAKERS[name](weights()))
    for before in (1, watch._LEARNED_AFTER - 1, LONG, LONG):
        for _ in range(before):
            watched.step()
        assert not watched.watch.disturbed
        write(watched.parameters[index])
        assert watched.watch.disturbed
        watched.watch.mark()
    assert watched.seen == []


@pytest.mark.parametrize("name", MAKERS)
def test_a_write_to_all_weights_is_noticed_before_the_next_step(name: str) -> None:
    watched = Watched(MAKERS[name](weights()))
    for step in range(LONG):
        if step % 7 == 6:
            write(*watched.parameters)
        watched.step()
    assert watched.seen == [step for step in range(LONG) if step % 7 == 6]


def test_as_many_writes_as_a_step_makes_are_noticed() -> None:
    watched = Watched(SGD(weights(), lr=0.1))
    for _ in range(LONG):
        watched.step()
    assert not watched.watch.disturbed
    write(watched.parameters[1])  # once, as every step does
    assert watched.watch.disturbed


@pytest.mark.parametrize("without", [[0], [5, 6], list(range(COUNT))])
def test_weights_that_join_later_are_not_taken_for_somebody_else(without: list[int]) -> None:
    watched = Watched(Adam(weights(), lr=0.1))
    for step in range(2 * LONG):
        watched.step(without_gradient=without if step < LONG else [])
        assert not watched.watch.disturbed
    assert watched.seen == []
    write(watched.parameters[1])
    assert watched.watch.disturbed


def test_irregular_optimizers_of_others_are_read_at_every_step() -> None:
    watched = Watched(SlowWeights(weights()))
    for _ in range(3 * LONG):
        watched.step()
    assert watched.seen == []
    write(watched.parameters[1])  # not one of those glanced at
    watched.step()
    assert watched.seen == [3 * LONG]


def test_several_optimizers_in_any_order() -> None:
    watched = Watched(
        Adam(weights(15), lr=0.1), SGD(weights(15), lr=0.1), NAdam(weights(10), lr=0.1)
    )
    chance = random.Random(0)
    for _ in range(6 * LONG):
        watched.step(which=chance.randrange(3))
        assert not watched.watch.disturbed
    assert watched.watch._habits.known
    write(watched.parameters[20])
    assert watched.watch.disturbed
    assert watched.seen == []


def test_an_optimizer_that_shares_its_weights_with_another_one() -> None:
    shared = weights()
    watched = Watched(SGD(shared, lr=0.1), Adam(shared, lr=0.1))
    for step in range(2 * LONG):
        watched.step(which=step % 2)
        assert not watched.watch.disturbed
    assert watched.watch._habits.known


def test_a_skipped_step_of_a_fused_optimizer_counts_as_its_own_write() -> None:
    optimizer = Adam(weights(), lr=0.1, fused=True)
    watched = Watched(optimizer)
    for step in range(2 * LONG):
        overflow: object = torch.tensor(float(step >= LONG and step % 3 == 0))
        optimizer.grad_scale, optimizer.found_inf = torch.ones(()), overflow  # pyright: ignore[reportAttributeAccessIssue]
        watched.step()
        assert watched.watch.take() is not bool(overflow)
        assert not watched.watch.disturbed


def test_a_write_inside_of_a_step_shows_once_habits_are_known() -> None:
    watched = Watched(optimizer := SGD(weights(), lr=0.1))
    for _ in range(LONG):
        watched.step()
    hook = optimizer.register_step_post_hook(lambda *_: write(watched.parameters[1]))
    watched.step()
    hook.remove()
    assert watched.watch.disturbed


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many versions each look read."""
    looks: list[int] = []
    versions = watch._versions

    def counted(tensors: Sequence[Tensor]) -> list[int]:
        looks.append(len(tensors))
        return versions(tensors)

    monkeypatch.setattr(watch, "_versions", counted)
    return looks


def test_a_step_reads_a_few_versions_once_habits_are_known(read: list[int]) -> None:
    watched = Watched(Adam(weights(160), lr=0.1))
    for _ in range(watch._LEARNED_AFTER):
        watched.step()
    assert read.count(160) == 1 + 2 * watch._LEARNED_AFTER  # follow, and both ends of every step
    read.clear()
    for _ in range(100):
        watched.step()
    assert read == 100 * [watch._GLANCES]
    read.clear()
    assert not watched.watch.disturbed
    assert read == [160]
