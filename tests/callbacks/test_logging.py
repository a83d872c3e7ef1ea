"""What a user sees: rows of the logger, the progress bar, one summary."""

import collections
import csv
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_stableaa import SmoothingMonitor, Status
from lightning_stableaa.callbacks.summary import summarize
from lightning_stableaa.options import Options
from tests.helpers.regression import (
    Regression,
    Reports,
    Steered,
    Steering,
    anderson,
    batches,
    fit,
)

Row = dict[str, float]


def logged(folder: Path, *callbacks: Any, module: Any = None, **options: Any) -> list[Row]:
    """The rows of the CSV file, cells without a value left out."""
    logger = CSVLogger(folder, name="", version="", flush_logs_every_n_steps=1)
    settings: dict[str, Any] = {"max_epochs": 10, "log_every_n_steps": 1}
    fit(module or Steered(), batches(), *callbacks, logger=logger, **settings | options)
    with (folder / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def steps_with(rows: list[Row], name: str) -> list[int]:
    return [int(row["step"]) for row in rows if name in row]


def column(rows: list[Row], name: str) -> list[float]:
    return [row[name] for row in rows if name in row]


NUMBERS = {  # logged name: attribute of the report
    "residual_norm": "residual_norm",
    "step_norm": "step_norm",
    "noise": "noise",
    "gain": "gain",
    "mixing": "mixing",
    "horizon": "horizon",
    "gram_condition": "condition",
    "loss_before": "loss_before",
    "loss_after": "loss_after",
}


def test_rows_are_reports_of_engine_at_the_step_of_their_batch(tmp_path: Path) -> None:
    callback = anderson()
    reports = Reports(callback)
    rows = logged(tmp_path, callback, reports)
    # Lightning counts from 0: the second batch is logged at step 1
    due = [1, 3, 5, 7, 9]
    for name, attribute in NUMBERS.items():
        assert steps_with(rows, f"anderson/{name}") == due, name
        values = [getattr(one, attribute) for one in reports.attempted]
        assert column(rows, f"anderson/{name}") == pytest.approx(values, rel=1e-6), name
    assert column(rows, "anderson/attempted") == [1, 2, 3, 4, 5]
    assert column(rows, "anderson/accepted") == [0] * 5
    assert column(rows, "anderson/rejected_loss_increase") == [1, 2, 3, 4, 5]
    assert steps_with(rows, "train/loss") == list(range(10))
    names = {name for row in rows for name in row if name.startswith("anderson/")}
    counts = {"attempted", "accepted", "rejected_loss_increase"}
    assert names == {f"anderson/{name}" for name in [*NUMBERS, *counts]}


@pytest.mark.parametrize("alone", [True, False])
def test_rsd_is_a_row_at_every_windows_end(alone: bool, tmp_path: Path) -> None:
    callbacks: list[Any] = [SmoothingMonitor(average_window=4, rsd_threshold=0.01)]
    if not alone:
        schedule = {"store_every_n_steps": 4, "accelerate_every_n_steps": 8}
        callbacks.append(anderson(**schedule))
    rows = logged(tmp_path, *callbacks, max_epochs=20)
    assert steps_with(rows, "smoothing/rsd") == [3, 7, 11, 15, 19]
    assert steps_with(rows, "smoothing/on") == [3, 7, 11, 15, 19]
    pairs = zip(column(rows, "smoothing/rsd"), column(rows, "smoothing/on"), strict=True)
    assert all(rsd > 0 and on == (rsd > 0.01) for rsd, on in pairs)


class OneWeight(Regression):
    """Residuals are collinear, and the Gram matrix is singular."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(4, 1, bias=False)))
        self.network[0].weight = nn.Parameter(torch.ones(1, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.network[0].weight ** 2).sum()


class Stops(Regression):
    """The learning rate ends at zero: the weights do not move any more."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: max(0.0, 1 - k / 4))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Diverges(Regression):
    """Weights are NaN from the fifth step on."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * math.nan if self.global_step == 4 else loss


@pytest.mark.parametrize(
    ("kind", "last_outcome"),
    [
        (OneWeight, None),
        (Stops, "rejected_zero_residual"),
        (Diverges, "rejected_non_finite_history"),
    ],
)
def test_numbers_in_logs_are_finite(kind: Any, last_outcome: str | None, tmp_path: Path) -> None:
    callback = anderson(history_depth=2)
    rows = logged(tmp_path, callback, module=kind(), max_epochs=20)
    own = [(k, v) for row in rows for k, v in row.items() if k.startswith("anderson/")]
    assert own
    assert all(math.isfinite(value) for _, value in own)
    if last_outcome:
        assert column(rows, f"anderson/{last_outcome}")[-1] >= 6


def test_progress_bar_shows_count_and_rsd() -> None:
    shown: list[dict[str, Any]] = []

    ProgressBar: Any = TQDMProgressBar

    class Bar(ProgressBar):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *arguments: Any) -> None:
            super().on_train_batch_end(trainer, pl_module, *arguments)
            shown.append(self.get_metrics(trainer, pl_module))

    schedule = {"store_every_n_steps": 2, "accelerate_every_n_steps": 4}
    callbacks = [SmoothingMonitor(rsd_threshold=1e9, of="iterates"), anderson(**schedule), Bar()]
    module = Steered(steering=Steering(-1e3))
    fit(module, batches(8), *callbacks, enable_progress_bar=True, max_epochs=1)
    counts = [one.get("anderson_accepted") for one in shown]
    assert counts == [None, None, None, 1.0, 1.0, 1.0, 1.0, 2.0]
    assert ["rsd" in one for one in shown] == [False] + [True] * 7


def test_without_progress_bar_nothing_is_logged_by_the_module() -> None:
    names: set[str] = set()

    class Listens(Steered):
        def log(self, name: str, *arguments: Any, **options: Any) -> None:
            names.add(name)
            super().log(name, *arguments, **options)

    fit(Listens(), batches(8), anderson(), max_epochs=1)
    assert names == {"train/loss"}


# The summary at the end of fit.

HEAD = "Anderson acceleration: {} of {} extrapolations accepted in 20 optimizer steps"

INCREASE, ERROR = Status.REJECTED_LOSS_INCREASE, Status.REJECTED_ERROR
NOISE, STILL = Status.SKIPPED_NOISE_DOMINATED, Status.REJECTED_ZERO_RESIDUAL
WRITTEN, REPLACED = Status.EXTERNAL_UPDATE, Status.PARAMETERS_CHANGED

# Outcomes of all attempts, and the cause that is named; a warning where an option helps.
SUMMARIES: list[tuple[dict[Status, int], int, Status | None]] = [
    ({Status.ACCEPTED: 10}, logging.INFO, None),
    ({STILL: 2}, logging.WARNING, STILL),
    ({INCREASE: 10}, logging.INFO, INCREASE),
    ({NOISE: 8, ERROR: 2}, logging.INFO, NOISE),
    ({INCREASE: 4}, logging.INFO, None),  # too few
    ({ERROR: 4}, logging.WARNING, ERROR),
    ({ERROR: 2, INCREASE: 2}, logging.INFO, None),
    ({ERROR: 5}, logging.WARNING, ERROR),
    ({ERROR: 3, INCREASE: 2}, logging.WARNING, ERROR),
    ({ERROR: 4, Status.ACCEPTED: 1}, logging.WARNING, ERROR),
    ({ERROR: 6, Status.ACCEPTED: 2}, logging.INFO, None),  # from a quarter on
]


def engine_with(outcomes: dict[Status, int], **options: Any) -> Any:
    """What an engine shows after 20 steps, with these options or attributes."""
    steps, disabled = options.pop("optimizer_steps", 20), options.pop("disabled", None)
    attempts = {one: count for one, count in outcomes.items() if one not in (WRITTEN, REPLACED)}
    return SimpleNamespace(
        attempted=sum(attempts.values()),
        accepted=attempts.get(Status.ACCEPTED, 0),
        optimizer_steps=steps,
        disabled=disabled,
        outcomes=collections.Counter(outcomes),
        options=Options(**options),
    )


@pytest.mark.parametrize(("outcomes", "level", "cause"), SUMMARIES)
def test_summary_names_the_most_frequent_cause_and_warns_where_an_option_helps(
    outcomes: dict[Status, int], level: int, cause: Status | None
) -> None:
    engine = engine_with(outcomes)
    head = HEAD.format(engine.accepted, engine.attempted)
    rest = ""
    if cause is not None:
        rest = f". Most frequent cause, {outcomes[cause]} of {engine.attempted}: {cause.hint}"
    assert summarize(engine) == (level, f"{head}{rest}.")


def test_summary_without_attempts_names_what_prevented_them() -> None:
    schedule = {"accelerate_every_n_steps": 8, "store_every_n_steps": 2, "warmup_steps": 30}
    head = HEAD.format(0, 0)
    for status in (WRITTEN, REPLACED):
        text = f"{head}, since 9 cycles were interrupted: {status.hint}."
        assert summarize(engine_with({status: 9})) == (logging.WARNING, text)
    level, text = summarize(engine_with({}, optimizer_steps=0))
    assert level == logging.WARNING
    assert "in 0 optimizer steps: no step with gradients was seen of the optimizers" in text
    off = summarize(engine_with({}, disabled="the reason"))
    assert off == (logging.WARNING, f"{head}, until it was switched off: the reason.")
    assert summarize(engine_with({}, **schedule)) == (
        logging.WARNING,
        f"{head}: none was due with two residuals in the history; train longer, or lower "
        "accelerate_every_n_steps (8) together with store_every_n_steps (2), or warmup_steps (30).",
    )


@pytest.mark.parametrize(
    ("lr", "level", "text"),
    [
        (0.01, "INFO", HEAD.format(10, 10) + "."),
        (0.0, "WARNING", HEAD.format(0, 10) + f". Most frequent cause, 10 of 10: {STILL.hint}."),
    ],
)
def test_summary_is_one_sentence_at_the_end_of_a_fit(
    lr: float, level: str, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    module = Regression(None, lambda parameters: torch.optim.SGD(parameters, lr=lr))
    with caplog.at_level(logging.INFO):
        fit(module, batches(), anderson(safeguard="none"), max_epochs=20)
    found = [(one.levelname, one.getMessage()) for one in caplog.records]
    assert [one for one in found if one[1].startswith("Anderson accel")] == [(level, text)]
