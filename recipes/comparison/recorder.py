"""Records what a run has cost at each validation."""

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from lightning_stableaa import AndersonCallback
from lightning_stableaa.recipes.comparison.runner import CURVE
from lightning_stableaa.recipes.errors import UserError
from lightning_stableaa.recipes.files import write_atomically


def _clocks() -> np.ndarray:
    """Seconds on the wall, and those of them that this process had a processor for: (2,).

    Beside other programs on the same cores only the second can be compared.
    """
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # kernels still running belong to what was timed
    return np.array([time.perf_counter(), time.process_time()])


class CostRecorder(Callback):
    """Writes ``curve.json`` into ``folder`` when training ends: one entry a validation.

    ``gradients``, ``loss_evaluations``, ``attempted`` and ``accepted`` count those so far;
    ``seconds`` and ``processor_seconds`` are the training time so far, without validations;
    ``values`` are the monitored metric, and ``disabled`` is why acceleration was switched off.

    Args:
        metric: name under which validation logs the monitored metric.
        folder: the run folder.
    """

    def __init__(self, metric: str, folder: str) -> None:
        self.monitor = metric
        self.path = Path(folder) / CURVE
        self.curve: dict[str, list[float]] = defaultdict(list)
        self.disabled: str | None = None
        self.gradients = 0
        self.trained = np.zeros(2)
        self.started = np.zeros(2)
        self.before: dict[str, Any] = {}  # what Lightning had of all metrics before a validation

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self.started = _clocks()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts one gradient, also the many of one L-BFGS step."""
        self.gradients += 1

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock: how often to validate is no property of the variant."""
        if trainer.sanity_checking:
            return
        self.trained += _clocks() - self.started
        self.before = dict(trainer.callback_metrics)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Records the metric, where this validation logged it, and its cost."""
        if trainer.sanity_checking:
            return
        self._record(trainer)
        self.started = _clocks()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the curve."""
        if self.gradients == 0:
            raise UserError(
                "no gradient was taken in the whole run: training_step returned None every time"
            )
        if not trainer.enable_validation or sum(trainer.num_val_batches) == 0:
            raise UserError(
                f"the run has no validation, which has to log {self.monitor}: define "
                "validation_step, and a val_dataloader with at least one batch"
            )
        if not self.curve:
            raise UserError(
                "the run ended before its first validation: train longer, or validate more often "
                "(trainer.val_check_interval, trainer.check_val_every_n_epoch)"
            )
        write_atomically(self.path, json.dumps({"curve": self.curve, "disabled": self.disabled}))

    def _record(self, trainer: Trainer) -> None:
        logged = trainer.callback_metrics
        # Lightning keeps what training and earlier validations logged
        new = {name: value for name, value in logged.items() if value is not self.before.get(name)}
        if self.monitor not in logged:
            raise UserError(
                f"compare.metric={self.monitor}: validation does not log it; choose one of "
                f"{', '.join(sorted(new)) or 'those that validation_step logs, and log one'}"
            )
        if self.monitor not in new:
            return
        row: dict[str, float] = dict.fromkeys(("loss_evaluations", "attempted", "accepted"), 0)
        for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]  # "callbacks" is set by a connector
            if isinstance(callback, AndersonCallback) and callback.accelerator is not None:
                row["loss_evaluations"] += callback.loss_evaluations
                row["attempted"] += callback.accelerator.attempted
                row["accepted"] += callback.accelerator.accepted
                self.disabled = callback.accelerator.disabled
        row["gradients"] = self.gradients
        row["seconds"], row["processor_seconds"] = self.trained.round(4).tolist()
        row["values"] = new[self.monitor].item()
        for name, value in row.items():
            self.curve[name].append(value)
