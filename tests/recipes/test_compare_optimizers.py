"""Variants that change the optimizer or average, on a module that knows nothing of them."""

import math
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_stableaa.recipes.comparison.optimizers import (
    LBFGS,
    CosineSchedule,
    LearningRateMultiple,
    Lookahead,
    ScheduleFree,
)
from lightning_stableaa.recipes.errors import UserError
from tests.helpers.own_module import Data, Module
from tests.recipes.conftest import quiet_trainer

AVERAGES = "lightning_stableaa.recipes.comparison.averages"


def fit(
    module: Module, *callbacks: Callback, epochs: int = 2, resume: Path | None = None, **more: Any
) -> lightning.Trainer:
    saves = any(isinstance(one, ModelCheckpoint) for one in callbacks)
    settings: dict[str, Any] = {"max_epochs": epochs, "val_check_interval": 1, **more}
    trainer = quiet_trainer(callbacks=list(callbacks), enable_checkpointing=saves, **settings)
    trainer.fit(module, Data(), ckpt_path=resume)
    return trainer


def module(**options: Any) -> Module:
    torch.manual_seed(0)
    return Module(**options)


def path_of(made: Module, make: Any, steps: int) -> list[torch.Tensor]:
    """Weights after each step of a plain loop over the same batches with an optimizer."""
    optimizer, evaluate, train = make(made.parameters())
    batches = list(Data().train_dataloader())
    seen = []
    for step in range(steps):
        train()
        optimizer.zero_grad()
        made.training_step(batches[step % len(batches)], 0).backward()
        optimizer.step()
        evaluate()
        seen.append(made.weights())
    return seen


def test_learning_rate_multiple_scales_schedule() -> None:
    made = module(schedule=True)
    fit(made, LearningRateMultiple(3.0), val_check_interval=5, epochs=3)
    # validation comes after the epoch's step of the schedule
    assert made.rates == pytest.approx([0.15, 0.075, 0.0375])


def test_cosine_replaces_schedule() -> None:
    made = module(schedule=True)
    fit(made, LearningRateMultiple(2.0), CosineSchedule(), epochs=2)
    expected = [0.1 * (1 + math.cos(math.pi * step / 10)) for step in range(1, 11)]
    assert made.rates == pytest.approx(expected)


def test_schedule_free_validates_average() -> None:
    from schedulefree import SGDScheduleFree

    made = module()
    fit(made, ScheduleFree())

    def make(parameters: Any) -> tuple[Any, ...]:
        # lr 0.1 at momentum 0.5 goes as far as 0.2 without
        optimizer = SGDScheduleFree(parameters, lr=0.2, momentum=0.5)
        return optimizer, optimizer.eval, optimizer.train

    expected = path_of(module(), make, steps=10)
    assert torch.equal(torch.stack(made.validated), torch.stack(expected))
    assert torch.equal(made.weights(), expected[-1])


def test_lookahead_validates_slow_weights() -> None:
    from pytorch_optimizer import Lookahead as Package

    made = module()
    fit(made, Lookahead(k=3))
    plain = module()

    def make(parameters: Any) -> tuple[Any, ...]:
        optimizer = Package(torch.optim.SGD(parameters, lr=0.1, momentum=0.5), k=3)
        return optimizer, lambda: None, lambda: None

    fast = path_of(plain, make, steps=10)
    start = module().weights()
    expected = [start, start, *[fast[2]] * 3, *[fast[5]] * 3, *[fast[8]] * 2]
    assert torch.equal(torch.stack(made.validated), torch.stack(expected))
    assert torch.equal(made.weights(), fast[-1])


@pytest.mark.parametrize("change", [Lookahead, ScheduleFree])
def test_optimizer_change_resumed_is_bitwise_equal(change: type[Callback], tmp_path: Path) -> None:
    whole = module()
    fit(whole, change(), epochs=4)
    fit(module(), change(), ModelCheckpoint(tmp_path / "first", filename="kept"), epochs=2)
    kept = tmp_path / "first" / "kept.ckpt"
    torch.load(kept, weights_only=True)
    resumed = Module()
    fit(resumed, change(), ModelCheckpoint(tmp_path / "second"), epochs=4, resume=kept)
    assert torch.equal(resumed.weights(), whole.weights())


def test_lbfgs_stays_within_gradients_of_plain() -> None:
    made = module()
    optimizer = LBFGS(max_iter=8)
    fit(made, optimizer, epochs=12, val_check_interval=1.0)
    assert optimizer.budget == 60
    assert optimizer.gradients == made.training_steps
    # one more step of up to ten might have exceeded the budget
    assert 50 < optimizer.gradients <= 60
    assert made.validated


def test_late_averaging_validates_mean_of_last_weights() -> None:
    reason = "WeightAveraging came with Lightning 2.6"
    averages = pytest.importorskip(AVERAGES, reason=reason, exc_type=ImportError)
    made, plain = module(), module()
    fit(plain)
    fit(made, averages.LateWeightAveraging(start_share=0.7))
    raw = plain.validated
    expected = [*raw[:7], raw[7], sum(raw[7:9]) / 2, sum(raw[7:10]) / 3]
    # the average is updated in place, one rounding a step
    torch.testing.assert_close(torch.stack(made.validated), torch.stack(expected))
    assert torch.equal(made.weights(), made.validated[-1])


def test_optimizer_change_several_optimizers_is_refused() -> None:
    made = module()
    two = [torch.optim.SGD(made.parameters(), lr=0.1) for _ in range(2)]
    made.automatic_optimization = False
    made.configure_optimizers = lambda: two
    with pytest.raises(UserError, match="configure_optimizers returns 2 optimizers: leave out the"):
        fit(made, CosineSchedule())
