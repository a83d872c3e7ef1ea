"""Progress of a run: one bar on a terminal, else a line now and then."""

import math
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lightning_stableaa import AndersonCallback
from lightning_stableaa.recipes.sweep import number_of_point

REFRESH = 0.2  # seconds: reading a loss waits for the device
LINES = 10  # of a run, where there is no terminal
LONGEST_SILENCE = 60  # seconds


class RunProgress(ProgressBar):
    """Shows the steps of the whole run, its time left, and the newest values.

    The terminal gets one bar. Any other output gets a line after every tenth of the run, and at
    least one a minute.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: Progress | None = None
        self._total: int | None = None
        self._outputs: Any = None  # of the newest training step
        self._first = self._shown_step = 0
        self._started = self._shown = 0.0

    def enable(self) -> None:
        """Shows the progress."""
        self._enabled = True

    def disable(self) -> None:
        """Shows nothing, as on all ranks but the first."""
        self._enabled = False

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Starts the bar and the clock."""
        steps = trainer.max_steps if trainer.max_steps > 0 else trainer.estimated_stepping_batches
        self._total = int(steps) if 0 < steps < math.inf else None
        self._first = self._shown_step = trainer.global_step
        self._started = self._shown = time.monotonic()
        console = Console()
        if self._enabled and (console.is_terminal or console.is_jupyter):
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=16),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("left, {task.fields[values]}"),
                console=console,
            )
            self._bar.start()
            self._bar.add_task(
                f"{number_of_point()}steps", total=self._total, completed=self._first, values=""
            )

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Shows the step, where that is due."""
        self._outputs = outputs
        if self._enabled and self._is_due(trainer.global_step):
            self._show(trainer)

    def on_train_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Shows the last step."""
        if self._enabled:
            self._show(trainer)
        self._stop()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: Any, exception: BaseException
    ) -> None:
        """Gives the terminal back."""
        self._stop()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Prints above the bar."""
        (self._bar.console.print if self._bar else print)(*args, **kwargs)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _is_due(self, step: int) -> bool:
        silence = time.monotonic() - self._shown
        if self._bar is not None:
            return silence > REFRESH
        if step in (self._shown_step, self._total):  # the last one is shown at the end
            return False
        passed, shown = (
            LINES * one // (self._total or math.inf) for one in (step, self._shown_step)
        )
        return passed > shown or silence > LONGEST_SILENCE

    def _show(self, trainer: lightning.Trainer) -> None:
        self._shown, self._shown_step = time.monotonic(), trainer.global_step
        values = ", ".join(_values(trainer, self._outputs))
        if self._bar is not None:
            task = self._bar.task_ids[0]
            self._bar.update(task, completed=trainer.global_step, values=values)
            return
        of = f" of {self._total}" if self._total else ""
        line = f"{number_of_point()}step {trainer.global_step}{of}, {values}{self._time_left()}"
        print(line, flush=True)

    def _time_left(self) -> str:
        if self._total is None or self._total == self._shown_step:
            return ""
        pace = (self._shown - self._started) / max(1, self._shown_step - self._first)
        return f", {timedelta(seconds=round(pace * (self._total - self._shown_step)))} left"


def _values(trainer: lightning.Trainer, outputs: Any) -> Iterator[str]:
    """What a narrow terminal may cut off last comes first."""
    yield f"epoch {trainer.current_epoch}"
    logged = dict(trainer.progress_bar_metrics)
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    if "train/loss" in logged:
        yield f"loss {number(float(logged.pop('train/loss')))}"
    elif isinstance(loss, torch.Tensor):
        yield f"loss {number(loss.item() * trainer.accumulate_grad_batches)}"
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for one in callbacks:
        if isinstance(one, AndersonCallback) and one.accelerator is not None:
            yield f"AA {one.accelerator.accepted}/{one.accelerator.attempted}"
    logged.pop("anderson_accepted", None)
    for name, value in logged.items():
        yield f"{'RSD' if name == 'rsd' else name} {number(float(value))}"


def number(value: float) -> str:
    """Four digits, in scientific form where a value is small or large."""
    is_plain = value == 0 or not math.isfinite(value) or 1e-3 <= abs(value) < 1e5
    return f"{value:.4g}" if is_plain else f"{value:.2e}"
