"""Whether validation is worse than at its best: then candidates of a sample wait."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_stableaa.callbacks.loaders import trains_on_mini_batches

# In the names of metrics of which less is better, such as val/rmse_epoch; not in val/neg_mse.
LESS_IS_BETTER = (
    r"^(?!(.*[^a-z])?neg(ative)?[^a-z])"
    r".*(loss|error|perplexity|(?<![a-z])((r|n|nr)?mse|r?mae|mape|nll|l2)(?![a-z0-9]))"
)

# That which is minimised, and not a part of it.
WHOLE_LOSS = r"^(val(id(ation)?)?[-_/. ]*)?loss(_epoch)?$"

Mode = Literal["min", "max"]


def check_monitor(monitor: Any, mode: Any) -> None:
    """Refuse what names no metric, or no direction."""
    if not (monitor is None or isinstance(monitor, str)):
        raise TypeError(f"monitor must be the name of a metric, 'auto' or None, got {monitor!r}")
    if monitor == "":
        raise ValueError("monitor must be the name of a metric, 'auto' or None, got ''")
    if mode not in ("min", "max"):
        raise ValueError(f"monitor_mode must be 'min' or 'max', got {mode!r}")
    if monitor == "auto" and mode == "max":
        raise ValueError(
            "monitor_mode='max' needs monitor to name the metric, got 'auto', which knows its own"
        )


@dataclass
class BestValidation:
    """The best value of one metric of validation so far, and whether the last one was worse.

    A candidate is chosen by the loss of a training batch, and gets along faster in whatever lowers
    it, also where that is overfitting.
    """

    name: str | None = None  # of the metric; None before the first
    best: float = math.inf  # of its values, negated where more is better
    got_worse: bool = False
    of_mini_batches: bool = False  # in training, as the first process knew at that validation
    asked: str = ""  # for which metric, and direction

    @property
    def keeps_out_mini_batches(self) -> bool:
        """It got worse, and what judges candidates are mini-batches for sure."""
        return self.got_worse and self.of_mini_batches

    def begin(self, trainer: Any, monitor: str | None, mode: Mode) -> None:
        """A fit begins or goes on: what nobody asks for any longer says nothing."""
        asked = f"{mode} {monitor}"
        if monitor is None or not trainer.enable_validation or self.asked not in ("", asked):
            self.load_state_dict({})
        self.asked = asked

    def see(self, trainer: Any, before: Mapping[str, Any], monitor: str | None, mode: Mode) -> None:
        """A validation has ended; a collective call.

        Args:
            trainer: whose metrics they are. The first process decides, with the value it logged.
            before: ``trainer.callback_metrics`` when this validation began.
            monitor: name of the metric, ``"auto"``, or ``None``, which says nothing.
            mode: of a metric that is named; ``"min"`` where less is better.
        """
        if monitor is None:
            return
        # Lightning keeps what earlier validations logged, and what training did
        logged = trainer.callback_metrics
        new = {name: value for name, value in logged.items() if value is not before.get(name)}
        name, mode = choose_metric(trainer, new) if monitor == "auto" else (monitor, mode)
        if monitor != "auto" and monitor not in logged:
            rank_zero_warn(
                f"monitor={monitor}: validation does not log it, and has no say until it does; "
                f"choose one of {', '.join(sorted(new)) or 'those that it logs'}, 'auto' or None"
            )
        if name is not None and name in new:
            self._take(name, float(new[name]) if mode == "min" else -float(new[name]))
        known = self.got_worse, trains_on_mini_batches(trainer)
        self.got_worse, self.of_mini_batches = trainer.strategy.broadcast(known)

    def _take(self, name: str, value: float) -> None:
        if name != self.name:
            self.name, self.best = name, math.inf
        if math.isnan(value):  # says nothing
            return
        self.got_worse = value > self.best
        self.best = min(self.best, value)

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned; an empty one is that of the beginning."""
        for name, value in (asdict(BestValidation()) | state).items():
            setattr(self, name, value)


def choose_metric(trainer: Any, logged: Mapping[str, Any]) -> tuple[str | None, Mode]:
    """What validation is judged by where nobody says so, among the metrics that it logged.

    That of EarlyStopping, else of ModelCheckpoint, else the first that is called a loss, or has a
    loss, or an error in its name.
    """
    for callback in [*trainer.early_stopping_callbacks, *trainer.checkpoint_callbacks]:
        monitor = getattr(callback, "monitor", None)
        if monitor in logged:
            return monitor, callback.mode
    of_whole = [name for name in logged if not name.endswith("_step")]  # not of its last batch
    of_errors = [name for name in of_whole if re.search(LESS_IS_BETTER, name.lower())]
    for pattern in (WHOLE_LOSS, "loss", ""):
        for name in of_errors:
            if re.search(pattern, name.lower()):
                return name, "min"
    return None, "min"
