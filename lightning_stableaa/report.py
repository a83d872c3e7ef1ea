"""What one step did, why, and which option to change when that is not wanted."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from lightning_stableaa.options import describe


class Status(Enum):
    """Outcome of one call of ``AndersonAccelerator.step``; ``hint`` says what a user can do."""

    NO_OPTIMIZER_STEP = "no_optimizer_step"
    """The optimizer made no step."""
    ACCUMULATING = "accumulating"
    """A step within a cycle."""
    STORED = "stored"
    """An iterate entered the history."""
    WARMUP = "warmup"
    """A cycle ended within ``warmup_steps``."""
    HISTORY_TOO_SHORT = "history_too_short"
    """An extrapolation was due, with fewer than two residuals in the history."""
    PARAMETERS_CHANGED = "parameters_changed"
    """The trained parameters were replaced, and the history restarted."""
    EXTERNAL_UPDATE = "external_update"
    """Something other than the optimizer changed the weights within a cycle."""
    DISABLED = "disabled"
    """Nothing is accelerated any longer; ``AndersonAccelerator.disabled`` says why."""
    ACCEPTED = "accepted"
    """The candidate replaced the weights."""
    SKIPPED_NOISE_DOMINATED = "skipped_noise_dominated"
    """The residuals are noise: no loss was evaluated."""
    REJECTED_LOSS_INCREASE = "rejected_loss_increase"
    """The candidate does not lower the loss."""
    REJECTED_ERROR = "rejected_error"
    """The loss raised an error at the candidate."""
    REJECTED_NON_FINITE_LOSS = "rejected_non_finite_loss"
    """The loss is not finite, at the weights or at the candidate."""
    REJECTED_NON_FINITE_HISTORY = "rejected_non_finite_history"
    """The weights were not finite, and the history was dropped."""
    REJECTED_NON_FINITE_CANDIDATE = "rejected_non_finite_candidate"
    """The candidate is beyond the range of the weights."""
    REJECTED_ZERO_RESIDUAL = "rejected_zero_residual"
    """The weights did not move between the stored iterates."""

    @property
    def rejected(self) -> bool:
        """Whether an extrapolation was due and no candidate was accepted."""
        return self.value.startswith(("rejected", "skipped"))

    @property
    def hint(self) -> str:
        """One sentence naming the cause and what to change; empty where nothing is wrong."""
        return _HINTS.get(self, "")


_HINTS = {
    Status.REJECTED_LOSS_INCREASE: "the candidate did not lower the loss of the current batch",
    Status.SKIPPED_NOISE_DOMINATED: (
        "gradient noise dominated the residuals, and training was left unchanged; larger batches "
        "reduce the noise"
    ),
    Status.REJECTED_ERROR: (
        "the loss raised an error at the candidate, which may be outside of the domain of the "
        "model: lower max_extrapolation"
    ),
    Status.REJECTED_NON_FINITE_LOSS: (
        "the loss was not finite, with or without the candidate: lower the learning rate, clip "
        "gradients, or lower max_extrapolation"
    ),
    Status.REJECTED_NON_FINITE_HISTORY: (
        "the weights were not finite and the history was dropped: lower the learning rate or "
        "clip gradients"
    ),
    Status.REJECTED_NON_FINITE_CANDIDATE: (
        "the candidate was beyond the range of the weights' precision: raise regularization or "
        "lower max_extrapolation"
    ),
    Status.PARAMETERS_CHANGED: (
        "the trained parameters were replaced within a cycle, or moved to other memory, and the "
        "history restarted: freeze and unfreeze them less often than every store_every_n_steps, "
        "and write new values into them (one.copy_(other)) instead of replacing their memory "
        "(one.data = other)"
    ),
    Status.EXTERNAL_UPDATE: (
        "something other than the optimizer changed the weights before a cycle was complete, and "
        "no residual spans such a change: do it less often than every store_every_n_steps, or "
        "lower that option"
    ),
    Status.REJECTED_ZERO_RESIDUAL: (
        "the weights did not move between stored iterates: check that the optimizer updates them "
        "(learning rate, frozen parameters)"
    ),
}


@dataclass(frozen=True, kw_only=True, repr=False)
class StepReport:
    """What one call of ``AndersonAccelerator.step`` did; ``None`` where nothing was measured.

    Attributes:
        status: the outcome; ``status.hint`` names what to change.
        stored: an iterate entered the history.
        attempted: an extrapolation was due.
        accepted: the candidate replaced the weights.
        residual_norm: sqrt(tr(K)/m), root of the mean squared residual norm, in units of the
            weights.
        step_norm: length of the step to the candidate, in units of the weights.
        noise: nu; 1 where residuals have noise in every direction, near 0 where they are nearly
            linearly dependent.
        gain: rho; 0 where residuals are eliminated, 1 where they are independent noise, up to
            ``history_depth`` where they are a steady drift.
        mixing: beta_k, the mixing parameter of the candidate.
        horizon: Delta, cycles that the candidate may extrapolate along a drift.
        condition: condition number of the Gram matrix of the residuals.
        stochastic: the loss is that of a sample: candidates are skipped where residuals are noise.
        loss_before: loss of the current batch at the optimizer's weights.
        loss_after: loss of the same batch at the candidate.
        loss_evaluations: calls of the loss in this step.
        rsd: relative standard deviation of the window that ended with this step.
        smoothing_on: whether averages are in use.
    """

    status: Status
    stored: bool = False
    attempted: bool = False
    accepted: bool = False
    residual_norm: float | None = None
    step_norm: float | None = None
    noise: float | None = None
    gain: float | None = None
    mixing: float | None = None
    horizon: float | None = None
    condition: float | None = None
    stochastic: bool | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    loss_evaluations: int = 0
    rsd: float | None = None
    smoothing_on: bool | None = None

    def __repr__(self) -> str:
        """Leaves out what was not measured."""
        return describe("StepReport", self)
