"""Modules that step their optimizers themselves: compared without their steps, or left alone."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, softplus

from tests.helpers.regression import (
    Reports,
    Steering,
    anderson,
    assert_plain_run,
    batches,
    capped,
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
        self.seen: list[float] = []

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return mse_loss(self.network(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer = optimizer.optimizer if self.way == "the optimizer of torch" else optimizer
        result = getattr(self, WAYS[self.way])(optimizer, batch)
        schedule: Any = self.lr_schedulers()
        schedule.step()
        self.log("train/loss", self.loss(batch))
        return result

    def step(self, optimizer: Any, batch: Any) -> None:
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        gradient: Any = self.network[0].weight.grad
        self.seen.append(gradient.norm().item())  # which a step may look at
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


@pytest.mark.parametrize("way", WAYS)
def test_manual_step_with_rejected_candidates_is_bitwise_the_plain_run(way: str) -> None:
    callback = capped()
    assert_plain_run(callback, lambda: Manual(way), max_epochs=STEPS)
    assert counters(callback)["attempted"] >= 5
    assert counters(callback)["accepted"] == 0
    assert callback.state_dict()["disabled"] is None


@pytest.mark.parametrize("way", WAYS)
def test_manual_step_is_compared_by_the_loss_of_its_backward_passes(way: str) -> None:
    """Accepted candidates have the lower loss of the same batch, and training goes further."""
    module, plain, callback = Manual(way), Manual(way), anderson()
    reports = Reports(callback)
    (batch,) = batches()
    start = module.loss(batch).item()
    fit(module, batches(), callback, reports, max_epochs=STEPS)
    fit(plain, batches(), max_epochs=STEPS)
    assert reports.accepted_steps
    first, *_ = reports.attempted
    assert first.loss_before is not None
    assert 0 < first.loss_before < start * (3 if way == "three steps" else 1)
    assert module.loss(batch).item() < plain.loss(batch).item()


class Several(lightning.pytorch.LightningModule):
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


class Adversaries(Several):
    """A backward pass for each optimizer.

    Args:
        toggled: each time the parameters of the other one are frozen.
    """

    def __init__(self, *, toggled: bool = False) -> None:
        super().__init__()
        self.toggled = toggled

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        for index, one in enumerate(optimizers):
            if self.toggled:
                self.toggle_optimizer(one)
            one.zero_grad()
            self.manual_backward(self.losses(batch)[index])
            one.step()
            if self.toggled:
                self.untoggle_optimizer(one)


class WithOwnLoss(Adversaries):
    def anderson_loss(self, batch: Any) -> dict[str, Any]:
        return {"loss": sum(self.losses(batch)), "size": len(batch[0])}


class Turns(Several):
    """A generator that is trained at every fifth batch, its critic at the others."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        makes = batch_idx % 5 == 0
        optimizer: Any = self.optimizers()[0 if makes else 1]  # pyright: ignore[reportIndexIssue]
        self.toggle_optimizer(optimizer)
        made = self.second(self.first(batch[0]).expand(-1, 4)).mean()
        real = softplus(-self.second(batch[0]).mean())
        optimizer.zero_grad()
        self.manual_backward(softplus(-made) if makes else softplus(made) + real)
        optimizer.step()
        self.untoggle_optimizer(optimizer)


def test_optimizers_that_share_a_backward_pass_are_accelerated_together() -> None:
    callback = anderson()
    fit(Several(), batches(), callback, max_epochs=STEPS)
    assert counters(callback)["accepted"] >= 1
    assert callback.state_dict()["disabled"] is None


@pytest.mark.parametrize("toggled", [False, True], ids=["free", "toggled"])
def test_several_optimizers_make_one_step_together(toggled: bool) -> None:
    callback = anderson(accelerate_every_n_steps=5, history_depth=50)
    trainer = fit(WithOwnLoss(toggled=toggled), batches(), callback, max_epochs=12)
    assert trainer.global_step == 24  # Lightning counts both
    counts = {"optimizer_steps": 12, "attempted": 2, "accepted": 2, "loss_evaluations": 6}
    assert counters(callback) == counts
    # 12 steps, the start, and a new start after each acceptance; two networks
    assert callback.state_dict()["iterates"]["rows"].shape == (15, 2 * 49)


class WithoutLoss(Manual):
    """Its backward pass is out of sight."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.of_torch(self.optimizers(), batch)


UNUSABLE: dict[Callable[[], Any], str] = {
    Adversaries: "2 optimizers that follow 2 losses, none of which all of them decrease",
    Turns: "2 optimizers that take turns, so that each may follow another loss",
    lambda: WithoutLoss("step"): "training_step neither calls manual_backward nor returns one",
}


@pytest.mark.parametrize("make_module", UNUSABLE)
def test_manual_step_without_one_loss_is_left_alone_with_one_warning(
    make_module: Any, caplog: pytest.LogCaptureFixture
) -> None:
    callback = anderson()
    assert_plain_run(callback, make_module, batches(12), max_epochs=2)
    assert counters(callback)["accepted"] == 0
    sentences = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert sentences[0] == (
        "Anderson acceleration is off for the rest of this run: the loss cannot be evaluated "
        f"again, and raised ValueError: {UNUSABLE[make_module]}; define anderson_loss(batch) on "
        "the LightningModule, or pass another loss_fn"
    )
    assert sum("is off" in one for one in sentences) == 1


class Leaves(Several):
    """Raises at candidates, between toggle_optimizer and untoggle_optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.ModuleList([self.first, self.second])
        self.steering = Steering()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer, _ = self.optimizers()  # pyright: ignore[reportGeneralTypeIssues]
        at_candidate = self.steering.at_candidate(self)
        self.toggle_optimizer(optimizer)
        if at_candidate:
            raise RuntimeError("outside of the domain")
        self.untoggle_optimizer(optimizer)
        super().training_step(batch, batch_idx)


def test_error_at_a_candidate_leaves_no_parameter_toggled() -> None:
    callback = anderson()
    assert_plain_run(callback, Leaves, max_epochs=STEPS)
    assert outcomes(callback)["rejected_error"] >= 5
