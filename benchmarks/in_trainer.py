"""What AndersonCallback adds to a step of a Lightning Trainer, on small models.

    python -m benchmarks.in_trainer               # figures
    python -m benchmarks.in_trainer --json FILE   # the same, to a file

Fits without a callback, with one that does nothing, and with ``AndersonCallback`` by its defaults
take turns. Times are those of the processor, of one thread, medians over the turns; ratios are
taken within a turn. A callback that does nothing shows what Lightning itself takes to call hooks.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.cost import STEPS, Row, machine, models
from lightning_stableaa import AndersonCallback
from lightning_stableaa.recipes.files import write_atomically

TURNS = 24
WARM_UP = 3 * STEPS  # steps of each fit that are not timed: the history fills
TIMED = 10 * STEPS


class Module(lightning.LightningModule):
    """A network, its loss, and nothing that a user would not log."""

    def __init__(self, network: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.network = network
        self.loss = loss

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss, logged."""
        inputs, targets = batch
        loss = self.loss(self.network(inputs), targets)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Steps so small that all fits train alike."""
        return torch.optim.SGD(self.parameters(), lr=1e-6)


class Idle(lightning.Callback):
    """Overrides what AndersonCallback overrides of a step, and does nothing."""

    def on_train_batch_start(self, *_: Any) -> None:
        """Nothing."""

    def on_train_batch_end(self, *_: Any) -> None:
        """Nothing."""


class Timer(lightning.Callback):
    """Processor time of the steps after the first ``WARM_UP``."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        """Begins where the history is full."""
        if trainer.global_step == WARM_UP:
            self.seconds = -time.process_time()

    def on_train_end(self, *_: Any) -> None:
        """Ends with the last step."""
        self.seconds += time.process_time()


def seconds_of_fit(module: Module, batch: tuple[Tensor, Tensor], callbacks: list[Any]) -> float:
    """Of ``TIMED`` steps."""
    timer = Timer()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=WARM_UP + TIMED,
        logger=False,
        callbacks=[*callbacks, timer],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    samples = TensorDataset(*(one[None] for one in batch))
    loader = DataLoader(samples, batch_size=None, sampler=[0] * (WARM_UP + TIMED))
    trainer.fit(module, loader)
    return timer.seconds


def measure(name: str, network: nn.Module, batch: tuple[Tensor, Tensor], loss: Any) -> Row:
    """Steps without and with the callbacks, in turns."""
    settings: dict[str, list[Any]] = {"plain": [], "idle": [Idle()], "anderson": []}
    turns: list[dict[str, float]] = []
    for _ in range(TURNS):
        settings["anderson"] = [AndersonCallback(stochastic=False)]
        turns.append(
            {
                kind: seconds_of_fit(Module(copy.deepcopy(network), loss), batch, callbacks)
                for kind, callbacks in settings.items()
            }
        )

    def added(kind: str) -> float:
        return statistics.median(one[kind] / one["plain"] for one in turns) - 1

    return {
        "model": name,
        "step_ms": 1e3 * statistics.median(one["plain"] for one in turns) / TIMED,
        "callback that does nothing": added("idle"),
        "AndersonCallback": added("anderson"),
    }


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print, and write where asked to."""
    parser = argparse.ArgumentParser(description="cost of AndersonCallback in a Trainer")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args(words)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    rows = [
        measure(name, network, batch(), loss)
        for name, (network, batch, loss, _) in models().items()
        if "ResNet" not in name
    ]
    result = {"machine": machine(torch.device("cpu")), "in a Trainer": rows}
    print(json.dumps(result, indent=1))
    if arguments.json:
        write_atomically(arguments.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
