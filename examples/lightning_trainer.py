"""AndersonCallback and SmoothingMonitor in a Trainer of Lightning.

python examples/lightning_trainer.py
"""

import lightning
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from lightning_stableaa import AndersonCallback, SmoothingMonitor


class Regression(lightning.LightningModule):
    """A small network; nothing in it refers to the acceleration."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Mean squared error of the batch."""
        inputs, targets = batch
        loss = mse_loss(self.network(inputs), targets)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Momentum and a cautious learning rate."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def loader() -> DataLoader:
    """One batch an epoch: the callback sees that the loss is the same function at every step."""
    inputs = torch.linspace(-1, 1, 128).reshape(-1, 1)
    return DataLoader(TensorDataset(inputs, torch.sin(torch.pi * inputs)), batch_size=128)


def train(*callbacks: lightning.Callback) -> float:
    """Trains with these callbacks; returns the last training loss."""
    lightning.seed_everything(0, verbose=False)
    trainer = lightning.Trainer(
        max_epochs=300,
        accelerator="cpu",
        devices=1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Regression(), loader())
    return float(trainer.callback_metrics["train/loss"])


if __name__ == "__main__":
    print(f"plain:                    {train():.2e}")
    print(f"accelerated:              {train(AndersonCallback()):.2e}")
    # the moving average of the paper: iterates are averaged while their updates are noisy
    both = train(SmoothingMonitor(), AndersonCallback())
    print(f"accelerated and smoothed: {both:.2e}")
