"""stableaa-compare on a module of your own: does acceleration help on your problem?

    python examples/hydra_own_module.py

which does what this command does in the folder of this file, and writes comparisons/...:

    stableaa-compare compare.module=hydra_own_module.Regression \
        compare.datamodule=hydra_own_module.Data compare.metric=val/loss \
        'compare.variants=[plain,anderson]' compare.seeds=2 trainer.max_epochs=200

Needs: pip install 'lightning-stableaa[recipes,compare]'.
"""

import sys
from pathlib import Path

import lightning
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, Subset, TensorDataset


class Regression(lightning.LightningModule):
    """Can be built without arguments, and logs the metric that decides."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Squared error of a batch."""
        return mse_loss(self.network(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Squared error of unseen samples."""
        self.log("val/loss", mse_loss(self.network(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Momentum and a cautious learning rate."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Data(lightning.LightningDataModule):
    """Training and validation samples of one relation."""

    def setup(self, stage: str) -> None:
        """One period of a sine."""
        inputs = torch.linspace(-1, 1, 96).reshape(-1, 1)
        self.samples = TensorDataset(inputs, torch.sin(torch.pi * inputs))

    def train_dataloader(self) -> DataLoader:
        """Two of three samples, in one batch."""
        return DataLoader(Subset(self.samples, [i for i in range(96) if i % 3]), batch_size=64)

    def val_dataloader(self) -> DataLoader:
        """Every third sample."""
        return DataLoader(Subset(self.samples, range(0, 96, 3)), batch_size=32)


if __name__ == "__main__":
    from lightning_stableaa.recipes.compare import main

    sys.path.insert(0, str(Path(__file__).parent))
    sys.argv[1:] = sys.argv[1:] or [
        "compare.module=hydra_own_module.Regression",
        "compare.datamodule=hydra_own_module.Data",
        "compare.metric=val/loss",
        "compare.variants=[plain,anderson]",
        "compare.seeds=2",
        "compare.jobs=0",  # in this process; 2 makes two runs side by side
        "trainer.max_epochs=200",
    ]
    main()
