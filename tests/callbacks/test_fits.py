"""Several fits, exceptions, finders, changing optimizers: what is carried over, and what is not."""

import gc
import math
import pickle
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BatchSizeFinder, LearningRateFinder
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, IterableDataset

from tests.helpers.problems import assert_bitwise_equal
from tests.helpers.regression import (
    INPUTS,
    Callback,
    Record,
    Regression,
    Reports,
    Steered,
    anderson,
    batches,
    counters,
    fit,
    network,
    num_iterates,
    outcomes,
    rows,
    weights,
)


@pytest.mark.parametrize("interrupted", [False, True])
def test_fit_of_another_module_is_that_of_new_callback(interrupted: bool) -> None:
    class Fails(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if interrupted and self.global_step == 7:
                raise RuntimeError("interrupted")
            return super().training_step(batch, batch_idx)

    used, new = anderson(), anderson()
    if interrupted:
        with pytest.raises(RuntimeError, match="interrupted"):
            fit(Fails(network(seed=5)), batches(), used, max_epochs=20)
    else:
        fit(Fails(network(seed=5)), batches(), used, max_epochs=20)
    again, alone = Regression(network(seed=1)), Regression(network(seed=1))
    fit(again, batches(), used, max_epochs=9)
    fit(alone, batches(), new, max_epochs=9)
    assert torch.equal(weights(again), weights(alone))
    assert_bitwise_equal(used.state_dict(), new.state_dict())


def test_finished_fit_keeps_nothing_alive_and_is_picklable() -> None:
    module, loader, callback = Regression(), batches(8), anderson()
    trainer = fit(module, loader, callback, max_epochs=1)
    assert counters(pickle.loads(pickle.dumps(callback))) == counters(callback)
    assert counters(callback)["attempted"] == 4
    references = [weakref.ref(one) for one in (trainer, loader, module)]
    del trainer, loader, module
    for name in ("log", "log_dict"):  # methods of the module that Lightning gives to callbacks
        vars(callback).pop(name, None)
    gc.collect()
    assert [one() for one in references] == [None, None, None]


def test_batch_is_released_after_its_attempt() -> None:
    """Also where the candidate is vetoed before any evaluation."""
    alive: list[Any] = []

    class Remembers(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
            assert [one() for one in alive[:-1]] == [None] * len(alive[:-1])
            alive.append(weakref.ref(batch[0]))

    callback = anderson(stochastic=True)
    noisy = batches(12, noise=100.0)
    large = lambda p: torch.optim.SGD(p, lr=1e-3)  # noqa: E731
    fit(Regression(None, large), noisy, Remembers(), callback, max_epochs=1)
    assert outcomes(callback)["skipped_noise_dominated"] >= 1


class Switches(Callback):
    """Replaces the optimizers at the start of some epochs."""

    def __init__(self, **optimizers: Any) -> None:
        self.optimizers = optimizers

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        make = self.optimizers.get(f"epoch{trainer.current_epoch}")
        if make is not None:
            trainer.strategy.optimizers = [make(pl_module.parameters())]


def test_replaced_optimizer_is_followed_with_counters() -> None:
    callback = anderson()
    switches = Switches(epoch4=lambda p: torch.optim.Adam(p, lr=1e-3))
    fit(Steered(), batches(), switches, callback, max_epochs=10)
    assert counters(callback)["optimizer_steps"] == 10
    assert counters(callback)["attempted"] == 5
    assert num_iterates(callback) == 6


def test_switch_to_lbfgs_and_back_pauses_and_continues() -> None:
    adam = lambda p: torch.optim.Adam(p, lr=1e-3)  # noqa: E731
    lbfgs = lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2)  # noqa: E731
    callback, own = anderson(), Regression(None, adam)
    attempts = Record(lambda *_: counters(callback)["attempted"])
    with pytest.warns(UserWarning, match="AndersonCallback pauses until the optimizer .* LBFGS"):
        fit(own, batches(), Switches(epoch4=lbfgs, epoch8=adam), callback, attempts, max_epochs=12)
    assert attempts.values == [0, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 4]
    assert counters(callback)["optimizer_steps"] == 8
    assert bool(weights(own).isfinite().all())


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
def test_backbone_unfrozen_in_mid_run_joins_history_and_candidates() -> None:
    """From then on its weights are trained ones: an evaluation does not put old ones back."""

    class WithBackbone(Steered):
        def __init__(self) -> None:
            backbone = network(nn.Linear(INPUTS, 8), nn.Tanh())
            super().__init__(nn.Sequential(backbone, network(nn.Linear(8, 1))))
            self.backbone = backbone

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01)

        def loss_now(self) -> float:
            x, y = data[self.trainer.fit_loop.batch_idx]
            return mse_loss(self.network(x), y).item()

    data = list(batches(8))
    module, callback = WithBackbone(), anderson()
    losses, reports = Record(lambda _, module: module.loss_now()), Reports(callback)
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
    fit(module, batches(8), finetuning, losses, callback, reports, max_epochs=2)
    size = sum(p.numel() for p in module.parameters())
    assert callback.state_dict()["iterates"]["rows"].shape == (6, size)
    # four attempts with the head alone; the change costs the first step of the second epoch
    assert outcomes(callback) == {"rejected_loss_increase": 7, "parameters_changed": 1}
    pairs = zip(losses.values, reports.all, strict=True)
    assert all(one.loss_before == loss for loss, one in pairs if one.attempted)


class Tunable(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.lr, self.batch_size = 0.01, 8

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> Any:
        return DataLoader(rows(80), batch_size=self.batch_size)


@pytest.mark.parametrize(
    "make_finder",
    [
        lambda: LearningRateFinder(num_training_steps=12, attr_name="lr"),
        lambda: BatchSizeFinder(
            "power", steps_per_trial=2, init_val=2, max_trials=2, batch_arg_name="batch_size"
        ),
    ],
    ids=["learning rate", "batch size"],
)
@pytest.mark.parametrize("first", [True, False])
def test_finder_before_fit_leaves_no_trace(make_finder: Any, first: bool, tmp_path: Path) -> None:
    module, callback, finder = Tunable(), anderson(), make_finder()
    steps = Record(lambda *_: counters(callback)["optimizer_steps"])
    callbacks = [finder, callback] if first else [callback, finder]
    options = {"default_root_dir": tmp_path, "enable_checkpointing": True, "max_epochs": 2}
    fit(module, None, *callbacks, steps, **options)
    count = 2 * math.ceil(80 / module.batch_size)
    assert steps.values[-count:] == list(range(1, count + 1))
    assert counters(callback)["optimizer_steps"] == count


class Stream(IterableDataset):
    """32 samples without a length."""

    def __iter__(self) -> Iterator[Any]:
        data = rows(32)
        return iter([data[k] for k in range(32)])


@pytest.mark.filterwarnings("ignore:train_dataloader yielded None")
@pytest.mark.parametrize(
    ("loader", "steps"),
    [
        (DataLoader(Stream(), batch_size=4), 8),
        (DataLoader([*batches(4), None, *batches(4)], batch_size=None), 8),  # type: ignore[arg-type]
    ],
    ids=["no length", "gaps"],
)
def test_loader_without_length_or_with_gaps_is_followed(loader: Any, steps: int) -> None:
    callback = anderson()
    fit(Steered(), loader, callback, max_epochs=1)
    assert counters(callback)["optimizer_steps"] == steps
    assert counters(callback)["attempted"] == steps // 2
