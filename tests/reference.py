"""The method in float64 NumPy, slow and without tricks: what the engine must equal.

Symbols: x_j iterates, oldest first; x_q the newest; m residuals in the window; f the loss.

    (1)  r_j = x_{j+1} - x_j, where one cycle leads from x_j to x_{j+1}
    (2)  K = R^T R, R = [r_1 .. r_m]; s^2 = tr(K) / m
    (3)  (K + lambda s^2 I) z = 1,  alpha = z / sum(z); lambda = None: 3e-2 nu,
         nu = min(1, h / 1e-3)^2, h = harmonic mean of the eigenvalues of K over s^2; residuals of
         zero are left out
    (4)  gain    rho = min(m, m |R alpha|^2 / s^2)
    (5)  lag     tau = max(0, sum_j alpha_j (m - j)), j = 1 .. m
    (6)  mixing  beta_k = beta + min(1, c rho) tau + clip(rho - 1, 0, 1) Delta / max(1, |alpha|)
    (7)  candidate  x+ = sum_j alpha_j (x_j + beta_k r_j)
    (8)  cap     |x+ - x_q| <= kappa s, by shortening the step
    (9)  accept where f(x+) < f(x) - tolerance |f(x)|; where f is stochastic, candidates are skipped
         for w >= ``NOISE_DOMINATED``, w = nu clip(2 - rho, 0, 1)
    (10) trust region: Delta grows and shrinks with acceptance, at most the cycles trained
    (11) restart: no residual spans an external write; the newest iterate, where no cycle ended
         there, is dropped with it; so is an oldest iterate without a residual
    (12) RSD of a window: |sigma| / |mu| of the updates or iterates, or max sigma_i / max |mu_i|;
         averages are used while it is above the threshold
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lightning_stableaa.core.acceptance import EXPAND, SHRINK
from lightning_stableaa.core.anderson import NOISY, REGULARIZATION

Vector = NDArray[np.float64]
Pair = tuple[Vector, Vector]  # x_j and the end of its cycle, x_{j+1}

EPS = float(np.finfo(np.float64).eps)


def mixing_coefficients(residuals: Sequence[Vector], regularization: float | None) -> Vector:
    """Equations (2) and (3)."""
    moved = [j for j, r in enumerate(residuals) if r.any()]
    rows = np.array([residuals[j] for j in moved])
    gram = rows @ rows.T
    mean_square = np.trace(gram) / len(moved)
    shift = ridge(residuals, regularization) * mean_square
    z = np.linalg.solve(gram + shift * np.eye(len(moved)), np.ones(len(moved)))
    alpha = np.zeros(len(residuals))
    alpha[moved] = z / z.sum()
    return alpha


def ridge(residuals: Sequence[Vector], regularization: float | None) -> float:
    """lambda of equation (3), with a floor for residuals that depend on each other."""
    if regularization is None:
        regularization = REGULARIZATION * noise(residuals)
    return max(regularization, sum(r.any() for r in residuals) * EPS)


def noise(residuals: Sequence[Vector]) -> float:
    """nu of equation (3)."""
    rows = np.array([r for r in residuals if r.any()])
    gram = rows @ rows.T
    eigenvalues = np.maximum(np.linalg.eigvalsh(gram / (np.trace(gram) / len(rows))), 0.0)
    harmonic_mean = len(rows) / float(np.sum(1.0 / (eigenvalues + EPS)))
    return min(1.0, harmonic_mean / NOISY) ** 2


def mean_square_norm(residuals: Sequence[Vector]) -> float:
    """s^2 of equation (2)."""
    return float(np.mean([r @ r for r in residuals]))


def gain(residuals: Sequence[Vector], alpha: Vector) -> float:
    """Equation (4)."""
    m, mixed = len(residuals), alpha @ np.array(residuals)
    return min(float(m), m * float(mixed @ mixed) / mean_square_norm(residuals))


def lag(alpha: Vector) -> float:
    """Equation (5)."""
    m = len(alpha)
    return max(0.0, sum(float(a) * (m - j) for j, a in enumerate(alpha, start=1)))


def candidate(pairs: Sequence[Pair], alpha: Vector, mixing: float) -> Vector:
    """Equation (7)."""
    total = np.zeros_like(pairs[0][0])
    for a, (x, end) in zip(alpha, pairs, strict=True):
        total += a * (x + mixing * (end - x))
    return total


def cap(new: Vector, newest: Vector, residuals: Sequence[Vector], kappa: float) -> Vector:
    """Equation (8)."""
    longest, length = kappa * math.sqrt(mean_square_norm(residuals)), np.linalg.norm(new - newest)
    return newest + (new - newest) * (longest / length) if length > longest else new


@dataclass
class Step:
    """A candidate, and the numbers that led to it."""

    candidate: Vector
    alpha: Vector
    residual_norm: float
    gain: float
    mixing: float


def anderson(
    pairs: Sequence[Pair],
    newest: Vector,
    *,
    regularization: float | None,
    relaxation: float = 1.0,
    lag_compensation: float = 0.0,
    horizon: float = 0.0,
    max_extrapolation: float = math.inf,
) -> Step:
    """Equations (1) to (8)."""
    residuals = [end - x for x, end in pairs]
    alpha = mixing_coefficients(residuals, regularization)
    rho = gain(residuals, alpha)
    compensated = min(1.0, lag_compensation * rho) * lag(alpha)
    drift = min(max(rho - 1.0, 0.0), 1.0) * horizon / max(1.0, float(np.linalg.norm(alpha)))
    beta = relaxation + compensated + drift  # (6)
    new = cap(candidate(pairs, alpha, beta), newest, residuals, max_extrapolation)
    return Step(new, alpha, math.sqrt(mean_square_norm(residuals)), rho, beta)


def noise_weight(nu: float, rho: float) -> float:
    """w of equation (9)."""
    return nu * min(max(2.0 - rho, 0.0), 1.0)


def accepts(before: float, after: float, *, tolerance: float = 0.0) -> bool:
    """Equation (9); NaN is never accepted."""
    return math.isfinite(before) and after < before - tolerance * abs(before)


def next_radius(radius: float, *, accepted: bool, max_horizon: float) -> float:
    """Equation (10): of the trust region, after a candidate that extrapolated along a drift."""
    radius *= EXPAND if accepted else SHRINK
    return min(max(radius, 1.0), max_horizon)


@dataclass
class Sequences:
    """Equation (11): iterates in sequences that external writes separate."""

    depth: int
    iterates: list[Vector] = field(default_factory=list)
    ends_cycle: list[bool] = field(default_factory=list)
    contiguous: bool = False

    def push(self, x: Vector) -> None:
        """Append the end of a cycle, or the start of a sequence after a restart."""
        self.iterates.append(x.copy())
        self.ends_cycle.append(self.contiguous)
        self.contiguous = True
        full = len(self.iterates) > self.depth + 1
        while full and (len(self.iterates) > self.depth + 1 or not self.ends_cycle[1]):
            del self.iterates[0], self.ends_cycle[0]
        self.ends_cycle[0] = False

    def restart(self) -> None:
        """Something else than the optimizer moves the weights."""
        if self.iterates and not self.ends_cycle[-1]:
            del self.iterates[-1], self.ends_cycle[-1]
        self.contiguous = False

    def pairs(self) -> list[Pair]:
        """(x_j, x_{j+1}) of every residual, equation (1)."""
        return [
            (x, end)
            for x, end, is_end in zip(
                self.iterates, self.iterates[1:], self.ends_cycle[1:], strict=False
            )
            if is_end
        ]


def rsd(window: NDArray[np.float64], *, kind: str, of: str) -> float:
    """Equation (12), with the unbiased standard deviation; ``window`` is (c, n)."""
    values = np.diff(window, axis=0) if of == "updates" else window
    sigma, mu = values.std(axis=0, ddof=1), values.mean(axis=0)
    if kind == "norm":
        return float(np.linalg.norm(sigma) / np.linalg.norm(mu))
    return float(sigma.max() / np.abs(mu).max())


def smoothed(window: NDArray[np.float64], *, kind: str, of: str, threshold: float) -> Vector:
    """Equation (12): the average where the window is noisy, else its last iterate."""
    return window.mean(axis=0) if rsd(window, kind=kind, of=of) > threshold else window[-1]


def textbook_anderson(g: Callable[[Vector], Vector], x: Vector, *, depth: int, maps: int) -> Vector:
    """Walker and Ni 2011, type II, beta = 1: minimise |F alpha| with sum(alpha) = 1."""
    xs, gs = [x], [g(x)]
    for _ in range(maps - 1):
        xs.append(next_iterate(xs, gs))
        gs.append(g(xs[-1]))
        xs, gs = xs[-depth:], gs[-depth:]
    return next_iterate(xs, gs)


def next_iterate(xs: Sequence[Vector], gs: Sequence[Vector]) -> Vector:
    """x+ = sum_j alpha_j g_j, by least squares of the newest f over the differences of f."""
    f, g = np.array(gs) - np.array(xs), np.array(gs)
    if len(f) == 1:
        return g[0]
    gamma = np.linalg.lstsq(np.diff(f, axis=0).T, f[-1], rcond=None)[0]
    return g[-1] - gamma @ np.diff(g, axis=0)
