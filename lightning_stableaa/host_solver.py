"""``solver.propose`` in NumPy, for a Gram matrix in the memory of the host.

An attempt on a small model is little else than kernels that take longer to start than to compute.
Those of NumPy start sooner than those of torch, and one eigendecomposition serves the noise of the
residuals, every lambda and the condition number. Symbols are those of ``solver``, to which results
are equal up to rounding (tested).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

_EPS = np.finfo(np.float64).eps

# lambda where residuals have noise, and how much that is: the harmonic mean of the eigenvalues of K
# relative to their mean. Below, lambda falls with its square.
NOISY_LAMBDA = 3e-2
NOISE = 1e-3

# Taken to be added to every eigenvalue, relative to their mean, by the rounding of products.
ROUNDING = 1e-9

Array = np.ndarray[Any, np.dtype[np.float64]]


def propose_on_host(
    gram: Array,  # (q, q)
    linked: Sequence[bool],
    regularization: Sequence[float] | None,
    *,
    relaxation: float,
    max_extrapolation: float,
    lag_compensation: float,
    look_ahead_cycles: float,
) -> tuple[Array, Array]:
    """``jumps`` and ``numbers`` of ``solver.Proposal``, one candidate for each of L lambdas."""
    columns = [k for k, is_residual in enumerate(linked) if is_residual]
    m, whole = len(columns), all(linked)
    k = gram if whole else gram[columns][:, columns]
    with np.errstate(all="ignore"):  # whether a result is usable is in the result itself
        squares = k.diagonal()
        mean_square = squares.sum() / m
        condition, share, lambdas, alpha = _mixtures(k, squares, regularization)
        first, last = alpha[0], alpha[-1]
        # in this order the NaN of the first argument is kept
        remaining = min(first @ k @ first / mean_square, 1.0) * m
        lag = np.maximum(alpha @ np.arange(m - 1, -1, -1.0), 0.0)
        advance = min(lag_compensation * remaining, 1.0) * lag
        drift = min(max(remaining - 1.0, 0.0), 1.0)
        advance[-1] += look_ahead_cycles * drift / max(np.sqrt(last @ last), 1.0)
        of_differences = alpha
        if not whole:
            of_differences = np.zeros((len(alpha), len(linked)))
            of_differences[:, columns] = alpha
        # p_k + (beta + theta) delta_k = p_q + (beta + theta) delta_k - sum_{i >= k} delta_i
        jumps = (relaxation + advance)[:, None] * of_differences - of_differences.cumsum(axis=1)
        residual_norm = np.sqrt(mean_square)
        norms = np.sqrt(np.maximum((jumps @ gram * jumps).sum(axis=1), 0.0))
        # a zero jump divides to inf, or to NaN where the residuals are zero as well
        shrink = np.minimum(max_extrapolation * residual_norm / norms, 1.0)
        jumps *= shrink[:, None]
        reaches = np.abs(jumps) @ np.sqrt(gram.diagonal())
        # NaN as well where a difference across a break is not finite: every candidate would be
        known_norm = residual_norm + 0.0 * gram.trace()
        numbers = (known_norm, share * (1.0 - drift), remaining, condition)
        return jumps, np.concatenate([numbers, norms * shrink, reaches, lambdas])


def _mixtures(
    k: Array,  # (m, m)
    squares: Array,  # (m,)
    regularization: Sequence[float] | None,
) -> tuple[float, float, Array, Array]:
    """Condition number of K, share of noise, lambdas (L,), and mixing weights (L, m)."""
    moved = squares != 0  # a residual of zero carries no direction: it gets no weight
    if not moved.all() and moved.any():
        _, share, lambdas, of_moved = _mixtures(k[moved][:, moved], squares[moved], regularization)
        alpha = np.zeros((len(lambdas), len(k)))
        alpha[:, moved] = of_moved
        return math.inf, share, lambdas, alpha
    values, vectors = _eigendecomposition(k, squares)
    noise = len(k) / (1.0 / (values + ROUNDING)).sum()
    share = min(min(max(noise, ROUNDING), 1.0) / NOISE, 1.0) ** 2
    lambdas = np.array([NOISY_LAMBDA * share] if regularization is None else regularization)
    ridged = values + np.maximum(lambdas, len(k) * _EPS)[:, None]
    z = (vectors.sum(axis=0) / ridged) @ vectors.T
    return values[-1] / values[0], share, lambdas, z / z.sum(axis=1, keepdims=True)


def _eigendecomposition(k: Array, squares: Array) -> tuple[Array, Array]:  # (m,), (m, m)
    """Eigenvalues relative to their mean, ascending, and eigenvectors; NaN where there are none."""
    mean = squares.sum() / len(k)
    if 0.0 < mean < math.inf:
        try:
            values, vectors = np.linalg.eigh(k / mean)
        except np.linalg.LinAlgError:  # did not converge
            pass
        else:
            return np.maximum(values, 0.0), vectors
    return np.full(len(k), math.nan), np.full(k.shape, math.nan)
