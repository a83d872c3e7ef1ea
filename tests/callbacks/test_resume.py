"""A run that is stopped, or killed, and resumed ends bitwise as the uninterrupted run."""

import functools
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from lightning_stableaa import AndersonCallback, SmoothingMonitor
from tests.helpers.problems import assert_bitwise_equal
from tests.helpers.ranks import Ranks
from tests.helpers.regression import (
    INPUTS,
    Alternates,
    Record,
    Steered,
    anderson,
    batches,
    counters,
    fit,
    network,
    outcomes,
    weights,
)
from tests.helpers.regression import SaveAt as Saves

# The batch belongs to the step here, whatever the loader does after a resume.
pytestmark = pytest.mark.filterwarnings(
    "ignore:You're resuming from a checkpoint that ended before the epoch ended",
    "ignore:Be aware that when using `ckpt_path`",
)

KEY = "AndersonCallback"


class Stepwise(Steered):
    """Batch and random numbers belong to the step; the candidates of 6, 18 and 30 are accepted."""

    def __init__(self, make_optimizer: Any = None) -> None:
        layers = [nn.Linear(INPUTS, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.1)]
        adam = lambda p: torch.optim.Adam(p, lr=1e-3)  # noqa: E731
        net = network(*layers, nn.Linear(8, 1))
        super().__init__(net, make_optimizer or adam, steering=Alternates(12, at=6))

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        generator = torch.Generator().manual_seed(self.global_step)
        x = torch.randn(8, INPUTS, generator=generator)
        return x, x.sum(dim=1, keepdim=True)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(self.global_step)


def sixths(**options: Any) -> AndersonCallback:
    """An iterate every third step, an attempt every sixth."""
    return anderson(**{"store_every_n_steps": 3, "accelerate_every_n_steps": 6} | options)


def assert_resumes(
    folder: Path, make_callbacks: Any, stops: Sequence[int], make_optimizer: Any = None
) -> AndersonCallback:
    """30 steps at once, and the rest after each of ``stops``; the callback of the former."""

    def run(*saves: Any, ckpt_path: Any = None) -> tuple[Any, list[float], AndersonCallback]:
        callbacks, module = make_callbacks(), Stepwise(make_optimizer)
        losses = Record(lambda trainer, _: trainer.callback_metrics["train/loss"].item())
        options = {"ckpt_path": ckpt_path, "max_epochs": 3, "log_every_n_steps": 1}
        fit(module, batches(10), *callbacks, losses, *saves, **options)
        (callback,) = (one for one in callbacks if isinstance(one, AndersonCallback))
        return weights(module), losses.values, callback

    paths = {stop: folder / f"{stop}.ckpt" for stop in stops}
    whole = run(*(Saves(stop, path) for stop, path in paths.items()))
    for stop, path in paths.items():
        resumed = run(ckpt_path=path)
        assert torch.equal(whole[0], resumed[0]), stop
        assert resumed[1] == whole[1][stop:], stop
        assert_bitwise_equal(resumed[2].state_dict(), whole[2].state_dict(), f"stop {stop}")
        assert resumed[2].loss_evaluations == whole[2].loss_evaluations
    return whole[2]


def test_resume_at_any_step_is_bitwise(tmp_path: Path) -> None:
    # in a cycle, before and after an attempt and a cycle's end, at the end of an epoch (10, 20)
    stops = [1, 5, 6, 9, 10, 11, 12, 17, 18, 20, 29]
    callback = assert_resumes(tmp_path, lambda: [sixths()], stops)
    assert counters(callback)["attempted"] == 5
    assert outcomes(callback)["accepted"] == 3  # at 6, 18 and 30


SMOOTHING: dict[str, dict[str, Any]] = {
    "updates": {"average_window": 3, "rsd_threshold": 0.0},
    "iterates": {"average_window": 2, "of": "iterates", "rsd": "max", "rsd_threshold": 0.0},
    "weights": {"apply_to": "weights", "rsd_threshold": 0.05},
}


@pytest.mark.parametrize("monitor_first", [True, False])
@pytest.mark.parametrize("smoothing", SMOOTHING)
def test_resume_with_monitor_is_bitwise(
    smoothing: str, monitor_first: bool, tmp_path: Path
) -> None:
    def make_callbacks() -> list[Any]:
        callbacks = [SmoothingMonitor(**SMOOTHING[smoothing]), sixths()]
        return callbacks if monitor_first else callbacks[::-1]

    momentum = functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9)
    assert_resumes(tmp_path, make_callbacks, [17], momentum)


def test_checkpoint_holds_plain_containers(tmp_path: Path) -> None:
    path = tmp_path / "stop.ckpt"
    callbacks = [sixths(), SmoothingMonitor(average_window=2), Saves(17, path)]
    fit(Stepwise(), batches(10), *callbacks, max_epochs=2)
    state = torch.load(path, weights_only=True)["callbacks"]
    assert state[KEY]["counters"]["optimizer_steps"] == 17
    assert (state[KEY]["cycle_steps"], state[KEY]["steps_since_attempt"]) == (2, 5)
    assert "SmoothingMonitor" not in state  # the engine of the AndersonCallback has it


@pytest.mark.parametrize(
    ("make_callbacks", "dropped"),
    [
        (lambda: [sixths(safeguard="none", regularization=1e-3, warmup_steps=24)], []),
        (lambda: [sixths(history_depth=4)], ["history_depth"]),
        (lambda: [sixths(), SmoothingMonitor()], ["smoothing"]),
    ],
    ids=["options beside the history", "history_depth", "smoothing"],
)
def test_resume_with_other_options_drops_history_that_depends_on_them(
    make_callbacks: Any, dropped: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "stop.ckpt"
    fit(Stepwise(), batches(10), sixths(), Saves(18, path), max_epochs=2)
    callback, *monitor = make_callbacks()
    residuals = Record(lambda *_: sum(callback.state_dict()["iterates"]["ends_cycle"]))
    fit(Stepwise(), batches(10), callback, *monitor, residuals, ckpt_path=path, max_epochs=3)
    assert residuals.values[0] == (0 if dropped else 4)
    assert counters(callback)["optimizer_steps"] == 30
    head = "the Anderson history of the checkpoint was dropped and restarts: it was stored with "
    messages = [one for one in caplog.messages if one.startswith(head)]
    assert messages == [f"{head}another {name}" for name in dropped]


# A process that dies, and one that goes on from the last checkpoint.

DEATHS = (("anderson_loss", 11), ("optimizer_step", 21), ("on_save_checkpoint", 31))


class Mortal(Stepwise):
    """Kills its process at the ``moment`` of the micro-batch ``batch``, counted from 0."""

    def __init__(self, moment: str, batch: int) -> None:
        super().__init__()
        self.death = (moment, batch)

    def pass_by(self, moment: str) -> None:
        if self.death == (moment, self.trainer.fit_loop.total_batch_idx):
            os.kill(os.getpid(), signal.SIGKILL)

    def anderson_loss(self, batch: Any) -> Tensor:
        self.pass_by("anderson_loss")
        return mse_loss(self.network(batch[0]), batch[1])

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        super().optimizer_step(*arguments, **options)
        self.pass_by("optimizer_step")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.pass_by("on_save_checkpoint")


def train_mortal(folder: str, moment: str, batch: int, ckpt_path: str | None) -> Any:
    """42 micro-batches, two a step, a checkpoint every second step; everything at the end."""
    schedule = {"store_every_n_steps": 2, "accelerate_every_n_steps": 2, "history_depth": 4}
    keep = ModelCheckpoint(
        folder, every_n_train_steps=2, save_last=True, enable_version_counter=False
    )
    callback, module = anderson(**schedule), Mortal(moment, batch)
    callbacks = [callback, SmoothingMonitor(average_window=2, rsd_threshold=0.02), keep]
    options = {"accumulate_grad_batches": 2, "max_epochs": 3, "enable_checkpointing": True}
    trainer = fit(module, batches(14), *callbacks, ckpt_path=ckpt_path, **options)
    states = (module.state_dict(), trainer.optimizers[0].state_dict(), callback.state_dict())
    return {"states": states, "step": trainer.global_step, "random": torch.get_rng_state()}


@pytest.mark.slow
@pytest.mark.ddp
def test_killed_run_resumes_bitwise_whatever_it_was_doing(tmp_path: Path) -> None:
    processes = Ranks(1)
    try:
        (whole,) = processes.run(train_mortal, str(tmp_path / "whole"), "never", -1, None)
        state = whole["states"][2]
        assert state["counters"]["optimizer_steps"] == 21
        assert state["counters"]["attempted"] == 9
        for moment, batch in DEATHS:
            folder = str(tmp_path / f"{moment}{batch}")
            killed = processes.run(train_mortal, folder, moment, batch, None, killed=0)
            assert killed == [-signal.SIGKILL], moment
            last = str(Path(folder, "last.ckpt"))
            (end,) = processes.run(train_mortal, folder, "never", -1, last)
            assert_bitwise_equal(end, whole, f"{moment} {batch}")
    finally:
        processes.close()
