"""Modules that step their optimizers themselves: compared without their steps, or left alone."""

import logging
from typing import Any

import lightning.pytorch
import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from lightning_stableaa import AndersonCallback
from tests.helpers.problems import assert_bitwise_equal
from tests.helpers.regression import (
    SETTING,
    Reports,
    Steering,
    anderson,
    batches,
    counters,
    fit,
    network,
    outcomes,
)

STEPS = 24


# Names of the ways, and methods of Manual.
WAYS = {
    "step": "step",
    "closure": "step_of_closure",
    "toggled": "toggled",
    "three steps": "several",
    "accumulated": "accumulated",
    "the optimizer of torch": "step",
    "backward of torch": "of_torch",
}


class Manual(lightning.pytorch.LightningModule):
    """One network, one optimizer, one schedule, and a way to step them.

    Args:
        way: how the training step makes its step.
    """

    def __init__(self, way: str) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.way = way
        self.network = network()
        self.schedule_steps = 0

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return mse_loss(self.network(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer = optimizer.optimizer if self.way == "the optimizer of torch" else optimizer
        result = getattr(self, WAYS[self.way])(optimizer, batch)
        schedule: Any = self.lr_schedulers()
        schedule.step()
        self.schedule_steps += 1
        self.log("train/loss", self.loss(batch))
        return result

    def step(self, optimizer: Any, batch: Any) -> None:
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()

    def step_of_closure(self, optimizer: Any, batch: Any) -> None:
        def closure() -> Tensor:
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)

    def toggled(self, optimizer: Any, batch: Any) -> None:
        self.toggle_optimizer(optimizer)
        self.step(optimizer, batch)
        self.untoggle_optimizer(optimizer)

    def several(self, optimizer: Any, batch: Any) -> None:
        for _ in range(3):
            self.step(optimizer, batch)

    def accumulated(self, optimizer: Any, batch: Any) -> None:
        optimizer.zero_grad()
        for x, y in zip(*(one.chunk(2) for one in batch), strict=True):
            self.manual_backward(self.loss((x, y)) / 2)
        self.clip_gradients(optimizer, 100.0, "norm")
        optimizer.step()

    def of_torch(self, optimizer: Any, batch: Any) -> dict[str, Tensor]:
        optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        optimizer.step()
        return {"loss": loss}

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.5)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        return [optimizer], [schedule]


def everything(trainer: Any, module: Any) -> dict[str, Any]:
    """Weights, optimizer, schedule and counters after a fit."""
    return {
        "weights": module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict()["state"],
        "rates": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "steps": [trainer.global_step, getattr(module, "schedule_steps", 0)],
        "frozen": [one.requires_grad for one in module.parameters()],
        "logged": dict(trainer.callback_metrics),
    }


@pytest.mark.parametrize("way", WAYS)
def test_manual_step_with_rejected_candidates_is_bitwise_the_plain_run(way: str) -> None:
    def run(*callbacks: Any) -> dict[str, Any]:
        module = Manual(way)
        return everything(fit(module, batches(), *callbacks, max_epochs=STEPS), module)

    capped = AndersonCallback(**SETTING, max_extrapolation=1e-30)
    assert_bitwise_equal(run(capped), run())
    assert counters(capped)["attempted"] >= 5
    assert counters(capped)["accepted"] == 0
    assert capped.state_dict()["disabled"] is None


@pytest.mark.parametrize("way", WAYS)
def test_manual_step_is_compared_by_the_loss_of_its_backward_passes(way: str) -> None:
    """Accepted candidates have the lower loss of the same batch, and training goes further."""
    module, callback = Manual(way), anderson()
    reports = Reports(callback)
    with torch.no_grad():
        start = module.loss(next(iter(batches())))
    fit(module, batches(), callback, reports, max_epochs=STEPS)
    assert reports.accepted_steps
    first, *_ = reports.attempted
    assert first.loss_before is not None
    assert 0 < first.loss_before < float(start) * (3 if way == "three steps" else 1)
    with torch.no_grad():
        end = module.loss(next(iter(batches())))
    plain = Manual(way)
    fit(plain, batches(), max_epochs=STEPS)
    with torch.no_grad():
        assert end < plain.loss(next(iter(batches())))


class Ensemble(lightning.pytorch.LightningModule):
    """Two networks, each with an optimizer, that share one backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = network(seed=0), network(seed=1)

    def losses(self, batch: Any) -> tuple[Tensor, Tensor]:
        x, y = batch
        return mse_loss(self.first(x), y), mse_loss(self.second(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        for one in optimizers:
            one.zero_grad()
        self.manual_backward(sum(self.losses(batch), start=torch.zeros(())))
        for one in optimizers:
            one.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(net.parameters(), lr=0.01) for net in (self.first, self.second)]


class Adversaries(Ensemble):
    """A backward pass for each optimizer."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        for one, loss in zip(optimizers, self.losses(batch), strict=True):
            one.zero_grad()
            self.manual_backward(loss)
            one.step()


def test_optimizers_that_share_a_backward_pass_are_accelerated_together() -> None:
    callback = anderson()
    fit(Ensemble(), batches(), callback, max_epochs=STEPS)
    assert counters(callback)["accepted"] >= 1
    assert callback.state_dict()["disabled"] is None


def test_optimizers_that_follow_several_losses_are_left_alone_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def run(*callbacks: Any) -> dict[str, Any]:
        module = Adversaries()
        return everything(fit(module, batches(), *callbacks, max_epochs=STEPS), module)

    callback = anderson()
    with caplog.at_level(logging.WARNING, logger="lightning_stableaa"):
        own = run(callback)
    assert_bitwise_equal(own, run())
    assert counters(callback)["accepted"] == 0
    sentences = [one.getMessage() for one in caplog.records if "is off" in one.getMessage()]
    assert sentences == [
        "Anderson acceleration is off for the rest of this run: the loss cannot be evaluated "
        "again, and raised ValueError: 2 optimizers that follow 2 losses, none of which all of "
        "them decrease; define anderson_loss(batch) on the LightningModule, or pass another loss_fn"
    ]


class Leaves(Manual):
    """Raises at candidates, between toggle_optimizer and untoggle_optimizer."""

    def step(self, optimizer: Any, batch: Any) -> None:
        if any(isinstance(one, Steering) and one.at_candidate(self) for one in self.callbacks):
            raise RuntimeError("outside of the domain")
        super().step(optimizer, batch)

    @property
    def callbacks(self) -> list[Any]:
        return self.trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]


def test_error_at_a_candidate_leaves_no_parameter_toggled() -> None:
    def run(*callbacks: Any) -> dict[str, Any]:
        module = Leaves("toggled")
        return everything(fit(module, batches(), *callbacks, max_epochs=STEPS), module)

    callback = anderson()
    assert_bitwise_equal(run(Steering(), callback), run())
    assert outcomes(callback)["rejected_error"] >= 5
