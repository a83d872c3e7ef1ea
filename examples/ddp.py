"""AndersonCallback under DDP: two processes on the CPU, equal weights on both.

    python examples/ddp.py

On GPUs: accelerator="gpu", devices=4, and nothing else. Lightning starts the other process by
running this file again.
"""

import lightning
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from lightning_stableaa import AndersonCallback


class Regression(lightning.LightningModule):
    """A small network and its data."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Squared error of this process's part of the batch."""
        inputs, targets = batch
        return mse_loss(self.network(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Momentum and a cautious learning rate."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def train_dataloader(self) -> DataLoader:
        """Lightning gives every process half of the samples: one batch an epoch."""
        inputs = torch.linspace(-1, 1, 128).reshape(-1, 1)
        return DataLoader(TensorDataset(inputs, torch.sin(torch.pi * inputs)), batch_size=64)


def main() -> None:
    """Trains, and compares the weights of the two processes."""
    torch.set_num_threads(1)
    lightning.seed_everything(0, verbose=False)
    trainer = lightning.Trainer(
        max_epochs=300,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        callbacks=[AndersonCallback()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Regression()
    trainer.fit(module)

    weights = nn.utils.parameters_to_vector(module.parameters()).detach()
    lowest = trainer.strategy.reduce(weights.clone(), reduce_op="min")
    highest = trainer.strategy.reduce(weights.clone(), reduce_op="max")
    if trainer.is_global_zero:
        equal = torch.equal(lowest, highest)
        print(f"weights of {trainer.world_size} processes are equal: {equal}")
    torch.distributed.destroy_process_group()  # gloo's threads may abort the exit otherwise


if __name__ == "__main__":
    main()
