"""What the processes of tests/test_kill.py run: a fit that kills itself, or one that goes on."""

from __future__ import annotations

import os
import signal
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from lightning_stableaa import SmoothingMonitor
from tests.callbacks.regression import INPUTS, QUIET, Regression, anderson, batches, network

BATCHES, EPOCHS, SAVE_EVERY = 21, 3, 3  # 63 micro-batches

# where in a batch the process dies
MOMENTS = ("training step", "judging", "optimizer step", "after the batch", "saving")

CASES: dict[str, dict[str, Any]] = {
    "sgd": {},
    "adam": {"optimizer": "adam"},
    "bf16": {"precision": "bf16-mixed"},
    "accumulation": {"accumulate": 3},
    "smoothing": {"smoothing": {"rsd_threshold": 0.02, "average_window": 2}},
    "smoothed weights": {
        "optimizer": "adam",
        "smoothing": {"rsd_threshold": 0.05, "apply_to": "weights"},
    },
    "evaluation": {"options": {"apply_to": "both", "optimizer_state": "mix"}},
    "batch norm": {"options": {"apply_to": "evaluation"}},
}


@dataclass(frozen=True)
class Death:
    """The process kills itself in this micro-batch, counted from 0, at this moment of it."""

    batch: int
    moment: str


class Model(Regression):
    """Batch and random numbers belong to the micro-batch, whatever a resume does to loaders."""

    def __init__(self, optimizer: str, death: Death | None) -> None:
        layers = [nn.Linear(INPUTS, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.1)]
        super().__init__(network(*layers, nn.Linear(8, 1)))
        self.optimizer_name = optimizer
        self.death = death
        self.passed: dict[str, list[int]] = {moment: [] for moment in MOMENTS}

    @property
    def position(self) -> int:
        return self.trainer.fit_loop.total_batch_idx

    def die(self, moment: str) -> None:
        self.passed[moment].append(self.position)
        if self.death == Death(self.position, moment):
            os.kill(os.getpid(), signal.SIGKILL)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if not self.trainer.training:
            return batch
        # asked for before the loop counts it
        generator = torch.Generator().manual_seed(self.position + 1)
        x = torch.randn(8, INPUTS, generator=generator)
        return x, x.sum(dim=1, keepdim=True) + 0.3 * torch.randn(8, 1, generator=generator)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(self.position)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        self.die("training step")
        return super().training_step(batch, batch_idx)

    def anderson_loss(self, batch: Any) -> Tensor:
        self.die("judging")
        return mse_loss(self.network(batch[0]), batch[1])

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        super().optimizer_step(*arguments, **options)
        self.die("optimizer step")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", mse_loss(self.network(batch[0]), batch[1]))

    def val_dataloader(self) -> Any:
        return batches(2)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.die("saving")

    def configure_optimizers(self) -> Any:
        if self.optimizer_name == "adam":
            return torch.optim.Adam(self.parameters(), lr=0.02)
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Dies(lightning.pytorch.Callback):
    """The last of the callbacks: everything that a batch does has been done."""

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        pl_module.die("after the batch")


def run(folder: str, case: str, death: Death | None, resume: bool) -> None:
    """Trains, and writes ``end.pt`` unless it is killed."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of Lightning, about small data; they are not the subject
    setting = CASES[case]
    path = Path(folder)
    checkpoints = ModelCheckpoint(
        path, "{step}", every_n_train_steps=SAVE_EVERY, save_top_k=1, monitor=None, save_last=True
    )
    options = {"store_every_n_steps": 3, "accelerate_every_n_steps": 3, "history_depth": 4}
    # a run resumed between an epoch's last step and its validation never makes that validation
    # (docs/checkpoints.md)
    callback = anderson(monitor=None, **options | setting.get("options", {}))
    smoothing = setting.get("smoothing")
    module = Model(setting.get("optimizer", "sgd"), death)
    trainer = lightning.pytorch.Trainer(
        **QUIET
        | {
            "enable_checkpointing": True,
            "logger": CSVLogger(folder, "log", version="resumed" if resume else "first"),
        },
        callbacks=[
            callback,
            *([SmoothingMonitor(**smoothing)] if smoothing is not None else []),
            checkpoints,
            Dies(),
        ],
        max_epochs=EPOCHS,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        precision=setting.get("precision", "32-true"),
        accumulate_grad_batches=setting.get("accumulate", 1),
    )
    torch.manual_seed(0)
    last = path / "last.ckpt"
    trainer.fit(module, batches(BATCHES, size=1), ckpt_path=last if resume else None)
    state = callback.state_dict()
    torch.save(
        {
            "weights": module.state_dict(),
            "optimizer": trainer.optimizers[0].state_dict() if trainer.optimizers else None,
            "callback": state,
            "random": torch.get_rng_state(),
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "steps": trainer.global_step,
            "passed": module.passed,
        },
        path / "end.pt",
    )
