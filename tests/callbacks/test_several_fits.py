"""What is left of a fit: by an exception, for another one, and where nothing is left to train."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch import callbacks as of_lightning
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from tests.callbacks.regression import (
    QUIET,
    Regression,
    anderson,
    batches,
    counters,
    fit,
    network,
    rows,
    weights,
)


class Validated(Regression):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", mse_loss(self.network(batch[0]), batch[1]))

    def val_dataloader(self) -> Any:
        return batches(1)


class Fails(Validated):
    fail_at = -1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_step == self.fail_at:
            raise RuntimeError("interrupted")
        return super().training_step(batch, batch_idx)


def interrupted(apply_to: Any) -> tuple[Any, Any]:
    """Module and callback of a fit that failed, with a candidate for evaluation."""
    module, callback = Fails(), anderson(safeguard="none", apply_to=apply_to)
    module.fail_at = 10
    with pytest.raises(RuntimeError, match="interrupted"):
        fit(module, batches(1), callback, max_epochs=20)
    module.fail_at = -1
    return module, callback


@pytest.mark.parametrize("apply_to", ["evaluation", "both"])
def test_after_an_exception_another_trainer_saves_what_the_module_holds(
    apply_to: Any, tmp_path: Path
) -> None:
    module, _ = interrupted(apply_to)
    trainer = fit(module, batches(1), max_epochs=3)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    saved = torch.load(tmp_path / "plain.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(saved[name], value) for name, value in module.state_dict().items())


@pytest.mark.parametrize("apply_to", ["evaluation", "both"])
def test_after_an_exception_validation_on_its_own_sees_the_module(apply_to: Any) -> None:
    module, callback = interrupted(apply_to)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(0.5)
    (batch,) = batches(1)
    expected = mse_loss(module.network(batch[0]), batch[1]).item()
    trainer = Trainer(**QUIET, callbacks=[callback])
    assert trainer.validate(module, batches(1))[0]["val/loss"] == pytest.approx(expected)


@pytest.mark.parametrize("apply_to", ["evaluation", "both"])
def test_after_an_exception_a_second_fit_shows_candidates_of_its_own(
    apply_to: Any, tmp_path: Path
) -> None:
    module, callback = interrupted(apply_to)

    class Looks(Callback):
        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if trainer.global_step == 10:
                self.seen = callback._evaluation.replacements()
                trainer.save_checkpoint(tmp_path / "second.ckpt")

    fit(module, batches(1), callback, looks := Looks(), max_epochs=12)
    saved = torch.load(tmp_path / "second.ckpt", weights_only=True)["state_dict"]
    assert looks.seen
    assert all(torch.equal(saved[name], value) for name, value in looks.seen.items())
    assert "on_save_checkpoint" not in vars(module)


def test_a_hook_of_somebody_else_is_left_in_its_place() -> None:
    calls: list[int] = []
    module = Regression()
    hook = module.__dict__["on_save_checkpoint"] = lambda checkpoint: calls.append(1)
    fit(module, batches(1), anderson(safeguard="none", apply_to="both"), max_epochs=9)
    assert module.on_save_checkpoint is hook


def test_a_finished_run_that_is_started_again_shows_the_weights_of_its_end(
    tmp_path: Path,
) -> None:
    first, again = Fails(), Fails()
    options: dict[str, Any] = {"safeguard": "none", "apply_to": "evaluation"}
    trainer = fit(first, batches(1), anderson(**options), max_epochs=10)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    callback = anderson(**options)
    trainer = fit(again, batches(1), callback, max_epochs=10, ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(weights(first), weights(again))
    trainer.save_checkpoint(tmp_path / "again.ckpt")
    ended, restarted = (
        torch.load(tmp_path / name, weights_only=True) for name in ("last.ckpt", "again.ckpt")
    )
    of_training = [one["callbacks"][callback.state_key]["training"] for one in (ended, restarted)]
    for states in (of_training, [ended["state_dict"], restarted["state_dict"]]):
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    name, value = next(iter(of_training[0].items()))
    assert not torch.equal(value, ended["state_dict"][name]), "there is a candidate"


def test_a_candidate_of_a_checkpoint_is_not_shown_where_candidates_are_for_training(
    tmp_path: Path,
) -> None:
    path = tmp_path / "both.ckpt"

    class Saves(Callback):
        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if trainer.global_step == 9:
                trainer.save_checkpoint(path)

    both = anderson(safeguard="none", apply_to="both")
    fit(Regression(), batches(1), both, Saves(), max_epochs=10)
    kept = torch.load(path, weights_only=True)["callbacks"][both.state_key]
    assert kept["evaluation"].numel() == sum(one.numel() for one in network().parameters())

    class Looks(Callback):
        seen: bool | None = None

        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if self.seen is None:
                self.seen = callback.accelerator.evaluation_weights_ready  # type: ignore[union-attr]

    callback, looks = anderson(safeguard="none", apply_to="training"), Looks()
    fit(Regression(), batches(1), callback, looks, max_epochs=11, ckpt_path=path)
    assert looks.seen is False


def test_another_module_begins_with_the_warm_up_and_counts_anew() -> None:
    callback = anderson(warmup_steps=8)
    fit(Regression(network(seed=0)), batches(1), callback, max_epochs=20)
    assert counters(callback)["attempted"] == 4
    assert callback.extra_losses >= 8
    fit(Regression(network(seed=1)), batches(1), callback, max_epochs=7)
    assert (counters(callback)["optimizer_steps"], counters(callback)["attempted"]) == (7, 0)
    assert callback.extra_losses == 0


class Classifies(Regression):
    rows_needed = 1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, classes = batch
        self.judged_on.add(len(x))
        return (
            mse_loss(self.network(x[:, :4]), classes[:, None].float())
            + 0.0 * x[self.rows_needed - 1].sum()
        )


def test_what_one_module_cannot_do_is_not_held_against_another() -> None:
    data = TensorDataset(torch.randn(64, 4), torch.randint(2, (64,)))
    callback = anderson()
    judged_on = []
    for needed in (32, 1):
        module = Classifies()
        module.rows_needed, module.judged_on = needed, set()
        fit(module, DataLoader(data, batch_size=32), callback, max_epochs=6)
        judged_on.append((module.judged_on, callback.state_dict()["batches"]["indivisible"]))
    assert judged_on == [({16, 32}, True), ({16, 32}, False)]


def test_a_judge_that_failed_still_runs_the_forward_pass_that_others_may_wait_in() -> None:
    sizes: list[int] = []

    class Counts(Classifies):
        rows_needed = 32

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            sizes.append(len(batch[0]))
            return super().training_step(batch, batch_idx)

    module = Counts()
    module.judged_on = set()
    data = TensorDataset(torch.randn(32, 4), torch.randint(2, (32,)))
    fit(module, DataLoader(data, batch_size=32), anderson(regularization=1e-2), max_epochs=8)
    # four steps, the judging that fails on 16 samples, four steps, and two losses of all
    assert sizes == [32] * 4 + [16, 32] + [32] * 4 + [32, 32]


@pytest.mark.skipif(
    not hasattr(of_lightning, "WeightAveraging"), reason="it came with Lightning 2.6"
)
@pytest.mark.parametrize("apply_to", ["evaluation", "both"])
def test_averages_that_want_the_same_place_are_refused(apply_to: Any) -> None:
    sentence = (
        f"apply_to='{apply_to}' of AndersonCallback and EMAWeightAveraging both decide which "
        "weights validation and checkpoints hold: choose apply_to='training'"
    )
    averages: Any = vars(of_lightning)["EMAWeightAveraging"]
    with pytest.raises(ValueError, match=sentence):
        fit(Regression(), batches(1), anderson(apply_to=apply_to), averages(), max_epochs=2)
    fit(Regression(), batches(1), anderson(), averages(), max_epochs=5)
    swa = of_lightning.StochasticWeightAveraging(1e-2)
    with pytest.raises(ValueError, match=sentence.replace("EMA", "Stochastic")):
        fit(Regression(), batches(1), anderson(apply_to=apply_to), swa, max_epochs=2)


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
def test_a_step_that_fetches_its_batches_is_refused() -> None:
    class Fetches(Regression):
        def training_step(self, dataloader_iter: Any) -> Tensor:
            (x, y), _, _ = next(dataloader_iter)
            return mse_loss(self.network(x), y)

    with pytest.raises(ValueError, match=r"training_step\(dataloader_iter\) is not supported by"):
        fit(Fetches(), batches(4), anderson(), max_epochs=2)
    callback = anderson(safeguard="none")
    fit(Fetches(), batches(4), callback, max_epochs=2)
    assert counters(callback)["optimizer_steps"] == 8


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
def test_a_step_that_fetches_its_batches_is_judged_on_the_last_of_them() -> None:
    trained_on: list[Tensor] = []
    judged_on: set[int] = set()

    class Fetches(Regression):
        def training_step(self, dataloader_iter: Any) -> Tensor:
            (x, y), _, _ = next(dataloader_iter)
            trained_on.append(x)
            return mse_loss(self.network(x), y)

        def anderson_loss(self, batch: Any) -> Tensor:
            judged_on.add(len(trained_on))
            assert torch.equal(batch[0], trained_on[-1])
            return mse_loss(self.network(batch[0]), batch[1])

    fit(Fetches(), batches(8), anderson(), max_epochs=2)
    assert judged_on == {4, 8, 12, 16}


def test_what_a_hook_puts_into_the_batch_is_there_when_candidates_are_judged() -> None:
    calls: Counter[Any] = Counter()

    class Drawn(Regression):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            calls["target" in batch] += 1
            batch["noise"] = torch.randn(1)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, target = batch["x"], batch.pop("target")
            batch["loss"] = mse_loss(self.network(x), target + 1e-3 * batch["noise"])
            calls["judged"] += 1
            return batch["loss"]

    samples: Any = [{"x": x, "target": y} for x, y in rows(32)]
    fit(Drawn(), DataLoader(samples, batch_size=8), anderson(), max_epochs=2)
    assert calls[True] == 8
    assert calls["judged"] > 8


class Mixes(Validated):
    draw: Callable[[], float]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        share = self.draw()
        x, y = (share * one + (1 - share) * one.flip(0) for one in batch)
        return super().training_step((x, y), batch_idx)


@pytest.mark.parametrize(
    "draw",
    [lambda: float(np.random.beta(0.4, 0.4)), random.random, lambda: float(torch.rand(()))],
    ids=["numpy", "random", "torch"],
)
def test_recalibration_leaves_every_generator_alone(draw: Any) -> None:
    found = []
    for recalibrate in (0, 3):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        module = Mixes(network(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)))
        module.draw = draw
        callback = anderson(recalibrate_batch_norm=recalibrate)
        loader = DataLoader(rows(16), batch_size=16)
        fit(module, loader, callback, max_epochs=30)
        found.append((module, callback))
    (plain, _), (recalibrated, callback) = found
    assert counters(callback)["accepted"] > 0
    for one, other in zip(plain.parameters(), recalibrated.parameters(), strict=True):
        assert torch.equal(one, other)


class Unwilling(Regression):
    """Likes every loss less than the one before."""

    asked = 0

    def anderson_loss(self, batch: Any) -> Tensor:
        self.asked += 1
        return torch.tensor(float(self.asked))


def test_another_fit_looks_as_far_ahead_as_the_first_one_did() -> None:
    module, callback = Unwilling(), anderson()
    fit(module, batches(8, noise=1.0), callback, max_epochs=4)
    assert callback.state_dict()["look_ahead"]["share"] < 1.0
    fit(module, batches(8, noise=1.0), callback, max_steps=1, max_epochs=-1)
    assert callback.state_dict()["look_ahead"]["share"] == 1.0
