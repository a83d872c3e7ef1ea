"""The learned solution beside the exact one."""

from pathlib import Path

import torch
from torch import nn

from lightning_stableaa.recipes.burgers2d.data import reference_grid
from lightning_stableaa.recipes.plots import figure


def draw_solution(network: nn.Module, path: Path) -> None:
    """Images of the network's u, the exact u, and their difference over t and x."""
    positions, times = 256, 100
    coordinates, exact = reference_grid(positions, times)
    parameter = next(network.parameters())
    with torch.no_grad():
        learned = network(coordinates.to(parameter)).to(exact)
    error = learned - exact
    relative = (error.norm() / exact.norm()).item()
    largest = error.abs().max().item()
    panels = [
        ("network", learned, "RdBu_r", 1.0, "u"),
        ("exact (Cole-Hopf)", exact, "RdBu_r", 1.0, "u"),
        (f"error, relative $L^2$ = {relative:.3f}", error, "PuOr_r", largest, "network - exact"),
    ]
    with figure(path, columns=3) as (drawing, axes):
        for ax, (title, values, colours, limit, label) in zip(axes, panels, strict=True):
            image = ax.imshow(
                values.reshape(times, positions).T.numpy(),
                origin="lower",
                extent=(0, 1, -1, 1),
                aspect="auto",
                cmap=colours,
                vmin=-limit,
                vmax=limit,
            )
            ax.set(title=title, xlabel="t", ylabel="x")
            drawing.colorbar(image, ax=ax, label=label)
