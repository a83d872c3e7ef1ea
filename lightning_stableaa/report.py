"""What one step did."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_stableaa.status import Status


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one call of ``AndersonAccelerator.step`` did; ``None`` where nothing was measured.

    Attributes:
        status: why; ``status.remedy`` names the option to turn.
        stored: a point entered the history.
        attempted: an extrapolation was due: candidates were formed, or validation kept them out.
        accepted: a candidate passed the safeguard.
        replaced: the accepted candidate replaced the weights of training.
        residual_norm: sqrt(tr(K)/m), the root of the mean squared residual norm, in units of the
            weights.
        jump_norm: length of the accepted, or else of the longest jump, in units of the weights.
        condition: condition number of K.
        regularization: lambda of the accepted candidate.
        looked_ahead: the accepted candidate went on along a drift.
        noisiness: 1 where residuals are noise, 0 where they are a steady drift or depend on one
            another; share of ``sufficient_decrease`` that is asked for.
        loss_before: loss of the current batch at the optimizer's weights.
        loss_after: loss of the best candidate on the same batch.
        rsd: relative standard deviation of the window that ended with this step.
        smoothing_on: whether averages are in use.
    """

    status: Status
    stored: bool = False
    attempted: bool = False
    accepted: bool = False
    replaced: bool = False
    residual_norm: float | None = None
    jump_norm: float | None = None
    condition: float | None = None
    regularization: float | None = None
    looked_ahead: bool = False
    noisiness: float | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    rsd: float | None = None
    smoothing_on: bool | None = None
