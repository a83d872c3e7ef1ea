"""How candidates are judged: every one by all ranks, or each by another group of them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lightning_stableaa.distributed import collectives_so_far
from lightning_stableaa.groups import RankGroups
from lightning_stableaa.points import PointStore
from lightning_stableaa.safeguard import LossFunction, RandomState, loss_value

# From so many ranks for every candidate on, each candidate is judged by a group of its own: on no
# fewer than 64 samples of classes or tokens where a rank judges on 4; one process judges on 16.
RANKS_A_CANDIDATE = 16


class Judgement(NamedTuple):
    """What one rank has to say about L candidates."""

    losses: list[Tensor]  # () float64 each, before and L after; their means over ranks decide
    evaluations: int  # of the loss, by this rank
    kept: int | None  # the candidate that is left in ``points.candidate``, the same on all ranks


def judge(points: PointStore, jumps: Tensor, loss_fn: LossFunction) -> Judgement:
    """Loss before, then that of each of L candidates, (L, q): one random state for all.

    Where there are many ranks, each of L groups of them judges another candidate, on samples of its
    own: by the mean difference to the loss before on the same samples.
    """
    device = points.weights.device
    random = RandomState(device)
    enough = _enough_ranks(points, len(jumps))
    known = collectives_so_far() if enough else None
    before = loss_value(loss_fn, device, collective=points.split)
    groups = None
    if enough:
        communicates = known is None or known != collectives_so_far()
        groups = _groups(points, len(jumps), communicates=communicates)
    # where no jump is defined, none: the loss may raise on weights that are NaN
    jumps = jumps.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    after = []
    with points.trials() as put:
        for jump in jumps if groups is None else [jumps]:
            random.restore()
            put(jump)
            after.append(loss_value(loss_fn, device, collective=points.split))
    random.restore(last=True)
    if groups is not None:
        return Judgement([before, *_in_slots(before, after[0], groups, len(jumps))], 2, None)
    kept = len(jumps) - 1 if points.keeps_gathered else None
    return Judgement([before, *after], 1 + len(after), kept)


def _enough_ranks(points: PointStore, candidates: int) -> bool:
    """Whether groups may judge: not where the forward pass of split weights needs all ranks."""
    enough = points.communicator.world_size >= RANKS_A_CANDIDATE * candidates
    return enough and candidates > 1 and not points.split


def _groups(points: PointStore, candidates: int, *, communicates: bool) -> RankGroups | None:
    """Those that judge a candidate each; ``None`` where the loss communicates on any rank.

    As that of SyncBatchNorm does, or one that compares samples of several ranks: between groups it
    would mix their candidates. A collective call.
    """
    if points.communicator.any(communicates, points.weights.device):
        return None
    return points.groups(candidates)


def _in_slots(before: Tensor, after: Tensor, groups: RankGroups, count: int) -> list[Tensor]:
    """This rank's numbers, one a candidate, of which means over all ranks are to be taken.

    They are the mean loss before of all ranks plus the mean difference that a candidate's own group
    found: what a rank knows weighs as if its group were all ranks.
    """
    slots = [before] * count
    slots[groups.own] = before + (after - before) / groups.share
    return slots
