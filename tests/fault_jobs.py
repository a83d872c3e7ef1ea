"""What the ranks of tests/test_faults.py run: one of them meets what the others do not."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import lightning.pytorch
import torch
import torch.distributed as dist

from lightning_stableaa import Smoothing
from lightning_stableaa.averaging import WeightSmoother
from lightning_stableaa.dtensors import local_part
from lightning_stableaa.history import History
from lightning_stableaa.statistics import RunningStatistics
from lightning_stableaa.weights import FlatTensors
from tests import ddp_jobs, fsdp_jobs
from tests.callbacks.regression import anderson
from tests.ddp_jobs import join, run
from tests.fsdp_jobs import LAYOUTS, Minimisation, flat

WORLD = 2
STEPS = 24  # cycles end every 3 steps, and every other one with an update

PLACEMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "replicated": ("plain", {"history": "replicated"}),
    "sharded": ("plain", {"history": "sharded"}),
    "split": ("mixed", {}),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "guarded": {},
    "unguarded": {
        "safeguard": "none",
        "regularization": 1e-2,
        "optimizer_state": "mix",
        "apply_to": "both",
    },
    "averages": {"smoothing": Smoothing(rsd_threshold=0.05)},
    "averaged weights": {"smoothing": Smoothing(rsd_threshold=0.05, apply_to="weights")},
}
CASES = [
    (placement, name)
    for placement in PLACEMENTS
    for name in OPTIONS
    if placement == "replicated" or name != "averaged weights"
]

# After which step one rank's weights are written to, and whether before the engine hears of it.
MOMENTS: dict[str, tuple[int, bool]] = {
    "in a cycle": (8, False),
    "at a cycle's end": (9, True),
    "between cycles": (9, False),
    "on the step before an update": (11, False),
    "at an update": (12, True),
    "after an update": (12, False),
}


def main(rank: int, port: int, folder: str) -> None:
    """All jobs in one pair of processes; each rank writes what it saw to ``folder``."""
    join(rank, port, WORLD)
    jobs = {
        "edited": lambda: each(edited),
        "validated": lambda: {name: validated(name) for name in PLACEMENTS},
        "saved": lambda: {name: saved_in_between(name) for name in PLACEMENTS},
        "moved": lambda: {name: moved(name) for name in PLACEMENTS},
        "frozen": lambda: {name: frozen(name) for name in ("replicated", "sharded")},
        "no room": lambda: {name: no_room(name) for name in PLACEMENTS},
        "short": lambda: each(short_of_memory),
        "moved to the host": lambda: {name: moved_to_host(name) for name in PLACEMENTS},
        "smoothed": lambda: {name: smoothed(name) for name in ("plain", "mixed")},
        "ddp": lambda: [
            ddp_jobs.train(anderson(history=one), WritesOnOneRank(), epochs=4)
            for one in ("replicated", "sharded")
        ],
        "fsdp": lambda: fsdp_jobs.train(anderson(), WritesOnOneRank(), epochs=4),
    }
    run(jobs, rank, folder)


class Training:
    """A minimisation, its reports, and what one rank does to it in between."""

    def __init__(self, placement: str, **options: Any) -> None:
        layout, where = PLACEMENTS[placement]
        cycle: dict[str, Any] = {
            "store_every_n_steps": 3,
            "accelerate_every_n_steps": 6,
            "look_ahead_cycles": 10.0,
        }
        self.problem = Minimisation(LAYOUTS[layout], torch.float64, **where | cycle | options)
        self.engine = self.problem.accelerator
        self.statuses: list[str] = []
        self.recent_losses: list[list[float]] = []  # that are known after each step

    def train(self, steps: int, disturb: Callable[[int, bool], None] = lambda *_: None) -> None:
        """``disturb(step, early)`` is called early, before the engine's step, and after it."""
        problem = self.problem
        for _ in range(steps):
            problem.optimizer.zero_grad()
            problem.loss().backward()
            problem.optimizer.step()
            step = len(self.statuses) + 1
            disturb(step, True)
            self.statuses.append(self.engine.step(problem.loss).status.value)
            cycles = self.engine._cycles
            known = [] if cycles is None else cycles._losses.state_dict()["recent"]
            self.recent_losses.append(known)
            disturb(step, False)

    def seen(self) -> dict[str, Any]:
        """What all ranks must agree about, and the weights."""
        state = self.engine.state_dict()
        return {
            "statuses": self.statuses,
            "recent_losses": self.recent_losses,
            "counters": state["counters"],
            "outcomes": state["outcomes"],
            "links": state["points"] and state["points"]["history"]["links"],
            "weights": flat(self.problem.parameters),
            "resumed": None,
        }

    def resumed(self, **options: Any) -> Training:
        """Another one that continues from the state of all ranks."""
        state = [self.engine.whole_state_dict()]
        dist.broadcast_object_list(state)
        other = Training(**options)
        with torch.no_grad():
            for mine, its in zip(self.problem.parameters, other.problem.parameters, strict=True):
                local_part(its).copy_(local_part(mine))
        momenta = copy.deepcopy(self.problem.optimizer.state_dict())
        other.problem.optimizer.load_state_dict(momenta)
        other.engine.load_state_dict(state[0])
        return other


def each(job: Callable[..., Any]) -> dict[tuple[str, str], Any]:
    """The job in all cases."""
    return {(placement, name): job(placement, OPTIONS[name]) for placement, name in CASES}


def write(training: Training) -> None:
    """Something else than the optimizer writes to the weights; they stay equal on all ranks."""
    with torch.no_grad():
        for one in training.problem.parameters:
            local_part(one).mul_(1.0)


def edited(placement: str, options: dict[str, Any]) -> dict[str, Any]:
    """The second rank's weights are written to at each moment."""
    return {name: edited_at(moment, placement, options) for name, moment in MOMENTS.items()}


def edited_at(moment: tuple[int, bool], placement: str, options: dict[str, Any]) -> dict[str, Any]:
    """Written to, saved, and resumed."""
    training = Training(placement, **options)

    def disturb(step: int, early: bool) -> None:
        if (step, early) == moment and dist.get_rank() == 1:
            write(training)

    training.train(19, disturb)
    other = training.resumed(placement=placement, **options)
    training.train(STEPS - 19)
    other.train(STEPS - 19)
    return training.seen() | {"resumed": flat(other.problem.parameters)}


def validated(placement: str) -> dict[str, Any]:
    """One rank writes to the weights while they are evaluated."""
    training = Training(placement, apply_to="both")

    def disturb(step: int, early: bool) -> None:
        if step in (8, 13) and not early:
            with training.engine.evaluation_weights():
                if dist.get_rank() == 1:
                    write(training)

    training.train(STEPS, disturb)
    return training.seen()


def saved_in_between(placement: str) -> dict[str, Any]:
    """A checkpoint between the write and the end of the cycle, in which one rank knows of it."""
    seen = {}
    for writer in range(WORLD):
        training = Training(placement)
        training.train(10)
        if dist.get_rank() == writer:
            write(training)
        other = training.resumed(placement=placement)
        training.train(14)
        other.train(14)
        seen[writer] = training.seen() | {"resumed": flat(other.problem.parameters)}
    return seen


def moved(placement: str) -> dict[str, Any]:
    """The parameters of one rank are no longer in the memory where they were."""
    training = Training(placement)
    training.train(10)
    cycles = training.engine._cycles
    assert cycles is not None
    if dist.get_rank() == 1:
        cycles.points.still_fits = lambda parameters: False
    training.train(STEPS - 10)
    return training.seen()


def frozen(placement: str) -> dict[str, Any]:
    """One rank trains fewer parameters for a while."""
    training = Training(placement)
    parameter = training.problem.parameters[2]

    def disturb(step: int, early: bool) -> None:
        if step == 8 and not early:
            parameter.requires_grad_(dist.get_rank() == 0)
        if step == 16 and not early:
            parameter.requires_grad_(True)
            dist.broadcast(parameter.detach(), src=0)

    training.train(STEPS, disturb)
    return training.seen()


@contextmanager
def short_on_one_rank(
    owner: Any, name: str, error: type[Exception], *, after: int = 0
) -> Iterator[None]:
    """Inside, a function runs out of memory on the second rank, after so many calls."""
    original, calls = getattr(owner, name), itertools.count()

    def patched(*arguments: Any, **named: Any) -> Any:
        if next(calls) >= after and dist.get_rank() == 1:
            raise error("DefaultCPUAllocator: can't allocate memory")
        return original(*arguments, **named)

    with mock.patch.object(owner, name, patched):
        yield


def no_room(placement: str) -> dict[str, Any]:
    """The history fits on one rank only; and on both, without acceleration."""
    training = Training(placement)
    with short_on_one_rank(History, "__init__", RuntimeError):
        training.train(12)
    return training.seen() | {"plain": plain(placement, 12)}


def plain(placement: str, steps: int) -> torch.Tensor:
    """The weights without acceleration."""
    training = Training(placement)
    training.engine.detach()
    training.train(steps)
    return flat(training.problem.parameters)


# What runs out of memory in an update, or on the way to it, and after how many calls since step 6.
SHORT: dict[str, tuple[Any, str, type[Exception], int]] = {
    "push": (FlatTensors, "read", MemoryError, 0),
    "gram": (History, "gram", RuntimeError, 0),
    "first candidate": (History, "combine", RuntimeError, 0),
    "last candidate": (History, "combine", MemoryError, 5),
    "accepted candidate": (History, "combine", RuntimeError, 6),
    "is it finite": (FlatTensors, "cannot_hold", RuntimeError, 0),
    "swap": (FlatTensors, "work_space", RuntimeError, 0),
    "smoothing": (RunningStatistics, "observe", RuntimeError, 1),
}


def short_of_memory(placement: str, options: dict[str, Any]) -> dict[str, Any]:
    """Updates on the way of which one rank runs out of memory."""
    seen = {}
    for name, (owner, function, error, after) in SHORT.items():
        training = Training(placement, **options)
        training.train(6)
        with short_on_one_rank(owner, function, error, after=after):
            training.train(12)
        seen[name] = training.seen()
    return seen


def moved_to_host(placement: str) -> dict[str, Any]:
    """One rank runs out of memory on a device that is not the host, or would be."""
    training = Training(placement)
    with short_on_one_rank(History, "gram", RuntimeError):
        training.train(7)
    training.engine._builder.has_no_memory = False
    training.train(9)
    other = training.resumed(placement=placement)
    training.train(8)
    other.train(8)
    return training.seen() | {"resumed": flat(other.problem.parameters)}


def smoothed(layout: str) -> dict[str, Any]:
    """Averages without a history, and a write on one rank."""
    problem = Minimisation(LAYOUTS[layout], torch.float64)
    problem.accelerator.detach()
    options: Any = {"average_window": 4, "rsd_threshold": 0.0, "apply_to": "weights"}
    smoother = WeightSmoother(problem.optimizer, Smoothing(**options))
    statuses = []
    for step in range(1, 17):
        problem.optimizer.zero_grad()
        problem.loss().backward()
        problem.optimizer.step()
        statuses.append(smoother.step().status.value)
        if step in (6, 12) and dist.get_rank() == 1:
            with torch.no_grad():
                local_part(problem.parameters[0]).mul_(1.0)
    return {"statuses": statuses, "weights": flat(problem.parameters)}


class WritesOnOneRank(lightning.pytorch.Callback):
    """In the middle of a cycle, and before an update."""

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_rank == 1 and trainer.global_step in (5, 11):
            with torch.no_grad():
                for one in pl_module.parameters():
                    local_part(one).mul_(1.0)
