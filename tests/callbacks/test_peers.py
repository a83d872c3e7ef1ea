"""What Lightning tests of its own averaging callbacks and no other test here does: COVERAGE.md."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from tests.callbacks.regression import (
    INPUTS,
    Record,
    Regression,
    anderson,
    batches,
    counters,
    fit,
    network,
    weights,
)


class Stream(IterableDataset):
    """32 samples that have no length."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(32):
            x = torch.randn(INPUTS, generator=generator)
            yield x, x.sum(dim=0, keepdim=True)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_data_without_a_length(batch_norm: bool) -> None:
    layers = [nn.Linear(INPUTS, 8), *([nn.BatchNorm1d(8)] if batch_norm else []), nn.Linear(8, 1)]
    callback = anderson(safeguard="none")
    fit(
        Regression(network(*layers)),
        DataLoader(Stream(), batch_size=4),
        callback,
        max_epochs=3,
        accumulate_grad_batches=2,
    )
    # four steps an epoch, candidates every fourth step
    assert counters(callback)["optimizer_steps"] == 12
    assert counters(callback)["attempted"] == 3


class Late(Regression):
    """Has no weights before ``configure_model``."""

    def __init__(self) -> None:
        super().__init__()
        del self.network

    def configure_model(self) -> None:
        if not hasattr(self, "network"):
            self.network = network()


def test_weights_that_are_made_in_configure_model() -> None:
    late, early = Late(), Regression()
    callbacks = anderson(), anderson()
    for module, callback in zip((late, early), callbacks, strict=True):
        fit(module, batches(12), callback, max_epochs=1)
    assert counters(callbacks[0])["attempted"] == 3
    assert torch.equal(weights(late), weights(early))


class Crash(Callback):
    """Raises at the start of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch:
            raise RuntimeError("crash")


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_run_that_crashed_goes_on_from_its_last_checkpoint(epoch: int, tmp_path: Path) -> None:
    def keep() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, save_last=True, enable_version_counter=False)

    options: dict[str, Any] = {"max_epochs": 4, "enable_checkpointing": True}
    whole = Regression()
    fit(whole, batches(6), anderson(), max_epochs=4)
    with pytest.raises(RuntimeError, match="crash"):
        fit(Regression(), batches(6), anderson(), Crash(epoch), keep(), **options)
    resumed, callback = Regression(), anderson()
    fit(resumed, batches(6), callback, keep(), ckpt_path=tmp_path / "last.ckpt", **options)
    assert counters(callback)["optimizer_steps"] == 24
    assert torch.equal(weights(resumed), weights(whole))


class Scheduled(Regression):
    interval = "step"

    def configure_optimizers(self) -> Any:
        first, *others = self.parameters()
        groups = [{"params": [first], "lr": 0.05}, {"params": others, "lr": 0.02}]
        optimizer = torch.optim.SGD(groups, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": self.interval},
        }


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_learning_rates_of_all_groups_are_the_schedulers_alone(interval: str) -> None:
    def rates(*callbacks: Any) -> list[list[float]]:
        module = Scheduled()
        module.interval = interval
        record = Record(lambda trainer, _: [g["lr"] for g in trainer.optimizers[0].param_groups])
        fit(module, batches(6), *callbacks, record, max_epochs=3)
        return record.values

    callback = anderson()
    assert rates(callback) == rates()
    assert counters(callback)["accepted"] > 0


def test_nothing_of_the_run_is_kept_alive() -> None:
    module, loader, callback = Regression(), batches(8), anderson()
    trainer = fit(module, loader, callback, max_epochs=1)
    assert counters(callback)["attempted"] == 2
    kept = [weakref.ref(one) for one in (trainer, loader, module)]
    del trainer, loader, module
    for name in ("log", "log_dict"):  # methods of the module that Lightning gives to callbacks
        vars(callback).pop(name)
    gc.collect()
    assert [one() for one in kept] == [None, None, None]
