"""Whether a candidate replaces the weights, and how far the next one may extrapolate."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from lightning_stableaa.core.anderson import AndersonStep
from lightning_stableaa.report import Status

# Noise weight from which on candidates on a stochastic objective are averages, and skipped: they
# lower the loss of a batch at once, and momentum undoes them.
NOISE_DOMINATED = 0.5

# Factors of the trust region after an accepted and after a rejected candidate: its radius stays
# about the same as long as six of ten are accepted.
EXPAND, SHRINK = 1.4, 0.6


# Losses at the same weights differ by fewer rounding errors than this; a smaller change is none.
ROUNDING_ERRORS = 64


class Evaluation(NamedTuple):
    """A candidate on trial; losses are means over the ranks, and NaN on all where NaN on one."""

    before: float  # loss at the current weights
    after: float  # loss at the candidate
    stochastic: bool  # the losses are those of a sample
    tolerance: float = 0.0  # relative, by which losses at the same weights may differ
    overflows: bool = False  # the candidate is not finite in the precision of the weights
    failed: bool = False  # the loss raised an error
    repeatable: bool = True  # the loss at the current weights was the same when asked again
    evaluations: int = 0  # calls of the loss
    raises: str = ""  # the error of the loss, where it raised twice at the current weights


def veto_candidate(step: AndersonStep, *, stochastic: bool) -> Status | None:
    """Why no candidate is worth an evaluation; ``None`` where one is.

    Args:
        step: the proposed one.
        stochastic: the loss is that of a sample.
    """
    if not math.isfinite(step.residual_norm):
        return Status.REJECTED_NON_FINITE_HISTORY
    if step.residual_norm == 0:
        return Status.REJECTED_ZERO_RESIDUAL
    if not (math.isfinite(step.norm) and np.isfinite(step.coefficients).all()):
        return Status.REJECTED_NON_FINITE_CANDIDATE
    if stochastic and noise_weight(step) >= NOISE_DOMINATED:
        return Status.SKIPPED_NOISE_DOMINATED
    return None


def decide(result: Evaluation) -> Status:
    """Accept a candidate that decreases the loss: f(x+) < f(x) - tolerance |f(x)|.

    Args:
        result: its evaluation; without losses a candidate is accepted if it is finite.
    """
    if result.overflows:
        return Status.REJECTED_NON_FINITE_CANDIDATE
    if result.evaluations == 0:
        return Status.ACCEPTED
    if result.failed:
        return Status.REJECTED_ERROR
    if not (math.isfinite(result.before) and math.isfinite(result.after)):
        return Status.REJECTED_NON_FINITE_LOSS
    if not result.after < result.before - result.tolerance * abs(result.before):
        return Status.REJECTED_LOSS_INCREASE
    return Status.ACCEPTED


def noise_weight(step: AndersonStep) -> float:
    """nu clip(2 - rho, 0, 1): 1 where residuals are noise, 0 where a drift or eliminated."""
    return step.noise * min(max(2.0 - step.gain, 0.0), 1.0)


class TrustRegion:
    """Delta: how many cycles a candidate may extrapolate along a drift.

    It grows after accepted and shrinks after rejected candidates, between one cycle and
    ``max_horizon``, and never exceeds the number of cycles trained so far.

    Args:
        max_horizon: largest radius, in cycles; 0 turns the extrapolation along drifts off.

    Source: trust-region methods, as in Conn, Gould, Toint 2000, with the acceptance itself in
    place of the ratio of actual to predicted decrease.
    """

    def __init__(self, max_horizon: float) -> None:
        self._max_horizon = max_horizon
        self._radius = max_horizon
        self.cycles = 0  # trained so far

    @property
    def horizon(self) -> float:
        """Delta of the next candidate, in cycles."""
        return min(self._radius, float(self.cycles))

    def update(self, *, accepted: bool) -> None:
        """Take in the outcome of a candidate that extrapolated along a drift."""
        radius = self._radius * (EXPAND if accepted else SHRINK)
        self._radius = min(max(radius, 1.0), self._max_horizon)

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"radius": self._radius, "cycles": self.cycles}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned; options may have changed since."""
        self._radius = min(float(state["radius"]), self._max_horizon)
        self.cycles = int(state["cycles"])
