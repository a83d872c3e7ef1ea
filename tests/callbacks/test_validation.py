"""Candidates of a sample wait while validation is worse than at its best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_stableaa import AndersonCallback
from lightning_stableaa.callbacks.validation import choose_metric
from tests.callbacks.regression import (
    QUIET,
    TREES,
    Record,
    Regression,
    anderson,
    batches,
    counters,
    fit,
    regression_class,
    rows,
    weights,
)

VALUES = [3.0, 4.0, 2.0, 2.5, 2.0, 1.0]  # one an epoch of eight steps, with two extrapolations
WAITING = {4, 5, 8, 9}  # extrapolations of the epochs that follow 4.0 and 2.5
WAITS = "rejected_by_validation"


class Scripted:
    """Its validations log given values, and ``None`` nothing."""

    logged = "val/loss"
    values: Sequence[float | None] = VALUES

    def val_dataloader(self) -> Any:
        return DataLoader(rows(8), batch_size=8)

    def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
        value = self.values[self.current_epoch]
        if value is not None:
            self.log(self.logged, torch.tensor(value), batch_size=1)


def scripted(
    values: Sequence[float | None] = VALUES,
    logged: str = "val/loss",
    tree: str = "lightning.pytorch",
) -> Any:
    module = type("Module", (Scripted, regression_class(tree)), {})()
    module.logged, module.values = logged, values
    return module


def said(module: Any, *others: Any, loader: Any = None, **options: Any) -> list[str]:
    """What became of every extrapolation."""
    trainer = {
        name: options.pop(name) for name in ("tree", "enable_checkpointing") & options.keys()
    }
    callback = anderson(**options)
    outcomes = Record(lambda *_: dict(callback.state_dict()["outcomes"]))
    fit(
        module,
        loader or batches(8, noise=0.1),
        callback,
        outcomes,
        *others,
        max_epochs=len(VALUES),
        num_sanity_val_steps=1,
        **trainer,
    )
    counted = zip([{}, *outcomes.values], outcomes.values, strict=False)
    return [name for one, two in counted for name in two if two[name] > one.get(name, 0)]


def waiting(*arguments: Any, **options: Any) -> set[int]:
    """Which extrapolations waited for validation."""
    found = said(*arguments, **options)
    assert len(found) == 2 * len(VALUES)
    assert "accepted" in found
    return {which for which, outcome in enumerate(found) if outcome == WAITS}


@pytest.mark.parametrize("tree", TREES)
def test_candidates_wait_while_validation_is_worse_than_at_its_best(tree: str) -> None:
    assert waiting(scripted(tree=tree), tree=tree) == WAITING


@pytest.mark.parametrize("apply_to", ["training", "both"])
def test_no_loss_is_asked_for_where_nobody_looks_at_candidates(apply_to: Any) -> None:
    callback = anderson(apply_to=apply_to)
    asked = Record(lambda *_: counters(callback)["loss_evaluations"])
    fit(scripted(), batches(8, noise=0.1), callback, asked, max_epochs=len(VALUES))
    of_candidates = [later - earlier for earlier, later in pairwise([0, *asked.values[3::4]])]
    left_out = {which for which, losses in enumerate(of_candidates) if losses == 0}
    assert left_out == (WAITING if apply_to == "training" else set())


def test_validation_has_a_say_only_where_samples_judge() -> None:
    assert WAITS not in said(scripted(), loader=batches(1, size=64, noise=0.1))
    assert WAITS not in said(scripted(), monitor=None)


def test_a_metric_can_be_named() -> None:
    more = [-one for one in VALUES]
    assert waiting(scripted(more, "val/top1"), monitor="val/top1", monitor_mode="max") == WAITING
    assert WAITS not in said(scripted(logged="val/top1"))
    with pytest.warns(UserWarning, match=r"monitor=val/mse: .*one of val/loss, 'auto' or None"):
        assert WAITS not in said(scripted(), monitor="val/mse")


def test_what_this_validation_did_not_log_says_nothing() -> None:
    assert waiting(scripted([3.0, 4.0, None, math.nan, 2.0, 1.0])) == {4, 5, 6, 7, 8, 9}


def test_what_training_logs_is_no_validation(tmp_path: Path) -> None:
    of_training = ModelCheckpoint(tmp_path, monitor="train/loss")
    assert waiting(scripted(), of_training, enable_checkpointing=True) == WAITING


def test_what_the_trainer_monitors_comes_first() -> None:
    def chosen(*callbacks: Any) -> Any:
        options: dict[str, Any] = QUIET | {"enable_checkpointing": True}
        trainer = Trainer(**options, callbacks=list(callbacks))
        return choose_metric(trainer, {"val/acc": 0.5, "val/mse": 1.0, "val/loss": 2.0})

    best, last = ModelCheckpoint(monitor="val/acc", mode="max"), ModelCheckpoint(filename="last")
    assert chosen() == ("val/loss", "min")
    assert chosen(last, best) == ("val/acc", "max")
    assert chosen(best, EarlyStopping("val/mse")) == ("val/mse", "min")
    assert chosen(EarlyStopping("val/other")) == ("val/loss", "min")


def test_a_name_says_that_less_is_better() -> None:
    trainer = Trainer(**QUIET)
    assert choose_metric(trainer, {"val/acc": 0.5, "val/MSE": 1.0}) == ("val/MSE", "min")
    parts = {"val_loss_step": 1.0, "val/kl_loss": 1.0, "val/l2": 1.0}
    assert choose_metric(trainer, parts) == ("val/kl_loss", "min")
    for whole in ("val_loss", "loss", "valid/loss", "validation loss", "val_loss_epoch"):
        assert choose_metric(trainer, parts | {whole: 2.0}) == (whole, "min")
    for less in ("val/nrmse", "val_mae_epoch", "relative_l2", "perplexity", "ValLoss", "NLL"):
        assert choose_metric(trainer, {"val/acc": 0.5, less: 1.0}) == (less, "min")
    names = ("val/acc", "model2_acc", "recall2", "level2_top1", "neg_mse", "val/neg_loss")
    for more in (*names, "val/negative_error"):
        assert choose_metric(trainer, {more: 0.5})[0] is None


@pytest.mark.parametrize("stop", [2, 4])
def test_a_resumed_run_remembers_the_best_validation(stop: int, tmp_path: Path) -> None:
    def run(epochs: int, module: Any, checkpoint: Path | None = None) -> AndersonCallback:
        callback = anderson()
        trainer = fit(
            module,
            batches(8, noise=0.1),
            callback,
            max_epochs=epochs,
            num_sanity_val_steps=0,
            ckpt_path=checkpoint,
        )
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return callback

    whole, first, resumed = scripted(), scripted(), scripted()
    expected = run(len(VALUES), whole)
    run(stop, first)
    found = run(len(VALUES), resumed, tmp_path / f"{stop}.ckpt")
    assert torch.equal(weights(resumed), weights(whole))
    assert counters(found) == counters(expected)
    assert found.state_dict()["outcomes"] == expected.state_dict()["outcomes"]
    assert found.state_dict()["outcomes"][WAITS] > 0


def test_a_second_fit_knows_nothing_of_the_first_ones_validations() -> None:
    callback = anderson()
    module = scripted([1.0, *[2.0] * 5])
    fit(module, batches(8, noise=0.1), callback, max_epochs=3)
    waited = callback.state_dict()["outcomes"][WAITS]
    assert waited > 0
    module.values = [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]
    fit(module, batches(8, noise=0.1), callback, max_epochs=6)
    assert callback.state_dict()["outcomes"][WAITS] == waited


@pytest.mark.parametrize(
    "options",
    [{"monitor": None}, {"limit_val_batches": 0}, {"monitor": "val/loss", "monitor_mode": "max"}],
)
def test_a_resumed_run_forgets_what_nobody_asks_for(options: Any, tmp_path: Path) -> None:
    def run(values: list[float], callback: Any, epochs: int, **trainer: Any) -> Any:
        trainer = fit(
            scripted(values),
            batches(8, noise=0.1),
            callback,
            max_epochs=epochs,
            num_sanity_val_steps=0,
            **trainer,
        )
        return trainer, callback.state_dict()["outcomes"].get(WAITS, 0)

    trainer, waited = run([1.0, 2.0], anderson(monitor="val/loss"), 2)
    assert waited == 0
    trainer.save_checkpoint(tmp_path / "worse.ckpt")
    settings = {"limit_val_batches": 1.0, "ckpt_path": tmp_path / "worse.ckpt"}
    rising = [1.0, 2.0, 3.0, 4.0]
    _, waited = run(rising, anderson(monitor="val/loss"), 4, **settings)
    assert waited == 4
    settings |= {name: options.pop(name) for name in ("limit_val_batches",) if name in options}
    _, waited = run(rising, anderson(**{"monitor": "val/loss"} | options), 4, **settings)
    assert waited == 0


class OtherValues(Scripted, Regression):
    """Of two processes, the second one validates to other values, and once to none."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_start(self) -> None:
        if self.global_rank == 1:
            self.values = [1.0, None, 2.0, 0.5, 3.0, 0.1]

    def on_fit_end(self) -> None:
        (callback,) = self.trainer.callbacks
        told = {"weights": weights(self), "outcomes": callback.state_dict()["outcomes"]}
        torch.save(told, self.folder / f"{self.global_rank}.pt")


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore:It is recommended to use")
def test_the_first_process_decides_for_all(tmp_path: Path) -> None:
    fit(
        OtherValues(tmp_path),
        batches(16, noise=1.0),
        anderson(),
        max_epochs=len(VALUES),
        num_sanity_val_steps=0,
        strategy="ddp_spawn",
        devices=2,
    )
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert one["outcomes"] == other["outcomes"]
    assert one["outcomes"][WAITS] > 0
    assert torch.equal(one["weights"], other["weights"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"monitor": 3}, "monitor must be the name of a metric, 'auto' or None, got 3"),
        ({"monitor": ""}, "monitor must be the name of a metric, 'auto' or None, got ''"),
        (
            {"monitor_mode": "max"},
            "monitor_mode='max' needs monitor to name the metric, got 'auto', which knows its own",
        ),
        ({"monitor_mode": "less"}, "monitor_mode must be 'min' or 'max', got 'less'"),
    ],
)
def test_a_wrong_monitor_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises((TypeError, ValueError)) as refusal:
        AndersonCallback(**options)
    assert str(refusal.value) == sentence
