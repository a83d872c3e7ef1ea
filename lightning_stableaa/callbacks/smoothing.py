"""SmoothingMonitor: Lightning glue of the adaptive moving average."""

from __future__ import annotations

from typing import Any

from lightning_stableaa.averaging import WeightSmoother
from lightning_stableaa.callbacks.base import LightningCallback, log_to_loggers
from lightning_stableaa.callbacks.support import check_supported
from lightning_stableaa.options import RsdKind, RsdOf, Smoothing, SmoothingApplyTo


class SmoothingMonitor(LightningCallback):
    """Logs the relative standard deviation (RSD) of the iterates and toggles a moving average.

    Beside an ``AndersonCallback``, in any order, it is that callback's ``smoothing``. Alone it
    logs the RSD of every window and, with ``apply_to="weights"``, writes the averages over the
    weights while the RSD is high.

    Args:
        average_window: iterates averaged; ``None`` is one cycle of the AndersonCallback, or 10
            steps without one.
        rsd_threshold: RSD above which the average is on; dimensionless.
        rsd: ``"norm"`` or ``"max"``, see :class:`~lightning_stableaa.Smoothing`.
        of: ``"iterates"`` or ``"updates"``.
        apply_to: ``"history"`` or ``"weights"``.

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
        self.smoothing = Smoothing(
            average_window=average_window,
            rsd_threshold=rsd_threshold,
            rsd=rsd,
            of=of,
            apply_to=apply_to,
        )
        self._engine: WeightSmoother | None = None
        self._optimizers: list[Any] = []
        self._loaded: dict[str, Any] = {}
        self._loaded_from_checkpoint = False  # else an earlier fit left it

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what cannot work before anything is trained."""
        if stage == "fit":
            self._stop()  # where an exception ended the fit before
            if not self._loaded_from_checkpoint:
                self._loaded = {}  # a new fit begins a new window
            check_supported(trainer, pl_module, type(self).__name__)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Take up the optimizers, unless an AndersonCallback does the work."""
        check_supported(trainer, pl_module, type(self).__name__)
        if not any(getattr(one, "uses_smoothing_monitor", False) for one in trainer.callbacks):
            self._start(trainer)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Follow the optimizers where they were replaced."""
        if self._engine is not None and trainer.optimizers != self._optimizers:
            self._stop()
            self._start(trainer)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the RSD at the end of a window."""
        if self._engine is None:
            return
        report = self._engine.step()
        if report.rsd is not None:
            log_smoothing(trainer, pl_module, report.rsd, on=bool(report.smoothing_on))

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """What a checkpoint held is of no use to another fit, also where nothing was trained."""
        self._loaded_from_checkpoint = False

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let go of the optimizers, keeping the state for a checkpoint."""
        self._stop()

    def state_dict(self) -> dict[str, Any]:
        """State of the open window; empty where an AndersonCallback keeps it."""
        return self._loaded if self._engine is None else self._engine.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state, on the CPU, until the optimizers exist."""
        self._loaded = state_dict
        self._loaded_from_checkpoint = True

    def _start(self, trainer: Any) -> None:
        self._optimizers = list(trainer.optimizers)
        self._engine = WeightSmoother(self._optimizers, self.smoothing)
        if self._loaded:
            self._engine.load_state_dict(self._loaded)
            self._loaded = {}
        self._loaded_from_checkpoint = False

    def _stop(self) -> None:
        if self._engine is not None:
            self._loaded = self._engine.state_dict()
            self._engine.detach()
            self._engine = None


def log_smoothing(trainer: Any, pl_module: Any, rsd: float, *, on: bool) -> None:
    """RSD and switch to the loggers, RSD to the progress bar."""
    log_to_loggers(trainer, {"smoothing/rsd": rsd, "smoothing/on": float(on)})
    if trainer.progress_bar_callback is not None:
        pl_module.log("rsd", rsd, prog_bar=True, logger=False, on_step=True, on_epoch=False)
