"""The history grows by exactly the optimizer steps that really happened."""

from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.nn.functional import mse_loss

from lightning_stableaa import AndersonCallback, SmoothingMonitor
from tests.helpers.histories import iterates_of
from tests.helpers.regression import (
    Callback,
    Record,
    Regression,
    Reports,
    Steered,
    anderson,
    batches,
    counters,
    fit,
    num_iterates,
    outcomes,
    trained,
)


def every_step(**options: Any) -> AndersonCallback:
    """An iterate a step, an attempt every fifth; never a full history."""
    return anderson(**{"history_depth": 50, "accelerate_every_n_steps": 5} | options)


def test_accumulation_of_uneven_batches_counts_optimizer_steps() -> None:
    callback = every_step()
    steps = Record(lambda *_: counters(callback)["optimizer_steps"])
    options: dict[str, Any] = {"accumulate_grad_batches": 3, "max_epochs": 4}
    trainer = fit(Steered(), batches(7), callback, steps, **options)
    # Lightning steps after batches 3, 6 and, the rest, 7 of every epoch
    one_epoch = [0, 0, 1, 1, 1, 2, 3]
    assert steps.values == [3 * epoch + count for epoch in range(4) for count in one_epoch]
    assert trainer.global_step == 12
    assert counters(callback)["attempted"] == 2
    assert num_iterates(callback) == 13  # the start, and one for every step


class SkipsBatches(Steered):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx in (0, 3, 4) else loss


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_training_step_returning_none_is_no_step() -> None:
    callback = every_step()
    trainer = fit(SkipsBatches(), batches(8), callback, max_epochs=2)
    assert trainer.global_step == 16  # Lightning counts them
    assert counters(callback)["optimizer_steps"] == 10
    assert counters(callback)["attempted"] == 2
    assert num_iterates(callback) == 11


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_none_loss_where_attempt_was_due_moves_it_to_next_step() -> None:
    callback = anderson()
    reports = Reports(callback)
    fit(SkipsBatches(), batches(8), callback, reports, max_epochs=1)
    # batches 2, 3, 6, 7, 8 step: the second of them is the third batch, the fourth the seventh
    attempts = [batch for batch, one in enumerate(reports.all, start=1) if one.attempted]
    assert attempts == [3, 7]
    assert outcomes(callback) == {"rejected_loss_increase": 2}


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_step_skipped_by_grad_scaler_is_no_step(fused: bool) -> None:
    class Overflows(Steered):
        def on_after_backward(self) -> None:
            if self.trainer.fit_loop.batch_idx in (2, 5):
                next(self.parameters()).grad.fill_(float("inf"))

    callback = every_step()
    module = Overflows(None, lambda p: torch.optim.SGD(p, lr=0.01, fused=fused))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    trainer = fit(module, batches(8), callback, plugins=[precision], max_epochs=1)
    assert scaler.get_scale() == 1.0  # halved twice: both overflows were seen
    assert trainer.global_step == 8  # Lightning counts them
    assert counters(callback)["optimizer_steps"] == 6
    assert counters(callback)["attempted"] == 1
    assert torch.equal(iterates_of(callback.state_dict()["iterates"])[-1], trained(module))
    assert num_iterates(callback) == 7


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("step", [3, 10], ids=["within cycle", "end of cycle"])
def test_write_by_another_callback_restarts_sequence(before: bool, step: int) -> None:
    """No residual spans it, also where every batch is an epoch, and weights are backed up."""

    class Shifts(Callback):
        @torch.no_grad()
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == step:
                for one in pl_module.parameters():
                    one.add_(100.0)

    callback = anderson(history_depth=50, store_every_n_steps=5, accelerate_every_n_steps=500)
    callbacks = [Shifts(), callback] if before else [callback, Shifts()]
    fit(Steered(None, lambda p: torch.optim.SGD(p, lr=1e-4)), batches(), *callbacks, max_epochs=20)
    state = callback.state_dict()
    # a write after the iterate of step 10 was stored is seen at the end of the next cycle
    assert outcomes(callback) == {"external_update": 1}
    jumps = (iterates_of(state["iterates"]).diff(dim=0).abs().amax(dim=1) > 50).tolist()
    residuals = state["iterates"]["ends_cycle"][1:]
    assert not any(jump and residual for jump, residual in zip(jumps, residuals, strict=True))
    assert residuals.count(True) == 3


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_monitor_alone_counts_real_steps() -> None:
    monitor = SmoothingMonitor(average_window=4)
    fit(SkipsBatches(), batches(8), monitor, max_epochs=2)
    assert counters(monitor)["optimizer_steps"] == 10
    assert monitor.state_dict()["cycle_steps"] == 2


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
def test_own_loss_of_step_that_fetches_batches_gets_the_last_batch() -> None:
    class Fetches(Regression):
        def training_step(self, dataloader_iter: Any) -> Tensor:
            (x, y), _, _ = next(dataloader_iter)
            trained_on.append(x)
            return mse_loss(self.network(x), y)

        def anderson_loss(self, batch: Any) -> Tensor:
            assert torch.equal(batch[0], trained_on[-1])
            evaluated.append(len(trained_on))
            return mse_loss(self.network(batch[0]), batch[1])

    trained_on: list[Tensor] = []
    evaluated: list[int] = []
    callback = anderson(accelerate_every_n_steps=4)
    fit(Fetches(), batches(8), callback, max_epochs=2)
    assert evaluated == [4, 4, 4, 8, 8, 8, 12, 12, 16, 16]
    assert counters(callback)["attempted"] == 4
