"""The history grows by exactly the optimizer steps that really happened."""

from typing import Any

import lightning.pytorch
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from lightning_stableaa import AndersonAccelerator, AndersonCallback, SmoothingMonitor, Status
from tests.callbacks.regression import (
    INPUTS,
    Record,
    Regression,
    anderson,
    batches,
    counters,
    fit,
    network,
    stored_points,
    weights,
)
from tests.histories import points_of


def every_step(**options: Any) -> AndersonCallback:
    """One point for one optimizer step, candidates every fifth; never a full history."""
    schedule = {"history_depth": 50, "store_every_n_steps": 1, "accelerate_every_n_steps": 5}
    return anderson(**schedule | options)


def never_accept(module: Any, batch: Any) -> Tensor:
    """A judge whose loss does not depend on the weights, so that no candidate lowers it."""
    return torch.ones(())


class Unaccepted(Regression):
    """Candidates are formed and rejected: the chain of points has no break."""

    anderson_loss = never_accept


def test_gradient_accumulation_over_an_uneven_number_of_batches() -> None:
    callback = every_step()
    module = Unaccepted()
    seen = Record(lambda *_: counters(callback)["optimizer_steps"])
    trainer = fit(module, batches(7), callback, seen, accumulate_grad_batches=3, max_epochs=4)

    # Lightning steps after batches 3, 6 and, the rest, 7 of every epoch
    one_epoch = [0, 0, 1, 1, 1, 2, 3]
    assert seen.values == [3 * epoch + steps for epoch in range(4) for steps in one_epoch]
    assert trainer.global_step == 12
    assert counters(callback)["attempted"] == 2
    assert counters(callback)["accepted"] == 0
    assert stored_points(callback).shape[0] == 13  # the start, and one for every step


def test_a_history_holds_the_weights_after_every_step() -> None:
    callback = every_step()
    module = Unaccepted()
    after = Record(lambda _, m: torch.cat([p.detach().flatten() for p in m.parameters()]))
    fit(module, batches(7), callback, after, max_epochs=1)

    # differences are stored, so that points are known to the rounding of a few sums
    torch.testing.assert_close(stored_points(callback)[1:], torch.stack(after.values))


class SkipsBatches(Unaccepted):
    skipped = (0, 3, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx in self.skipped else loss


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_a_training_step_that_returns_none_is_no_step() -> None:
    callback = every_step()
    trainer = fit(SkipsBatches(), batches(8), callback, max_epochs=2)

    assert trainer.global_step == 16  # Lightning counts them
    assert counters(callback)["optimizer_steps"] == 10
    assert counters(callback)["attempted"] == 2
    assert stored_points(callback).shape[0] == 11


def overflow(module: nn.Module) -> None:
    gradient = next(module.parameters()).grad
    assert gradient is not None
    gradient.fill_(float("inf"))


class Overflows(Unaccepted):
    """The gradients of batches 2 and 5 are infinite."""

    def on_after_backward(self) -> None:
        if self.trainer.fit_loop.batch_idx in (2, 5):
            overflow(self)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_step_that_the_grad_scaler_skips_is_no_step(fused: bool) -> None:
    callback = every_step()
    module = Overflows(make_optimizer=lambda p: torch.optim.SGD(p, lr=0.05, fused=fused))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    trainer = fit(module, batches(8), callback, plugins=[precision], max_epochs=1)

    assert scaler.get_scale() == 1.0  # halved twice: both overflows were seen
    assert trainer.global_step == 8  # Lightning counts them
    assert counters(callback)["optimizer_steps"] == 6
    assert counters(callback)["attempted"] == 1
    points = stored_points(callback)
    assert points.shape[0] == 7
    assert torch.equal(points[-1], torch.cat([p.detach().flatten() for p in module.parameters()]))


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_step_that_the_grad_scaler_skips_is_no_step_of_a_plain_loop(fused: bool) -> None:
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    accelerator = AndersonAccelerator(
        optimizer,
        history_depth=50,
        store_every_n_steps=1,
        accelerate_every_n_steps=100,
        safeguard="none",
    )
    (x, y) = next(iter(batches(1)))
    statuses = []
    for index in range(6):
        optimizer.zero_grad()
        scaler.scale(mse_loss(net(x), y)).backward()
        if index in (0, 3):
            overflow(net)
        scaler.step(optimizer)
        scaler.update()
        statuses.append(accelerator.step().status)

    skipped, stored = Status.NO_OPTIMIZER_STEP, Status.STORED
    assert statuses == [skipped, stored, stored, skipped, stored, stored]
    assert accelerator.optimizer_steps == 4
    assert accelerator.state_dict()["points"]["history"]["rows"].shape[0] == 5


class TiedFrozenEmpty(Unaccepted):
    """A weight used twice, a frozen one, one without elements, and a group of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.tied = nn.Linear(8, 8, bias=False)
        self.twin = nn.Linear(8, 8, bias=False)
        self.twin.weight = self.tied.weight
        self.frozen = nn.Linear(INPUTS, INPUTS).requires_grad_(False)
        self.empty = nn.Parameter(torch.empty(0))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        inner, activation, outer = self.network
        hidden = self.twin(activation(self.tied(activation(inner(self.frozen(x))))))
        return mse_loss(outer(hidden), y)

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": list(self.network.parameters())},
            {"params": [self.tied.weight, self.empty]},
            {"params": list(self.frozen.parameters())},
        ]
        return torch.optim.SGD(groups, lr=0.01)


def test_tied_frozen_and_empty_parameters() -> None:
    callback = every_step()
    module = TiedFrozenEmpty()
    frozen = module.frozen.weight.clone()
    fit(module, batches(6), callback, max_epochs=1)

    trained = sum(p.numel() for p in module.network.parameters()) + module.tied.weight.numel()
    assert stored_points(callback).shape == (7, trained)
    assert counters(callback)["optimizer_steps"] == 6
    assert torch.equal(module.frozen.weight, frozen)
    assert module.twin.weight is module.tied.weight


class TwoOptimizers(lightning.pytorch.LightningModule):
    """Manual optimisation as in a GAN: two networks, each with an optimizer, in turns."""

    def __init__(self, *, toggled: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.toggled = toggled
        self.first, self.second = network(seed=0), network(seed=1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        optimizers: Any = self.optimizers()
        for optimizer, net in zip(optimizers, (self.first, self.second), strict=True):
            if self.toggled:
                self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(mse_loss(net(x), y))
            optimizer.step()
            if self.toggled:
                self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(net.parameters(), lr=0.05) for net in (self.first, self.second)]


class JudgedTwoOptimizers(TwoOptimizers):
    def anderson_loss(self, batch: Any) -> Tensor:
        x, y = batch
        return mse_loss(self.first(x), y) + mse_loss(self.second(x), y)


@pytest.mark.parametrize("toggled", [False, True], ids=["free", "toggled"])
def test_several_optimizers_make_one_step_together(toggled: bool) -> None:
    callback = every_step()
    module = JudgedTwoOptimizers(toggled=toggled)
    trainer = fit(module, batches(1), callback, max_epochs=12)

    assert trainer.global_step == 24  # Lightning counts both
    assert counters(callback)["optimizer_steps"] == 12
    assert counters(callback)["attempted"] == 2
    assert counters(callback)["accepted"] == 2
    # 12 steps, the start, and a new start after each accepted candidate
    assert stored_points(callback).shape == (15, sum(p.numel() for p in module.parameters()))


def test_several_optimizers_without_a_judge() -> None:
    callback = every_step(safeguard="none", history_depth=3)
    plain, accelerated = TwoOptimizers(toggled=False), TwoOptimizers(toggled=False)
    fit(plain, batches(1), max_epochs=12)
    fit(accelerated, batches(1), callback, max_epochs=12)

    assert counters(callback)["optimizer_steps"] == 12
    assert counters(callback)["attempted"] == counters(callback)["accepted"] == 2
    assert not torch.equal(weights(plain), weights(accelerated))


class Reseeds(lightning.pytorch.Callback):
    """Something else than the optimizer moves the weights, after batch 6."""

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop.batch_idx == 6:
            with torch.no_grad():
                for one in pl_module.parameters():
                    one.add_(100.0)


@pytest.mark.parametrize("reseeds_first", [True, False])
def test_no_residual_across_a_change_from_outside(reseeds_first: bool) -> None:
    callback = every_step(accelerate_every_n_steps=50)
    order = [Reseeds(), callback] if reseeds_first else [callback, Reseeds()]
    fit(
        Unaccepted(make_optimizer=lambda p: torch.optim.SGD(p, lr=1e-4)),
        batches(12),
        *order,
        max_epochs=1,
    )

    history = callback.state_dict()["points"]["history"]
    jumps = (points_of(history).diff(dim=0).abs().amax(dim=1) > 50).tolist()
    assert jumps.count(True) == 1
    assert [link for link, jump in zip(history["links"][1:], jumps, strict=True) if jump] == [False]
    assert counters(callback)["optimizer_steps"] == 12


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_the_monitor_counts_real_steps_as_well() -> None:
    monitor = SmoothingMonitor(average_window=10)
    fit(SkipsBatches(), batches(8), monitor, max_epochs=1)

    assert monitor.state_dict()["position"] == 5
