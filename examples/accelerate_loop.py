"""AndersonAccelerator with Hugging Face Accelerate: gradient accumulation, saved and resumed.

    python examples/accelerate_loop.py

Needs Accelerate: pip install accelerate.
"""

import tempfile

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from lightning_stableaa import AndersonAccelerator


class Run:
    """A network, its optimizer and the accelerators, prepared by Accelerate."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        inputs = torch.linspace(-1, 1, 128).reshape(-1, 1)
        samples = TensorDataset(inputs, torch.sin(torch.pi * inputs))
        model = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(
            model, optimizer, DataLoader(samples, batch_size=64)
        )
        self.anderson = AndersonAccelerator(self.optimizer)  # prepare may have moved the weights
        self.accelerator.register_for_checkpointing(self.anderson)

    def loss(self) -> Tensor:
        """Mean squared error of both micro-batches: the same function at every step."""
        return sum(mse_loss(self.model(x), y) for x, y in self.loader) / 2

    def train(self, epochs: int, *, accelerated: bool = True) -> float:
        """Makes one optimizer step an epoch; returns the loss after the last one."""
        for _ in range(epochs):
            for x, y in self.loader:
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(mse_loss(self.model(x), y))
                    self.optimizer.step()
                    self.optimizer.zero_grad()
            if accelerated:
                self.anderson.step(self.loss, stochastic=False)
        return self.loss().item()


def main() -> None:
    """Trains 300 steps plain, accelerated, and accelerated in two parts with the same end."""
    plain = Run().train(300, accelerated=False)
    uninterrupted = Run().train(300)
    with tempfile.TemporaryDirectory() as folder:
        first = Run()
        first.train(130)  # in the middle of a cycle
        first.accelerator.save_state(folder)
        second = Run()
        second.accelerator.load_state(folder)
    resumed = second.train(170)
    print(f"loss after 300 steps: {plain:.2e} plain, {uninterrupted:.6e} accelerated")
    print(f"resumed after 130 steps: {resumed:.6e}")


if __name__ == "__main__":
    main()
