"""Faults of a run: afterwards the weights are the optimizer's own, or an accepted candidate."""

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    LearningRateFinder,
    ModelPruning,
)
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from tests.callbacks.regression import (
    INPUTS,
    Regression,
    anderson,
    batches,
    counters,
    fit,
    network,
    rows,
    weights,
)

BATCHES, EPOCHS = 10, 4


class Optimizers(lightning.pytorch.Callback):
    """Before the AndersonCallback: the weights that the optimizer left."""

    def __init__(self) -> None:
        self.left = torch.empty(0)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.left = trained(pl_module)


class Invariants(lightning.pytorch.Callback):
    """After it: those weights, bit for bit, or an accepted candidate, which is finite."""

    def __init__(self, callback: Any, optimizers: Optimizers) -> None:
        self.callback, self.optimizers = callback, optimizers
        self.accepted = self.checked = 0

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        accepted = self.callback.accelerator.accepted
        now = trained(pl_module)
        if accepted == self.accepted:
            assert torch.equal(now.nan_to_num(), self.optimizers.left.nan_to_num())
        else:
            assert bool(now.isfinite().all())
        self.accepted = accepted
        self.checked += 1


def trained(module: nn.Module) -> Tensor:
    return torch.cat([one.detach().flatten() for one in module.parameters()])


def run(module: Any, *others: Any, loader: Any = None, **options: Any) -> Any:
    """The AndersonCallback of a run whose every batch kept the invariants."""
    callback = anderson(**options.pop("options", {}))
    optimizers = Optimizers()
    invariants = Invariants(callback, optimizers)
    loader = batches(BATCHES, noise=0.1) if loader is None else loader
    options = {"max_epochs": EPOCHS} | options
    fit(module, loader, *others, optimizers, callback, invariants, **options)
    assert invariants.checked >= BATCHES
    return callback


class Spoiled(Regression):
    """The loss is multiplied by ``factor`` in the batch with that number, counted from 0."""

    def __init__(self, at: int, factor: float, *, judged: bool) -> None:
        super().__init__()
        self.at, self.factor, self.judged = at, factor, judged

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = mse_loss(self.network(batch[0]), batch[1])
        spoiled = self.trainer.fit_loop.total_batch_idx == self.at
        return loss * self.factor if spoiled else loss

    def anderson_loss(self, batch: Any) -> Tensor:
        loss = mse_loss(self.network(batch[0]), batch[1])
        spoiled = self.judged and self.trainer.fit_loop.total_batch_idx == self.at
        return loss * self.factor if spoiled else loss


@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf])
def test_a_judge_that_is_not_finite_rejects_and_training_goes_on(factor: float) -> None:
    module = Spoiled(15, factor, judged=True)
    module.training_step = Regression.training_step.__get__(module)
    callback = run(module)
    # every fourth step is judged, the sixteenth among them
    assert callback.state_dict()["outcomes"]["rejected_non_finite_loss"] == 1
    assert counters(callback)["accepted"] >= 1
    assert bool(weights(module).isfinite().all())


def test_a_judge_without_a_result_rejects_and_is_told_so() -> None:
    class Forgets(Regression):
        def anderson_loss(self, batch: Any) -> None:
            mse_loss(self.network(batch[0]), batch[1])

    with pytest.warns(UserWarning, match=r"anderson_loss\(batch\) returned None, .*: return the"):
        callback = run(Forgets())
    assert list(callback.state_dict()["outcomes"]) == ["rejected_non_finite_loss"]


def test_a_loss_of_nan_ruins_the_weights_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The optimizer's doing, and left to it; nothing is accepted from then on."""
    module = Spoiled(15, math.nan, judged=False)
    callback = run(module)
    outcomes = callback.state_dict()["outcomes"]
    assert outcomes["rejected_non_finite_history"] == BATCHES * EPOCHS // 4 - 15 // 4
    assert "lower the learning rate or clip gradients" in caplog.text


def test_gradients_that_are_not_finite_and_skipped_cost_nothing_but_a_step() -> None:
    class Skips(Spoiled):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            finite = all(bool(p.grad.isfinite().all()) for p in self.parameters())
            if not finite:
                optimizer.zero_grad(set_to_none=True)

    module = Skips(15, math.inf, judged=False)
    callback = run(module)
    assert counters(callback)["optimizer_steps"] == BATCHES * EPOCHS - 1
    assert counters(callback)["accepted"] >= 1
    assert bool(weights(module).isfinite().all())


@pytest.mark.parametrize("safeguard", ["loss", "none"])
def test_a_spike_of_the_loss_is_survived(safeguard: str) -> None:
    module = Spoiled(15, 1e4, judged=True)
    run(module, options={"safeguard": safeguard}, gradient_clip_val=1.0)
    assert bool(weights(module).isfinite().all())


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "milestones": lambda o: lr_scheduler.MultiStepLR(o, [13, 26]),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=10),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=BATCHES * EPOCHS),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_learning_rate_that_jumps(schedule: str) -> None:
    class Scheduled(Regression):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
            made = SCHEDULES[schedule](optimizer)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": made, "interval": "step"},
            }

    module = Scheduled()
    callback = run(module)
    assert counters(callback)["attempted"] == BATCHES * EPOCHS // 4
    assert counters(callback)["accepted"] >= 1


class WithBackbone(Regression):
    """A backbone that BackboneFinetuning freezes, and unfreezes later."""

    def __init__(self) -> None:
        backbone = network(nn.Linear(INPUTS, 8), nn.BatchNorm1d(8), nn.Tanh())
        super().__init__(nn.Sequential(backbone, network(nn.Linear(8, 1))))
        self.backbone = backbone

    def configure_optimizers(self) -> Any:
        trainable = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(trainable, lr=0.05, momentum=0.9)


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
def test_a_backbone_that_is_unfrozen_on_the_way() -> None:
    module = WithBackbone()
    callback = run(module, BackboneFinetuning(unfreeze_backbone_at_epoch=2, verbose=False))
    # the history is that of all weights in the end
    layout = callback.state_dict()["fingerprint"]["parameter layout"]
    assert len(layout) == len(list(module.parameters()))
    assert counters(callback)["optimizer_steps"] == BATCHES * EPOCHS


def test_pruned_weights_stay_pruned() -> None:
    module = Regression()
    pruning = ModelPruning(
        "l1_unstructured",
        parameters_to_prune=[(module.network[0], "weight")],
        amount=0.5,
        use_lottery_ticket_hypothesis=False,
        make_pruning_permanent=True,
    )
    callback = run(module, pruning)
    assert counters(callback)["attempted"] >= 4
    pruned = float((module.network[0].weight == 0).float().mean())
    assert pruned >= 0.5


class Found(Regression):
    """With what the finders look for."""

    def __init__(self) -> None:
        super().__init__()
        self.lr, self.batch_size = 0.05, 8

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)

    def train_dataloader(self) -> Any:
        return DataLoader(rows(BATCHES * 8, noise=0.1), batch_size=self.batch_size)


class Started(lightning.pytorch.Callback):
    """What the engine had counted when the fit proper began."""

    def __init__(self, callback: Any) -> None:
        self.callback = callback
        self.counts: list[int] = []

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.counts.append(self.callback.accelerator.optimizer_steps)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_finders_before_the_fit_leave_no_trace(tmp_path: Any) -> None:
    finders: dict[str, Any] = {
        "lr": LearningRateFinder(num_training_steps=12, attr_name="lr"),
        "batch size": BatchSizeFinder(
            "power", steps_per_trial=2, init_val=2, max_trials=2, batch_arg_name="batch_size"
        ),
    }
    for name, finder in finders.items():
        module, callback = Found(), anderson()
        started = Started(callback)
        fit(
            module,
            None,
            finder,
            callback,
            started,
            max_epochs=2,
            default_root_dir=tmp_path,
            enable_checkpointing=True,
        )
        last = started.counts[-1]
        steps = 2 * math.ceil(BATCHES * 8 / module.batch_size)
        assert started.counts[-steps:] == list(range(1, steps + 1)), name
        assert last == steps
