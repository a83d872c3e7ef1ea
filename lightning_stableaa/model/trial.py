"""A candidate on trial: in place of the weights for one loss, and gone again."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from lightning_stableaa.core.acceptance import ROUNDING_ERRORS, Evaluation
from lightning_stableaa.model.iterates import IterateStore
from lightning_stableaa.model.objective import Objective

log = logging.getLogger(__name__)


def evaluate_candidate(
    iterates: IterateStore, objective: Objective | None, *, check: bool
) -> Evaluation:
    """Losses at the current weights and at ``iterates.candidate``; a collective call.

    Afterwards the weights, and all that the objective restores, are bitwise what they were.

    Args:
        iterates: has formed a candidate.
        objective: ``None`` looks only whether the candidate is finite.
        check: compute the loss at the current weights twice, to see that it is repeatable.
    """
    overflows = iterates.weights.overflows(iterates.candidate)
    if objective is None:
        (overflow,) = _mean(iterates, [overflows])
        return Evaluation(math.nan, math.nan, False, overflows=overflow > 0)
    undo_writes = iterates.keep_weights()
    with objective:
        before = objective()
        undo_writes()
        error = objective.error
        again = objective() if check else before
        undo_writes()
        raises = check and error is not None and objective.error is not None
        with iterates.trial():
            after = objective()
            error = error or objective.error
    tolerance = ROUNDING_ERRORS * objective.precision
    unlike = (again - before).abs() > tolerance * before.abs()  # of NaN, which rejects, False
    flags = [unlike, error is not None, raises, objective.stochastic]
    numbers = [before, after, overflows, *flags]
    loss_before, loss_after, overflow, differ, failed, unusable, draws = _mean(iterates, numbers)
    text = "an error on another process" if error is None else f"{type(error).__name__}: {error}"
    if error is not None:
        log.info("a loss by which a candidate was compared raised %s", text)
    return Evaluation(
        before=loss_before,
        after=loss_after,
        stochastic=draws > 0,
        tolerance=tolerance,
        overflows=overflow > 0,
        failed=failed > 0,
        repeatable=differ == 0,
        raises=text if unusable > 0 else "",
        evaluations=3 if check else 2,
    )


def _mean(iterates: IterateStore, numbers: list[Tensor | bool]) -> list[float]:
    """Over the ranks; the device is waited for."""
    if iterates.communicator.is_single_process and iterates.weights.device.type == "cpu":
        return [float(one) for one in numbers]
    device = iterates.weights.device
    shared = torch.stack([torch.as_tensor(one).to(device, torch.float64) for one in numbers])
    iterates.communicator.sum(shared)
    return (shared / iterates.communicator.world_size).tolist()
