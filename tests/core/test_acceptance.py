"""Veto, decision and trust region, against the reference."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from lightning_stableaa.core.acceptance import (
    NOISE_DOMINATED,
    Evaluation,
    TrustRegion,
    decide,
    veto_candidate,
)
from lightning_stableaa.core.anderson import AndersonStep
from lightning_stableaa.report import Status
from tests import reference

GAINS = [0.0, 1.0, 1.25, 1.75, 2.0, 8.0]


def step_of(**values: Any) -> AndersonStep:
    usual: dict[str, Any] = {
        **{"coefficients": np.ones(2), "norm": 1.0, "residual_norm": 1.0},
        **{"noise": 1.0, "gain": 5.0, "mixing": 1.0, "condition": 1.0},
    }
    return AndersonStep(**(usual | values))


def evaluation_of(before: float, after: float, **values: Any) -> Evaluation:
    return Evaluation(before, after, **({"stochastic": False, "evaluations": 2} | values))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, None),
        ({"residual_norm": math.nan}, Status.REJECTED_NON_FINITE_HISTORY),
        ({"residual_norm": math.inf}, Status.REJECTED_NON_FINITE_HISTORY),
        ({"residual_norm": 0.0, "norm": 0.0, "gain": math.nan}, Status.REJECTED_ZERO_RESIDUAL),
        ({"norm": math.inf}, Status.REJECTED_NON_FINITE_CANDIDATE),
        ({"coefficients": np.array([1.0, math.nan])}, Status.REJECTED_NON_FINITE_CANDIDATE),
    ],
)
@pytest.mark.parametrize("stochastic", [False, True])
def test_veto_unusable_step_names_cause(
    values: dict[str, Any], expected: Status | None, stochastic: bool
) -> None:
    assert veto_candidate(step_of(**values), stochastic=stochastic) is expected


@pytest.mark.parametrize("gain", GAINS)
@pytest.mark.parametrize("noise", [0.0, 0.4, 0.7, 1.0])
def test_veto_noise_only_of_stochastic_loss(noise: float, gain: float) -> None:
    dominated = reference.noise_weight(noise, gain) >= NOISE_DOMINATED
    step = step_of(noise=noise, gain=gain)
    expected = Status.SKIPPED_NOISE_DOMINATED if dominated else None
    assert veto_candidate(step, stochastic=True) is expected
    assert veto_candidate(step, stochastic=False) is None


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("tolerance", [0.0, 1e-5])
@pytest.mark.parametrize("before", [1.0, -1.0, 0.0, 1e-30])
@pytest.mark.parametrize("share", [-0.5, -1.1e-5, -0.9e-5, -1e-9, 0.0, 1e-9, 0.5])
def test_decide_equals_reference(
    stochastic: bool, tolerance: float, before: float, share: float
) -> None:
    after = before + share * (abs(before) or 1.0)
    accepted = reference.accepts(before, after, tolerance=tolerance)
    result = evaluation_of(before, after, stochastic=stochastic, tolerance=tolerance)
    expected = Status.ACCEPTED if accepted else Status.REJECTED_LOSS_INCREASE
    assert decide(result) is expected


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["before", "after"])
def test_decide_non_finite_loss_rejected(value: float, where: str) -> None:
    losses = {"before": 1.0, "after": 0.5} | {where: value}
    status = decide(evaluation_of(losses["before"], losses["after"]))
    assert status is Status.REJECTED_NON_FINITE_LOSS


def test_decide_graver_cause_comes_first() -> None:
    unusable = evaluation_of(math.nan, math.nan, overflows=True, failed=True)
    assert decide(unusable) is Status.REJECTED_NON_FINITE_CANDIDATE
    assert decide(unusable._replace(overflows=False)) is Status.REJECTED_ERROR


def trained(max_horizon: float, cycles: int = 1000) -> TrustRegion:
    region = TrustRegion(max_horizon)
    region.cycles = cycles
    return region


@pytest.mark.parametrize("max_horizon", [0.0, 0.5, 8.0, 40.0])
@pytest.mark.parametrize("seed", range(3))
def test_trust_region_equals_reference(max_horizon: float, seed: int) -> None:
    region, radius = trained(max_horizon), max_horizon
    for accepted in np.random.default_rng(seed).random(60) < 0.6:
        region.update(accepted=bool(accepted))
        radius = reference.next_radius(radius, accepted=bool(accepted), max_horizon=max_horizon)
        assert region.horizon == radius


def test_trust_region_never_exceeds_cycles_trained() -> None:
    region, horizons = TrustRegion(4.0), []
    for _ in range(6):
        horizons.append(region.horizon)
        region.cycles += 1
    assert horizons == [0.0, 1.0, 2.0, 3.0, 4.0, 4.0]


def test_trust_region_state_continues_and_respects_new_maximum() -> None:
    region = trained(40.0, cycles=7)
    region.update(accepted=False)
    same, smaller = TrustRegion(40.0), TrustRegion(2.0)
    for other in (same, smaller):
        other.load_state_dict(region.state_dict())
        assert other.cycles == 7
    assert same.state_dict() == region.state_dict()
    assert smaller.horizon == 2.0
