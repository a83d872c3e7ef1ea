"""The exact solution, the points, and the physics-informed loss against it."""

import math
from typing import Any

import pytest
import torch

from lightning_stableaa.recipes.burgers2d import Burgers2dData, Burgers2dModule
from lightning_stableaa.recipes.burgers2d.data import draw_points, reference_grid
from lightning_stableaa.recipes.burgers2d.module import residual
from lightning_stableaa.recipes.burgers2d.reference import VISCOSITY, cole_hopf
from lightning_stableaa.recipes.networks import mlp


def grid(times: int, positions: int) -> torch.Tensor:
    return torch.cartesian_prod(
        torch.linspace(0.02, 1, times, dtype=torch.float64),
        torch.linspace(-1, 1, positions, dtype=torch.float64),
    )


def exact(points: torch.Tensor) -> torch.Tensor:
    return cole_hopf(points[:, 0], points[:, 1]).unsqueeze(1)


def test_reference_satisfies_equation() -> None:
    # u_xx reaches 4e4 at the shock; 1e-16 of rounding is amplified accordingly
    assert residual(exact, grid(21, 41)).abs().max() < 1e-9


def test_reference_satisfies_boundary_conditions() -> None:
    x = torch.linspace(-1, 1, 21, dtype=torch.float64)
    zero = torch.zeros_like(x)
    torch.testing.assert_close(cole_hopf(zero, x), -torch.sin(math.pi * x), atol=1e-15, rtol=0)
    t = torch.linspace(0, 1, 21, dtype=torch.float64)
    for wall in (-1.0, 1.0):
        values = cole_hopf(t, torch.full_like(t, wall))
        torch.testing.assert_close(values, torch.zeros_like(t), atol=1e-13, rtol=0)


@pytest.mark.parametrize(("nodes", "error"), [(50, 1e-6), (80, 1e-12)])
def test_reference_quadrature_converges(nodes: int, error: float) -> None:
    points = grid(21, 41)
    coarse = cole_hopf(points[:, 0], points[:, 1], nodes=nodes).unsqueeze(1)
    assert (coarse - exact(points)).abs().max() < error


def test_reference_steepest_slope_equals_published() -> None:
    # Basdevant et al. 1986, table 2: |du/dx| at x = 0 peaks at 152.00516 for t = 1.6037 / pi
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([1.6037 / math.pi], dtype=torch.float64)
    (slope,) = torch.autograd.grad(cole_hopf(t, x).sum(), x)
    assert slope.item() == pytest.approx(-152.00516, abs=1e-3)


def test_points_each_stratum_holds_one() -> None:
    interior = draw_points(50, 8, seed=(0,)).interior
    unit = torch.stack([interior[:, 0], (interior[:, 1] + 1) / 2])
    assert torch.equal((unit * 50).long().sort(dim=1).values, torch.arange(50).expand(2, 50))


def test_points_border_has_exact_values() -> None:
    border, values = draw_points(2, 41, seed=(0,))[1:]
    t, x = border.T
    assert (t == 0).sum() == 20
    assert [((t > 0) & (x == wall)).sum().item() for wall in (-1, 1)] == [11, 10]
    torch.testing.assert_close(values, exact(border.double()).float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("option", "least"), [("interior_points", 1), ("border_points", 2), ("redraw_every", 1)]
)
def test_data_zero_counts_raise(option: str, least: int) -> None:
    options: Any = {option: 0}
    with pytest.raises(ValueError, match=f"{option} must be >= {least}, got 0"):
        Burgers2dData(**options)


def test_residual_polynomial_equals_hand_computed() -> None:
    # u = t^2 x^3: u_t = 2 t x^3, u u_x = 3 t^4 x^5, u_xx = 6 t^2 x
    points = grid(4, 5)
    t, x = points.split(1, dim=1)
    expected = 2 * t * x**3 + 3 * t**4 * x**5 - VISCOSITY * 6 * t**2 * x
    solution = residual(lambda p: (p[:, 0] ** 2 * p[:, 1] ** 3).unsqueeze(1), points)
    torch.testing.assert_close(solution, expected)


def test_loss_is_residual_plus_border_error() -> None:
    torch.manual_seed(0)
    module = Burgers2dModule(mlp([2, 5, 1], "tanh"), torch.optim.Adam)
    points = draw_points(6, 4, seed=(0,))
    expected = (
        residual(module.network, points.interior).square().mean()
        + (module.network(points.border) - points.border_values).square().mean()
    )
    torch.testing.assert_close(module.anderson_loss(points), expected)


def test_grid_holds_exact_solution() -> None:
    coordinates, values = reference_grid(4, 3)
    assert coordinates[:5].tolist() == [
        [0, -1],
        [0, pytest.approx(-1 / 3)],
        [0, pytest.approx(1 / 3)],
        [0, 1],
        [0.5, -1],
    ]
    torch.testing.assert_close(values, exact(coordinates.double()).float(), atol=1e-5, rtol=0)
