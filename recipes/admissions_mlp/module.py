"""Regression of the chance of admission."""

from typing import Any

from torch import Tensor
from torch.nn.functional import mse_loss
from torchmetrics import MeanSquaredError

from lightning_stableaa.recipes.admissions_mlp.data import FEATURES
from lightning_stableaa.recipes.base import RecipeModule


class AdmissionsModule(RecipeModule):
    """Mean squared error of a network that maps (batch, 7) to (batch, 1)."""

    monitor = "val/mse"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.validation_mse = MeanSquaredError()

    def features(self) -> tuple[int, int]:
        """The columns of the table, and the chance of admission."""
        return len(FEATURES), 1

    def anderson_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The training loss, free of side effects."""
        features, targets = batch
        return mse_loss(self.network(features), targets)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean squared error of one batch."""
        loss = self.anderson_loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Adds one batch to the validation error."""
        features, targets = batch
        self.validation_mse(self.network(features), targets)
        self.log("val/mse", self.validation_mse, prog_bar=True)
