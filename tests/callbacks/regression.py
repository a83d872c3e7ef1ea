"""A small regression for both class trees of Lightning: the problem that the tests here train."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_stableaa import AndersonCallback
from tests.histories import points_of

TREES = ("lightning.pytorch", "pytorch_lightning")

INPUTS = 4

# Silent runs of one CPU process, unless a test asks for more.
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}

# Stated, so that no count in these tests turns on the defaults that users get.
SETTING: dict[str, Any] = {
    "sufficient_decrease": 0.0,
    "history_depth": 10,
    "store_every_n_steps": 2,
    "accelerate_every_n_steps": 4,
    "look_ahead_cycles": 10.0,
    "regularization": [1e-8, 1e-6, 1e-4, 1e-2, 1e-1],
    "max_extrapolation": 1000.0,
}

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]

momentum_sgd = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def network(*layers: nn.Module, seed: int = 0) -> nn.Module:
    """``layers``, or a small tanh network, with seeded weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if not layers:
            layers = (nn.Linear(INPUTS, 8), nn.Tanh(), nn.Linear(8, 1))
        for layer in layers:
            if isinstance(layer, nn.Linear | nn.Conv2d | nn.BatchNorm1d):
                layer.reset_parameters()
        return nn.Sequential(*layers)


def rows(count: int, *, seed: int = 1, noise: float = 0.0) -> TensorDataset:
    """``count`` samples of a linear map of four inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, INPUTS, generator=generator)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]])
    return TensorDataset(x, y + noise * torch.randn(count, 1, generator=generator))


def batches(count: int, *, size: int = 8, noise: float = 0.0) -> DataLoader:
    """``count`` batches of ``size`` samples, in order."""
    return DataLoader(rows(count * size, noise=noise), batch_size=size)


class _Regression:
    """What both trees share; the LightningModule comes in by ``regression_class``."""

    def __init__(
        self, net: nn.Module | None = None, make_optimizer: MakeOptimizer = momentum_sgd
    ) -> None:
        super().__init__()
        self.network = net or network()
        self.make_optimizer = make_optimizer

    def training_step(self: Any, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        x, y = batch
        loss = mse_loss(self.network(x), y)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self: Any) -> Any:
        return self.make_optimizer(self.parameters())


@functools.cache
def regression_class(tree: str) -> Any:
    """The module as a LightningModule of ``tree``."""
    base = importlib.import_module(tree).LightningModule
    return type("Regression", (_Regression, base), {})


Regression: Any = regression_class("lightning.pytorch")


def fit(
    module: Any,
    loader: Any,
    *callbacks: Any,
    tree: str = "lightning.pytorch",
    ckpt_path: str | Path | None = None,
    **options: Any,
) -> Any:
    """Train and return the Trainer."""
    trainer = importlib.import_module(tree).Trainer(
        **{**QUIET, "callbacks": list(callbacks), **options}
    )
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer


def anderson(**options: Any) -> AndersonCallback:
    """Points every second step, candidates every fourth, unless ``options`` say otherwise."""
    if options.get("safeguard") == "none":
        options = {"regularization": 1e-8} | options
    return AndersonCallback(**SETTING | options)


def weights(module: nn.Module) -> Tensor:
    """All parameters and buffers, one flat vector."""
    return torch.cat([one.detach().flatten().double() for one in module.state_dict().values()])


def counters(callback: Any) -> dict[str, int]:
    """Counts of the engine, during or after a fit."""
    return callback.state_dict()["counters"]


def stored_points(callback: Any) -> Tensor:  # (k, n)
    """The points of the history, oldest first, during or after a fit."""
    return points_of(callback.state_dict()["points"]["history"])


class Record(lightning.pytorch.Callback):
    """Appends ``read(trainer, module)`` after every batch."""

    def __init__(self, read: Callable[[Any, Any], Any]) -> None:
        self.read = read
        self.values: list[Any] = []

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.values.append(self.read(trainer, pl_module))
