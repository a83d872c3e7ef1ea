"""Small networks on the full batch: the training loss with several options, over the plain run's.

    pip install scikit-learn
    python -m benchmarks.full_batch                                  # several ridges
    python -m benchmarks.full_batch --options '{}' '{"max_horizon": 0}'

A sine and four small tables, each with SGD, SGD with momentum and Adam; 500 steps, float32.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from lightning_stableaa import AndersonAccelerator

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, 0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, 3e-3),
}
RIDGES = [json.dumps({"regularization": ridge}) for ridge in (3e-2, 3e-3, 1e-3, 1e-6)]


def tables() -> dict[str, tuple[Tensor, Tensor]]:
    """Standardised inputs (n, d), and targets: (n, 1) numbers or (n,) classes."""
    datasets: Any = importlib.import_module("sklearn.datasets")
    x = torch.linspace(-1, 1, 128).reshape(-1, 1)
    found = {"sine": (x, torch.sin(torch.pi * x))}
    for name, (inputs, targets) in {
        "diabetes": datasets.load_diabetes(return_X_y=True),
        "friedman": datasets.make_friedman1(500, random_state=0),
        "wine": datasets.load_wine(return_X_y=True),
        "cancer": datasets.load_breast_cancer(return_X_y=True),
    }.items():
        y = torch.tensor(targets)
        if y.is_floating_point():
            y = _standardised(y.float().reshape(-1, 1))
        found[name] = _standardised(torch.tensor(inputs).float()), y
    return found


def _standardised(values: Tensor) -> Tensor:
    return (values - values.mean(0)) / (values.std(0) + 1e-8)


def run(
    table: tuple[Tensor, Tensor],
    optimizer: str,
    seed: int,
    options: dict[str, Any] | None,
    steps: int,
) -> float:
    """Training loss at the end; ``None`` for ``options`` is plain."""
    torch.manual_seed(seed)
    inputs, targets = table
    outputs = 1 if targets.is_floating_point() else int(targets.max()) + 1
    network = nn.Sequential(nn.Linear(inputs.shape[1], 32), nn.Tanh(), nn.Linear(32, outputs))

    def loss() -> Tensor:
        if targets.is_floating_point():
            return mse_loss(network(inputs), targets)
        decay = torch.stack([one.square().sum() for one in network.parameters()]).sum()
        return cross_entropy(network(inputs), targets) + 1e-4 * decay

    own = OPTIMIZERS[optimizer](network.parameters())
    accelerator = None if options is None else AndersonAccelerator(own, **options)
    for _ in range(steps):
        own.zero_grad()
        loss().backward()
        own.step()
        if accelerator is not None:
            accelerator.step(loss, stochastic=False)
    return float(loss().detach())


def main(words: Sequence[str] | None = None) -> None:
    """Print geometric means of the ratios with plain of the same seed."""
    parser = argparse.ArgumentParser(description="small networks on the full batch")
    parser.add_argument("--options", nargs="+", default=RIDGES, help="as JSON, one set a word")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=500)
    arguments = parser.parse_args(words)
    torch.set_num_threads(1)
    every: dict[str, list[float]] = {one: [] for one in arguments.options}
    for name, table in tables().items():
        for optimizer in OPTIMIZERS:
            jobs = [(table, optimizer, seed) for seed in range(arguments.seeds)]
            plain = [run(*job, None, arguments.steps) for job in jobs]
            cells = []
            for text, ratios in every.items():
                ours = [run(*job, json.loads(text), arguments.steps) for job in jobs]
                own = [a / b for a, b in zip(ours, plain, strict=True)]
                ratios += own
                cells.append(f"{text} {statistics.geometric_mean(own):.3f}")
            print(name, optimizer, *cells, sep="  ")
    for text, ratios in every.items():
        logs = [math.log(one) for one in ratios]
        error = statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.nan
        print(f"{text}: {statistics.geometric_mean(ratios):.3f} (one standard error {error:.0%})")


if __name__ == "__main__":
    main()
