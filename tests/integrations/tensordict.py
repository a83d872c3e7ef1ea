"""tensordict: a regression whose batches are TensorDicts, into which the training step writes."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

PACKAGE, MODEL = "tensordict", "`TensorDictModule`, tanh network, full batch"


class Regression(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        network = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1))
        self.model = TensorDictModule(network, in_keys=["x"], out_keys=["prediction"])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        batch = self.model(batch)
        return mse_loss(batch["prediction"], batch["y"])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def as_it_is(batch: Any) -> Any:
    return batch


def train(callbacks: list[Any], options: dict[str, Any]) -> Any:
    x = torch.rand(256, 2, generator=torch.Generator().manual_seed(0))
    data = TensorDict({"x": x, "y": (4 * x).sin().prod(1, keepdim=True)}, batch_size=[256])
    module = Regression()
    trainer = Trainer(max_epochs=400, callbacks=callbacks, **options)
    trainer.fit(module, DataLoader(data, batch_size=256, collate_fn=as_it_is))
    return module
