"""One extrapolation: propose candidates, judge them, decide. The weights end as they began."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_stableaa.agreement import DISTURBANCES, Agreement
from lightning_stableaa.decision import (
    Decision,
    Known,
    decide,
    decide_by_losses,
    is_noise,
    kept_out,
)
from lightning_stableaa.look_ahead import LookAhead
from lightning_stableaa.losses import RecentLosses
from lightning_stableaa.options import Options
from lightning_stableaa.points import PointStore
from lightning_stableaa.random_state import RandomState
from lightning_stableaa.report import StepReport
from lightning_stableaa.safeguard import Judge, LossFunction, loss_value
from lightning_stableaa.solver import Proposal, condition_number, propose
from lightning_stableaa.status import Status

# Of a candidate that went on along a drift, what says that a nearer one might have been better.
TOO_FAR = (
    Status.REJECTED_LOSS,
    Status.REJECTED_SMALL_DECREASE,
    Status.REJECTED_NON_FINITE_LOSS,
)


@dataclass(frozen=True, kw_only=True)
class Extrapolation:
    """The decision, and what it was based on."""

    report: StepReport
    jump: Tensor | None = None  # (q,), of the accepted candidate, equal on all ranks
    loss_evaluations: int = 0
    mends: bool = False  # training had leapt away, and the candidate brings it back

    @property
    def disturbance(self) -> Status | None:
        """What happened to one of several ranks, for which all reject."""
        return self.report.status if self.report.status in DISTURBANCES else None


def extrapolate(
    points: PointStore,
    options: Options,
    judge: Judge | None,
    agreement: Agreement,
    recent: RecentLosses,
    look_ahead: LookAhead,
) -> Extrapolation:
    """Form the candidates, and choose the one of least loss if it is an advance.

    Where candidates are for training alone, nobody is asked for losses if the last one was kept out
    whatever its loss, unless that of training leapt, or what kept it out is over.

    The accepted candidate is left in ``points.candidate``. The device is waited for once, when
    everything that decides is read back together, and once more where losses are asked for after
    that, where a candidate is confirmed, and of several ranks where one is accepted.

    Args:
        points: at least two residuals.
        options: those of the candidates.
        judge: ``None`` accepts the first candidate, if it is finite.
        agreement: what this rank noted since the last one, and with whom it decides.
        recent: losses at earlier ones; takes note of this one.
        look_ahead: how far they go on along a drift; takes note of what becomes of this one.
    """
    # what else says so is shared with everything else, and told the next candidate
    known_of_sample = judge is not None and judge.surely_of_sample
    proposal = propose(
        points.gram(),
        points.history.linked,
        regularization=options.regularization_grid,
        relaxation=options.relaxation,
        max_extrapolation=options.max_extrapolation,
        lag_compensation=options.lag_compensation,
        look_ahead_cycles=(0.0 if judge is None else look_ahead.cycles(of_sample=known_of_sample)),
    )
    known, losses, reason, disturbance = _find_out(
        points, options, judge, agreement, recent, proposal
    )
    best = known.best
    before, after = known.loss_before, known.losses_after[best] if losses else None
    mends = known.of_sample and recent.are_mended_by(before, after)
    decision = (
        Decision(disturbance)
        if disturbance
        else decide(known, options, guarded=judge is not None, reason=reason, mends=mends)
    )
    formed = len(losses) - 2  # the candidate that was judged last
    if judge is not None and decision.replaces and known.asks_again:
        confirming = judge.confirming() or judge
        again = _losses(points, proposal.jumps[best : best + 1], judge, loss_fn=confirming)
        losses += again
        before, after = _mean(points, torch.stack(again)).tolist()
        mends = known.of_sample and recent.are_mended_by(before, after)
        decision = decide_by_losses(before, after, known, options, reason=reason, mends=mends)
        formed = best
    jump = None
    if decision.status is Status.ACCEPTED:
        jump = points.agree(proposal.jumps[best])
        if not points.keeps_last_trial or best != formed:
            points.form(jump)
        # finite in float64 may be beyond the precision of the weights; the judge need not tell
        if not points.candidate_is_finite(known.reaches[best]):
            decision, jump = Decision(Status.REJECTED_NON_FINITE_CANDIDATE), None
    accepted = jump is not None
    is_last = best == len(known.lambdas) - 1
    drifts = judge is not None and options.look_ahead_cycles > 0 and known.remaining > 1
    look_ahead.of_sample = known.of_sample
    helped = decision.of_training is Status.ACCEPTED
    if drifts and known.of_sample and (decision.of_training in TOO_FAR or (helped and is_last)):
        look_ahead.note(accepted=helped)
    report = StepReport(
        status=decision.status,
        attempted=True,
        accepted=accepted,
        replaced=accepted and decision.replaces,
        residual_norm=known.residual_norm,
        jump_norm=known.norms[best] if accepted else max(known.norms),
        condition=known.condition,
        regularization=known.lambdas[best] if accepted else None,
        looked_ahead=accepted and drifts and is_last,
        noisiness=known.noisiness,
        loss_before=before,
        loss_after=after,
    )
    return Extrapolation(report=report, jump=jump, loss_evaluations=len(losses), mends=mends)


class _Found(NamedTuple):
    """What is known of the candidates, and what it rests on."""

    known: Known
    losses: list[Tensor]  # that were asked for
    reason: Status | None  # what keeps candidates out of training, whatever their losses are
    disturbance: Status | None


def _find_out(
    points: PointStore,
    options: Options,
    judge: Judge | None,
    agreement: Agreement,
    recent: RecentLosses,
    proposal: Proposal,
) -> _Found:
    """Ask for losses: at once, or only if it turns out that they can change anything."""
    in_vain = judge is not None and (recent.amid_noise or judge.asked_in_vain)
    left_alone = in_vain and options.apply_to == "training"
    losses = [] if judge is None or left_alone else _losses(points, proposal.jumps, judge)
    known = _told(points, proposal, judge, losses, agreement)
    disturbance = agreement.settle(known.noted * points.communicator.world_size)
    told = math.isfinite(known.training_loss)
    recent.observe(known.training_loss if told else known.loss_before)
    held = judge is not None and judge.validation_got_worse
    reason = kept_out(known, options, held=held)
    matters = disturbance is None and (reason is None or recent.leapt)
    if judge is not None and left_alone and matters:
        losses = _losses(points, proposal.jumps, judge)
        known = _told(points, proposal, judge, losses, agreement)
        reason = kept_out(known, options, held=held)
    recent.amid_noise = told and is_noise(known, options)
    return _Found(known, losses, reason, disturbance)


def _losses(
    points: PointStore, jumps: Tensor, judge: Judge, *, loss_fn: LossFunction | None = None
) -> list[Tensor]:
    """Loss before, then that of each of L candidates, (L, q): one random state for all."""
    device = points.weights.device
    loss_fn, collective = loss_fn or judge, points.split or judge.communicates
    random = RandomState(device)
    losses = [loss_value(loss_fn, device, collective=collective)]
    with points.trials() as put:
        # where no jump is defined, none: the loss may raise on weights that are NaN
        for jump in jumps.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0):
            random.restore()
            put(jump)
            losses.append(loss_value(loss_fn, device, collective=collective))
    random.restore()
    return losses


def _told(
    points: PointStore,
    proposal: Proposal,
    judge: Judge | None,
    losses: list[Tensor],
    agreement: Agreement,
) -> Known:
    """What all ranks know then; the device is waited for."""
    shared = _shared(points, proposal, judge, losses, agreement)
    return _read_back(proposal, shared, residuals=points.history.residual_count)


def _shared(
    points: PointStore,
    proposal: Proposal,
    judge: Judge | None,
    losses: list[Tensor],
    agreement: Agreement,
) -> Tensor:
    """What all have to decide alike on, (7,) or (8 + L,).

    What was noted, residual norm, noisiness, remaining residual; whether losses are those of
    samples, whether others have to confirm them, and that of training; those that were asked for.

    Means over ranks. What is NaN on one rank is NaN on all: a rank that rejects alone would leave
    the others waiting.
    """
    device = points.weights.device
    norm, *others = (one.to(device) for one in proposal.numbers[:3])
    noted = torch.full_like(norm, agreement.number)
    known: list[Tensor | float] = [False, False, math.nan]
    if judge is not None:
        loss = judge.training_loss
        confirmed = judge.confirming() is not None
        known = [judge.of_sample, confirmed, math.nan if loss is None else loss]
    told = [one if isinstance(one, Tensor) else torch.full_like(norm, one) for one in known]
    told = [one.to(norm) for one in told]
    return _mean(points, torch.stack([noted, norm, *others, *told, *losses]))


def _mean(points: PointStore, values: Tensor) -> Tensor:
    """Over ranks."""
    points.communicator.mean(values)
    return values


def _read_back(proposal: Proposal, shared: Tensor, *, residuals: int) -> Known:
    """In one transfer."""
    gram = proposal.residual_gram
    parts = [shared.to(proposal.numbers.device), proposal.numbers[3:]]
    if gram is not None:
        parts.append(gram.flatten())
    values = torch.cat(parts).cpu()
    together, numbers, *flat_gram = values.split([part.numel() for part in parts])
    noted, residual_norm, noisiness, remaining, *judged = together.tolist()
    of_sample, asks_again, training_loss, *losses = judged
    condition, *of_candidates = numbers.tolist()
    count = len(of_candidates) // 3
    before, *after = losses or (None,)
    return Known(
        noted=noted,
        residuals=residuals,
        residual_norm=residual_norm,
        noisiness=noisiness,
        of_sample=of_sample > 0,
        asks_again=asks_again > 0,
        loss_before=before,
        losses_after=after,
        training_loss=training_loss,
        remaining=remaining,
        condition=condition if gram is None else condition_number(flat_gram[0].view(gram.shape)),
        norms=of_candidates[:count],
        reaches=of_candidates[count : 2 * count],
        lambdas=of_candidates[2 * count :],
    )
