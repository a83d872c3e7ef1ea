"""Collocation points of the 100-dimensional Burgers problems, redrawn as training goes on."""

from functools import lru_cache
from typing import NamedTuple

import lightning
import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_stableaa.recipes.burgers100d.problems import Problem


class Points(NamedTuple):
    """What one training step sees; coordinates are (x_1, .., x_d, t)."""

    interior: Tensor  # (n, d + 1), where the equation must hold
    data: Tensor  # (k, d + 1), where the solution is given
    data_values: Tensor  # (k,), the solution there
    step: int  # optimizer steps so far; the seed of random directions


def draw_points(
    problem: Problem, interior: int, data: int, seed: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """The three tensors of ``Points``, a function of ``seed`` alone."""
    generator = generator_for(seed)
    inside = problem.interior_points(interior, generator)
    given = problem.data_points(data, generator)
    return inside, given, problem.exact(given)


def generator_for(seed: tuple[int, ...]) -> Generator:
    """An independent stream for every tuple."""
    mixed = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed))


class Burgers100dData(lightning.LightningDataModule):
    """Training points, redrawn every ``redraw_every`` optimizer steps.

    The points depend on ``seed``, the rank and the step alone, so a resumed run meets the same
    ones, and the ranks of a distributed run meet different ones.

    Args:
        problem: the equation, with the law of its points.
        interior_points: points at which the equation is imposed.
        data_points: points at which the solution is given.
        redraw_every: optimizer steps between two draws.
        validation_points: points of the validation, the same for every ``seed``.
        epoch_length: optimizer steps in an epoch, which means nothing here.
        seed: decides the points.
    """

    def __init__(
        self,
        problem: Problem,
        interior_points: int = 4000,
        data_points: int = 400,
        redraw_every: int = 500,
        validation_points: int = 2000,
        epoch_length: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__()
        counts = {
            "interior_points": interior_points,
            "data_points": data_points,
            "redraw_every": redraw_every,
            "validation_points": validation_points,
            "epoch_length": epoch_length,
        }
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} must be >= 1, got {count}")
        self.problem = problem
        self.interior_points = interior_points
        self.data_points = data_points
        self.redraw_every = redraw_every
        self.validation_points = validation_points
        self.epoch_length = epoch_length
        self.seed = seed
        self._draw = lru_cache(maxsize=1)(draw_points)

    def train_dataloader(self) -> StatefulDataLoader:
        """One placeholder a step; ``on_before_batch_transfer`` puts the points in its place."""
        return StatefulDataLoader(range(self.epoch_length), batch_size=None)  # pyright: ignore[reportArgumentType]  # "range" is not assignable to "Dataset"

    def on_before_batch_transfer(self, batch: object, dataloader_idx: int) -> object:
        """Draws the training points of the current step."""
        assert self.trainer is not None
        if not self.trainer.training:
            return batch
        step = self.trainer.global_step
        seed = (self.seed, self.trainer.global_rank, step // self.redraw_every)
        return Points(*self._draw(self.problem, self.interior_points, self.data_points, seed), step)

    def val_dataloader(self) -> StatefulDataLoader:
        """One batch: points drawn like those of the equation, and the exact solution."""
        points = self.problem.interior_points(self.validation_points, generator_for((0,)))
        dataset = TensorDataset(points, self.problem.exact(points))
        return StatefulDataLoader(dataset, batch_size=self.validation_points)
