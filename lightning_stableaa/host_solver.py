"""``solver.propose`` in NumPy, for a Gram matrix in the memory of the host.

On a CPU a kernel of torch takes longer to start than numbers of this size take to compute: this
is a third of the time, and an attempt on a small model is little else. Symbols are those of
``solver``, to which results are equal up to rounding (tested).
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
) -> tuple[Array, ...]:
    """The fields of ``solver.Proposal``, one candidate for each of L lambdas."""
    columns = [k for k, is_residual in enumerate(linked) if is_residual]
    k = gram if all(linked) else gram[columns][:, columns]
    with np.errstate(all="ignore"):  # whether a result is usable is in the result itself
        squares = k.diagonal()
        mean_square = squares.sum() / len(columns)
        share = _noisy_share(_residual_noise(k, squares))
        grid = np.array([NOISY_LAMBDA * share] if regularization is None else regularization)
        alpha = _mixing_weights(k, squares, grid)
        remaining = np.minimum(alpha[0] @ k @ alpha[0] / mean_square, 1.0) * len(columns)
        ages = np.arange(len(columns) - 1, -1, -1.0)
        lag = np.maximum(alpha @ ages, 0.0)
        advance = np.minimum(lag_compensation * remaining, 1.0) * lag
        drift = np.minimum(np.maximum(remaining - 1.0, 0.0), 1.0)
        advance[-1] += look_ahead_cycles * drift / np.maximum(np.sqrt(alpha[-1] @ alpha[-1]), 1.0)
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
        return (
            jumps,
            norms * shrink,
            reaches,
            np.asarray(remaining),
            np.asarray(share * (1.0 - drift)),
            grid,
            np.asarray(residual_norm),
            k,
        )


def _residual_noise(k: Array, squares: Array) -> float:
    moved = (squares > 0).astype(np.float64)
    try:
        inverse = np.linalg.inv(k / (squares.sum() / moved.sum()) + np.diag(ROUNDING + 1.0 - moved))
    except np.linalg.LinAlgError:  # singular
        return 0.0
    noise = moved.sum() / (inverse.diagonal() @ moved)
    return np.minimum(np.maximum(noise, ROUNDING), 1.0)


def _noisy_share(noise: float) -> float:
    return np.square(np.minimum(noise / NOISE, 1.0))


def _mixing_weights(k: Array, squares: Array, grid: Array) -> Array:  # (L, m)
    m = len(k)
    moved = (squares > 0).astype(np.float64)
    ridged = np.empty((len(grid), m, m))
    ridged[:] = k / (squares.sum() / moved.sum())
    ridged.reshape(len(grid), -1)[:, :: m + 1] += np.maximum(grid, m * _EPS)[:, None]
    try:
        z = np.linalg.solve(ridged, moved[None, :, None])[:, :, 0]
    except np.linalg.LinAlgError:  # singular
        return np.full((len(grid), m), math.nan)
    return z / z.sum(axis=1, keepdims=True)
