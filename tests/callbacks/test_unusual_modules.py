"""Modules and batches that plain training does not mind, and that acceleration must not either."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader

from lightning_stableaa import SmoothingMonitor
from tests.callbacks.regression import (
    INPUTS,
    QUIET,
    Record,
    Regression,
    anderson,
    batches,
    counters,
    fit,
    momentum_sgd,
    network,
    rows,
    weights,
)

EPOCHS = 24


class Losses(Callback):
    """Before and after, of every extrapolation; to stand behind the callback that it watches."""

    def __init__(self, callback: Any) -> None:
        self.callback = callback
        self.values: list[tuple[float, float]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        engine = self.callback.accelerator
        step = engine.step

        def watched(*arguments: Any) -> Any:
            report = step(*arguments)
            if report.attempted:
                self.values.append((report.loss_before, report.loss_after))
            return report

        engine.step = watched


class SizeOfBatch(Callback):
    """Sum of the magnitudes of the inputs, as the callbacks before it leave them."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.values.append(float(batch[0].abs().sum()))


def attempts(module: Any, loader: Any = None, **options: Any) -> list[tuple[float, float]]:
    callback = anderson(**options)
    losses = Losses(callback)
    fit(module, loader or batches(1), callback, losses, max_epochs=EPOCHS)
    return losses.values


class TakesOut(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        y = batch.pop("y")
        return mse_loss(self.network(**batch), y)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_a_training_step_that_takes_things_out_of_its_batch_is_judged_on_all_of_it() -> None:
    samples = [{"x": x, "y": y} for x, y in rows(8)]
    found = attempts(TakesOut(Named()), DataLoader(samples, batch_size=8))  # pyright: ignore
    assert found == attempts(Regression())
    assert len(found) == EPOCHS // 4


class Halves(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        x.mul_(0.5)
        return mse_loss(self.network(x), y)


class OfHalves(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return mse_loss(self.network(0.5 * batch[0]), batch[1])


@pytest.mark.parametrize("samples", [None, 3])
def test_a_training_step_that_writes_to_its_batch_is_judged_on_equal_ones(
    samples: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    """One extrapolation is given up to notice it; then both losses are of the same inputs."""
    module, callback = Halves(), anderson(judge_samples=samples)
    losses, left = Losses(callback), SizeOfBatch()
    fit(module, batches(1), callback, losses, left, max_epochs=EPOCHS)
    assert "training_step writes to the tensors of its batch" in caplog.text
    (_, after), *others = losses.values
    assert np.isnan(after)
    assert np.isfinite(others).all()
    assert len(set(left.values[4:])) == 1, "judging left the batch as the step did"
    assert any(after < before for before, after in others)


class WithTable(Regression):
    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_buffers_that_cannot_be_written_to_are_left_alone(tmp_path: Path) -> None:
    np.save(tmp_path / "table.npy", np.arange(4096.0))
    read_only = torch.from_numpy(np.load(tmp_path / "table.npy", mmap_mode="r"))
    expected = attempts(Regression())
    for table in (read_only, torch.linspace(0, 1, 8).expand(64, 8)):
        assert attempts(WithTable(table)) == expected


def test_a_buffer_in_the_memory_of_a_weight_goes_with_the_weight() -> None:
    module = Regression()
    module.register_buffer("shared", module.network[0].weight.data)
    plain = Regression()
    for one in (module, plain):
        callback = anderson()
        fit(one, batches(1), callback, max_epochs=EPOCHS)
        assert counters(callback)["accepted"] > 0
    assert torch.equal(weights(module.network), weights(plain.network))


class KeepsStatistics(Regression):
    """A layer of batch normalisation that is fine-tuned around, in evaluation mode."""

    def on_train_epoch_start(self) -> None:
        self.network[1].eval()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.network(batch[0])

    def val_dataloader(self) -> Any:
        return batches(1)


@pytest.mark.parametrize("apply_to", ["training", "both"])
def test_recalibration_leaves_statistics_that_are_not_trained_alone(apply_to: Any) -> None:
    ends = []
    for recalibrate in (0, 2):
        layers = (nn.Linear(INPUTS, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
        module = KeepsStatistics(network(*layers))
        module.network[1].running_mean.fill_(0.3)
        callback = anderson(recalibrate_batch_norm=recalibrate, apply_to=apply_to)
        fit(module, batches(1), callback, max_epochs=EPOCHS)
        assert counters(callback)["accepted"] > 0
        assert bool((module.network[1].running_mean == 0.3).all())
        ends.append(weights(module))
    assert torch.equal(*ends)


@pytest.mark.parametrize("make", [anderson, lambda: SmoothingMonitor(rsd_threshold=0.0)])
def test_a_lazy_module_is_trained_from_its_first_batch_on(make: Any) -> None:
    callback = make()
    net = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(1))
    fit(Regression(net), batches(1), callback, max_epochs=EPOCHS)
    state = callback.state_dict()
    if "counters" in state:  # cycles begin with the second step
        assert counters(callback)["attempted"] == (EPOCHS - 1) // 4
        assert state["outcomes"].keys() <= {"accepted", "rejected_loss"}
        assert state["points"]["history"]["rows"].shape[1] == 8 * INPUTS + 8 + 8 + 1
    else:
        assert state["layout"]


class Batches(Sequence[Any]):
    """A loader of its own kind, which makes its batches when asked for them."""

    def __init__(self, *, length: int, size: int) -> None:
        self.length, self.size, self.made = length, size, 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        if index >= self.length:
            raise IndexError(index)
        self.made += 1
        return rows(self.size, seed=index).tensors


def test_a_loader_that_is_a_sequence_is_not_read_by_anybody_else() -> None:
    loader = Batches(length=2, size=8)
    callback = anderson()
    fit(Regression(), loader, callback, max_epochs=EPOCHS)
    assert loader.made == 2 * EPOCHS
    assert counters(callback)["attempted"] == EPOCHS // 2


class OwnBatch(dict[str, Tensor]):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__(x=x, y=y)

    def to(self, device: Any, **_: Any) -> OwnBatch:
        return OwnBatch(self["x"].to(device), self["y"].to(device))


class Classifier(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self.network(batch["x"]), batch["y"])


def test_a_container_that_cannot_be_rebuilt_is_judged_whole(
    caplog: pytest.LogCaptureFixture,
) -> None:
    x, _ = rows(64).tensors
    whole = OwnBatch(x, (x.sum(1) > 0).long())
    loader = DataLoader(list(range(64)), batch_size=64, collate_fn=lambda _: whole)  # pyright: ignore
    callback = anderson()
    fit(Classifier(network(nn.Linear(INPUTS, 2))), loader, callback, max_epochs=EPOCHS)
    assert "from now on whole batches judge" in caplog.text
    assert counters(callback)["attempted"] == EPOCHS // 4
    assert callback.extra_losses == 6 * (EPOCHS // 4)  # one before, and five lambdas


@pytest.mark.filterwarnings("ignore:train_dataloader yielded None")
def test_a_loader_may_skip_steps() -> None:
    kept: list[Any] = [*batches(4)]
    with_gaps: Any = [kept[0], None, *kept[1:], None]
    normalised = network(nn.Linear(INPUTS, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
    callback = anderson(safeguard="none", recalibrate_batch_norm=6)
    module = Regression(normalised)
    module.val_dataloader = lambda: batches(1)
    module.validation_step = lambda batch, batch_idx: module.training_step(batch, batch_idx)
    fit(module, DataLoader(with_gaps, batch_size=None), callback, max_epochs=4)
    assert counters(callback)["optimizer_steps"] == 16
    assert counters(callback)["accepted"] > 0
    assert callback.extra_losses >= 6


def test_anderson_loss_may_return_what_training_step_may() -> None:
    class Named(Regression):
        def anderson_loss(self, batch: Any) -> Any:
            return {"loss": self.training_step(batch, 0), "size": len(batch)}

    ends = []
    for module in (Named(), Regression()):
        callback = anderson()
        fit(module, batches(1), callback, max_epochs=EPOCHS)
        ends.append((weights(module), counters(callback)))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


def test_a_callback_that_has_fitted_can_be_sent_to_another_process() -> None:
    callback = anderson()
    fit(Regression(), batches(1), callback, max_epochs=8)
    copied = pickle.loads(pickle.dumps(callback))
    assert counters(copied) == counters(callback)


class Renames(Regression):
    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        state = super().state_dict(*arguments, **options)
        return {name.removeprefix("network."): value for name, value in state.items()}


def test_checkpoints_under_other_names_are_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = anderson(safeguard="none", apply_to="both")
    save = Record(lambda trainer, _: trainer.save_checkpoint(tmp_path / "now.ckpt"))
    fit(Renames(), batches(1), callback, save, max_epochs=9)
    assert counters(callback)["accepted"] > 0
    assert caplog.text.count("saves them under other names") == 1


class GivesOtherMemory(Regression):
    def on_train_batch_end(self, *_: Any) -> None:
        for one in self.parameters():
            one.data = one.data.clone()


class ClearsGradients(Regression):
    def configure_optimizers(self) -> Any:
        optimizer = momentum_sgd(self.parameters())
        optimizer.register_step_post_hook(lambda one, *_: one.zero_grad())
        return optimizer


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (GivesOtherMemory, "write new values into them"),
        (ClearsGradients, "no step with gradients was seen"),
    ],
)
def test_what_cannot_be_accelerated_is_said(
    module: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        fit(module(), batches(1), anderson(), max_epochs=EPOCHS)
    assert why in caplog.text


def test_nothing_of_a_finished_run_is_left_for_another_module(tmp_path: Path) -> None:
    callback = anderson(safeguard="none", apply_to="evaluation")
    fit(Regression(), batches(1), callback, max_epochs=EPOCHS).save_checkpoint(tmp_path / "a.ckpt")
    again = Regression()
    trainer = Trainer(**QUIET, callbacks=[callback], max_epochs=EPOCHS)
    trainer.fit(again, batches(1), ckpt_path=tmp_path / "a.ckpt")
    other = Regression(network(seed=5))
    expected = weights(other)
    fit(other, batches(1), callback, max_epochs=0)
    assert torch.equal(weights(other), expected)
    fit(Regression(), batches(1), callback, max_epochs=EPOCHS)
    assert counters(callback)["optimizer_steps"] == EPOCHS


def monitored(monitor: SmoothingMonitor, seed: int, *, epochs: int = 16) -> Tensor:
    module = Regression(network(seed=seed))
    fit(module, batches(1), monitor, max_epochs=epochs)
    return weights(module)


def test_a_monitor_begins_anew_with_another_fit() -> None:
    options: dict[str, Any] = {"average_window": 10, "rsd_threshold": 0.01, "apply_to": "weights"}
    used = SmoothingMonitor(**options)
    monitored(used, 0)
    assert torch.equal(monitored(used, 1), monitored(SmoothingMonitor(**options), 1))


class Fails(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        if self.global_step == 14:
            raise RuntimeError("interrupted")
        return super().training_step(batch, batch_idx)


def test_a_monitor_of_an_interrupted_fit_is_another_callbacks_in_the_next() -> None:
    monitor = SmoothingMonitor(rsd_threshold=0.0, apply_to="weights")
    with pytest.raises(RuntimeError, match="interrupted"):
        fit(Fails(), batches(1), monitor, max_epochs=20)
    ends = []
    for one in (monitor, SmoothingMonitor(rsd_threshold=0.0, apply_to="weights")):
        module = Regression()
        fit(module, batches(1), anderson(), one, max_epochs=20)
        ends.append(weights(module))
        assert one.state_dict() == {}
    assert torch.equal(*ends)
