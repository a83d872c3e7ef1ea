"""Averaging of the last weights."""

from typing import Any

import lightning
from lightning.pytorch.callbacks import WeightAveraging

from lightning_stableaa.recipes.errors import UserError


class LateWeightAveraging(WeightAveraging):
    """Lightning's ``WeightAveraging`` over the last part of the run.

    Lightning's ``StochasticWeightAveraging`` needs ``max_epochs`` and shows the average only
    after the last validation; ``WeightAveraging`` with a late start validates, until then, the
    weights before training. This class does neither.

    Args:
        start_share: share of the run after which averaging begins.

    Source: Izmailov et al. 2018, Averaging Weights Leads to Wider Optima.
    """

    def __init__(self, start_share: float = 0.75) -> None:
        super().__init__()
        self.start_share = start_share
        self.start_step = 0

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Refuses what Lightning's own class would fail on without a reason."""
        if not isinstance(pl_module, lightning.LightningModule):
            raise UserError("swa averages modules of lightning, not of pytorch_lightning")
        super().setup(trainer, pl_module, stage)

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Learns how long the run is."""
        super().on_train_start(trainer, pl_module)
        self.start_step = int(self.start_share * trainer.estimated_stepping_batches)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """After every optimizer step of the last part."""
        return step_idx is not None and step_idx >= self.start_step

    @property
    def _started(self) -> bool:
        return self._average_model is not None and bool(self._average_model.n_averaged > 0)

    def on_validation_epoch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Shows the average once there is one."""
        if self._started:
            super().on_validation_epoch_start(trainer, pl_module)

    def on_validation_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Goes on from the training weights."""
        if self._started:
            super().on_validation_epoch_end(trainer, pl_module)

    def on_train_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Leaves the average in the module."""
        if self._started:
            super().on_train_end(trainer, pl_module)

    def on_save_checkpoint(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Puts the average into the checkpoint once there is one."""
        if self._started:
            super().on_save_checkpoint(trainer, pl_module, checkpoint)
