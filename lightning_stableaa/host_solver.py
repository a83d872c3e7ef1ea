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

Array = np.ndarray[Any, np.dtype[np.float64]]


def propose_on_host(
    gram: Array,  # (q, q)
    linked: Sequence[bool],
    grid: Sequence[float],
    *,
    relaxation: float,
    max_extrapolation: float,
    lag_compensation: float,
    look_ahead_cycles: float,
) -> tuple[Array, Array, Array, Array, Array]:
    """The fields of ``solver.Proposal``, one candidate for each of the L lambdas in ``grid``.

    Args:
        look_ahead_cycles: by which the candidate of the last lambda goes on; 0 for none that does.
    """
    columns = [k for k, is_residual in enumerate(linked) if is_residual]
    k = gram if all(linked) else gram[columns][:, columns]
    with np.errstate(all="ignore"):  # whether a result is usable is in the result itself
        squares = k.diagonal()
        mean_square = squares.sum() / len(columns)
        alpha = _mixing_weights(k, squares, grid)
        remaining = np.minimum(alpha[0] @ k @ alpha[0] / mean_square, 1.0) * len(columns)
        ages = np.arange(len(columns) - 1, -1, -1.0)
        lag = np.maximum(alpha @ ages, 0.0)
        advance = np.minimum(lag_compensation * remaining, 1.0) * lag
        if look_ahead_cycles > 0:
            advance[-1] += look_ahead_cycles * np.minimum(np.maximum(remaining - 1.0, 0.0), 1.0)
        of_differences = np.zeros((len(grid), len(linked)))
        of_differences[:, columns] = alpha
        # p_k + (beta + theta) delta_k = p_q + (beta + theta) delta_k - sum_{i >= k} delta_i
        jumps = (relaxation + advance)[:, None] * of_differences - of_differences.cumsum(axis=1)
        residual_norm = np.sqrt(mean_square)
        norms = np.sqrt(np.maximum((jumps @ gram * jumps).sum(axis=1), 0.0))
        # a zero jump divides to inf, or to NaN where the residuals are zero as well
        shrink = np.minimum(max_extrapolation * residual_norm / norms, 1.0)
        jumps *= shrink[:, None]
        reaches = np.abs(jumps) @ np.sqrt(gram.diagonal())
        return jumps, norms * shrink, reaches, np.asarray(residual_norm), k


def _mixing_weights(k: Array, squares: Array, grid: Sequence[float]) -> Array:  # (L, m)
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
