"""What a user sees: rows of the logger, the progress bar, one summary."""

import csv
import logging
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_stableaa import SmoothingMonitor
from tests.callbacks.regression import Regression, anderson, batches, counters, fit

Row = dict[str, float]


def logged(folder: Path, *callbacks: Any, module: Any = None, **options: Any) -> list[Row]:
    """The rows of the CSV file, cells without a value left out."""
    logger = CSVLogger(folder, name="", version="", flush_logs_every_n_steps=1)
    settings: dict[str, Any] = {"max_epochs": 20, "log_every_n_steps": 1}
    fit(module or Regression(), batches(1), *callbacks, logger=logger, **settings | options)
    with (folder / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def steps_with(rows: list[Row], name: str) -> list[int]:
    return [int(row["step"]) for row in rows if name in row]


def column(rows: list[Row], name: str) -> list[float]:
    return [row[name] for row in rows if name in row]


NUMBERS = ("residual_norm", "jump_norm", "condition", "loss_before", "loss_after")


def test_every_extrapolation_is_a_row_at_the_step_of_its_batch(tmp_path: Path) -> None:
    callback = anderson()
    rows = logged(tmp_path, callback)

    # Lightning counts from 0: the fourth batch is logged at step 3
    due = [3, 7, 11, 15, 19]
    assert column(rows, "anderson/attempted") == [1, 2, 3, 4, 5]
    for name in ("attempted", "accepted", *NUMBERS):
        assert steps_with(rows, f"anderson/{name}") == due, name
    assert column(rows, "anderson/accepted")[-1] == counters(callback)["accepted"] > 0
    assert steps_with(rows, "train/loss") == list(range(20))
    accepted = [
        b - a
        for a, b in zip(
            [0, *column(rows, "anderson/accepted")], column(rows, "anderson/accepted"), strict=False
        )
    ]
    for taken, before, after in zip(
        accepted,
        column(rows, "anderson/loss_before"),
        column(rows, "anderson/loss_after"),
        strict=True,
    ):
        assert (after < before) == bool(taken)


def test_every_extrapolation_is_a_row_whatever_log_every_n_steps_is(tmp_path: Path) -> None:
    rows = logged(tmp_path, anderson(), log_every_n_steps=6)

    assert steps_with(rows, "train/loss") == [5, 11, 17]
    assert steps_with(rows, "anderson/attempted") == [3, 7, 11, 15, 19]


def test_the_rows_of_the_module_are_untouched(tmp_path: Path) -> None:
    plain = logged(tmp_path / "plain")
    watched = logged(tmp_path / "watched", anderson(warmup_steps=100), SmoothingMonitor())

    own = [{k: v for k, v in row.items() if "smoothing" not in k} for row in watched]
    assert [row for row in own if "train/loss" in row] == plain
    assert column(plain, "train/loss") == column(watched, "train/loss")


def test_accumulated_batches_share_the_step_of_their_optimizer_step(tmp_path: Path) -> None:
    rows = logged(
        tmp_path, anderson(store_every_n_steps=1), accumulate_grad_batches=2, max_epochs=4
    )
    # one batch an epoch steps at its end, accumulated or not
    assert steps_with(rows, "anderson/attempted") == [3]


class Rejects(Regression):
    def anderson_loss(self, batch: Any) -> Tensor:
        return torch.ones(())


def test_rejections_are_counted_by_cause(tmp_path: Path) -> None:
    rows = logged(tmp_path, anderson(), module=Rejects())

    assert column(rows, "anderson/accepted") == [0] * 5
    assert column(rows, "anderson/rejected_loss") == [1, 2, 3, 4, 5]
    assert column(rows, "anderson/loss_before") == column(rows, "anderson/loss_after") == [1] * 5


@pytest.mark.parametrize("alone", [True, False])
def test_the_rsd_is_a_row_at_the_end_of_every_window(tmp_path: Path, alone: bool) -> None:
    callbacks: list[Any] = [SmoothingMonitor(average_window=4, rsd_threshold=0.05)]
    if not alone:
        callbacks.append(anderson(store_every_n_steps=4, warmup_steps=100))
    rows = logged(tmp_path, *callbacks)

    assert steps_with(rows, "smoothing/rsd") == [3, 7, 11, 15, 19]
    assert steps_with(rows, "smoothing/on") == [3, 7, 11, 15, 19]
    for rsd, on in zip(column(rows, "smoothing/rsd"), column(rows, "smoothing/on"), strict=True):
        assert rsd > 0
        assert on in (0, 1)
        if rsd > 0.05 or rsd < 0.8 * 0.05:  # between, the switch stays as it is
            assert on == (rsd > 0.05)


def test_the_rows_of_both_callbacks_agree_with_the_engine(tmp_path: Path) -> None:
    reports: list[Any] = []

    class Listens(lightning.pytorch.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            engine = callback.accelerator
            assert engine is not None
            step = engine.step
            engine.step = lambda loss_fn=None: reports.append(step(loss_fn)) or reports[-1]

    callback = anderson()
    rows = logged(tmp_path, callback, SmoothingMonitor(rsd_threshold=1e9), Listens())

    attempted = [one for one in reports if one.attempted]
    assert len(attempted) == 5
    for name in NUMBERS:
        values = [getattr(one, name) for one in attempted]
        assert column(rows, f"anderson/{name}") == pytest.approx(values, rel=1e-6), name
    stored = [one for one in reports if one.rsd is not None]
    assert column(rows, "smoothing/rsd") == pytest.approx([one.rsd for one in stored], rel=1e-6)


def test_the_progress_bar_shows_the_count_and_the_rsd() -> None:
    shown: list[dict[str, Any]] = []

    class Bar(TQDMProgressBar):
        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            shown.append(self.get_metrics(trainer, pl_module))

    callback = anderson()
    fit(
        Regression(),
        batches(8),
        SmoothingMonitor(rsd_threshold=1e9),
        callback,
        Bar(),
        enable_progress_bar=True,
        max_epochs=1,
    )

    assert ["anderson_accepted" in one for one in shown] == [False] * 3 + [True] * 5
    assert ["rsd" in one for one in shown] == [False] + [True] * 7
    assert shown[-1]["anderson_accepted"] == counters(callback)["accepted"]


def test_without_a_progress_bar_nothing_is_logged_for_it() -> None:
    names: list[str] = []

    class Listens(Regression):
        def log(self, name: str, *arguments: Any, **options: Any) -> None:
            names.append(name)
            super().log(name, *arguments, **options)

    callback = anderson()
    fit(Listens(), batches(8), SmoothingMonitor(rsd_threshold=1e9), callback, max_epochs=1)

    assert counters(callback)["attempted"] > 0
    assert not {"anderson_accepted", "rsd"} & set(names)


def summary_of(caplog: pytest.LogCaptureFixture, *callbacks: Any, module: Any, epochs: int) -> Any:
    with caplog.at_level(logging.INFO):
        fit(module, batches(1), *callbacks, max_epochs=epochs)
    (record,) = [one for one in caplog.records if one.getMessage().startswith("Anderson acc")]
    return record


def test_the_summary_names_the_option_when_most_were_rejected(
    caplog: pytest.LogCaptureFixture,
) -> None:
    record = summary_of(caplog, anderson(), module=Rejects(), epochs=20)

    assert record.levelname == "WARNING"
    assert record.getMessage() == (
        "Anderson acceleration: 0 of 5 extrapolations accepted in 20 optimizer steps. Most often "
        "(5 times) no candidate lowered the loss of the current batch: try larger values of "
        "regularization, or raise store_every_n_steps so that residuals stand out of their noise."
    )


class Accepts(Regression):
    """The candidates of some attempts, by their number."""

    def __init__(self, attempts: set[int]) -> None:
        super().__init__()
        self.attempts = attempts
        self.calls = 0

    def anderson_loss(self, batch: Any) -> Tensor:
        attempt, is_candidate = divmod(self.calls, 2)
        self.calls += 1
        return torch.tensor(0.5 if is_candidate and attempt in self.attempts else 1.0)


@pytest.mark.parametrize(("attempts", "level"), [({0, 3}, "INFO"), ({3}, "WARNING")])
def test_a_third_of_all_candidates_is_enough(
    attempts: set[int], level: str, caplog: pytest.LogCaptureFixture
) -> None:
    callback = anderson(regularization=1e-2)
    record = summary_of(caplog, callback, module=Accepts(attempts), epochs=20)

    assert counters(callback)["attempted"] == 5
    assert counters(callback)["accepted"] == len(attempts)
    assert record.levelname == level


def test_the_summary_of_a_run_that_an_earlier_version_began_names_no_cause(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its candidates were rejected for what no longer rejects any."""
    path = tmp_path / "end.ckpt"
    trainer = fit(Rejects(), batches(1), anderson(), max_epochs=20)
    trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    (state,) = (one for one in checkpoint["callbacks"].values() if "outcomes" in one)
    state["outcomes"] = {"rejected_without_payoff": state["outcomes"].pop("rejected_loss")}
    torch.save(checkpoint, path)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        fit(Rejects(), batches(1), anderson(), max_epochs=21, ckpt_path=path)
    (record,) = [one for one in caplog.records if one.getMessage().startswith("Anderson acc")]
    assert record.getMessage() == (
        "Anderson acceleration: 0 of 5 extrapolations accepted in 21 optimizer steps."
    )


def test_the_summary_is_short_when_most_were_accepted(caplog: pytest.LogCaptureFixture) -> None:
    callback = anderson(safeguard="none")
    record = summary_of(caplog, callback, module=Regression(), epochs=20)

    assert record.levelname == "INFO"
    assert record.getMessage() == (
        "Anderson acceleration: 5 of 5 extrapolations accepted in 20 optimizer steps."
    )


def test_the_summary_of_a_short_run_names_the_schedule(caplog: pytest.LogCaptureFixture) -> None:
    record = summary_of(caplog, anderson(warmup_steps=7), module=Regression(), epochs=3)

    assert record.levelname == "WARNING"
    assert record.getMessage() == (
        "Anderson acceleration: 0 of 0 extrapolations accepted in 3 optimizer steps: none was due "
        "with two residuals in the history; train longer, or lower accelerate_every_n_steps (4) or "
        "warmup_steps (7)."
    )


def test_the_summary_says_when_somebody_else_moves_the_weights(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Clamped(Regression):
        def on_train_batch_start(self, *_: Any) -> None:
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.clamp_(-10.0, 10.0)

    record = summary_of(caplog, anderson(), module=Clamped(), epochs=6)

    assert record.levelname == "WARNING"
    assert record.getMessage() == (
        "Anderson acceleration: 0 of 0 extrapolations accepted in 6 optimizer steps: 5 times "
        "something other than the optimizer changed the weights before a cycle was complete, and "
        "no residual is formed across such a change: do it less often than every "
        "store_every_n_steps, or lower that option."
    )


def test_a_run_without_loggers_or_with_several(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path, name=name, version="") for name in ("one", "two")]
    fit(Regression(), batches(1), anderson(), logger=loggers, max_epochs=8, log_every_n_steps=1)

    texts = [(tmp_path / name / "metrics.csv").read_text() for name in ("one", "two")]
    assert texts[0] == texts[1]
    assert "anderson/attempted" in texts[0]
