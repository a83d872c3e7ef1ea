"""A run that is stopped and resumed from a checkpoint ends with the weights of the whole run."""

from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_stableaa import AndersonCallback, SmoothingMonitor
from tests.callbacks.regression import (
    INPUTS,
    Record,
    Regression,
    anderson,
    batches,
    counters,
    fit,
    momentum_sgd,
    network,
    weights,
)

# Here the step decides on the batch, whatever the loader does after a resume.
pytestmark = pytest.mark.filterwarnings(
    "ignore:You're resuming from a checkpoint that ended before the epoch ended"
)

SMOOTHING: dict[str, Any] = {"average_window": 2, "rsd_threshold": 0.02}


class Stepwise(Regression):
    """The batch belongs to the step: a resumed run sees what the whole run sees."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        generator = torch.Generator().manual_seed(self.trainer.global_step)
        x = torch.randn(8, INPUTS, generator=generator)
        return x, x.sum(dim=1, keepdim=True) + 0.1 * torch.randn(8, 1, generator=generator)


def loader() -> DataLoader:
    """10 steps an epoch."""
    return batches(10, size=1)


class SaveAt(lightning.pytorch.Callback):
    """Writes a checkpoint after a step, as ModelCheckpoint(every_n_train_steps) would."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def adam(parameters: Any) -> Any:
    return torch.optim.Adam(parameters, lr=0.01)


def thirds(**options: Any) -> AndersonCallback:
    return anderson(**{"store_every_n_steps": 3, "accelerate_every_n_steps": 6} | options)


def whole_and_resumed(path: Path, make_callbacks: Any, *, stop: int, optimizer: Any) -> Any:
    """(weights, losses, first callback) of 30 steps at once and of ``stop`` plus the rest."""
    ends = []
    for start in (None, path):
        callbacks = make_callbacks()
        module = Stepwise(network(), optimizer)
        losses = Record(lambda trainer, _: trainer.callback_metrics["train/loss"].item())
        save = [] if start else [SaveAt(stop, path)]  # the last in the list: after the others
        fit(module, loader(), *callbacks, losses, *save, ckpt_path=start, max_epochs=3)
        ends.append((weights(module), losses.values, callbacks[0]))
    return ends


@pytest.mark.parametrize("optimizer", [momentum_sgd, adam], ids=["sgd", "adam"])
@pytest.mark.parametrize(
    ("options", "monitor"),
    [
        ({}, {}),
        ({}, SMOOTHING),
        ({}, SMOOTHING | {"rsd": "max", "apply_to": "weights"}),
        ({"optimizer_state": "mix"}, SMOOTHING | {"of": "updates"}),
    ],
    ids=["anderson", "smoothing", "smoothed weights", "mixed momentum"],
)
def test_a_resumed_run_is_bitwise_the_whole_run(
    options: Any, monitor: Any, optimizer: Any, tmp_path: Path
) -> None:
    def make_callbacks() -> list[Any]:
        return [thirds(**options), *([SmoothingMonitor(**monitor)] if monitor else [])]

    # step 17 of 30, the 7th of the second epoch and the second of its cycle
    whole, resumed = whole_and_resumed(
        tmp_path / "stop.ckpt", make_callbacks, stop=17, optimizer=optimizer
    )

    assert torch.equal(whole[0], resumed[0])
    assert resumed[1] == whole[1][17:]
    assert counters(resumed[2]) == counters(whole[2])
    assert counters(whole[2])["attempted"] >= 4
    assert counters(whole[2])["accepted"] >= 1
    assert resumed[2].extra_losses == whole[2].extra_losses >= 8
    history = [one[2].state_dict()["points"]["history"] for one in (whole, resumed)]
    assert torch.equal(history[0]["rows"], history[1]["rows"])
    assert history[0]["links"] == history[1]["links"]


@pytest.mark.parametrize("stop", [10, 12, 18, 20])
def test_any_step_will_do(stop: int, tmp_path: Path) -> None:
    """At the end of an epoch (10, 20), of a cycle (12, 18), and right after an extrapolation."""
    whole, resumed = whole_and_resumed(
        tmp_path / "stop.ckpt", lambda: [thirds()], stop=stop, optimizer=momentum_sgd
    )

    assert torch.equal(whole[0], resumed[0])
    assert resumed[1] == whole[1][stop:]


def test_a_monitor_alone_resumes_its_window(tmp_path: Path) -> None:
    whole, resumed = whole_and_resumed(
        tmp_path / "stop.ckpt",
        lambda: [SmoothingMonitor(average_window=5, rsd_threshold=0.0, apply_to="weights")],
        stop=17,
        optimizer=momentum_sgd,
    )

    assert torch.equal(whole[0], resumed[0])
    assert whole[2].state_dict()["position"] == resumed[2].state_dict()["position"] == 0


def test_a_checkpoint_holds_tensors_and_plain_containers(tmp_path: Path) -> None:
    path = tmp_path / "stop.ckpt"
    callbacks = [thirds(optimizer_state="mix", apply_to="both"), SmoothingMonitor(**SMOOTHING)]
    fit(Stepwise(), loader(), *callbacks, SaveAt(17, path), max_epochs=2)

    state = torch.load(path, weights_only=True)["callbacks"]["AndersonCallback"]
    assert state["counters"]["optimizer_steps"] == 17
    assert state["points"]["momentum"]["rows"].shape == state["points"]["history"]["rows"].shape
    assert state["smoother"]["statistics"]["count"] == 1  # 2 steps into a cycle of 3, window of 2


def test_other_options_drop_the_history_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "stop.ckpt"
    fit(Stepwise(), loader(), thirds(), SaveAt(17, path), max_epochs=2)
    caplog.clear()
    callback = thirds(history_depth=4)
    fit(Stepwise(), loader(), callback, ckpt_path=path, max_epochs=3)

    warnings = [one for one in caplog.messages if "history of the checkpoint" in one]
    assert warnings == [
        "the Anderson history of the checkpoint was dropped and starts anew: it was stored with "
        "another history_depth"
    ]
    assert counters(callback)["optimizer_steps"] == 30


def test_a_monitor_resumed_with_other_options_starts_a_new_window(tmp_path: Path) -> None:
    path = tmp_path / "stop.ckpt"
    fit(Stepwise(), loader(), SmoothingMonitor(average_window=10), SaveAt(17, path), max_epochs=2)
    other = SmoothingMonitor(average_window=4, rsd="max")
    fit(Stepwise(), loader(), other, ckpt_path=path, max_epochs=3)

    assert other.state_dict()["position"] == (30 - 17) % 4


def test_a_second_fit_goes_on_counting_with_a_new_history() -> None:
    module, callback = Regression(), thirds()
    trainer = fit(module, batches(5), callback, max_epochs=2)
    assert counters(callback)["optimizer_steps"] == 10
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, batches(5))

    assert counters(callback)["optimizer_steps"] == 20
    assert counters(callback)["attempted"] == 2  # at the sixth step of either, from two residuals
    assert callback.accelerator is None


def test_a_second_fit_of_another_module_shares_no_history() -> None:
    callback, fresh = thirds(), thirds()
    fit(Regression(network(seed=0)), batches(1), callback, max_epochs=8)  # 2 steps into a cycle
    again, alone = Regression(network(seed=1)), Regression(network(seed=1))
    fit(again, batches(1), callback, max_epochs=24)
    fit(alone, batches(1), fresh, max_epochs=24)

    assert counters(fresh)["accepted"] >= 1
    history = callback.state_dict()["points"]["history"]
    assert torch.equal(history["rows"], fresh.state_dict()["points"]["history"]["rows"])
    assert torch.equal(weights(again), weights(alone))


class ReplacesOptimizer(lightning.pytorch.Callback):
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            trainer.strategy.optimizers = [torch.optim.SGD(pl_module.parameters(), lr=0.01)]


def test_an_optimizer_that_is_replaced_is_followed() -> None:
    callback = thirds()
    fit(Regression(), batches(9), ReplacesOptimizer(), callback, max_epochs=3)

    assert counters(callback)["optimizer_steps"] == 27
    assert counters(callback)["attempted"] == 4


def test_a_parameter_group_that_is_added_starts_a_new_history() -> None:
    class Unfreezes(lightning.pytorch.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                pl_module.network[0].requires_grad_(True)
                parameters = list(pl_module.network[0].parameters())
                trainer.optimizers[0].add_param_group({"params": parameters})

    class Frozen(Regression):
        def configure_optimizers(self) -> Any:
            self.network[0].requires_grad_(False)
            return torch.optim.SGD(self.network[2].parameters(), lr=0.01)

    callback, module = thirds(), Frozen()
    fit(module, batches(9), Unfreezes(), callback, max_epochs=2)

    points = callback.state_dict()["points"]["history"]["rows"]
    assert points.shape[1] == sum(p.numel() for p in module.parameters())
    # the cycle of the change, 10 to 12, is lost: points at 12, 15 and 18
    assert points.shape[0] == 3
    assert counters(callback)["optimizer_steps"] == 18
