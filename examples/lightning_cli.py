"""The callbacks in a configuration of LightningCLI: lightning_cli.yaml, beside this file.

    python examples/lightning_cli.py
    python examples/lightning_cli.py fit --config=examples/lightning_cli.yaml \
        --trainer.callbacks.history_depth=5
    python examples/lightning_cli.py fit --trainer.callbacks.help=AndersonCallback

Needs jsonargparse: pip install 'lightning-stableaa[cli]'.
"""

import sys
from pathlib import Path

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

# LightningCLI knows a callback by its short name once its class was imported.
from lightning_stableaa import AndersonCallback, SmoothingMonitor  # noqa: F401


class Regression(LightningModule):
    """A small network and its data.

    Args:
        width: of the hidden layer.
        lr: learning rate of Adam.
    """

    def __init__(self, width: int = 16, lr: float = 1e-3) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1))
        self.lr = lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Squared error of all points."""
        inputs, targets = batch
        return mse_loss(self.network(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> DataLoader:
        """One batch an epoch, so that the loss is the same function at every step."""
        inputs = torch.linspace(-1, 1, 64).reshape(-1, 1)
        return DataLoader(TensorDataset(inputs, inputs**3), batch_size=64)


def main() -> None:
    """Runs the command line; without arguments, ``fit`` with the configuration beside this file."""
    config = Path(__file__).with_suffix(".yaml")
    without = ["fit", f"--config={config}"] if len(sys.argv) == 1 else None
    LightningCLI(Regression, args=without, save_config_callback=None)


if __name__ == "__main__":
    main()
