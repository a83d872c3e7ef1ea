"""Weights and loops that plain training does not mind, and that acceleration must not either."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from lightning_stableaa import AndersonAccelerator, Smoothing
from lightning_stableaa.averaging import WeightSmoother
from lightning_stableaa.callbacks.batches import BatchWatch

SETTING: dict[str, Any] = {
    "store_every_n_steps": 2,
    "accelerate_every_n_steps": 4,
    "look_ahead_cycles": 10.0,
}


class Training:
    """A small regression in a loop of the user's own."""

    def __init__(self, net: nn.Module, **options: Any) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(16, 4, generator=generator)
        self.y = self.x.sum(1, keepdim=True).sin()
        self.net = net
        self.optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        self.accelerator = AndersonAccelerator(self.optimizer, **SETTING | options)

    def loss(self) -> Tensor:
        return mse_loss(self.net(self.x), self.y)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.step()
            self.accelerator.step(self.loss)

    def weights(self) -> Tensor:
        return torch.cat([one.detach().flatten() for one in self.net.parameters()])


def net(*, shared: bool = False) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = nn.Sequential(
            nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)
        )
    if shared:  # two parameters in one memory
        first: Any = made[0]
        made[2].weight = nn.Parameter(first.weight.data)
    return made


def test_looking_at_a_candidate_leaves_weights_that_share_memory_alone() -> None:
    plain = Training(net(shared=True), apply_to="evaluation")
    plain.accelerator.detach()
    training = Training(net(shared=True), apply_to="evaluation")
    seen = 0
    for _ in range(40):
        plain.step()
        training.train(1)
        if training.accelerator.evaluation_weights_ready:
            expected = training.weights()
            with training.accelerator.evaluation_weights():
                candidate = training.weights()
                state = training.accelerator.state_dict()
                assert torch.equal(training.weights(), candidate)
            assert torch.equal(training.weights(), expected)
            assert torch.equal(
                state["points"]["history"]["rows"],
                training.accelerator.state_dict()["points"]["history"]["rows"],
            )
            seen += not torch.equal(candidate, expected)
    assert seen
    assert torch.equal(training.weights(), plain.weights())


def test_rejected_candidates_leave_weights_that_share_memory_alone() -> None:
    always = Smoothing(rsd_threshold=0.0, average_window=2)  # points are averages: weights swap
    training = Training(net(shared=True), smoothing=always)
    plain = Training(net(shared=True))
    plain.accelerator.detach()
    losses = itertools.cycle([1.0, 2.0])
    for _ in range(40):
        plain.step()
        training.step()
        training.accelerator.step(lambda: torch.tensor(next(losses)))
    assert training.accelerator.attempted > training.accelerator.accepted == 0
    assert torch.equal(training.weights(), plain.weights())


def test_candidates_are_judged_by_their_own_weights_inside_of_autocast() -> None:
    reports = []
    for around in (False, True):
        training = Training(net())
        found = []
        for _ in range(40):
            training.step()
            with torch.autocast("cpu", torch.bfloat16, enabled=around):
                found.append(training.accelerator.step(training.loss))
                after = training.loss()
            with torch.autocast("cpu", torch.bfloat16, enabled=around):
                assert torch.equal(after, training.loss()), "casts of a candidate were left"
        reports.append([one for one in found if one.attempted])
    for found in reports:
        assert any(one.loss_before != one.loss_after for one in found)
    plain, around = ([one.accepted for one in found] for found in reports)
    assert any(plain), "else this says nothing"
    assert any(around)


class Lookahead(torch.optim.Optimizer):
    """Steps an optimizer inside, and is one of its own right."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        super().__init__(optimizer.param_groups, {})
        self.parameters = [one for group in self.param_groups for one in group["params"]]
        self.slow = [one.detach().clone() for one in self.parameters]
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.optimizer.step(closure)
        self.steps += 1
        if self.steps % 3 == 0:
            for slow, one in zip(self.slow, self.parameters, strict=True):
                one.copy_(slow.lerp_(one, 0.5))


def test_an_optimizer_with_another_one_inside_is_followed_as_a_whole() -> None:
    training = Training(net())
    training.accelerator.detach()
    training.optimizer = Lookahead(training.optimizer)  # pyright: ignore
    training.accelerator = AndersonAccelerator(training.optimizer, **SETTING)
    training.train(40)
    assert training.accelerator.attempted == 10
    assert (
        not training.accelerator.outcomes.keys()
        - {status for status in training.accelerator.outcomes if status.rejected}
        - {status for status in training.accelerator.outcomes if status.value == "accepted"}
    )


def test_a_network_that_is_frozen_while_another_is_trained_stays_in_the_history() -> None:
    generator, discriminator = net(), net()
    training = Training(generator)
    training.accelerator.detach()
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.01) for one in (generator, discriminator)]
    accelerator = AndersonAccelerator(optimizers, **SETTING)

    def loss_of(one: nn.Module) -> Tensor:
        return mse_loss(one(training.x), training.y)

    for _ in range(20):
        discriminator.requires_grad_(True)
        optimizers[1].zero_grad()
        loss_of(discriminator).backward()
        optimizers[1].step()
        discriminator.requires_grad_(False)
        optimizers[0].zero_grad()
        loss_of(generator).backward()
        optimizers[0].step()
        accelerator.step(lambda: loss_of(generator) + loss_of(discriminator))
    assert accelerator.attempted == 5
    length = sum(one.numel() for one in [*generator.parameters(), *discriminator.parameters()])
    assert accelerator.state_dict()["points"]["history"]["rows"].shape[1] == length


def test_momentum_that_is_sparse_is_kept() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), nn.Linear(16, 2))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    accelerator = AndersonAccelerator(optimizer, optimizer_state="mix", **SETTING)
    x = torch.randint(0, 10, (64, 4))
    for _ in range(20):
        optimizer.zero_grad()
        cross_entropy(module(x), x.sum(1) % 2).backward()
        optimizer.step()
        accelerator.step(lambda: cross_entropy(module(x), x.sum(1) % 2))
    assert accelerator.attempted == 5


def test_an_average_of_other_weights_is_dropped() -> None:
    smoothing = Smoothing(apply_to="weights", rsd_threshold=0.0)
    training = Training(net())
    training.accelerator.detach()
    smoother = WeightSmoother(training.optimizer, smoothing)
    for _ in range(15):
        training.step()
        smoother.step()
    state = smoother.state_dict()
    smoother.detach()
    for scale, kept in ((1.0, True), (3.0, False)):
        with torch.no_grad():
            for one in training.net.parameters():
                one.mul_(scale)
        resumed = WeightSmoother(training.optimizer, smoothing)
        resumed.load_state_dict(state)
        reports = []
        before = [one.detach().clone() for one in training.net.parameters()]
        for _ in range(5):
            training.step()
            reports.append(resumed.step())
        resumed.detach()
        assert (reports[-1].rsd is not None) is kept
        with torch.no_grad():
            for one, value in zip(training.net.parameters(), before, strict=True):
                one.copy_(value)


def test_the_default_device_is_not_that_of_the_host() -> None:
    training = Training(net())
    training.train(8)
    torch.set_default_device("meta")
    try:
        state = training.accelerator.state_dict()
        training.accelerator.detach()
        training.accelerator = AndersonAccelerator(training.optimizer, **SETTING)
        training.accelerator.load_state_dict(state)
        training.train(4)
    finally:
        torch.set_default_device("cpu")
    assert training.accelerator.attempted == 3


def test_new_batches_with_missing_values_are_new_batches() -> None:
    watch = BatchWatch()
    seen = []
    for seed in range(4):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
        x[0, 0] = torch.nan
        seen.append(bool(watch.see([x])))
    assert seen == [True] * 4
