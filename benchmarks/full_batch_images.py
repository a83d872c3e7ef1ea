"""Images on the full batch: how soon the training loss of the tuned baseline is reached.

    STABLEAA_CIFAR10_DIR=... python -m benchmarks.full_batch_images FILE

2,048 images of CIFAR-10 at 16 x 16 pixels, all of them at every step; a network of three
convolutions; SGD with momentum and Adam, each at several rates, 400 steps. The tuned baseline of an
optimizer and a seed is the plain run, of all rates, with the lowest training loss on the way. Cost
counts gradients, and a loss evaluated to compare candidates as a third of one.

``FILE`` has one line a run, and a run that has its line is not made again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.batch_sizes import adam, cifar10, convolutions, momentum
from lightning_stableaa import AndersonAccelerator

IMAGES = 2048
MICRO_BATCH = 1024
OPTIMIZERS = {"SGD": (momentum, (0.02, 0.05, 0.1)), "Adam": (adam, (1e-3, 3e-3, 1e-2))}


def run(optimizer: str, rate: float, seed: int, steps: int, *, accelerated: bool) -> dict[str, Any]:
    """Costs and training losses, one of each a step."""
    torch.set_num_threads(1)
    images, classes, *_ = cifar10(0)
    every = len(images) // IMAGES  # they are sorted by class
    images, classes = images[::every][:IMAGES], classes[::every][:IMAGES]
    torch.manual_seed(seed)
    model = convolutions()
    own = OPTIMIZERS[optimizer][0](rate)(model)
    accelerator = AndersonAccelerator(own) if accelerated else None

    def loss() -> Tensor:
        parts = zip(images.split(MICRO_BATCH), classes.split(MICRO_BATCH), strict=True)
        return torch.stack([cross_entropy(model(x), y) for x, y in parts]).mean()

    cost, costs, losses = 0.0, [], []
    for _ in range(steps):
        own.zero_grad()
        value = loss()
        value.backward()
        own.step()
        costs.append(cost)
        losses.append(float(value.detach()))
        cost += 1
        if accelerator is not None:
            with torch.no_grad():
                cost += accelerator.step(loss, stochastic=False).loss_evaluations / 3
    return {
        **{"optimizer": optimizer, "rate": rate, "seed": seed, "steps": steps},
        **{"accelerated": accelerated, "cost": costs, "loss": losses},
        "accepted": accelerator.accepted if accelerator is not None else None,
    }


def cost_to(run: dict[str, Any], target: float) -> float:
    """The cost at which the loss is first at most the target; inf where it never is."""
    pairs = zip(run["cost"], run["loss"], strict=True)
    return next((cost for cost, loss in pairs if loss <= target), math.inf)


def best_within(run: dict[str, Any], budget: float) -> float:
    """The lowest loss at a cost of at most the budget."""
    pairs = zip(run["cost"], run["loss"], strict=True)
    return min(loss for cost, loss in pairs if cost <= budget)


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Of each optimizer: its best accelerated rate against its best plain one, seed by seed."""
    lines = [
        "| optimizer | seed | rate: plain, accelerated | cost to the baseline's lowest loss "
        "| lowest loss at equal cost | accepted |",
        "|---|---|---|---|---|---|",
    ]
    for optimizer in OPTIMIZERS:
        times, losses = [], []
        for seed in sorted({one["seed"] for one in runs}):
            own = [one for one in runs if (one["optimizer"], one["seed"]) == (optimizer, seed)]
            budget = float(own[0]["steps"])
            plain = min(
                (one for one in own if not one["accelerated"]), key=lambda one: min(one["loss"])
            )
            target = min(plain["loss"])
            ours = min(
                (one for one in own if one["accelerated"]), key=lambda one: cost_to(one, target)
            )
            times.append(cost_to(ours, target) / cost_to(plain, target))
            losses.append(best_within(ours, budget) / target)
            lines.append(
                f"| {optimizer} | {seed} | {plain['rate']:g}, {ours['rate']:g} | {times[-1]:.2f} "
                f"| {losses[-1]:.2f} | {ours['accepted']} of {int(budget) // 20} |"
            )
        lines.append(
            f"| {optimizer} | median | | {statistics.median(times):.2f} "
            f"| {statistics.median(losses):.2f} | |"
        )
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    """Make the runs that are missing, and print the table."""
    parser = argparse.ArgumentParser(description="images on the full batch")
    parser.add_argument("file", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args(words)
    path: Path = arguments.file
    runs = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    names = ("optimizer", "rate", "seed", "accelerated", "steps")
    done = {tuple(one[name] for name in names) for one in runs}
    with path.open("a") as file:
        for seed, optimizer in itertools.product(range(arguments.seeds), OPTIMIZERS):
            for rate, accelerated in itertools.product(OPTIMIZERS[optimizer][1], (False, True)):
                if (optimizer, rate, seed, accelerated, arguments.steps) not in done:
                    runs.append(
                        run(optimizer, rate, seed, arguments.steps, accelerated=accelerated)
                    )
                    file.write(json.dumps(runs[-1]) + "\n")
                    file.flush()
    print(table(runs))


if __name__ == "__main__":
    main()
