"""AndersonCallback beside the callbacks of Lightning, in every order of the list."""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import callbacks as of_lightning
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger

from tests.helpers.problems import assert_bitwise_equal
from tests.helpers.regression import (
    Alternates,
    Record,
    Reports,
    Steered,
    Validated,
    anderson,
    assert_plain_run,
    batches,
    counters,
    fit,
    outcomes,
    trained,
    weights,
)

needs_averaging = pytest.mark.skipif(
    not hasattr(of_lightning, "WeightAveraging"), reason="it came with Lightning 2.6"
)


@pytest.fixture(autouse=True)
def _empty_working_folder(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the Trainer's own ModelCheckpoint writes."""
    monkeypatch.chdir(tmp_path_factory.mktemp("working"))


class Program(Steered, Validated):
    """Accepts every second candidate."""

    def __init__(self) -> None:
        super().__init__(steering=Alternates(4, at=2))


def run(order: Iterable[Any], *, epochs: int = 3, **options: Any) -> dict[str, Any]:
    """End of a run of four steps an epoch; weights after every step."""
    order = list(order)
    (callback,) = (one for one in order if type(one).__name__ == "AndersonCallback")
    trace, module, reports = Record(lambda _, m: trained(m)), Program(), Reports(callback)
    options = {"enable_checkpointing": True, "max_epochs": epochs} | options
    trainer = fit(module, batches(4), *order, trace, reports, val=batches(), **options)
    return {
        "trace": trace.values,
        "weights": weights(module),
        "accepted": reports.accepted_steps,
        "counters": counters(callback),
        "outcomes": outcomes(callback),
        "steps": trainer.global_step,
        "rates": [group["lr"] for group in trainer.optimizers[0].param_groups],
    }


def alone(**options: Any) -> dict[str, Any]:
    return run([anderson()], enable_checkpointing=False, **options)


def test_every_order_of_passive_callbacks_gives_the_same_run(tmp_path: Path) -> None:
    def make(folder: Path) -> list[Any]:
        return [
            anderson(),
            EarlyStopping("val/loss", patience=1, min_delta=1e9),
            ModelCheckpoint(folder, save_last=True, enable_version_counter=False),
            LearningRateMonitor(),
        ]

    ends, saved = [], []
    for number, order in enumerate(itertools.permutations(range(4))):
        folder = tmp_path / f"{number}"
        callbacks = make(folder)
        logger = CSVLogger(folder, name="log")
        options = {"epochs": 6, "logger": logger, "log_every_n_steps": 4}
        ends.append(run([callbacks[k] for k in order], **options))
        last = torch.load(folder / "last.ckpt", weights_only=True)
        saved.append([last["state_dict"], last["callbacks"]["AndersonCallback"]])
    assert ends[0]["steps"] == 8  # stopped after the second epoch, which was not better
    assert ends[0]["accepted"] == [2, 6]
    for end, checkpoint in zip(ends[1:], saved[1:], strict=True):
        assert_bitwise_equal(end, ends[0])
        assert_bitwise_equal(checkpoint, saved[0])


def averagings() -> dict[str, Any]:
    return {
        "WeightAveraging": of_lightning.WeightAveraging,
        "EMAWeightAveraging": lambda: of_lightning.EMAWeightAveraging(decay=0.9),
    }


@needs_averaging
@pytest.mark.parametrize(
    ("name", "val_check_interval"),
    [("WeightAveraging", 1.0), ("EMAWeightAveraging", 3)],
    ids=["epochs", "within epochs"],
)
def test_weight_averaging_evaluates_averages_of_accelerated_training(
    name: str, val_check_interval: Any, tmp_path: Path
) -> None:
    expected = alone()
    options = {"val_check_interval": val_check_interval}
    averages, saved = [], []
    for number, order in enumerate(itertools.permutations(range(3))):
        keep = ModelCheckpoint(tmp_path / f"{number}", save_last=True)
        callbacks = [anderson(), averagings()[name](), keep]
        end = run([callbacks[k] for k in order], **options)
        averages.append((order.index(0) < order.index(1), end.pop("weights")))
        assert_bitwise_equal(end, {k: v for k, v in expected.items() if k != "weights"})
        saved.append(torch.load(tmp_path / f"{number}" / "last.ckpt", weights_only=True))
    for (after, average), checkpoint in zip(averages, saved, strict=True):
        # the average takes the weights of a step as they are at its place in the list
        same = next(one for kind, one in averages if kind == after)
        assert torch.equal(average, same)
        current = torch.cat([v.flatten() for v in checkpoint["current_model_state"].values()])
        step = checkpoint["global_step"]
        assert step == (12 if val_check_interval == 1.0 else 11)
        assert torch.equal(current, expected["trace"][step - 1])
        in_checkpoint = torch.cat([v.flatten() for v in checkpoint["state_dict"].values()])
        assert torch.equal(in_checkpoint.double(), average) == (step == 12)
        assert not torch.equal(in_checkpoint, current)


@needs_averaging
def test_weight_averaging_resumes_bitwise(tmp_path: Path) -> None:
    ends = []
    for ckpt_path in (None, tmp_path / "last.ckpt"):
        keep = ModelCheckpoint(tmp_path, save_last=True, enable_version_counter=False)
        if ckpt_path is None:
            run([anderson(), averagings()["EMAWeightAveraging"](), keep], epochs=2)
            keep = ModelCheckpoint(tmp_path / "whole")
        callbacks = [anderson(), averagings()["EMAWeightAveraging"](), keep]
        ends.append(run(callbacks, epochs=4, ckpt_path=ckpt_path))
    for name in ("weights", "counters", "outcomes", "steps"):
        assert_bitwise_equal(ends[1][name], ends[0][name], name)


@pytest.mark.parametrize("first", [True, False])
def test_stochastic_weight_averaging_ends_with_averages(first: bool) -> None:
    expected = alone(epochs=6)
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2, annealing_epochs=1)
    callback = anderson()
    end = run([callback, swa] if first else [swa, callback], epochs=6)
    # it ends after five epochs and one that computes batch statistics alone
    assert end["accepted"] == [2, 6, 10, 14, 18, 22]
    assert_bitwise_equal(end["trace"][:8], expected["trace"][:8])
    assert end["counters"] == expected["counters"]
    assert not torch.equal(end["weights"], expected["weights"])


@pytest.mark.parametrize(
    ("options", "attempted"),
    [
        ({"gradient_clip_val": 0.1}, 6),
        ({"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, 6),
        ({"beside": [GradientAccumulationScheduler({0: 1, 1: 2})]}, 4),
    ],
    ids=["norm", "value", "accumulation"],
)
def test_rejected_candidates_beside_gradient_settings_are_plain_run(
    options: Any, attempted: int
) -> None:
    callback = anderson()
    assert_plain_run(callback, Steered, batches(4), max_epochs=3, **options)
    assert outcomes(callback) == {"rejected_loss_increase": attempted}
