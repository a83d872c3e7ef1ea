"""SmoothingMonitor: the paper's adaptive moving average."""

from __future__ import annotations

import math
from typing import Any

from lightning_stableaa.accelerator import AndersonAccelerator
from lightning_stableaa.callbacks.base import EngineCallback, log_to_loggers, log_to_progress_bar
from lightning_stableaa.options import RsdKind, RsdOf, Smoothing, SmoothingApplyTo, describe
from lightning_stableaa.report import StepReport

# Iterates of a window where there is no cycle to take it from.
DEFAULT_WINDOW = 10


class SmoothingMonitor(EngineCallback):
    """Logs the relative standard deviation (RSD) of the updates and switches a moving average.

    Beside an ``AndersonCallback``, in any order, it is that callback's ``smoothing``: while the RSD
    is high, averages of the iterates enter the history. Alone it logs the RSD of every window and,
    with ``apply_to="weights"``, writes the averages over the weights while the RSD is high.

    Args:
        average_window: iterates averaged; ``None`` is one cycle of the AndersonCallback, or 10
            steps without one.
        rsd_threshold: RSD above which the average is on; dimensionless. 0 keeps it on, inf off.
        rsd: ``"norm"`` is ||sigma||_2 / ||mu||_2, ``"max"`` is max sigma_i / max |mu_i|.
        of: what the RSD is measured on: ``"updates"``, the differences of consecutive iterates
            (noise to signal of the steps), or ``"iterates"`` themselves.
        apply_to: ``"history"`` puts the averages into the history, ``"weights"`` writes them over
            the weights as well.

    Logs ``smoothing/rsd`` (dimensionless) and ``smoothing/on`` (0 or 1) at every window's end.

    Raises:
        TypeError, ValueError: an option is of the wrong type or out of range.

    Source: arXiv:2110.14813, the criterion on the RSD of consecutive iterates.
    """

    def __init__(
        self,
        *,
        average_window: int | None = Smoothing.average_window,
        rsd_threshold: float = Smoothing.rsd_threshold,
        rsd: RsdKind = Smoothing.rsd,
        of: RsdOf = Smoothing.of,
        apply_to: SmoothingApplyTo = Smoothing.apply_to,
    ) -> None:
        super().__init__()
        self.smoothing = Smoothing(
            average_window=average_window,
            rsd_threshold=rsd_threshold,
            rsd=rsd,
            of=of,
            apply_to=apply_to,
        )

    def __repr__(self) -> str:
        """Names the options that differ from the defaults."""
        return describe("SmoothingMonitor", self.smoothing)

    def make_engine(self, trainer: Any, pl_module: Any) -> AndersonAccelerator | None:
        """One that never extrapolates; ``None`` beside an AndersonCallback, which does the work."""
        others = [one for one in trainer.callbacks if isinstance(one, EngineCallback)]
        if any(not isinstance(one, SmoothingMonitor) for one in others):
            return None
        window = self.smoothing.average_window or DEFAULT_WINDOW
        return AndersonAccelerator(
            trainer.optimizers,
            history_depth=2,
            store_every_n_steps=window,
            accelerate_every_n_steps=window << 40,
            safeguard="none",
            smoothing=self.smoothing,
        )

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the RSD at the end of a window."""
        if self._engine is not None:
            log_smoothing(trainer, pl_module, self._engine.step())


def log_smoothing(trainer: Any, pl_module: Any, report: StepReport) -> None:
    """RSD and switch to the loggers, RSD to the progress bar, where a window ended."""
    if report.rsd is None:
        return
    values = {"smoothing/rsd": report.rsd, "smoothing/on": float(bool(report.smoothing_on))}
    log_to_loggers(trainer, {name: one for name, one in values.items() if math.isfinite(one)})
    log_to_progress_bar(trainer, pl_module, "rsd", report.rsd)
