"""Gram matrix -> Anderson step, against the reference and the textbook."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from lightning_stableaa.core.anderson import (
    AndersonStep,
    Array,
    anderson_step,
    mixing_coefficients,
)
from tests import reference

CONTIGUOUS = [True] * 5
RESTARTED = [True, False, True, True, False, True]


def random_rows(m: int, n: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(m, n))


def step_of(differences: Array, is_residual: list[bool] | None = None, **options: Any) -> Any:
    return anderson_step(
        differences @ differences.T,
        [True] * len(differences) if is_residual is None else is_residual,
        **({"regularization": 1e-3} | options),
    )


def pairs_of(iterates: Array, is_residual: list[bool]) -> list[Any]:
    return [(iterates[k], iterates[k + 1]) for k, is_end in enumerate(is_residual) if is_end]


@pytest.mark.parametrize("m", [1, 2, 5, 10])
@pytest.mark.parametrize("regularization", [None, 0.0, 1e-8, 1e-3, 1.0])
def test_mixing_coefficients_equal_reference(m: int, regularization: float | None) -> None:
    rows = random_rows(m, 40)
    # ten well-conditioned equations in float64
    expected = reference.mixing_coefficients(list(rows), regularization)
    for scale in (1.0, 1e-300, 1e-20, 1e20, 1e300):
        gram = scale * (rows @ rows.T)
        alpha, noise, condition = mixing_coefficients(gram, regularization=regularization)
        np.testing.assert_allclose(alpha, expected, rtol=1e-12)
        assert noise == pytest.approx(reference.noise(list(rows)), rel=1e-10)
        assert condition == pytest.approx(np.linalg.cond(rows) ** 2, rel=1e-10)


def test_mixing_coefficients_sum_to_one_and_are_stationary() -> None:
    rows = random_rows(6, 30)
    alpha, *_ = mixing_coefficients(rows @ rows.T, regularization=0.0)
    assert alpha.sum() == pytest.approx(1.0, abs=1e-14)
    least = np.linalg.norm(alpha @ rows)
    for seed in range(20):
        change = np.random.default_rng(seed).normal(size=6)
        change -= change.mean()  # stays on the plane of coefficients that sum to one
        for size in (1e-3, -1e-3):
            assert np.linalg.norm((alpha + size * change) @ rows) > least


@pytest.mark.parametrize(
    ("rows", "regularization", "expected", "rtol"),
    [
        (random_rows(4, 30), 1e12, [0.25] * 4, 1e-10),  # averages
        (np.ones((3, 4)), 1e-6, [1 / 3] * 3, 1e-6),  # shared equally
        # r and 2 r: 2 r_1 - r_2 = 0; the floor of the ridge is m eps
        (np.array([[1.0, 1.0], [2.0, 2.0]]), 0.0, [2.0, -1.0], 1e-13),
    ],
    ids=["huge lambda", "equal", "collinear"],
)
def test_mixing_coefficients_of_special_residuals(
    rows: Array, regularization: float, expected: list[float], rtol: float
) -> None:
    alpha, noise, condition = mixing_coefficients(rows @ rows.T, regularization=regularization)
    np.testing.assert_allclose(alpha, expected, rtol=rtol)
    assert alpha.sum() == pytest.approx(1.0, abs=1e-13)
    dependent = regularization < 1e12
    assert (noise < 1e-20) is (condition > 1e14) is dependent


@pytest.mark.parametrize("regularization", [None, 0.0])
def test_mixing_coefficients_equal_residuals_without_ridge_stay_bounded(
    regularization: float | None,
) -> None:
    # every alpha that sums to one is a minimiser; at the floor, rounding of K chooses among them
    rows = np.ones((3, 4))
    alpha, *_ = mixing_coefficients(rows @ rows.T, regularization=regularization)
    np.testing.assert_allclose(alpha @ rows, np.ones(4), rtol=1e-13)
    assert np.abs(alpha).max() < 3


@pytest.mark.parametrize("regularization", [None, 1e-3])
def test_mixing_coefficients_zero_residual_gets_zero(regularization: float | None) -> None:
    rows = random_rows(3, 10)
    rows[1] = 0.0
    alpha, noise, condition = mixing_coefficients(rows @ rows.T, regularization=regularization)
    others = rows[[0, 2]]
    expected, *_ = mixing_coefficients(others @ others.T, regularization=regularization)
    assert alpha[1] == 0.0
    assert alpha[[0, 2]].tolist() == expected.tolist()
    assert noise == pytest.approx(reference.noise(list(rows)), rel=1e-10)
    assert condition == math.inf


@pytest.mark.parametrize("is_residual", [[True] * 2, CONTIGUOUS, RESTARTED, [True] * 10])
@pytest.mark.parametrize("regularization", [None, 1e-8, 1e-2, 1.0])
@pytest.mark.parametrize("relaxation", [0.3, 1.0])
@pytest.mark.parametrize(
    ("lag_compensation", "horizon", "cap", "drift", "scale"),
    [(0.0, 0.0, math.inf, 0.0, 1.0), (0.75, 10.0, math.inf, 1.0, 1e6), (0.75, 40.0, 2.0, 3.0, 1.0)],
)
def test_anderson_step_equals_reference(
    is_residual: list[bool],
    regularization: float | None,
    relaxation: float,
    lag_compensation: float,
    horizon: float,
    cap: float,
    drift: float,
    scale: float,
) -> None:
    options: dict[str, Any] = {
        "regularization": regularization,
        "relaxation": relaxation,
        "lag_compensation": lag_compensation,
        "horizon": horizon,
        "max_extrapolation": cap,
    }
    differences = scale * (random_rows(len(is_residual), 30) + drift)
    iterates = np.concatenate([np.zeros((1, 30)), differences.cumsum(axis=0)])
    step = step_of(differences, is_residual, **options)
    expected = reference.anderson(pairs_of(iterates, is_residual), iterates[-1], **options)
    assert step.residual_norm == pytest.approx(expected.residual_norm, rel=1e-12)
    assert step.gain == pytest.approx(expected.gain, rel=1e-9)
    assert step.mixing == pytest.approx(expected.mixing, rel=1e-9)
    length = float(np.linalg.norm(expected.candidate - iterates[-1]))
    # relative to the residuals: the length of a step that nearly cancels is rounding
    rounding = 1e-7 * expected.residual_norm
    assert step.norm == pytest.approx(length, rel=1e-9, abs=rounding)
    candidate = iterates[-1] + step.coefficients @ differences
    np.testing.assert_allclose(candidate, expected.candidate, rtol=1e-9, atol=rounding)


def test_anderson_step_steady_drift_extrapolates_by_horizon() -> None:
    drift = random_rows(1, 9)
    differences = np.repeat(drift, 6, axis=0)
    options: dict[str, Any] = {"regularization": 1.0, "lag_compensation": 0.75}
    along = step_of(differences, horizon=10.0, **options)
    np.testing.assert_allclose(along.coefficients @ differences, 10.0 * drift[0], rtol=1e-10)
    assert along.gain == pytest.approx(6.0, rel=1e-12)
    assert along.norm == pytest.approx(10.0 * np.linalg.norm(drift), rel=1e-10)
    compensated = step_of(differences, **options)
    np.testing.assert_allclose(compensated.coefficients @ differences, 0.0, atol=1e-12)
    classical = step_of(differences, regularization=1.0)
    # an average of six iterates is 2.5 cycles behind the newest one
    np.testing.assert_allclose(classical.coefficients @ differences, -2.5 * drift[0], rtol=1e-10)


def test_anderson_step_independent_noise_ignores_horizon() -> None:
    noise = np.eye(8)
    options: dict[str, Any] = {"regularization": 1.0, "lag_compensation": 0.5}
    step = step_of(noise, horizon=10.0, **options)
    assert step.gain == pytest.approx(1.0, rel=1e-12)
    assert step.mixing == pytest.approx(1.0 + 0.5 * 3.5, rel=1e-12)
    np.testing.assert_allclose(step.coefficients, step_of(noise, **options).coefficients, rtol=1e-9)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [1, 2])  # a residual, and a difference across a restart
def test_anderson_step_non_finite_history_is_nan(value: float, row: int) -> None:
    differences = random_rows(4, 6)
    differences[row, 3] = value
    with np.errstate(invalid="ignore"):
        step = step_of(differences, [True, True, False, True])
    assert math.isnan(step.residual_norm)
    assert step.coefficients.tolist() == [0.0] * 4


def test_anderson_step_zero_residuals_has_zero_norm() -> None:
    step = step_of(np.zeros((3, 5)))
    assert (step.residual_norm, step.norm) == (0.0, 0.0)
    assert step.coefficients.tolist() == [0.0] * 3


def test_anderson_step_packed_round_trip_is_exact() -> None:
    step = step_of(random_rows(4, 6), lag_compensation=0.75)
    again = AndersonStep.unpacked(step.packed())
    assert again.packed() == step.packed()
    assert again.coefficients.tolist() == step.coefficients.tolist()
    assert (again.norm, again.gain, again.mixing) == (step.norm, step.gain, step.mixing)


class Contraction:
    """g(x) = A x + b with the fixed point 1; eigenvalues of A from 0.1 to 0.9."""

    def __init__(self, n: int) -> None:
        rotation, _ = np.linalg.qr(random_rows(n, n))
        self.matrix = rotation @ np.diag(np.linspace(0.1, 0.9, n)) @ rotation.T
        self.start = np.zeros(n)

    def __call__(self, x: Array) -> Array:
        return 1.0 + self.matrix @ (x - 1.0)


def extrapolate(pairs: list[Any], newest: Array) -> Array:
    """The candidate of residuals that restarts separate, by the engine's classical options."""
    iterates = np.array([x for pair in pairs for x in pair])
    differences = np.diff(iterates, axis=0)
    is_residual = [k % 2 == 0 for k in range(len(differences))]
    step = step_of(differences, is_residual, regularization=0.0)
    assert np.array_equal(newest, iterates[-1])
    return newest + step.coefficients @ differences


@pytest.mark.parametrize("maps", [1, 2, 4, 6])
def test_classical_options_equal_textbook_anderson(maps: int) -> None:
    g = Contraction(20)
    pairs = [(g.start, g(g.start))]
    x = pairs[0][1]
    for _ in range(maps - 1):
        pairs.append((x, g(x)))
        x = extrapolate(pairs, pairs[-1][1])
    expected = reference.textbook_anderson(g, g.start, depth=maps, maps=maps)
    np.testing.assert_allclose(x, expected, rtol=0, atol=1e-10)
