"""What becomes of the best candidate: decided on numbers that all ranks share."""

from __future__ import annotations

import math
from typing import NamedTuple

from lightning_stableaa.options import Options
from lightning_stableaa.status import Status

# Noisiness from which on a candidate is no better than an average.
MOSTLY_NOISE = 0.5
# So many residuals tell noise; fewer look like it whatever they are.
TELL_NOISE = 4


class Known(NamedTuple):
    """Everything that decides, on the host; losses are means over the ranks."""

    noted: float
    residuals: int
    residual_norm: float
    noisiness: float
    of_sample: bool  # the losses are those of samples of many
    asks_again: bool  # others have to confirm them, on some rank
    loss_before: float | None  # None without a judge
    losses_after: list[float]  # empty where nobody was asked
    training_loss: float  # NaN where it is not known
    remaining: float
    condition: float
    norms: list[float]
    reaches: list[float]
    lambdas: list[float]

    @property
    def best(self) -> int:
        """Place of the candidate of least loss, NaN being larger than all; the first of none."""
        losses = [math.inf if math.isnan(loss) else loss for loss in self.losses_after]
        return losses.index(min(losses)) if losses else 0


class Decision(NamedTuple):
    """Why, and whether the candidate is to replace the weights of training.

    Attributes:
        status: what is reported.
        replaces: it enters training.
        kept_out: why not, of one that is accepted for evaluation alone where training might have
            had it.
    """

    status: Status
    replaces: bool = False
    kept_out: Status | None = None

    @property
    def of_training(self) -> Status:
        """The status where candidates were for training alone."""
        return self.kept_out or self.status


def is_noise(known: Known, options: Options) -> bool:
    """Whether residuals are those of samples, and mostly noise.

    The momentum of the optimizer carries training off from an average at once.
    """
    asked = options.least_decrease(of_sample=known.of_sample)
    of_noise = known.noisiness >= MOSTLY_NOISE and known.residuals >= TELL_NOISE
    return known.of_sample and asked > 0 and of_noise


def kept_out(known: Known, options: Options, *, held: bool) -> Status | None:
    """Why a candidate stays out of training whatever its loss is; ``None`` where it need not.

    Args:
        known: what decides, the same on all ranks.
        options: those of the candidates.
        held: validation keeps what a sample agrees to out of training.
    """
    if held and known.of_sample:
        return Status.REJECTED_BY_VALIDATION
    return Status.REJECTED_NOISE if is_noise(known, options) else None


def decide(
    known: Known, options: Options, *, guarded: bool, reason: Status | None, mends: bool
) -> Decision:
    """Of the best candidate.

    Args:
        known: what decides, the same on all ranks.
        options: those of the candidates.
        guarded: whether there is a judge.
        reason: what keeps it out of training whatever its loss is; without losses there is one.
        mends: training had leapt away, and it brings the loss back: nothing keeps it out.
    """
    if not math.isfinite(known.residual_norm):
        return Decision(Status.REJECTED_NON_FINITE_HISTORY)
    if known.residual_norm == 0:
        return Decision(Status.REJECTED_STAGNATION)
    if not guarded:
        if not math.isfinite(known.norms[known.best]):
            return Decision(Status.REJECTED_NON_FINITE_CANDIDATE)
        return Decision(Status.ACCEPTED, replaces=options.apply_to != "evaluation")
    if known.loss_before is None:
        assert reason is not None  # or somebody would have been asked
        return Decision(reason)
    after = known.losses_after[known.best]
    return decide_by_losses(known.loss_before, after, known, options, reason=reason, mends=mends)


def decide_by_losses(
    before: float,
    after: float,
    known: Known,
    options: Options,
    *,
    reason: Status | None,
    mends: bool,
) -> Decision:
    """Of a candidate that changes the loss of the batch from ``before`` to ``after``."""
    if not math.isfinite(before) or not math.isfinite(after):
        return Decision(Status.REJECTED_NON_FINITE_LOSS)
    if not after < before:
        return Decision(Status.REJECTED_LOSS)
    share = options.least_decrease(of_sample=known.of_sample) * known.noisiness
    if not after < before - share * abs(before):
        return _only_evaluated(Status.REJECTED_SMALL_DECREASE, options)
    if reason is not None and not mends:
        return _only_evaluated(reason, options)
    return Decision(Status.ACCEPTED, replaces=options.apply_to != "evaluation")


def _only_evaluated(status: Status, options: Options) -> Decision:
    """Good enough to be looked at, where anybody looks at candidates; else for the reason given."""
    if options.apply_to == "training":
        return Decision(status)
    return Decision(Status.ACCEPTED, kept_out=status if options.apply_to == "both" else None)
