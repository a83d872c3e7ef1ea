"""AndersonAccelerator in a loop of Lightning Fabric, saved to a checkpoint and resumed.

python examples/fabric_loop.py
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from lightning_stableaa import AndersonAccelerator


class Run:
    """A network, its optimizer and the accelerator, on the device that Fabric chose."""

    def __init__(self, fabric: Fabric) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        model, optimizer = fabric.setup(model, optimizer)
        self.fabric, self.model, self.optimizer = fabric, model, optimizer
        self.accelerator = AndersonAccelerator(optimizer)
        self.inputs = fabric.to_device(torch.rand(64, 2))
        self.targets = self.inputs.prod(dim=1, keepdim=True)

    def loss(self) -> Tensor:
        """Mean squared error of all points: the same function at every step."""
        return mse_loss(self.model(self.inputs), self.targets)

    def train(self, steps: int) -> float:
        """Makes so many optimizer steps; returns the loss after them."""
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.fabric.backward(self.loss())
            self.optimizer.step()
            self.accelerator.step(self.loss, stochastic=False)
        return self.loss().item()

    def state(self) -> dict[str, Any]:
        """What ``fabric.save`` and ``fabric.load`` take; the accelerator is one of its entries."""
        return {"model": self.model, "optimizer": self.optimizer, "anderson": self.accelerator}


def main() -> None:
    """Trains 300 steps at once, and again in two parts: the end is bitwise the same."""
    fabric = Fabric(accelerator="cpu", devices=1)
    uninterrupted = Run(fabric).train(300)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "checkpoint.ckpt")
        first = Run(fabric)
        first.train(130)  # in the middle of a cycle
        fabric.save(path, first.state())
        second = Run(fabric)
        fabric.load(path, second.state())
    resumed = second.train(170)
    print(f"loss after 300 steps: {uninterrupted:.6e}, resumed after 130: {resumed:.6e}")
    assert uninterrupted == resumed


if __name__ == "__main__":
    main()
