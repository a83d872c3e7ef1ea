"""torch_geometric: a graph convolutional network on Zachary's karate club, full batch."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.nn.functional import cross_entropy
from torch_geometric.datasets import KarateClub
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GCN

PACKAGE, MODEL = "torch-geometric", "GCN on a graph of 34 nodes, full batch"


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = GCN(34, hidden_channels=16, num_layers=2, out_channels=4)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        scores = self.model(batch.x, batch.edge_index)
        return cross_entropy(scores[batch.train_mask], batch.y[batch.train_mask])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3, weight_decay=5e-4)


def train(callbacks: list[Any], options: dict[str, Any]) -> Any:
    module = Classifier()
    trainer = Trainer(max_epochs=300, callbacks=callbacks, **options)
    trainer.fit(module, DataLoader([KarateClub()[0]], batch_size=1))
    return module
