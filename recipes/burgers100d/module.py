"""Training a network on a 100-dimensional Burgers problem."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanSquaredError

from lightning_stableaa.recipes.base import RecipeModule
from lightning_stableaa.recipes.burgers100d.data import Points
from lightning_stableaa.recipes.burgers100d.laplacian import Estimator, derivatives
from lightning_stableaa.recipes.burgers100d.problems import Problem
from lightning_stableaa.recipes.errors import attribute_to
from lightning_stableaa.recipes.metrics import RelativeL2Error


class Burgers100dModule(RecipeModule):
    """Mean squared residual of the equation plus mean squared error of the given values.

    Args:
        network: space coordinates and time to one value; Linear and Tanh in turn.
        optimizer: called with the parameters.
        scheduler: called with the optimizer and the number of steps.
        problem: the equation.
        laplacian: "exact", or an estimate along ``probes`` directions redrawn every step:
            "hutchinson" (random signs) or "sampled" (some of the dimensions). The square of an
            unbiased estimate is too large by its variance, so both also penalise curvature.
        probes: directions of the estimates.
    """

    monitor = "val/relative_l2"
    shardable = False

    def __init__(
        self,
        network: nn.Module,
        optimizer: Callable[[Iterable[Any]], Optimizer],
        scheduler: Callable[[Optimizer, int], LRScheduler] | None = None,
        *,
        problem: Problem,
        laplacian: Estimator = "exact",
        probes: int = 16,
    ) -> None:
        super().__init__(network, optimizer, scheduler)
        self.problem = problem
        self.laplacian: Estimator = laplacian
        self.probes = probes
        self.mse = MeanSquaredError()
        self.relative_l2 = RelativeL2Error()

    def features(self) -> tuple[int, int]:
        """The space coordinates and time, and the solution."""
        return self.problem.space_dimension + 1, 1

    def setup(self, stage: str) -> None:
        """Refuses a network that the Laplacian cannot be propagated through, and its options."""
        super().setup(stage)
        inputs, _ = self.features()
        like = next(self.network.parameters())
        point = torch.zeros(1, inputs, dtype=like.dtype, device=like.device)
        with attribute_to("module"), torch.random.fork_rng(devices=[]):
            derivatives(self.network, point, estimator=self.laplacian, probes=self.probes)

    def losses(self, points: Points) -> tuple[Tensor, Tensor]:
        """Mean squares of the equation's residual and of the error at the given values."""
        u = derivatives(
            self.network,
            points.interior,
            estimator=self.laplacian,
            probes=self.probes,
            # tied to the step, not to the state of a generator: a resume and every candidate of
            # the safeguard see the same directions
            generator=Generator().manual_seed(points.step),
        )
        residual = self.problem.residual(points.interior, u)
        return residual.square().mean(), mse_loss(
            self.network(points.data)[:, 0], points.data_values
        )

    def training_step(self, batch: Points, batch_idx: int) -> Tensor:
        """The loss of one batch of points."""
        equation, data = self.losses(batch)
        loss = equation + data
        self.log("train/loss", loss, prog_bar=True)
        self.log_dict({"train/equation": equation, "train/data": data})
        return loss

    def anderson_loss(self, batch: Points) -> Tensor:
        """The training loss, free of side effects."""
        equation, data = self.losses(batch)
        return equation + data

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Compares with the exact solution."""
        points, exact = batch
        prediction = self.network(points)[:, 0]
        self.mse(prediction, exact)
        self.relative_l2(prediction, exact)
        self.log("val/mse", self.mse)
        self.log("val/relative_l2", self.relative_l2, prog_bar=True)
