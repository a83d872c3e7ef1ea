"""Checkpoints that do not fit: the rows of "What does not fit" in docs/checkpoints.md."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_stableaa import SmoothingMonitor
from lightning_stableaa.saved import STATE_VERSION
from tests.callbacks.regression import counters, fit, weights
from tests.callbacks.test_resume import SaveAt, Stepwise, loader, thirds

pytestmark = pytest.mark.filterwarnings(
    "ignore:You're resuming from a checkpoint that ended before the epoch ended",
    "ignore:Be aware that when using `ckpt_path`",
)

STOP = 18  # of 30 steps, at the end of a cycle
KEY = "AndersonCallback"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "stop.ckpt"
    fit(Stepwise(), loader(), thirds(), SaveAt(STOP, path), max_epochs=2)
    return path


def resumed(path: Path, *callbacks: Any) -> Any:
    """The first callback, and how many points its history took over."""
    callback, module = callbacks[0], Stepwise()
    taken: list[int] = []

    class Looks(SaveAt):
        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if not taken:
                state = callback.state_dict()["points"]["history"]
                taken.append(len(state["links"]))

    fit(module, loader(), *callbacks, Looks(0, path), ckpt_path=path, max_epochs=3)
    assert bool(weights(module).isfinite().all())
    return callback, taken[0]


def dropped(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno == logging.WARNING and "was dropped and starts anew" in record.message
    ]


NEW = 1  # the start of the first cycle


def test_the_same_setting_takes_the_history_over(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback, points = resumed(checkpoint, thirds())
    assert points > NEW
    assert counters(callback)["optimizer_steps"] == 30
    assert not dropped(caplog)


def test_a_checkpoint_without_the_callback_begins_a_history(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "plain.ckpt"
    fit(Stepwise(), loader(), SaveAt(STOP, path), max_epochs=2)
    callback, points = resumed(path, thirds())
    assert points == NEW
    assert counters(callback)["optimizer_steps"] == 30 - STOP
    assert not dropped(caplog)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"history_depth": 4}, "history_depth"),
        ({"store_every_n_steps": 2, "accelerate_every_n_steps": 2}, "store_every_n_steps"),
        ({"optimizer_state": "mix"}, "optimizer_state"),
    ],
)
def test_other_options_of_the_history_begin_a_new_one(
    options: Any, name: str, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback, points = resumed(checkpoint, thirds(**options))
    assert points == NEW
    assert counters(callback)["optimizer_steps"] == 30
    (warning,) = dropped(caplog)
    assert warning.endswith(f"it was stored with another {name}")


def test_other_smoothing_begins_a_new_one(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, points = resumed(checkpoint, thirds(), SmoothingMonitor(rsd_threshold=10.0))
    assert points == NEW
    (warning,) = dropped(caplog)
    assert warning.endswith("it was stored with another smoothing")


@pytest.mark.parametrize(
    "options",
    [
        {"safeguard": "none"},
        {"regularization": 1e-3},
        {"relaxation": 0.5},
        {"max_extrapolation": 3.0},
        {"warmup_steps": 24},
        {"accelerate_every_n_steps": 9},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_the_history_does_not_depend_on_are_taken_as_they_are_now(
    options: Any, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, points = resumed(checkpoint, thirds(**options))
    assert points > NEW
    assert not dropped(caplog)


def edited(path: Path, edit: Any) -> Path:
    contents = torch.load(path, weights_only=True)
    edit(contents)
    other = path.with_name("edited.ckpt")
    torch.save(contents, other)
    return other


def test_other_weights_begin_a_new_one(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    def shift(contents: Any) -> None:
        contents["state_dict"]["network.0.weight"] += 0.1

    _, points = resumed(edited(checkpoint, shift), thirds())
    assert points == NEW
    (warning,) = dropped(caplog)
    assert warning.endswith("it was stored with another set of weights")


def test_another_layout_begins_a_new_one(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def transpose(contents: Any) -> None:
        layout = contents["callbacks"][KEY]["fingerprint"]["parameter layout"]
        layout[0][0].reverse()

    _, points = resumed(edited(checkpoint, transpose), thirds())
    assert points == NEW
    (warning,) = dropped(caplog)
    assert warning.endswith("it was stored with another parameter layout")


def test_a_slice_of_another_rank_begins_a_new_one(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def cut(contents: Any) -> None:
        contents["callbacks"][KEY]["shard"] = [1, 2]

    _, points = resumed(edited(checkpoint, cut), thirds())
    assert points == NEW
    (warning,) = dropped(caplog)
    assert warning.endswith("it was stored with another rank or number of ranks")


def test_an_earlier_version_of_the_state_begins_a_new_one(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def age(contents: Any) -> None:
        state = contents["callbacks"][KEY]
        contents["callbacks"][KEY] = {
            "version": STATE_VERSION - 1,
            "counters": state["counters"],
            "outcomes": state["outcomes"],
            "points": "in a form of its own",
        }

    _, points = resumed(edited(checkpoint, age), thirds())
    assert points == NEW
    (warning,) = dropped(caplog)
    assert warning.endswith("it was stored by an earlier version of lightning-stableaa")


def test_a_later_version_of_the_state_stops(checkpoint: Path) -> None:
    def advance(contents: Any) -> None:
        contents["callbacks"][KEY]["version"] = STATE_VERSION + 1

    with pytest.raises(ValueError, match="update lightning-stableaa, or drop the state"):
        resumed(edited(checkpoint, advance), thirds())
