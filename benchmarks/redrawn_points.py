"""A PINN in a plain loop whose points are redrawn: does a step that helps once wreck the run?

    python -m benchmarks.redrawn_points FILE --seeds 20

Burgers 2d by a tanh network 2 - 8 x 20 - 1 with Xavier normal weights; 2,000 points of a Latin
hypercube and 400 on the border, redrawn every 500 steps; 2,000 steps of Adam, cosine from 1e-2 to
1e-4. The error is that on the grid of the recipe, at the end and at the checkpoint of lowest
training loss, which is what a user can keep.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_stableaa import AndersonAccelerator
from lightning_stableaa.recipes.burgers2d.data import Points, draw_points, reference_grid

STEPS, REDRAW = 2000, 500
VISCOSITY = 0.01 / math.pi


def network() -> nn.Sequential:
    """2 - 8 x 20 - 1, tanh."""
    widths = [2, *[20] * 8, 1]
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        linear = nn.Linear(inputs, outputs)
        nn.init.xavier_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def loss_of(model: nn.Module, points: Points) -> Tensor:
    """Mean squared residual of u_t + u u_x = nu u_xx, and misfit on the border."""
    inside = points.interior.clone().requires_grad_()
    u = model(inside)
    du = torch.autograd.grad(u.sum(), inside, create_graph=True)[0]
    u_t, u_x = du[:, :1], du[:, 1:]
    u_xx = torch.autograd.grad(u_x.sum(), inside, create_graph=True)[0][:, 1:]
    residual = u_t + u * u_x - VISCOSITY * u_xx
    return residual.square().mean() + (model(points.border) - points.border_values).square().mean()


@torch.no_grad()
def error_of(model: nn.Module) -> float:
    """Relative L2 error on the grid."""
    coordinates, exact = reference_grid(256, 100)
    return float((model(coordinates) - exact).norm() / exact.norm())


def run(seed: int, options: dict[str, Any] | None) -> dict[str, float]:
    """One run; ``None`` is plain Adam."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS, eta_min=1e-4)
    accelerator = None if options is None else AndersonAccelerator(optimizer, **options)
    best, error_at_best, losses = math.inf, math.nan, 0
    points = draw_points(2000, 400, (seed, 0))
    for step in range(STEPS):
        if step % REDRAW == 0:
            points = draw_points(2000, 400, (seed, step // REDRAW))
        optimizer.zero_grad()
        loss = loss_of(model, points)
        if float(loss.detach()) < best and step % 20 == 0:
            best, error_at_best = float(loss.detach()), error_of(model)
        loss.backward()
        optimizer.step()
        schedule.step()
        if accelerator is not None:
            report = accelerator.step(lambda: loss_of(model, points), stochastic=False)  # noqa: B023
            losses += report.loss_evaluations
    return {"end": error_of(model), "at best loss": error_at_best, "losses": losses}


def main(words: Sequence[str] | None = None) -> None:
    """Compare plain and accelerated runs over the seeds."""
    parser = argparse.ArgumentParser(description="a PINN whose points are redrawn")
    parser.add_argument("file", type=Path)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--options", type=json.loads, default={}, help="of the accelerator")
    arguments = parser.parse_args(words)
    jobs = [(seed, one) for seed in range(arguments.seeds) for one in (None, arguments.options)]
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("fork")) as pool:
        found = list(pool.map(run, *zip(*jobs, strict=True)))
    rows = []
    for seed, (plain, ours) in enumerate(zip(found[::2], found[1::2], strict=True)):
        rows.append({"seed": seed, "plain": plain, "ours": ours})
        print(seed, {k: f"{plain[k]:.3f} {ours[k]:.3f}" for k in ("end", "at best loss")})
    for key in ("end", "at best loss"):
        ratios = [row["ours"][key] / row["plain"]["at best loss"] for row in rows]
        mean = statistics.geometric_mean(ratios)
        print(f"{key}, over plain's at its best loss: {mean:.3f} (worst {max(ratios):.2f})")
    arguments.file.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
