"""Which calls of an optimizer were steps, and who else wrote to the weights."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, NAdam, Optimizer

from lightning_stableaa.distributed.communicator import Communicator
from lightning_stableaa.model.iterates import IterateStore
from lightning_stableaa.model.step_monitor import (
    OptimizerStepMonitor,
    maximizes,
    unwrap_optimizers,
)

COUNT = 8

MAKERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD foreach": lambda weights: SGD(weights, lr=0.1, foreach=True),
    "SGD fused": lambda weights: SGD(weights, lr=0.1, fused=True),
    "SGD for-loop": lambda weights: SGD(weights, lr=0.1, momentum=0.9, foreach=False),
    "Adam foreach": lambda weights: Adam(weights, lr=0.1, foreach=True),
    "Adam fused": lambda weights: Adam(weights, lr=0.1, fused=True),
    "Adam for-loop": lambda weights: Adam(weights, lr=0.1, foreach=False),
    "AdamW": lambda weights: AdamW(weights, lr=0.1),
    "NAdam": lambda weights: NAdam(weights, lr=0.1),
}


class Monitored:
    """Optimizers with a monitor, stepped with gradients of one."""

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = optimizers
        groups = [group for one in optimizers for group in one.param_groups]
        self.weights: list[Tensor] = [one for group in groups for one in group["params"]]
        self.monitor = OptimizerStepMonitor(optimizers)
        self.monitor.watch(self.weights)

    def step(self, *, without_gradient: Sequence[int] = (), which: int = 0) -> bool:
        for index, one in enumerate(self.weights):
            one.grad = None if index in without_gradient else torch.ones_like(one)
        self.optimizers[which].step()
        return self.monitor.poll()

    def sees_write(self) -> bool:
        written = self.monitor.external_write()
        self.monitor.rebaseline()
        return written


def backup_of(monitored: Monitored) -> IterateStore:
    return IterateStore(monitored.weights, depth=2, communicator=Communicator())


def weights(count: int = COUNT) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2)) for _ in range(count)]


@torch.no_grad()
def write(*tensors: Tensor) -> None:
    for one in tensors:
        one.mul_(0.5)


def test_poll_step_without_any_gradient_does_not_count() -> None:
    monitored = Monitored(Adam(weights(), lr=0.1))
    assert not monitored.step(without_gradient=range(COUNT))
    assert monitored.step(without_gradient=range(COUNT - 1))


def test_unwrap_optimizer_given_twice_is_one() -> None:
    optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1)
    assert unwrap_optimizers([optimizer, optimizer]) == [optimizer]


def test_poll_several_optimizers_make_one_step() -> None:
    monitored = Monitored(SGD(weights(), lr=0.1), Adam(weights(), lr=0.1))
    for one in monitored.weights:
        one.grad = torch.ones_like(one)
    for optimizer in monitored.optimizers:
        optimizer.step()
    assert monitored.monitor.poll()
    assert not monitored.monitor.poll()
    assert monitored.step(which=1)


@pytest.mark.parametrize("fused", [False, True])
def test_poll_step_skipped_by_grad_scaler_does_not_count(fused: bool) -> None:
    monitored = Monitored(optimizer := SGD(weights(), lr=0.1, fused=fused))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    counted = []
    for k in range(6):
        loss = sum((one.sum() for one in monitored.weights), torch.zeros(()))
        optimizer.zero_grad()
        scaler.scale(loss * (torch.inf if k % 3 == 1 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        counted.append(monitored.monitor.poll())
        assert not monitored.monitor.external_write()
    assert counted == [True, False, True, True, False, True]


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("with_backup", [False, True])
def test_external_write_optimizer_steps_are_its_own(name: str, with_backup: bool) -> None:
    monitored = Monitored(MAKERS[name](weights()))
    monitored.monitor.backup = backup_of(monitored) if with_backup else None
    chance = random.Random(name)
    for _ in range(20):
        few = chance.sample(range(COUNT), 3) if chance.random() < 0.3 else []
        assert monitored.step(without_gradient=few)
        assert not monitored.monitor.external_write()


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("index", [0, COUNT - 1])
@pytest.mark.parametrize("followed_by_step", [False, True])
def test_external_write_in_place_is_seen(name: str, index: int, followed_by_step: bool) -> None:
    monitored = Monitored(MAKERS[name](weights()))
    for _ in range(3):
        monitored.step()
        assert not monitored.monitor.external_write()
        write(monitored.weights[index])
        if followed_by_step:
            monitored.step()
        assert monitored.sees_write()
    monitored.step()
    assert not monitored.monitor.external_write()


def test_external_write_through_data_needs_backup() -> None:
    monitored = Monitored(SGD(weights(), lr=0.1))
    for backup in (None, backup_of(monitored)):
        monitored.monitor.backup = backup
        monitored.step()
        assert not monitored.monitor.external_write()
        monitored.weights[3].data[1] += 1e-6
        assert monitored.sees_write() is (backup is not None)


def test_external_write_in_other_post_hook_is_seen() -> None:
    optimizer = SGD(weights(), lr=0.1)
    earlier = optimizer.register_step_post_hook(lambda *_: None)
    monitored = Monitored(optimizer)
    monitored.step()
    assert not monitored.monitor.external_write()
    later = optimizer.register_step_post_hook(lambda *_: write(monitored.weights[1]))
    monitored.step()
    assert monitored.sees_write()
    later.remove()
    monitored.step()
    assert not monitored.monitor.external_write()
    earlier.remove()


class Projected(SGD):
    """Projects the weights onto a box after every third step."""

    count = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().step(closure)
        self.count += 1
        if self.count % 3 == 0:
            for one in self.param_groups[0]["params"]:
                one.clamp_(0.0, 0.5)


def test_external_write_by_projecting_subclass_is_seen() -> None:
    monitored, seen = Monitored(Projected(weights(), lr=0.1)), []
    for _ in range(6):
        assert monitored.step()
        seen.append(monitored.sees_write())
    assert seen == [False, False, True] * 2


class Averaging(Optimizer):
    """An optimizer of its own, with another one inside: what it writes is its step."""

    def __init__(self, inner: Optimizer) -> None:
        self.optimizer = inner
        super().__init__(inner.param_groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.optimizer.step(closure)
        for group in self.param_groups:
            for one in group["params"]:
                one.mul_(0.9)


def test_external_write_by_optimizer_around_another_is_its_step() -> None:
    (outer,) = unwrap_optimizers(Averaging(SGD(weights(), lr=0.1)))
    assert isinstance(outer, Averaging)
    monitored = Monitored(outer)
    for _ in range(3):
        assert monitored.step()
        assert not monitored.monitor.external_write()
    write(monitored.weights[0])
    monitored.step()
    assert monitored.sees_write()


class LightningOptimizer:
    """Named as Lightning's, whose steps go on to the optimizer inside."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer


def test_unwrap_wrapper_gives_inner_optimizer() -> None:
    inner, other = SGD(weights(), maximize=True), Adam(weights(), maximize=True)
    wrapped: Any = LightningOptimizer(inner)
    assert unwrap_optimizers([wrapped, other]) == [inner, other]
    assert unwrap_optimizers(inner) == [inner]
    assert maximizes([inner, other])
    assert not maximizes([SGD(weights()), Adam(weights())])


GROUPS: list[dict[str, Any]] = [{"params": weights(1), "maximize": True}, {"params": weights(1)}]
BOTH = "must minimise or maximise one objective, got maximize=True for some parameters and False"
WRONG: list[tuple[Any, str]] = [
    ([], "must be one optimizer or several, got an empty list"),
    (nn.Linear(1, 1), "must be a torch.optim.Optimizer or several, got a Linear"),
    (None, "must be a torch.optim.Optimizer or several, got a NoneType"),
    ([nn.Linear(1, 1)], "must be a torch.optim.Optimizer, got Linear"),
    (LBFGS(weights()), "must make one update a step, got LBFGS, which iterates"),
    ([SGD(weights(), maximize=True), SGD(weights())], BOTH),
    (SGD(GROUPS), BOTH),
]


@pytest.mark.parametrize(("optimizer", "message"), WRONG)
def test_unwrap_unsupported_optimizer_raises(optimizer: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^optimizer {message}"):
        unwrap_optimizers(optimizer)
