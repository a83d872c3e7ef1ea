"""Partial differential equations that others test PINNs on, with their solutions.

A problem has points, drawn once, the loss of a network on them, and the error of the network
against the solution on a grid. Inputs are coordinates (t, x) or (x, y).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.stats import qmc
from torch import Tensor, nn

from lightning_stableaa.recipes.burgers2d.reference import VISCOSITY, cole_hopf

PI = math.pi


def network(outputs: int, *, width: int = 32, layers: int = 3) -> nn.Sequential:
    """Two inputs, ``layers`` of tanh, Xavier normal weights."""
    stack: list[nn.Module] = []
    for inputs in (2, *[width] * (layers - 1)):
        stack += [nn.Linear(inputs, width), nn.Tanh()]
    stack.append(nn.Linear(width, outputs))
    for one in stack:
        if isinstance(one, nn.Linear):
            nn.init.xavier_normal_(one.weight)
            nn.init.zeros_(one.bias)
    return nn.Sequential(*stack)


def derivatives(u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """By the first and by the second coordinate, (n, 1) each."""
    (gradient,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return gradient[:, :1], gradient[:, 1:]


class Problem:
    """An equation on a rectangle.

    Attributes:
        low, high: corners of the rectangle.
        outputs: components of the solution.
        border_weight: of the squared misfit on the border, beside the squared residual.
    """

    low: tuple[float, float] = (0.0, 0.0)
    high: tuple[float, float] = (1.0, 1.0)
    outputs = 1
    border_weight = 1.0

    def __init__(self, seed: int, *, interior: int = 500, border: int = 100) -> None:
        self.inside = self.points(interior, seed).requires_grad_()
        self.on_border = self.border(border, seed + 1).requires_grad_()

    def points(self, count: int, seed: int) -> Tensor:  # (count, 2)
        """A Latin hypercube."""
        unit = qmc.LatinHypercube(2, rng=seed).random(count)
        return torch.tensor(qmc.scale(unit, self.low, self.high), dtype=torch.float32)

    def border(self, count: int, seed: int) -> Tensor:  # (count, 2)
        """Points on all four sides, a quarter each."""
        points = self.points(count, seed)
        for side in range(4):
            points[side::4, side % 2] = (self.low, self.high)[side // 2][side % 2]
        return points

    def solution(self, x: Tensor) -> Tensor:  # (n, outputs)
        """The exact solution, or a reference."""
        raise NotImplementedError

    def residual(self, u: Tensor, x: Tensor) -> Tensor:  # (n, equations)
        """What is zero for the solution."""
        raise NotImplementedError

    def misfit(self, model: nn.Module, x: Tensor) -> Tensor:
        """What is zero on the border: by default, the difference to the solution."""
        return model(x) - self.border_values

    @functools.cached_property
    def border_values(self) -> Tensor:
        """The solution on the border."""
        return self.solution(self.on_border.detach())

    def loss(self, model: nn.Module) -> Tensor:  # ()
        """Mean squared residual and misfit."""
        residual = self.residual(model(self.inside), self.inside)
        misfit = self.misfit(model, self.on_border)
        return residual.square().mean() + self.border_weight * misfit.square().mean()

    @functools.cached_property
    def grid(self) -> tuple[Tensor, Tensor]:
        """100 x 100 points, and the solution there."""
        sides = [
            torch.linspace(a, b, 100, dtype=torch.float64)
            for a, b in zip(self.low, self.high, strict=True)
        ]
        points = torch.cartesian_prod(*sides).float()
        return points, self.solution(points)

    @torch.no_grad()
    def error(self, model: nn.Module) -> float:
        """Relative L2 error on the grid."""
        points, exact = self.grid
        return float((model(points) - exact).norm() / exact.norm())


class Poisson(Problem):
    """-u_xx - u_yy = 2 pi^2 u, u = sin(pi x) sin(pi y)."""

    def solution(self, x: Tensor) -> Tensor:
        return (PI * x).sin().prod(dim=1, keepdim=True)

    def residual(self, u: Tensor, x: Tensor) -> Tensor:
        first, second = derivatives(u, x)
        laplacian = derivatives(first, x)[0] + derivatives(second, x)[1]
        return laplacian + 2 * PI**2 * self.solution(x)


class Helmholtz(Problem):
    """u_xx + u_yy + u = q, u = sin(pi x) sin(4 pi y) (Wang, Teng, Perdikaris 2021)."""

    low, high, border_weight = (-1.0, -1.0), (1.0, 1.0), 100.0

    def solution(self, x: Tensor) -> Tensor:
        return (PI * x[:, :1]).sin() * (4 * PI * x[:, 1:]).sin()

    def residual(self, u: Tensor, x: Tensor) -> Tensor:
        first, second = derivatives(u, x)
        laplacian = derivatives(first, x)[0] + derivatives(second, x)[1]
        return laplacian + u - (1 - 17 * PI**2) * self.solution(x)


class Burgers(Problem):
    """u_t + u u_x = 0.01 / pi u_xx, u(0, x) = -sin(pi x), a shock at x = 0."""

    low, high = (0.0, -1.0), (1.0, 1.0)

    def border(self, count: int, seed: int) -> Tensor:
        points = self.points(count, seed)
        points[::2, 0] = 0.0
        points[1::4, 1], points[3::4, 1] = -1.0, 1.0
        return points

    def solution(self, x: Tensor) -> Tensor:
        start = -(PI * x[:, 1:]).sin()
        return torch.where(x[:, :1] == 0, start, cole_hopf(x[:, :1], x[:, 1:]).float())

    def residual(self, u: Tensor, x: Tensor) -> Tensor:
        u_t, u_x = derivatives(u, x)
        return u_t + u * u_x - VISCOSITY * derivatives(u_x, x)[1]


class Wave(Problem):
    """u_tt = 4 u_xx with two modes, at rest at t = 0 (Wang, Yu, Perdikaris 2022)."""

    border_weight = 100.0

    def border(self, count: int, seed: int) -> Tensor:
        points = self.points(count, seed)
        points[::2, 0] = 0.0
        points[1::4, 1], points[3::4, 1] = 0.0, 1.0
        return points

    def solution(self, x: Tensor) -> Tensor:
        t, x = x[:, :1], x[:, 1:]
        slow = (PI * x).sin() * (2 * PI * t).cos()
        return slow + 0.5 * (3 * PI * x).sin() * (6 * PI * t).cos()

    def residual(self, u: Tensor, x: Tensor) -> Tensor:
        u_t, u_x = derivatives(u, x)
        return derivatives(u_t, x)[0] - 4 * derivatives(u_x, x)[1]

    def misfit(self, model: nn.Module, x: Tensor) -> Tensor:
        u = model(x)
        at_rest = derivatives(u, x)[0] * (x[:, :1] == 0)
        return torch.cat([u - self.border_values, 0.1 * at_rest])


class Advection(Problem):
    """u_t + 10 u_x = 0, periodic, u(0, x) = sin(x) (Krishnapriyan et al. 2021, speed 10)."""

    high, border_weight = (1.0, 2 * PI), 10.0

    def border(self, count: int, seed: int) -> Tensor:
        points = self.points(count, seed)
        points[::2, 0] = 0.0
        points[1::2, 1] = 0.0
        return points

    def solution(self, x: Tensor) -> Tensor:
        return (x[:, 1:] - 10 * x[:, :1]).sin()

    def residual(self, u: Tensor, x: Tensor) -> Tensor:
        u_t, u_x = derivatives(u, x)
        return u_t + 10 * u_x

    def misfit(self, model: nn.Module, x: Tensor) -> Tensor:
        start, side = x[::2], x[1::2]
        period = torch.tensor([0.0, 2 * PI])
        return torch.cat([model(start) - start[:, 1:].sin(), model(side) - model(side + period)])


class AllenCahn(Problem):
    """u_t = 1e-3 u_xx + 5 (u - u^3), periodic, u(0, x) = x^2 cos(pi x).

    After Raissi, Perdikaris, Karniadakis 2019, with ten times their diffusion: a network of this
    size does not resolve theirs. Reference: Fourier in x, exponential time differencing.
    """

    low, high, border_weight = (0.0, -1.0), (1.0, 1.0), 100.0
    diffusion = 1e-3

    border = Burgers.border

    def solution(self, x: Tensor) -> Tensor:
        values = _allen_cahn(self.diffusion)(x.numpy())
        return torch.tensor(values, dtype=torch.float32)[:, None]

    def residual(self, u: Tensor, x: Tensor) -> Tensor:
        u_t, u_x = derivatives(u, x)
        return u_t - self.diffusion * derivatives(u_x, x)[1] - 5 * (u - u**3)

    def misfit(self, model: nn.Module, x: Tensor) -> Tensor:
        start, side = x[::2], x[1::4]
        other = side * torch.tensor([1.0, -1.0])
        initial = start[:, 1:].square() * (PI * start[:, 1:]).cos()
        return torch.cat([model(start) - initial, model(side) - model(other)])


@functools.cache
def _allen_cahn(diffusion: float, *, nodes: int = 512, steps: int = 2000) -> Callable[..., Any]:
    """Interpolates the solution of the method of lines on a fine grid."""
    from scipy.interpolate import RegularGridInterpolator

    x = -1 + 2 * np.arange(nodes) / nodes
    wave_numbers = PI * np.fft.fftfreq(nodes, 1 / nodes)
    linear, step = -diffusion * wave_numbers**2 + 5, 1 / steps
    decay = np.exp(linear * step)
    weight = np.where(linear == 0, step, np.expm1(linear * step) / np.where(linear, linear, 1))
    u = x**2 * np.cos(PI * x)
    rows = [u]
    for _ in range(steps):
        # a predictor, and a corrector with the mean of both nonlinear terms (ETD2RK)
        before = np.fft.fft(-5 * u**3)
        predicted = np.fft.ifft(decay * np.fft.fft(u) + weight * before).real
        after = np.fft.fft(-5 * predicted**3)
        u = np.fft.ifft(decay * np.fft.fft(u) + weight * (before + after) / 2).real
        rows.append(u)
    closed = np.concatenate([rows, np.array(rows)[:, :1]], axis=1)
    axes = np.linspace(0, 1, steps + 1), np.append(x, 1.0)
    return RegularGridInterpolator(axes, closed, method="linear")


class Kovasznay(Problem):
    """Steady Navier-Stokes flow behind a grid at Reynolds number 20 (Kovasznay 1948): u, v, p."""

    low, high, outputs, border_weight = (-0.5, -0.5), (1.0, 1.5), 3, 10.0
    reynolds = 20.0

    def solution(self, x: Tensor) -> Tensor:
        rate = self.reynolds / 2 - math.sqrt(self.reynolds**2 / 4 + 4 * PI**2)
        decay, angle = (rate * x[:, :1]).exp(), 2 * PI * x[:, 1:]
        u, v = 1 - decay * angle.cos(), rate / (2 * PI) * decay * angle.sin()
        return torch.cat([u, v, (1 - decay**2) / 2], dim=1)

    def residual(self, u: Tensor, x: Tensor) -> Tensor:
        velocity = [u[:, :1], u[:, 1:2]]
        slopes = [derivatives(one, x) for one in velocity]
        pressure = derivatives(u[:, 2:], x)
        rows = [slopes[0][0] + slopes[1][1]]
        for (by_x, by_y), push in zip(slopes, pressure, strict=True):
            laplacian = derivatives(by_x, x)[0] + derivatives(by_y, x)[1]
            transport = velocity[0] * by_x + velocity[1] * by_y
            rows.append(transport + push - laplacian / self.reynolds)
        return torch.cat(rows, dim=1)


PROBLEMS: dict[str, type[Problem]] = {
    one.__name__: one
    for one in (Poisson, Helmholtz, Burgers, Wave, Advection, AllenCahn, Kovasznay)
}
