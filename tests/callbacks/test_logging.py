"""What a user sees: rows of the logger, the progress bar, one summary."""

import csv
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_stableaa import SmoothingMonitor
from tests.helpers.regression import (
    Regression,
    Reports,
    Steered,
    Steering,
    anderson,
    batches,
    fit,
    network,
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

HEAD = "Anderson acceleration: {} of {} extrapolations accepted in {} optimizer steps"


def summary(
    caplog: pytest.LogCaptureFixture, module: Any, *, epochs: int, **options: Any
) -> tuple[str, str]:
    callback = anderson(**options)
    with caplog.at_level(logging.INFO):
        fit(module, batches(), callback, max_epochs=epochs)
    (record,) = [one for one in caplog.records if one.getMessage().startswith("Anderson accel")]
    return record.levelname, record.getMessage()


def test_summary_of_accepted_candidates_is_one_sentence(caplog: pytest.LogCaptureFixture) -> None:
    level, text = summary(caplog, Regression(), epochs=20, safeguard="none")
    assert (level, text) == ("INFO", HEAD.format(10, 10, 20) + ".")


def test_summary_names_what_failed_in_every_attempt_of_a_short_run(
    caplog: pytest.LogCaptureFixture,
) -> None:
    module = Regression()
    module.make_optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.0)
    level, text = summary(caplog, module, epochs=4)
    assert level == "WARNING"
    assert "2 of 2: the weights did not move between stored iterates" in text


def test_summary_of_rejections_by_loss_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    """Training is what it was: nothing is wrong."""
    level, text = summary(caplog, Steered(), epochs=20)
    assert level == "INFO"
    assert text == HEAD.format(0, 10, 20) + (
        ". Most frequent cause, 10 of 10: the candidate did not lower the loss of the current "
        "batch."
    )


class Raises(Steered):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.steering.at_candidate(self) and self.global_step > self.raises_after:
            raise ValueError("outside of the domain")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("epochs", "raises_after", "level"),
    [(8, 0, "WARNING"), (8, 4, "INFO"), (10, 0, "WARNING"), (10, 4, "WARNING"), (10, 99, "INFO")],
    ids=["errors alone", "too few attempts", "errors", "mostly errors", "no errors"],
)
def test_summary_warns_where_an_option_helps(
    epochs: int, raises_after: int, level: str, caplog: pytest.LogCaptureFixture
) -> None:
    module = Raises()
    module.raises_after = raises_after
    found, text = summary(caplog, module, epochs=epochs)
    assert found == level
    assert ("lower max_extrapolation" in text) == (level == "WARNING")


@pytest.mark.parametrize(("accepted", "level"), [(1, "WARNING"), (2, "INFO")])
def test_summary_is_no_warning_from_a_quarter_accepted(
    accepted: int, level: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Sometimes(Steering):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            super().on_train_batch_end(trainer, pl_module)
            self.offset = -1e3 if trainer.global_step <= 2 * accepted else math.nan

    found, _ = summary(caplog, Steered(steering=Sometimes()), epochs=12)
    assert found == level


def test_summary_of_short_run_names_the_schedule(caplog: pytest.LogCaptureFixture) -> None:
    level, text = summary(caplog, Regression(), epochs=3, warmup_steps=7)
    assert level == "WARNING"
    assert text == HEAD.format(0, 0, 3) + (
        ": none was due with two residuals in the history; train longer, or lower "
        "accelerate_every_n_steps (2) together with store_every_n_steps (1), or warmup_steps (7)."
    )


class Clamped(Regression):
    @torch.no_grad()
    def on_train_batch_start(self, *_: Any) -> None:
        for parameter in self.parameters():
            parameter.clamp_(-0.2, 0.2)


class OtherMemory(Regression):
    def on_train_batch_end(self, *_: Any) -> None:
        for one in self.parameters():
            one.data = one.data.clone()


@pytest.mark.parametrize(
    ("kind", "hint"),
    [
        (Clamped, "something other than the optimizer changed the weights"),
        (OtherMemory, "write new values into them"),
    ],
)
def test_summary_names_what_keeps_sequences_from_growing(
    kind: Any, hint: str, caplog: pytest.LogCaptureFixture
) -> None:
    level, text = summary(caplog, kind(network()), epochs=12)
    assert level == "WARNING"
    assert text.startswith(HEAD.format(0, 0, 12))
    assert hint in text
