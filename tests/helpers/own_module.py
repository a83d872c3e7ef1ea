"""A module and data that are no recipe, as a user of stableaa-compare has them."""

import itertools
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from lightning_stableaa import AndersonCallback


class Module(lightning.LightningModule):
    """A small regression; records its steps, and the weights and rates at each validation."""

    def __init__(self, width: int = 3, lr: float = 0.1, schedule: bool = False) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 1))
        self.lr = lr
        self.schedule = schedule
        self.training_steps = 0
        self.validated: list[Tensor] = []
        self.rates: list[float] = []

    def weights(self) -> Tensor:
        """All parameters as one vector (n,)."""
        return nn.utils.parameters_to_vector(self.parameters()).detach().clone()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        self.training_steps += 1
        features, targets = batch
        return mse_loss(self.network(features), targets)

    def on_train_batch_end(self, outputs: Any, batch: list[Tensor], batch_idx: int) -> None:
        """Logs what is none of validation's metrics."""
        self.log("train/steps", float(self.training_steps))

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.validated.append(self.weights())
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        features, targets = batch
        self.log("val/loss", mse_loss(self.network(features), targets))

    def configure_optimizers(self) -> Any:
        """SGD, and a rate that a schedule halves every epoch."""
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.5)
        if not self.schedule:
            return optimizer
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


class Breaks(Module):
    """Fails in its third step."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        if self.global_step == 2:
            raise RuntimeError("broken")
        return super().training_step(batch, batch_idx)


class BreaksAccelerated(Module):
    """Fails beside an AndersonCallback."""

    def on_train_start(self) -> None:
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(one, AndersonCallback) for one in callbacks):
            raise RuntimeError("broken")


class UsesLBFGS(Module):
    """Has an optimizer that cannot be accelerated."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), max_iter=2)


class Unrepeatable(Module):
    """Has another loss at every evaluation."""

    evaluations = itertools.count(1)

    def anderson_loss(self, batch: list[Tensor]) -> Tensor:
        return torch.tensor(float(next(self.evaluations)))


class Diverges(Module):
    """Validates to NaN."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", torch.tensor(torch.nan))


class Skips(Module):
    """Never gives a loss."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return None


class NeedsWidth(Module):
    """Its parameter has no annotation."""

    def __init__(self, width) -> None:  # type: ignore[no-untyped-def]
        super().__init__(width=width)


class Data(lightning.LightningDataModule):
    """Five batches of four rows, the same in every epoch."""

    def __init__(self) -> None:
        super().__init__()
        features = torch.rand(20, 2, generator=torch.Generator().manual_seed(0))
        self.rows = TensorDataset(features, features.sum(dim=1, keepdim=True))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.rows, batch_size=4)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.rows, batch_size=20)


class Empty(Data):
    """No row fills a batch."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.rows, batch_size=64, drop_last=True)


class Unvalidated(Data):
    """Rows to train on, and none to validate."""

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.rows, batch_size=64, drop_last=True)
