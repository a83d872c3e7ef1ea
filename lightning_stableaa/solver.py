"""Gram matrix -> mixing weights -> jump. Pure functions on small float64 matrices.

Symbols, as in arXiv:2110.14813:

    m         residuals in the window (at most ``history_depth``)
    p_k       stored points, oldest first, k = 0 .. q
    delta_k   p_{k+1} - p_k, the consecutive differences, k = 0 .. q-1
    r_j       residuals: the delta_k that one cycle of the optimizer made ("linked")
    K         R^T R, (m, m), inner products of the residuals
    lambda    ``regularization``, relative to tr(K)/m
    alpha     mixing weights, (m,), sum to one
    beta      ``relaxation``
    tau       lag of a mixture: cycles from its mean time to the newest point
    theta     advance along the mixed residual, in cycles
    w         jump weights, (q,): x_new = p_q + sum_k w_k delta_k

Everything runs on the device of ``gram`` and never waits for it: whether a result is usable is
in the result itself (NaN), which the caller reads back once, with everything else. On the host
``propose`` takes the shorter way of ``host_solver``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_stableaa.host_solver import NOISE, NOISY_LAMBDA, ROUNDING, propose_on_host


def residual_noise(gram: Tensor) -> Tensor:  # ()
    """Harmonic mean of the eigenvalues of K (m, m) over their mean, at most 1: h.

    About the squared norm of the noise over that of the residuals, where they have some in every
    direction, and next to nothing where they depend on one another and can be eliminated.
    """
    ones = (gram.diagonal() > 0).to(gram.dtype)  # of residuals that moved
    shifted = gram / (gram.trace() / ones.sum()) + torch.diag(ROUNDING + 1.0 - ones)
    inverse, _ = torch.linalg.inv_ex(shifted)  # without checks: does not wait for a GPU
    return (ones.sum() / (inverse.diagonal() @ ones)).clamp(ROUNDING, 1.0)


def noisy_share(noise: Tensor) -> Tensor:  # (), of residual_noise
    """1 where there is noise enough to be reckoned with, falling with the square of h below."""
    return (noise / NOISE).clamp_max(1.0).square()


def suitable_lambda(noise: Tensor) -> Tensor:  # (), of residual_noise
    """lambda by the noise of the residuals: ``NOISY_LAMBDA`` where they have some.

    Less where they have next to none, since a ridge would hinder their elimination.
    """
    return NOISY_LAMBDA * noisy_share(noise)


def mixing_weights(gram: Tensor, *, regularization: float | Sequence[float] | Tensor) -> Tensor:
    """Weights that minimise the norm of the mixed residual, summing to one.

    Solves (K + lambda tr(K)/m I) z = 1 and returns alpha = z / sum(z), in float64. A residual of
    exactly zero carries no direction (the weights did not move) and gets the weight zero.

    Args:
        gram: (m, m), inner products of the residuals, oldest first; symmetric.
        regularization: lambda >= 0, relative to the mean squared residual norm; dimensionless.
            A floor of m * eps keeps collinear residuals solvable at lambda = 0. Of a tensor, (L,),
            values are not checked.

    Returns:
        Weights (m,) for one lambda, (L, m) for a sequence of L of them, on the device of
        ``gram``. All NaN where ``gram`` is not finite or every residual is zero.

    Raises:
        ValueError: ``gram`` is not square, or ``regularization`` is negative or not finite.

    Source: Scieur, d'Aspremont, Bach, Regularized Nonlinear Acceleration (normalised ridge).
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or gram.shape[0] == 0:
        raise ValueError(f"gram must be square, (m, m) with m >= 1, got {tuple(gram.shape)}")
    single = isinstance(regularization, int | float)
    if not isinstance(regularization, Tensor):
        grid: Sequence[float] = [regularization] if single else regularization
        for value in grid:
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"regularization must be finite and >= 0, got {value}")
        regularization = torch.tensor(grid, dtype=torch.float64, device="cpu")

    m = gram.shape[0]
    k = gram.to(torch.float64)
    moved = k.diagonal() > 0
    # Scaled by its trace, K may hold values down to the square of the smallest float64.
    k = k / (k.trace() / moved.sum())
    lambdas = regularization.to(k.device, non_blocking=True)
    lambdas = lambdas.clamp_min(m * torch.finfo(k.dtype).eps)
    eye = torch.eye(m, dtype=k.dtype, device=k.device)
    ridged = k + lambdas[:, None, None] * eye
    # solve_ex without checks does not wait for a GPU; a singular system yields inf or NaN.
    z, _ = torch.linalg.solve_ex(ridged, moved.to(k.dtype).expand(len(lambdas), m))
    alpha = z / z.sum(dim=-1, keepdim=True)
    return alpha[0] if single else alpha


def jump_weights(
    alpha: Tensor,  # (..., m), oldest first
    linked: Sequence[bool],  # q entries, oldest first: is delta_k a residual?
    *,
    relaxation: float,
    advance: Tensor | None = None,  # (...)
) -> Tensor:  # (..., q)
    """The candidate as a jump from the newest point, in the basis of consecutive differences.

    sum_j alpha_j (x_j + (beta + theta) r_j) = p_q + sum_k w_k delta_k, where the j-th residual is
    the j-th linked difference. Differences are small where points are large: nothing cancels.

    Args:
        alpha: mixing weights, sum to one along the last axis.
        linked: which consecutive differences are residuals; ``sum(linked) == m``.
        relaxation: beta in (0, 1].
        advance: theta of every candidate; ``None`` is zero.

    Raises:
        ValueError: the number of linked differences is not m.
    """
    columns = _residual_columns(linked)
    if len(columns) != alpha.shape[-1]:
        raise ValueError(f"alpha has {alpha.shape[-1]} weights for {len(columns)} residuals")
    # p_k + beta delta_k = p_q - (1 - beta) delta_k - sum_{i > k} delta_i
    unit_jumps = [[0.0] * k + [relaxation - 1.0] + [-1.0] * (len(linked) - k - 1) for k in columns]
    residuals = [[float(i == k) for i in range(len(linked))] for k in columns]
    basis = torch.tensor([unit_jumps, residuals], dtype=alpha.dtype, device="cpu")
    basis = basis.to(alpha.device, non_blocking=True)  # (2, m, q)
    jumps = alpha @ basis[0]
    return jumps if advance is None else jumps + (advance[..., None] * alpha) @ basis[1]


def lag(alpha: Tensor) -> Tensor:  # (...)
    """tau of mixtures (..., m), in cycles: how far behind the newest point they lie, at least 0.

    Where residuals are noise about a drift, a mixture is an average over the points of the last
    cycles: it lacks the progress made since its mean time.
    """
    ages = torch.arange(alpha.shape[-1] - 1, -1, -1, dtype=alpha.dtype, device=alpha.device)
    return (alpha @ ages).clamp_min(0.0)


def remaining_residual(alpha: Tensor, gram: Tensor) -> Tensor:  # ()
    """m |R alpha|^2 / (tr(K)/m): what a mixture (m,) leaves of the residuals, K (m, m).

    1 where they are independent noise, which a mean divides by m; m, and never more, where they
    are a steady drift, which no mixture reduces; 0 where they are eliminated.
    """
    m = len(alpha)
    return (m * (alpha @ gram @ alpha) / gram.diagonal().mean()).clamp_max(m)


class Proposal(NamedTuple):
    """Candidates formed from one Gram, best understood as jumps from the newest point."""

    jumps: Tensor  # (L, q), weights of the consecutive differences, one row for each lambda
    numbers: Tensor  # (4 + 3 L,), everything below, to be read back at once
    residual_gram: Tensor | None = None  # (m, m), K, where ``condition`` is yet to be found

    @property
    def residual_norm(self) -> Tensor:  # ()
        """sqrt(tr(K)/m), root of the mean squared residual norm.

        Not finite where a difference is not, be it a residual or not.
        """
        return self.numbers[0]

    @property
    def noisiness(self) -> Tensor:  # ()
        """1 where residuals are noise, 0 where eliminated or a steady drift."""
        return self.numbers[1]

    @property
    def remaining(self) -> Tensor:  # ()
        """rho, see ``remaining_residual``, of the first lambda."""
        return self.numbers[2]

    @property
    def condition(self) -> Tensor:  # ()
        """Condition number of K; NaN where it would take a wait for the device."""
        return self.numbers[3]

    @property
    def norms(self) -> Tensor:  # (L,)
        """Lengths of the jumps, after the cap."""
        return self._of_candidates(0)

    @property
    def reaches(self) -> Tensor:  # (L,)
        """Lengths of their terms together: no partial sum is longer."""
        return self._of_candidates(1)

    @property
    def lambdas(self) -> Tensor:  # (L,)
        """As they were used."""
        return self._of_candidates(2)

    def _of_candidates(self, which: int) -> Tensor:
        return self.numbers[4:].view(3, -1)[which]


def propose(
    gram: Tensor,  # (q, q) float64, of all consecutive differences, oldest first
    linked: Sequence[bool],  # q entries: is the difference a residual?
    *,
    regularization: Sequence[float] | None,
    relaxation: float,
    max_extrapolation: float,
    lag_compensation: float = 0.0,
    look_ahead_cycles: float = 0.0,
) -> Proposal:
    """One candidate for each lambda, its jump shortened to the cap where it is longer.

    Args:
        gram: inner products of all consecutive differences of the stored points.
        linked: which of them are residuals; at least one.
        regularization: L values of lambda; ``None``: one, ``suitable_lambda``.
        relaxation: beta in (0, 1].
        max_extrapolation: longest jump, in units of the residual norm sqrt(tr(K)/m).
        lag_compensation: times the remaining residual of the first lambda, and at most 1: share
            of its lag that every mixture makes up along its mixed residual.
        look_ahead_cycles: by up to so many cycles the candidate of the last lambda goes on: by all
            of them where the remaining residual of the first lambda is 2 or more (a drift), by none
            where it is 1 or less; over |alpha|, where that is above 1 and magnifies what is not.
    """
    options = {
        "relaxation": relaxation,
        "max_extrapolation": max_extrapolation,
        "lag_compensation": lag_compensation,
        "look_ahead_cycles": look_ahead_cycles,
    }
    if gram.device.type == "cpu":
        found = propose_on_host(gram.numpy(), linked, regularization, **options)
        return Proposal(*map(torch.from_numpy, found))
    return propose_on_device(gram, linked, regularization, **options)


def propose_on_device(
    gram: Tensor,  # (q, q)
    linked: Sequence[bool],
    regularization: Sequence[float] | None,
    *,
    relaxation: float,
    max_extrapolation: float,
    lag_compensation: float,
    look_ahead_cycles: float,
) -> Proposal:
    """``propose`` without waiting for the device."""
    k = gram
    if not all(linked):
        columns = torch.tensor(_residual_columns(linked), device=gram.device)
        k = gram[columns][:, columns]
    noise = residual_noise(k)
    if regularization is None:
        lambdas = suitable_lambda(noise)[None]
    else:
        lambdas = torch.tensor(regularization, dtype=k.dtype, device="cpu")
        lambdas = lambdas.to(k.device, non_blocking=True)
    alpha = mixing_weights(k, regularization=lambdas)
    remaining = remaining_residual(alpha[0], k)
    advance = (lag_compensation * remaining).clamp_max(1.0) * lag(alpha)
    drift = (remaining - 1.0).clamp(0.0, 1.0)
    advance[-1] += look_ahead_cycles * drift / alpha[-1].norm().clamp_min(1.0)
    noisiness = noisy_share(noise) * (1.0 - drift)
    jumps = jump_weights(alpha, linked, relaxation=relaxation, advance=advance)
    residual_norm = k.diagonal().mean().sqrt()
    norms = ((jumps @ gram) * jumps).sum(dim=-1).clamp_min(0.0).sqrt()
    # a zero jump divides to inf, which the clamp turns into 1
    shrink = (max_extrapolation * residual_norm / norms).clamp_max(1.0)
    jumps = jumps * shrink[:, None]
    reaches = jumps.abs() @ gram.diagonal().sqrt()
    unknown = torch.full_like(remaining, math.nan)
    # NaN as well where a difference across a break is not finite: every candidate would be
    known_norm = residual_norm + 0.0 * gram.trace()
    numbers = torch.stack([known_norm, noisiness, remaining, unknown])
    return Proposal(jumps, torch.cat([numbers, norms * shrink, reaches, lambdas]), k)


def condition_number(gram: Tensor) -> float:
    """Ratio of the extreme eigenvalues of ``gram`` (m, m); inf when singular, NaN if not finite."""
    on_host = gram.to(device="cpu", dtype=torch.float64).numpy()
    if not np.isfinite(on_host).all():
        return math.nan
    eigenvalues = np.linalg.eigvalsh(on_host)
    smallest, largest = float(eigenvalues[0]), float(eigenvalues[-1])
    return largest / smallest if smallest > 0 else math.inf


def _residual_columns(linked: Sequence[bool]) -> list[int]:
    return [k for k, is_residual in enumerate(linked) if is_residual]
