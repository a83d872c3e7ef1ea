"""Points at which the network is trained, and the grid on which it is validated."""

from functools import lru_cache
from typing import NamedTuple

import lightning
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_stableaa.recipes.burgers2d.reference import cole_hopf


class Points(NamedTuple):
    """What one training step sees; coordinates are (t, x) in [0, 1] x [-1, 1]."""

    interior: Tensor  # (n, 2), where the equation must hold
    border: Tensor  # (m, 2), on t = 0 and x = -1, 1
    border_values: Tensor  # (m, 1), u there


def draw_points(interior: int, border: int, seed: tuple[int, ...]) -> Points:
    """Latin-hypercube points in float32; half of the border ones at t = 0, the rest at x = +-1."""
    random = np.random.default_rng(seed)

    def latin_hypercube(count: int, dimensions: int) -> np.ndarray:
        strata = random.permuted(np.tile(np.arange(count), (dimensions, 1)), axis=1).T
        return (strata + random.random((count, dimensions))) / count

    inside = latin_hypercube(interior, 2)
    inside[:, 1] = 2 * inside[:, 1] - 1
    at_start, at_walls = border // 2, border - border // 2
    start = np.stack([np.zeros(at_start), 2 * latin_hypercube(at_start, 1)[:, 0] - 1], axis=1)
    walls = np.stack(
        [latin_hypercube(at_walls, 1)[:, 0], np.where(np.arange(at_walls) % 2, 1.0, -1.0)], axis=1
    )
    on_border = torch.from_numpy(np.concatenate([start, walls])).float()
    time, position = on_border.split(1, dim=1)
    values = torch.where(time == 0, -torch.sin(torch.pi * position), 0.0)
    return Points(torch.from_numpy(inside).float(), on_border, values)


class Burgers2dData(lightning.LightningDataModule):
    """Training points, redrawn every ``redraw_every`` optimizer steps, and a reference grid.

    The points depend on ``seed``, the rank and the step alone, so a resumed run meets the same
    ones, and the ranks of a distributed run meet different ones.

    Args:
        interior_points: points at which the equation is imposed.
        border_points: points on the initial line and the two walls.
        redraw_every: optimizer steps between two draws; also the length of an epoch.
        grid: grid points in x and in t of the validation, which compares with Cole-Hopf.
        seed: decides the points.
    """

    def __init__(
        self,
        interior_points: int = 4000,
        border_points: int = 400,
        redraw_every: int = 500,
        grid: tuple[int, int] = (256, 100),
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, count, least in [
            ("interior_points", interior_points, 1),
            ("border_points", border_points, 2),
            ("redraw_every", redraw_every, 1),
            ("grid", min(grid), 2),
        ]:
            if count < least:
                raise ValueError(f"{name} must be >= {least}, got {count}")
        self.interior_points = interior_points
        self.border_points = border_points
        self.redraw_every = redraw_every
        self.grid = grid
        self.seed = seed
        self._draw = lru_cache(maxsize=1)(draw_points)

    def train_dataloader(self) -> StatefulDataLoader:
        """One placeholder a step; ``on_before_batch_transfer`` puts the points in its place."""
        return StatefulDataLoader(TensorDataset(torch.arange(self.redraw_every)), batch_size=None)

    def on_before_batch_transfer(self, batch: object, dataloader_idx: int) -> object:
        """Draws the training points of the current step."""
        assert self.trainer is not None
        if not self.trainer.training:
            return batch
        draw = self.trainer.global_step // self.redraw_every
        return self._draw(
            self.interior_points, self.border_points, (self.seed, self.trainer.global_rank, draw)
        )

    def val_dataloader(self) -> StatefulDataLoader:
        """The whole grid as one batch: coordinates (n, 2) and the exact solution (n, 1)."""
        coordinates, exact = reference_grid(*self.grid)
        return StatefulDataLoader(TensorDataset(coordinates[None], exact[None]), batch_size=None)


def reference_grid(positions: int, times: int) -> tuple[Tensor, Tensor]:
    """Coordinates (times * positions, 2) as (t, x), t slowest, and the exact u (.., 1); float32."""
    coordinates = torch.cartesian_prod(
        torch.linspace(0, 1, times, dtype=torch.float64),
        torch.linspace(-1, 1, positions, dtype=torch.float64),
    )
    exact = cole_hopf(coordinates[:, 0], coordinates[:, 1]).unsqueeze(1)
    return coordinates.float(), exact.float()
