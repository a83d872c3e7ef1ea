"""``make soak``: a long seeded run in which everything that can go wrong goes wrong, at random.

Episodes train small networks with random options. Faults come between the steps; after every step
the invariants of :meth:`Episode.check` must hold. The exit code is 1 if one did not.
"""

from __future__ import annotations

import argparse
import gc
import io
import logging
import math
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_stableaa import AndersonAccelerator, Smoothing, Status, StepReport

MIB = 2**20
# Growth after warm-up that counts as none: caches of torch and fragments of the allocator.
OBJECTS_SLACK, RESIDENT_SLACK = 2_000, 64 * MIB

EPISODE_STEPS = 150
FAULT_SHARE = 0.12


class Stop(Exception):
    """What a user's code raises in the midst of things."""


@dataclass
class Tally:
    """What happened, for the report at the end."""

    episodes: int = 0
    steps: int = 0
    attempted: int = 0
    accepted: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    resumes: int = 0
    violations: list[str] = field(default_factory=list)
    objects: list[int] = field(default_factory=list)  # alive after every episode
    resident: list[int] = field(default_factory=list)  # bytes, after every episode

    def report(self) -> str:
        """One line for each thing counted."""
        faults = sum(self.faults.values())
        lines = [
            f"episodes        {self.episodes}",
            f"steps           {self.steps}",
            f"extrapolations  {self.attempted}, accepted {self.accepted}",
            f"rejects         {sum(self.rejected.values())} ({_listed(self.rejected)})",
            f"faults          {faults} ({_listed(self.faults)})",
            f"resumes         {self.resumes}",
            f"objects         {_growth(self.objects)}",
            f"resident MiB    {_growth([size // MIB for size in self.resident])}",
            f"violations      {len(self.violations)}",
        ]
        return "\n".join([*lines, *self.violations[:20]])

    def check_memory(self) -> None:
        """Flat after warm-up, the first third of the episodes."""
        for name, sizes, slack in (
            ("objects", self.objects, OBJECTS_SLACK),
            ("resident memory", self.resident, RESIDENT_SLACK),
        ):
            third = len(sizes) // 3
            if third >= 3 and min(sizes[-third:]) > max(sizes[third : 2 * third]) + slack:
                self.violations.append(f"{name}: grows, {_growth(sizes)}")


class Episode:
    """One network, trained with one faulty run of luck."""

    def __init__(self, seed: int, tally: Tally) -> None:
        self.seed, self.tally = seed, tally
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        width = self.random.choice([2, 5, 16])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers = nn.Linear(4, width), nn.Linear(width, width), nn.Linear(width, 1)
        self.network = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])
        self.network.to(self.random.choice([torch.float32, torch.float64]))
        self.loss_kind = "mean square"
        self.position = 0
        self.real_steps = 0
        self.optimizer = self._new_optimizer()
        self.options = self._new_options()
        self.engine = AndersonAccelerator(self.optimizer, **self.options)
        self.checkpoint = self._save()
        self.batch = self._draw()

    def run(self) -> None:
        """All steps of the episode, and the faults between them."""
        for _ in range(EPISODE_STEPS):
            self.position += 1
            self.tally.steps += 1
            fault = None
            if self.random.random() < FAULT_SHARE:
                fault = self.random.choice(sorted(FAULTS))
                self.tally.faults[fault] += 1
                FAULTS[fault](self)
            self._step()
            self.loss_kind = "mean square"
            if self.position % 25 == 0 and self._finite():
                self.checkpoint = self._save()
            if not self._finite():
                self._resume(self.checkpoint)  # what a user does when the loss is NaN
        self.engine.detach()

    # Faults

    def nan_loss(self) -> None:
        self.loss_kind = "nan"

    def loss_spike(self) -> None:
        self.loss_kind = "spike"

    def judge_raises(self) -> None:
        self.loss_kind = "raises"

    def judge_says_nan(self) -> None:
        self.loss_kind = "nan judge"

    def learning_rate_jumps(self) -> None:
        factor = self.random.choice([0.0, 0.01, 10.0, 100.0])
        for group in self.optimizer.param_groups:
            group["lr"] = min(group["lr"] * factor, 1.0) or 1e-3 * self.random.randint(0, 3)

    @torch.no_grad()
    def weights_edited(self) -> None:
        for one in self.network.parameters():
            one.mul_(0.9)

    @torch.no_grad()
    def weights_spoiled(self) -> None:
        next(self.network.parameters()).view(-1)[0] = self.random.choice([math.nan, math.inf])

    def frozen_or_unfrozen(self) -> None:
        one = self.random.choice(list(self.network.parameters())[1:])
        one.requires_grad_(not one.requires_grad)
        one.grad = None

    def optimizer_replaced(self) -> None:
        state = self.engine.state_dict()
        self.engine.detach()
        self.optimizer = self._new_optimizer()
        self.engine = AndersonAccelerator(self.optimizer, **self.options)
        self.engine.load_state_dict(state)

    def options_changed(self) -> None:
        state = self.engine.state_dict()
        self.engine.detach()
        self.options = self._new_options()
        self.engine = AndersonAccelerator(self.optimizer, **self.options)
        self.engine.load_state_dict(state)

    def validation_fails(self) -> None:
        own = self._weights()
        try:
            with self.engine.evaluation_weights():
                self._expect(self._finite() or not _finite(own), "validation sees finite weights")
                self.engine.state_dict()  # a checkpoint in the midst of validation
                raise Stop
        except Stop:
            self._expect(_equal(self._weights(), own), "a failed validation leaves the weights")

    def saved_and_resumed(self) -> None:
        file = self._save()
        before = self.engine.state_dict()
        self._resume(file)
        self._expect(_equal_states(self.engine.state_dict(), before), "a state survives its file")

    def resumed_from_earlier(self) -> None:
        self._resume(self.checkpoint)

    def no_gradient(self) -> None:
        self.loss_kind = "none"

    # Steps

    def _step(self) -> None:
        self.batch = self._draw()
        self.optimizer.zero_grad()
        if self.loss_kind != "none":
            loss = self._loss()
            if loss.requires_grad:
                loss.backward()
        moved = any(one.grad is not None for one in self.network.parameters())
        self.optimizer.step()
        self.real_steps += moved
        own = self.judged = self._weights()
        counts = (self.engine.attempted, self.engine.accepted)
        try:
            report = self.engine.step(self._judge)
        except Stop:
            # those that it was shown first: smoothing may have written its average by then
            left = _equal(self._weights(), self.judged)
            self._expect(left, "a judge that raises leaves the weights")
            self.tally.attempted += self.engine.attempted - counts[0]
            return
        self.check(report, own, moved=moved, counts=counts)

    def check(
        self, report: StepReport, own: Tensor, *, moved: bool, counts: tuple[int, int]
    ) -> None:
        """The invariants: whose the weights are, why, and that the books balance."""
        engine, weights = self.engine, self._weights()
        smoothing: Smoothing | None = self.options["smoothing"]
        averaged = (
            report.stored
            and bool(report.smoothing_on)
            and smoothing is not None
            and smoothing.apply_to == "weights"
        )
        trains_on = report.replaced
        self._expect(
            not (report.replaced and self.options["apply_to"] == "evaluation"),
            "candidates for evaluation leave training alone",
        )
        if not (averaged or trains_on):
            self._expect(_equal(weights, own), f"{report.status.value} leaves the weights alone")
        if _finite(own):
            self._expect(_finite(weights), f"{report.status.value} leaves finite weights")
        if report.accepted and self.options["safeguard"] == "loss":
            before, after = report.loss_before, report.loss_after
            self._expect(before is not None and after is not None, "a judged candidate has losses")
            self._expect(after < before, "an accepted candidate lowers the loss")  # type: ignore[operator]
            if trains_on:
                asked = (self.options["sufficient_decrease"] or 0.0) * report.noisiness  # type: ignore[operator]
                enough = before - asked * abs(before)  # type: ignore[operator,arg-type]
                self._expect(after < enough, "what replaces the weights lowers it enough")  # type: ignore[operator]
            if trains_on:
                self._expect(self._judge().item() == after, "its loss is the one reported")
        self._expect(moved or report.status is Status.NO_OPTIMIZER_STEP, "no gradient, no step")
        attempted, accepted = engine.attempted - counts[0], engine.accepted - counts[1]
        self._expect((attempted, accepted) == (report.attempted, report.accepted), "counts agree")
        decided = sum(
            count
            for status, count in engine.outcomes.items()
            if status.rejected or status is Status.ACCEPTED
        )
        self._expect(decided == engine.attempted, "every attempt has one outcome")
        self._expect(engine.outcomes[Status.ACCEPTED] == engine.accepted, "accepted outcomes agree")
        self._expect(
            engine.optimizer_steps == self.real_steps, "real steps are counted, and no others"
        )
        self.tally.attempted += attempted
        self.tally.accepted += accepted
        if report.status.rejected:
            self.tally.rejected[report.status.value] += 1

    def _loss(self) -> Tensor:
        x, y = self.batch
        loss = (self.network(x) - y).square().mean()
        return loss * {"nan": math.nan, "spike": 1e6}.get(self.loss_kind, 1.0)

    def _judge(self) -> Tensor:
        if self.loss_kind == "raises":
            self.judged = self._weights()
            raise Stop
        return self._loss() * (math.nan if self.loss_kind == "nan judge" else 1.0)

    def _draw(self) -> tuple[Tensor, Tensor]:
        dtype = next(self.network.parameters()).dtype
        x = torch.randn(8, 4, generator=self.generator, dtype=torch.float64)
        noise = 0.1 * torch.randn(8, 1, generator=self.generator, dtype=torch.float64)
        return x.to(dtype), (x.sum(dim=1, keepdim=True).sin() + noise).to(dtype)

    def _new_optimizer(self) -> torch.optim.Optimizer:
        parameters = self.network.parameters()
        match self.random.randrange(4):
            case 0:
                return torch.optim.SGD(parameters, lr=0.02)
            case 1:
                return torch.optim.SGD(parameters, lr=0.02, momentum=0.9)
            case 2:
                return torch.optim.Adam(parameters, lr=0.01)
            case _:
                return torch.optim.AdamW(parameters, lr=0.01, amsgrad=True)

    def _new_options(self) -> dict[str, Any]:
        choose = self.random.choice
        cycle, safeguard = choose([1, 2, 3]), choose(["loss", "loss", "none"])
        smoothing = None
        if choose([True, False]):
            smoothing = Smoothing(
                rsd_threshold=choose([0.0, 0.01, 0.1]),
                of=choose(["iterates", "updates"]),
                apply_to=choose(["history", "weights"]),
            )
        follows = smoothing is not None and smoothing.apply_to == "weights"
        grids = [None, 1e-8, 0.1] + ([[1e-6, 1e-2, 1.0]] if safeguard == "loss" else [])
        return {
            "history_depth": choose([2, 5, 10]),
            "store_every_n_steps": cycle,
            "accelerate_every_n_steps": cycle * choose([1, 2, 4]),
            "warmup_steps": choose([0, 20]),
            "relaxation": choose([1.0, 0.5]),
            "regularization": choose(grids),
            "max_extrapolation": choose([1.0, 1000.0]),
            "safeguard": safeguard,
            "sufficient_decrease": choose([None, 0.0, 0.1]),
            "optimizer_state": choose(["keep", "mix", "reset"]),
            "smoothing": smoothing,
            "apply_to": choose(["training", "both"] + ([] if follows else ["evaluation"])),
            "history_device": choose([None, "cpu"]),
        }

    def _save(self) -> bytes:
        file = io.BytesIO()
        torch.save(
            {
                "network": self.network.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "kind": type(self.optimizer).__name__,
                "engine": self.engine.state_dict(),
                "real_steps": self.real_steps,
            },
            file,
        )
        return file.getvalue()

    def _resume(self, checkpoint: bytes) -> None:
        self.tally.resumes += 1
        state = torch.load(io.BytesIO(checkpoint), weights_only=True)
        self.engine.detach()
        self.network.load_state_dict(state["network"])
        if type(self.optimizer).__name__ == state["kind"]:
            self.optimizer.load_state_dict(state["optimizer"])
        else:
            self.optimizer = self._new_optimizer()
        self.engine = AndersonAccelerator(self.optimizer, **self.options)
        self.engine.load_state_dict(state["engine"])
        self.real_steps = state["real_steps"]

    def _weights(self) -> Tensor:
        return torch.cat([one.detach().flatten() for one in self.network.parameters()])

    def _finite(self) -> bool:
        return _finite(self._weights())

    def _expect(self, true: bool, invariant: str) -> None:
        if not true:
            self.tally.violations.append(
                f"seed {self.seed}, step {self.position}: not so: {invariant} ({self.options})"
            )


FAULTS: dict[str, Callable[[Episode], None]] = {
    one.__name__.replace("_", " "): one
    for one in (
        Episode.nan_loss,
        Episode.loss_spike,
        Episode.judge_raises,
        Episode.judge_says_nan,
        Episode.learning_rate_jumps,
        Episode.weights_edited,
        Episode.weights_spoiled,
        Episode.frozen_or_unfrozen,
        Episode.optimizer_replaced,
        Episode.options_changed,
        Episode.validation_fails,
        Episode.saved_and_resumed,
        Episode.resumed_from_earlier,
        Episode.no_gradient,
    )
}


def soak(*, seconds: float, seed: int) -> Tally:
    """Runs episodes until the time is over."""
    tally = Tally()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        Episode(seed + tally.episodes, tally).run()
        tally.episodes += 1
        gc.collect()
        tally.objects.append(len(gc.get_objects()))
        tally.resident.append(_resident())
    tally.check_memory()
    return tally


def _resident() -> int:  # bytes
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _growth(sizes: list[int]) -> str:
    third = len(sizes) // 3
    if not third:
        return "unknown"
    return f"{sizes[third]} after warm-up, {sizes[-1]} at the end"


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


def _finite(vector: Tensor) -> bool:
    return bool(vector.isfinite().all())


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _equal_states(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and _equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal_states(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal_states, one, other))
    return one == other


def main() -> int:
    """Runs, prints what happened, and returns 1 where an invariant did not hold."""
    parser = argparse.ArgumentParser(description=__doc__, prog="soak")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first episode")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning_stableaa").setLevel(logging.ERROR)  # dropped histories are meant
    tally = soak(seconds=60 * arguments.minutes, seed=arguments.seed)
    print(f"seed            {arguments.seed}, {arguments.minutes:g} minutes")
    print(tally.report())
    return 1 if tally.violations else 0


if __name__ == "__main__":
    sys.exit(main())
