"""The exact solution, the points, and the physics-informed loss against it."""

import math
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from lightning_stableaa.recipes.burgers2d import Burgers2dData, Burgers2dModule
from lightning_stableaa.recipes.burgers2d.data import Points, draw_points, reference_grid
from lightning_stableaa.recipes.burgers2d.module import residual
from lightning_stableaa.recipes.burgers2d.picture import draw_solution
from lightning_stableaa.recipes.burgers2d.reference import VISCOSITY, cole_hopf
from lightning_stableaa.recipes.networks import mlp


def grid(times: int, positions: int) -> torch.Tensor:
    return torch.cartesian_prod(
        torch.linspace(0.02, 1, times, dtype=torch.float64),
        torch.linspace(-1, 1, positions, dtype=torch.float64),
    )


def exact(points: torch.Tensor) -> torch.Tensor:
    return cole_hopf(points[:, 0], points[:, 1]).unsqueeze(1)


class TestReference:
    def test_satisfies_the_equation(self):
        # u_xx reaches 4e4 at the shock; 1e-16 of rounding is amplified accordingly
        assert residual(exact, grid(21, 41)).abs().max() < 1e-9

    def test_satisfies_initial_and_wall_conditions(self):
        x = torch.linspace(-1, 1, 21, dtype=torch.float64)
        zero = torch.zeros_like(x)
        torch.testing.assert_close(cole_hopf(zero, x), -torch.sin(math.pi * x), atol=1e-15, rtol=0)
        t = torch.linspace(0, 1, 21, dtype=torch.float64)
        for wall in (-1.0, 1.0):
            values = cole_hopf(t, torch.full_like(t, wall))
            torch.testing.assert_close(values, torch.zeros_like(t), atol=1e-13, rtol=0)

    def test_is_odd_in_x(self):
        points = grid(5, 11)
        torch.testing.assert_close(exact(points * torch.tensor([1.0, -1.0])), -exact(points))

    @pytest.mark.parametrize(("nodes", "error"), [(50, 1e-6), (80, 1e-12)])
    def test_quadrature_converges(self, nodes: int, error: float):
        points = grid(21, 41)
        coarse = cole_hopf(points[:, 0], points[:, 1], nodes=nodes).unsqueeze(1)
        assert (coarse - exact(points)).abs().max() < error

    def test_steepest_slope_is_the_published_one(self):
        # Basdevant et al. 1986, table 2: |du/dx| at x = 0 peaks at 152.00516 for t = 1.6037 / pi
        x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        t = torch.tensor([1.6037 / math.pi], dtype=torch.float64)
        (slope,) = torch.autograd.grad(cole_hopf(t, x).sum(), x)
        assert slope.item() == pytest.approx(-152.00516, abs=1e-3)


class TestPoints:
    def test_every_stratum_holds_one_point(self):
        interior = draw_points(50, 8, seed=(0,)).interior
        unit = torch.stack([interior[:, 0], (interior[:, 1] + 1) / 2])
        assert torch.equal((unit * 50).long().sort(dim=1).values, torch.arange(50).expand(2, 50))

    def test_border_lies_on_the_border_and_carries_the_exact_values(self):
        border, values = draw_points(2, 41, seed=(0,))[1:]
        t, x = border.T
        assert (t == 0).sum() == 20
        assert [((t > 0) & (x == wall)).sum().item() for wall in (-1, 1)] == [11, 10]
        torch.testing.assert_close(values, exact(border.double()).float(), atol=1e-6, rtol=0)

    def test_points_depend_on_seed_rank_and_draw(self):
        first = draw_points(5, 4, seed=(0, 0, 0))
        assert all(map(torch.equal, first, draw_points(5, 4, seed=(0, 0, 0))))
        for other in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
            assert not torch.equal(first.interior, draw_points(5, 4, seed=other).interior)

    def test_points_are_drawn_anew_every_so_many_steps(self, tmp_path: Path):
        seen: list[Points] = []

        class Watching(Burgers2dModule):
            def training_step(self, batch: Points, batch_idx: int) -> torch.Tensor:
                seen.append(batch)
                return super().training_step(batch, batch_idx)

        lightning.Trainer(
            max_steps=7,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
        ).fit(
            Watching(mlp([2, 3, 1], "tanh"), torch.optim.Adam),
            Burgers2dData(interior_points=5, border_points=4, redraw_every=3, grid=(4, 3), seed=9),
        )
        expected = [draw_points(5, 4, seed=(9, 0, step // 3)) for step in range(7)]
        assert all(
            all(map(torch.equal, got, wanted)) for got, wanted in zip(seen, expected, strict=True)
        )

    @pytest.mark.parametrize("option", ["interior_points", "border_points", "redraw_every"])
    def test_wrong_counts_are_refused(self, option: str):
        options: Any = {option: 0}
        with pytest.raises(ValueError, match=f"{option} must be >= 2, got 0"):
            Burgers2dData(**options)


class TestModule:
    def test_residual_of_a_known_function(self):
        # u = t^2 x^3: u_t = 2 t x^3, u u_x = 3 t^4 x^5, u_xx = 6 t^2 x
        points = grid(4, 5)
        t, x = points.split(1, dim=1)
        expected = 2 * t * x**3 + 3 * t**4 * x**5 - VISCOSITY * 6 * t**2 * x
        solution = residual(lambda p: (p[:, 0] ** 2 * p[:, 1] ** 3).unsqueeze(1), points)
        torch.testing.assert_close(solution, expected)

    def test_loss_is_residual_plus_border_error(self):
        torch.manual_seed(0)
        module = Burgers2dModule(mlp([2, 5, 1], "tanh"), torch.optim.Adam)
        points = draw_points(6, 4, seed=(0,))
        expected = (
            residual(module.network, points.interior).square().mean()
            + (module.network(points.border) - points.border_values).square().mean()
        )
        torch.testing.assert_close(module.anderson_loss(points), expected)

    def test_grid_holds_the_exact_solution(self):
        coordinates, values = reference_grid(4, 3)
        assert coordinates[:5].tolist() == [
            [0, -1],
            [0, pytest.approx(-1 / 3)],
            [0, pytest.approx(1 / 3)],
            [0, 1],
            [0.5, -1],
        ]
        torch.testing.assert_close(values, exact(coordinates.double()).float(), atol=1e-5, rtol=0)

    def test_solution_is_drawn(self, tmp_path: Path):
        draw_solution(mlp([2, 3, 1], "tanh"), tmp_path / "pictures" / "solution.png")
        assert (tmp_path / "pictures" / "solution.png").read_bytes().startswith(b"\x89PNG")
