"""Records what a run has cost at each validation."""

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from lightning_stableaa import AndersonCallback
from lightning_stableaa.recipes.comparison.cost import Curve
from lightning_stableaa.recipes.errors import UserError
from lightning_stableaa.recipes.files import write_atomically

CURVE = "curve.json"


@dataclass(frozen=True)
class Clocks:
    """Seconds on the wall, and those of them that this process had a processor for.

    Beside other programs on the same cores only the second can be compared.
    """

    wall: float
    processor: float

    @classmethod
    def now(cls) -> "Clocks":
        """Waits for CUDA first: kernels still running belong to what was timed."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return cls(time.perf_counter(), time.process_time())

    def __add__(self, other: "Clocks") -> "Clocks":
        return Clocks(self.wall + other.wall, self.processor + other.processor)

    def __sub__(self, other: "Clocks") -> "Clocks":
        return Clocks(self.wall - other.wall, self.processor - other.processor)


class CostRecorder(Callback):
    """Writes ``curve.json``, a :class:`Curve`, into ``folder`` when training ends.

    Args:
        metric: name under which validation logs the monitored metric.
        folder: the run folder.
    """

    def __init__(self, metric: str, folder: str) -> None:
        self.metric = metric
        self.path = Path(folder) / CURVE
        self.curve = Curve()
        self.gradients = 0
        self.clocks = Clocks(0.0, 0.0)  # what training has taken so far
        self.started = Clocks(0.0, 0.0)
        self.before: dict[str, Any] = {}  # what Lightning had of all metrics before a validation

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Starts the clock."""
        self.started = Clocks.now()

    def on_after_backward(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """One gradient, also the many of one L-BFGS step."""
        self.gradients += 1

    def on_validation_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Stops the clock: how often to validate is no property of the variant."""
        self.clocks += Clocks.now() - self.started
        self.before = dict(trainer.callback_metrics)

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Records the metric, where this validation logged it, and its cost."""
        self._record(trainer)
        self.started = Clocks.now()

    def on_train_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Writes the curve."""
        if self.gradients == 0:
            raise UserError(
                "no gradient was taken in the whole run: training_step returned None every time"
            )
        if not trainer.enable_validation or sum(trainer.num_val_batches) == 0:
            raise UserError(
                f"the run has no validation, which has to log {self.metric}: define "
                "validation_step, and a val_dataloader with at least one batch"
            )
        if not self.curve.values:
            raise UserError(
                "the run ended before its first validation: train longer, or validate more often "
                "(trainer.val_check_interval, trainer.check_val_every_n_epoch)"
            )
        write_atomically(self.path, json.dumps(dataclasses.asdict(self.curve)))

    def _record(self, trainer: lightning.Trainer) -> None:
        logged = trainer.callback_metrics
        # Lightning keeps what training and earlier validations logged
        new = {name: value for name, value in logged.items() if value is not self.before.get(name)}
        if self.metric not in logged:
            raise UserError(
                f"compare.metric={self.metric}: validation does not log it; choose one of "
                f"{', '.join(sorted(new)) or 'those that validation_step logs, and log one'}"
            )
        if self.metric not in new:
            return
        losses = attempted = accepted = 0
        for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]  # "callbacks" is set by a connector
            if isinstance(callback, AndersonCallback) and callback.accelerator is not None:
                losses += callback.loss_evaluations
                self.curve.disabled = callback.accelerator.disabled
                attempted += callback.accelerator.attempted
                accepted += callback.accelerator.accepted
        row: dict[str, Any] = {
            "gradients": self.gradients,
            "loss_evaluations": losses,
            "seconds": round(self.clocks.wall, 4),
            "processor_seconds": round(self.clocks.processor, 4),
            "values": new[self.metric].item(),
            "attempted": attempted,
            "accepted": accepted,
        }
        for name, value in row.items():
            getattr(self.curve, name).append(value)
