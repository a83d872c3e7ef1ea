from collections.abc import Callable
from typing import Any

import lightning
import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import mse_loss

from lightning_stableaa.recipes.burgers100d import (
    Burgers100dData,
    Burgers100dModule,
    LogisticBurgers,
    ProductBurgers,
)
from lightning_stableaa.recipes.burgers100d.data import Points, draw_points
from lightning_stableaa.recipes.burgers100d.laplacian import Estimator, derivatives
from lightning_stableaa.recipes.burgers100d.problems import Derivatives
from lightning_stableaa.recipes.networks import mlp
from lightning_stableaa.recipes.train import train
from tests.recipes.conftest import Compose, quiet_trainer

Problem = LogisticBurgers | ProductBurgers
PROBLEMS = [LogisticBurgers(), ProductBurgers()]


def by_autograd(function: Callable[[Tensor], Tensor], points: Tensor) -> Derivatives:
    """One second derivative after another: slow and plain."""
    points = points.clone().requires_grad_()
    value = function(points)
    (gradient,) = torch.autograd.grad(value.sum(), points, create_graph=True)
    laplacian = torch.zeros_like(value)
    for i in range(points.shape[1] - 1):
        (row,) = torch.autograd.grad(gradient[:, i].sum(), points, create_graph=True)
        laplacian = laplacian + row[:, i]
    return Derivatives(value, gradient[:, -1], gradient[:, :-1].sum(dim=1), laplacian)


def tanh_network(widths: list[int]) -> nn.Sequential:
    torch.manual_seed(0)
    return mlp(widths, "tanh").double()


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: type(p).__name__)
def test_residual_exact_solution_is_zero(problem: Problem) -> None:
    points = problem.interior_points(20, Generator().manual_seed(1)).double()
    u = by_autograd(problem.exact, points)
    # each term of the equation is of the size of its largest: rounding is relative to that
    scale = max(term.detach().abs().max() for term in u)
    assert problem.residual(points, u).abs().max() < 1e-13 * scale


def test_logistic_source_coordinates_satisfy_equation() -> None:
    problem, d = LogisticBurgers(), 100
    scaled = problem.interior_points(20, Generator().manual_seed(1)).double()
    points = torch.cat((d * scaled[:, :-1], scaled[:, -1:]), dim=1)

    def source_solution(points: Tensor) -> Tensor:
        s = torch.exp(points[:, -1] + points[:, :-1].mean(dim=1))
        return s / (1 + s)

    u = by_autograd(source_solution, points)
    residual = u.time + d**2 / 2 * u.laplacian + (u.value - (2 + d) / (2 * d)) * d * u.divergence
    assert torch.allclose(source_solution(points), problem.exact(scaled), rtol=1e-12)
    assert residual.abs().max() < 1e-13


# fewer hidden units than dimensions takes the reduced basis, more takes the unit vectors
@pytest.mark.parametrize("widths", [[13, 5, 5, 1], [4, 7, 6, 5, 1], [3, 4, 1]])
def test_laplacian_exact_equals_autograd(widths: list[int]) -> None:
    network = tanh_network(widths)
    points = torch.randn(11, widths[0], generator=Generator().manual_seed(0)).double()
    fast = derivatives(network, points)
    slow = by_autograd(lambda x: network(x)[:, 0], points)
    for name, quantity in fast._asdict().items():
        assert torch.allclose(quantity, getattr(slow, name), rtol=1e-12, atol=1e-14), name
    weights = list(network.parameters())
    gradients = [torch.autograd.grad(torch.stack(u).square().sum(), weights) for u in (fast, slow)]
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("estimator", ["hutchinson", "sampled"])
def test_laplacian_estimate_is_unbiased(estimator: Estimator) -> None:
    network = tanh_network([7, 5, 5, 1])
    points = torch.randn(3, 7, generator=Generator().manual_seed(0)).double()
    generator = Generator().manual_seed(0)
    with torch.no_grad():
        exact = derivatives(network, points)
        draws = [
            derivatives(network, points, estimator=estimator, probes=2, generator=generator)
            for _ in range(1500)
        ]
    estimates = torch.stack([draw.laplacian for draw in draws])
    # The mean of N independent unbiased draws is normal around the exact value with the
    # standard error std/sqrt(N); five of them are exceeded once in two million seeds.
    standard_error = estimates.std(dim=0) / len(draws) ** 0.5
    assert ((estimates.mean(dim=0) - exact.laplacian).abs() < 5 * standard_error).all()
    # the bound is sharp enough to see an error of a few per cent
    assert (5 * standard_error < 0.1 * exact.laplacian.abs().max()).all()
    for name in ("value", "time", "divergence"):
        assert torch.allclose(getattr(draws[0], name), getattr(exact, name), rtol=1e-12)


def fit(module: Burgers100dModule, data: Burgers100dData, steps: int) -> lightning.Trainer:
    trainer = quiet_trainer(max_steps=steps)
    trainer.fit(module, data)
    return trainer


def test_points_depend_on_seed_and_step() -> None:
    class Recorder(Burgers100dModule):
        def training_step(self, batch: Points, batch_idx: int) -> Tensor:
            seen.append(batch)
            return super().training_step(batch, batch_idx)

    seen: list[Points] = []
    problem = LogisticBurgers()
    module = Recorder(mlp([101, 4, 1], "tanh"), torch.optim.Adam, problem=problem)
    data = Burgers100dData(
        problem, interior_points=5, data_points=4, redraw_every=3, epoch_length=4, seed=7
    )
    fit(module, data, 8)
    assert [points.step for points in seen] == list(range(8))
    for points in seen:
        expected = draw_points(problem, 5, 4, seed=(7, 0, points.step // 3))
        assert all(torch.equal(a, b) for a, b in zip(points[:3], expected, strict=True))
    assert torch.equal(seen[0].data_values, problem.exact(seen[0].data))
    assert not torch.equal(seen[2].interior, seen[3].interior)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: type(p).__name__)
def test_training_two_steps_equal_plain_loop(problem: Problem) -> None:
    def network() -> nn.Sequential:
        torch.manual_seed(0)
        return mlp([problem.space_dimension + 1, 8, 8, 1], "tanh")

    def adam(parameters: Any) -> torch.optim.Adam:
        return torch.optim.Adam(parameters, lr=1e-2)

    data = Burgers100dData(
        problem, interior_points=6, data_points=5, redraw_every=1, epoch_length=2
    )
    module = Burgers100dModule(network(), adam, problem=problem)
    trainer = fit(module, data, 2)

    plain = network()
    optimizer = adam(plain.parameters())
    losses = []
    for step in range(2):
        interior, given, values = draw_points(problem, 6, 5, seed=(0, 0, step))
        residual = problem.residual(interior, derivatives(plain, interior))
        loss = residual.square().mean() + mse_loss(plain(given)[:, 0], values)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for ours, theirs in zip(module.network.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)

    points, exact = next(iter(data.val_dataloader()))
    error = (plain(points)[:, 0] - exact).norm() / exact.norm()
    logged = trainer.callback_metrics
    # single precision on our side, double in the metric
    assert logged["val/relative_l2"].item() == pytest.approx(error.item(), rel=1e-5)
    assert logged["train/loss"].item() == losses[-1]


@pytest.mark.parametrize("recipe", ["burgers100d", "burgers100d_product"])
def test_recipe_two_steps_log_error(recipe: str, compose: Compose) -> None:
    results = train(
        compose(
            f"recipe={recipe}",
            "data.interior_points=20",
            "trainer.max_steps=2",
            "trainer.val_check_interval=1",
            "callbacks=none",
            "callbacks.progress=null",
            "logger=none",
        )
    )
    assert results["best/val/relative_l2"] <= results["val/relative_l2"]
    # the product is of the order of 1e-9: an untrained network is off by a factor of millions
    assert (results["val/relative_l2"] > 1e6) == (recipe == "burgers100d_product")
