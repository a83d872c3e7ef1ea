"""AndersonAccelerator in a plain PyTorch loop, beside the same loop without it.

python examples/plain_torch.py
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from lightning_stableaa import AndersonAccelerator

STEPS = 600


def train(*, accelerated: bool) -> float:
    """Fits a small network to one period of a sine; returns the final loss."""
    torch.manual_seed(0)
    inputs = torch.linspace(-1, 1, 128).reshape(-1, 1)
    targets = torch.sin(torch.pi * inputs)
    model = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    accelerator = AndersonAccelerator(optimizer) if accelerated else None

    def loss_fn() -> Tensor:
        return mse_loss(model(inputs), targets)

    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_fn().backward()
        optimizer.step()
        if accelerator is not None:
            # stochastic=False: every step has the same data, so that any decrease is progress
            accelerator.step(loss_fn, stochastic=False)

    if accelerator is not None:
        print(f"accepted {accelerator.accepted} of {accelerator.attempted} extrapolations")
    return loss_fn().item()


if __name__ == "__main__":
    plain = train(accelerated=False)
    accelerated = train(accelerated=True)
    print(f"loss after {STEPS} steps: {plain:.2e} plain, {accelerated:.2e} accelerated")
