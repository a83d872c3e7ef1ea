"""Two Burgers-type equations in 100 variables whose exact solutions are known.

A point is a row (x_1, ..., x_k, t): the space coordinates first, time last.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Generator, Tensor


class Derivatives(NamedTuple):
    """A function and those of its derivatives that the equations contain; each (n,)."""

    value: Tensor  # u
    time: Tensor  # du/dt
    divergence: Tensor  # sum_i du/dx_i
    laplacian: Tensor  # sum_i d^2u/dx_i^2


class Problem(Protocol):
    """An equation with a known solution, and where its points are drawn."""

    space_dimension: int

    def interior_points(self, count: int, generator: Generator) -> Tensor:
        """Points (count, space_dimension + 1) at which the equation is to hold."""
        ...

    def data_points(self, count: int, generator: Generator) -> Tensor:
        """Points (count, space_dimension + 1) at which the solution is given."""
        ...

    def exact(self, points: Tensor) -> Tensor:
        """The solution (n,) at ``points`` (n, space_dimension + 1)."""
        ...

    def residual(self, points: Tensor, u: Derivatives) -> Tensor:
        """Left side minus right side of the equation (n,), zero for the solution."""
        ...


class LogisticBurgers:
    """u_t + (d^2/2) Lap u + (u - (2+d)/(2d)) d sum_i du/dx_i = 0, u = s/(1+s), s = exp(t + mean x).

    The diffusion has the sign of a *backward* equation: the source poses it with values given at
    the final time t = 1 on the whole of R^d, and follows the process X_t = d W_t from X_0 = 0. Both
    are kept: the solution is given at t = 1, and points follow the law of X_t, with t uniform on
    [0, 1]. In the unit cube instead, mean x would lie within 0.5 +- 0.03, so that u would depend
    on little but t. Like the source's paths, points are best redrawn at every step: a network
    that keeps 400 final values for 500 steps learns them by heart (relative error 0.6 against
    0.02 after 1000 steps).

    Coordinates are z = x/d, in which the same equation has coefficients of order one:

        u_t + (1/2) Lap_z u + (u - (2+d)/(2d)) sum_i du/dz_i = 0,   u = s/(1+s), s = exp(t + sum z)

    Source: E, Han, Jentzen, Deep learning-based numerical methods for high-dimensional parabolic
    partial differential equations and backward stochastic differential equations (2017), sec. 4.5.
    """

    space_dimension = 100

    def interior_points(self, count: int, generator: Generator) -> Tensor:
        return self._on_the_process(torch.rand(count, 1, generator=generator), generator)

    def data_points(self, count: int, generator: Generator) -> Tensor:
        return self._on_the_process(torch.ones(count, 1), generator)

    def _on_the_process(self, time: Tensor, generator: Generator) -> Tensor:
        noise = torch.randn(len(time), self.space_dimension, generator=generator)
        return torch.cat((time.sqrt() * noise, time), dim=1)

    def exact(self, points: Tensor) -> Tensor:
        return torch.sigmoid(points.sum(dim=1))

    def residual(self, points: Tensor, u: Derivatives) -> Tensor:
        d = self.space_dimension
        return u.time + u.laplacian / 2 + (u.value - (2 + d) / (2 * d)) * u.divergence


class ProductBurgers:
    """u_t + u sum_i du/dx_i - Lap u = f, with f such that u = exp(-t) prod_i (x_i^2 - 1).

    99 space coordinates and time make the authors' 100 inputs. As in their code, coordinates are
    normal with standard deviation 0.5, t is uniform on [0, 1], and the solution is given at points
    drawn like all others. Its root mean square there is 6e-9 (0.6875^49.5 times that of exp(-t)):
    the zero function has so small an absolute error that only the relative one says anything.

    Source: ORNL/DD-AADL, test_HighD_burgers.py.
    """

    space_dimension = 99

    def interior_points(self, count: int, generator: Generator) -> Tensor:
        space = 0.5 * torch.randn(count, self.space_dimension, generator=generator)
        return torch.cat((space, torch.rand(count, 1, generator=generator)), dim=1)

    data_points = interior_points

    def exact(self, points: Tensor) -> Tensor:
        space, time = points[:, :-1], points[:, -1]
        return torch.exp(-time) * (space.square() - 1).prod(dim=1)

    def residual(self, points: Tensor, u: Derivatives) -> Tensor:
        return u.time + u.value * u.divergence - u.laplacian - self.forcing(points)

    def forcing(self, points: Tensor) -> Tensor:
        """f (n,): the left side for the exact solution, where no |x_i| is exactly one."""
        space = points[:, :-1]
        u = self.exact(points)
        factor = space.square() - 1  # one factor of the product, with derivatives 2x and 2
        divergence = u * (2 * space / factor).sum(dim=1)
        laplacian = u * (2 / factor).sum(dim=1)
        return -u + u * divergence - laplacian
