"""Gram matrix of the residuals -> Anderson step, in NumPy on the host.

An m x m problem is too small for a device: its Gram matrix is moved to the host once, and all that
follows is plain floats. Symbols, as in ``docs/method.md``:

    x_j       stored iterates, oldest first
    d_k       x_{k+1} - x_k, the q consecutive differences
    r_j       residuals, the columns of R: the m of the d_k that one cycle of the optimizer made
    K         R^T R, (m, m)
    lambda    ``regularization``, relative to tr(K)/m
    alpha     mixing coefficients, (m,), sum to one
    nu        ``noise``: min(1, h / 1e-3)^2, h the harmonic mean of the eigenvalues of K over their
              mean
    rho       ``gain``: m |R alpha|^2 / (tr(K)/m)
    tau       lag of the mixed iterate behind the newest one, in cycles
    Delta     ``horizon``, in cycles
    beta_k    ``mixing``
    gamma     coefficients of the step in the basis of the d_k, (q,)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]

_EPS = float(np.finfo(np.float64).eps)

# lambda where residuals are noisy. From 1e-2 to 1e-1 results are alike (docs/method.md).
REGULARIZATION = 3e-2

# Harmonic mean of the eigenvalues of K over their mean from which on residuals are noisy.
NOISY = 1e-3


class AndersonStep(NamedTuple):
    """A candidate as a step from the newest iterate.

    Attributes:
        coefficients: gamma (q,); the candidate is x_q + sum_k gamma_k d_k.
        norm: length of the step, in units of the weights.
        residual_norm: sqrt(tr(K)/m), root of the mean squared residual norm; NaN where the history
            is not finite, 0 where the weights did not move.
        noise: nu; 1 where residuals have noise in every direction, near 0 where they are nearly
            linearly dependent.
        gain: rho; 0 where residuals are eliminated, 1 where they are independent noise, m where
            they are a steady drift.
        mixing: beta_k.
        condition: ratio of the extreme eigenvalues of K; inf where K is singular.
    """

    coefficients: Array
    norm: float
    residual_norm: float
    noise: float
    gain: float
    mixing: float
    condition: float

    def packed(self) -> list[float]:
        """All numbers of the step, to travel between ranks; ``unpacked`` reads them."""
        coefficients, *scalars = self
        return [*scalars, *coefficients.tolist()]

    @classmethod
    def unpacked(cls, numbers: Sequence[float]) -> AndersonStep:
        """The step whose ``packed`` numbers these are."""
        return cls(np.array(numbers[6:]), *numbers[:6])


def anderson_step(
    gram: Array,  # (q, q), of all consecutive differences, oldest first
    is_residual: Sequence[bool],  # (q,)
    *,
    regularization: float | None,
    relaxation: float = 1.0,
    lag_compensation: float = 0.0,
    horizon: float = 0.0,
    max_extrapolation: float = math.inf,
) -> AndersonStep:
    """The regularised type-II Anderson step, with an adaptive mixing parameter.

    Args:
        gram: inner products of all consecutive differences of the stored iterates.
        is_residual: which of them are residuals; at least one.
        regularization: lambda, see ``mixing_coefficients``.
        relaxation: beta in (0, 1].
        lag_compensation: c >= 0, share of the lag that is made up along the mixed residual.
        horizon: Delta >= 0, cycles by which the step extrapolates along a steady drift.
        max_extrapolation: longest step, in units of ``residual_norm``.

    Source: Anderson 1965; Walker and Ni 2011 (type II). Gain: Evans, Pollock, Rebholz, Xiao 2020.
    """
    columns = np.flatnonzero(is_residual)
    residual_gram, m = gram[np.ix_(columns, columns)], len(columns)
    mean_square = float(residual_gram.trace()) / m
    if not (np.isfinite(gram).all() and 0.0 < mean_square < math.inf):
        residual_norm = mean_square if mean_square == 0.0 and np.isfinite(gram).all() else math.nan
        zeros = np.zeros(len(gram))
        return AndersonStep(zeros, 0.0, residual_norm, *[math.nan] * 4)
    alpha, noise, condition = mixing_coefficients(residual_gram, regularization=regularization)
    gain = min(m * float(alpha @ residual_gram @ alpha) / mean_square, float(m))
    mixing = relaxation + min(1.0, lag_compensation * gain) * lag(alpha)
    mixing += min(max(gain - 1.0, 0.0), 1.0) * horizon / max(1.0, float(np.linalg.norm(alpha)))
    coefficients = step_coefficients(alpha, columns, len(gram), mixing=mixing)
    residual_norm = math.sqrt(mean_square)
    norm = math.sqrt(max(0.0, float(coefficients @ gram @ coefficients)))
    longest = max_extrapolation * residual_norm
    if norm > longest:
        coefficients, norm = coefficients * (longest / norm), longest
    return AndersonStep(coefficients, norm, residual_norm, noise, gain, mixing, condition)


def mixing_coefficients(gram: Array, *, regularization: float | None) -> tuple[Array, float, float]:
    """Coefficients that minimise the norm of the mixed residual, summing to one.

    Solves (K + lambda tr(K)/m I) z = 1 and returns alpha = z / sum(z). A residual of exactly zero
    carries no direction (the weights did not move) and gets the coefficient zero.

    Args:
        gram: K, (m, m), symmetric, not all zero.
        regularization: lambda >= 0, relative to the mean squared residual norm; dimensionless. A
            floor of m eps keeps collinear residuals solvable at lambda = 0. ``None`` takes
            ``REGULARIZATION`` times nu: where residuals are nearly dependent, a larger ridge
            hinders their elimination.

    Returns:
        alpha (m,), nu, and the condition number of K.

    Raises:
        ValueError: ``gram`` is not square, or ``regularization`` is negative or not finite.

    Source: Scieur, d'Aspremont, Bach 2016, Regularized Nonlinear Acceleration (normalised ridge).
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or len(gram) == 0:
        raise ValueError(f"gram must be square, (m, m) with m >= 1, got {gram.shape}")
    if regularization is not None and not 0 <= regularization < math.inf:
        raise ValueError(f"regularization must be finite and >= 0, got {regularization}")
    moved = gram.diagonal() > 0
    if not moved.all():
        alpha = np.zeros(len(gram))
        alpha[moved], noise, _ = mixing_coefficients(
            gram[np.ix_(moved, moved)], regularization=regularization
        )
        return alpha, noise, math.inf
    m = len(gram)
    values, vectors = np.linalg.eigh(gram / (gram.trace() / m))  # in units of tr(K)/m
    values = np.maximum(values, 0.0)
    noise = min(1.0, m / float((1.0 / (values + _EPS)).sum()) / NOISY) ** 2
    if regularization is None:
        regularization = REGULARIZATION * noise
    z = vectors @ (vectors.sum(axis=0) / (values + max(regularization, m * _EPS)))
    condition = float(values[-1] / values[0]) if values[0] > 0 else math.inf
    return z / z.sum(), noise, condition


def lag(alpha: Array) -> float:
    """tau of the mixed iterate sum_j alpha_j x_j, in cycles, at least 0.

    Where residuals are noise about a drift, it is an average over the last cycles and lacks the
    progress made since its mean time.
    """
    return max(0.0, float(alpha @ np.arange(len(alpha) - 1, -1, -1.0)))


def step_coefficients(
    alpha: Array, columns: np.ndarray[Any, Any], count: int, *, mixing: float
) -> Array:
    """gamma (q,): the candidate sum_j alpha_j (x_j + beta_k r_j) as a step from the newest iterate.

    Differences are small where iterates are large, so nothing cancels, and the length of the step
    is known before the candidate is formed.

    Args:
        alpha: (m,), sum to one.
        columns: (m,), which of the differences are the residuals.
        count: q, consecutive differences.
        mixing: beta_k.
    """
    of_differences = np.zeros(count)
    of_differences[columns] = alpha
    # x_j + beta_k d_j = x_q + beta_k d_j - sum_{i >= j} d_i
    return mixing * of_differences - of_differences.cumsum()
