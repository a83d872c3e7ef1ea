"""What the ranks of tests/test_judging.py run: a group of them judges each candidate."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.scaling import Recorder
from lightning_stableaa import AndersonAccelerator, distributed, judging
from lightning_stableaa.history import History
from lightning_stableaa.weights import FlatTensors
from tests.ddp_jobs import join, run
from tests.fault_jobs import short_on_one_rank

WORLD = 4
GROUPS = {"four": [0, 1, 2, 3], "three": [1, 2, 3]}  # the ranks that train together
CASES = list(itertools.product(GROUPS, ("replicated", "sharded")))
N = 1001
AT_ONCE = 300  # elements of a gather, which then takes several pieces
DEPTH = 10
GRID = [1e-3, 1e-1]  # and the candidate that looks ahead: three groups
STEPS = 64

ACCEPTED_FIRST = 24  # the first step with an update that is accepted, in all cases

# What runs out of memory on rank 1 in that step, and after how many calls.
SHORT: dict[str, tuple[Any, str, int]] = {
    "first slice": (History, "combine", 0),
    "room for slices": (torch, "empty_like", 0),
    "accepted candidate": (History, "combine", 3),
    "is it finite": (FlatTensors, "cannot_hold", 0),
    "swap": (FlatTensors, "work_space", 0),
}


def main(rank: int, port: int, folder: str) -> None:
    """All jobs in four processes, of which all or three train together."""
    join(rank, port, WORLD)
    judging.RANKS_A_CANDIDATE = 1
    distributed.GATHERED_AT_ONCE = AT_ONCE
    process_groups = {"four": None, "three": dist.new_group(GROUPS["three"])}

    def each(job: Callable[..., Any]) -> dict[tuple[str, str], Any]:
        return {
            (name, history): job(history=history, process_group=process_groups[name])
            for name, history in CASES
            if rank in GROUPS[name]
        }

    jobs = {
        "trained": lambda: each(train),
        "all judge all": lambda: each(all_judge_all),
        "nan candidate": lambda: each(nan_candidate),
        "nan before": lambda: each(lambda **how: train(**how, spoiled=(3, 0))),
        "loss communicates": lambda: each(lambda **how: train(**how, communicates=True)),
        "short": lambda: each(short_of_memory),
        "end": dist.barrier,  # the first rank keeps what the others meet by
    }
    run(jobs, rank, folder)


class Problem:
    """1/2 sum_i a_i x_i^2, with gradients that are noisy and equal on all ranks.

    Each rank judges by samples of its own, other ones at every update: where the minimum lies.
    """

    def __init__(self, spoiled: tuple[int, int], communicates: bool, **options: Any) -> None:
        self.noise = torch.Generator().manual_seed(0)
        self.samples = torch.Generator().manual_seed(1 + dist.get_rank())
        values = torch.randn(N, generator=self.noise, dtype=torch.float64)
        self.parameters = [nn.Parameter(one) for one in values.split([600, N - 600])]
        self.a = torch.logspace(0, -3, N, dtype=torch.float64)
        self.optimizer = torch.optim.SGD(self.parameters, lr=0.5, momentum=0.5)
        self.accelerator = AndersonAccelerator(
            self.optimizer,
            history_depth=DEPTH,
            store_every_n_steps=2,
            accelerate_every_n_steps=8,
            regularization=GRID,
            **options,
        )
        self.spoiled = spoiled
        self.group = options["process_group"] if communicates else None
        self.communicates = communicates
        self.judged: list[float] = []

    def flat(self) -> Tensor:
        return torch.cat([one.detach() for one in self.parameters])

    def step(self) -> Any:
        gradient = self.a * self.flat()
        gradient += 0.01 * torch.randn(N, generator=self.noise, dtype=torch.float64)
        for one, part in zip(self.parameters, gradient.split([600, N - 600]), strict=True):
            one.grad = part.clone()
        self.optimizer.step()
        self.judged = []
        self.minimum = 0.1 * torch.randn(N, generator=self.samples, dtype=torch.float64)
        with Recorder() as recorder:
            report = self.accelerator.step(self.judge)
        self.sent = recorder.sent
        return report

    def loss(self) -> Tensor:
        return 0.5 * (self.a * (self.flat() - self.minimum) ** 2).sum()

    def judge(self) -> Tensor:
        value = self.loss()
        if (dist.get_rank(), len(self.judged)) == self.spoiled:
            value = value * float("nan")
        if self.communicates:
            dist.all_reduce(value, group=self.group)
        self.judged.append(float(value))
        return value


def train(
    *, spoiled: tuple[int, int] = (-1, -1), communicates: bool = False, **options: Any
) -> dict[str, Any]:
    """What was judged, decided and sent at each update, and the weights in the end."""
    problem = Problem(spoiled, communicates, **options)
    updates = []
    for _ in range(STEPS):
        report = problem.step()
        cycles = problem.accelerator._cycles
        if report.attempted and cycles is not None:
            updates.append(
                {
                    "status": report.status.value,
                    "chosen": report.regularization,
                    "before": report.loss_before,
                    "after": report.loss_after,
                    "judged": problem.judged,
                    "loss now": float(problem.loss()),
                    "sent": problem.sent,
                    "differences": len(cycles.points.history) - 1,
                }
            )
    return {
        "updates": updates,
        "evaluations": problem.accelerator.loss_evaluations,
        "weights": problem.flat(),
    }


def nan_candidate(**options: Any) -> dict[str, Any]:
    """That of the last rank, whose group judges the candidate that looks ahead."""
    return train(spoiled=(3, 1), optimizer_state="mix", apply_to="both", **options)


def all_judge_all(**options: Any) -> dict[str, Any]:
    """Too few ranks for groups."""
    judging.RANKS_A_CANDIDATE = 2
    seen = train(**options)
    judging.RANKS_A_CANDIDATE = 1
    return seen


def short_of_memory(**options: Any) -> dict[str, Any]:
    """One rank runs out of memory in an update; nobody accelerates from the next one on."""
    seen = {}
    for name, (owner, function, after) in SHORT.items():
        problem = Problem((-1, -1), False, **options)
        statuses = []
        for step in range(1, ACCEPTED_FIRST + 9):
            short = short_on_one_rank(owner, function, RuntimeError, after=after)
            with short if step == ACCEPTED_FIRST else nullcontext():
                statuses.append(problem.step().status.value)
        seen[name] = {"statuses": statuses, "weights": problem.flat()}
    return seen
