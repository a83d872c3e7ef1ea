"""Does acceleration stack on other optimizers? Optimizers x PINNs, each with and without it.

    pip install pytorch-optimizer schedulefree scipy
    python -m benchmarks.optimizer_matrix FOLDER --jobs 2

Every optimizer is tuned on seed 100: the learning rate, with a cosine schedule to zero, whose plain
run ends with the lowest training loss. With that rate the other seeds are run plain and with
``AndersonAccelerator(optimizer)``; L-BFGS, Adam followed by L-BFGS and Schedule-Free plain alone.
All runs have the same budget of gradients, those of L-BFGS's line search included; a loss of the
safeguard counts one third.

The figure of a run is the relative error at its lowest training loss, looked at every 20 gradients:
what somebody can keep who does not know the solution. ``FOLDER/runs.jsonl`` has one line a run,
and a run that has its line is not made again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import bootstrap
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.pinns import PROBLEMS, Problem, network
from lightning_stableaa import AndersonAccelerator

BUDGET = 2000  # gradients
TUNING_SEED = 100

MakeOptimizer = Callable[[nn.Module, float], torch.optim.Optimizer]


def sgd(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9)


def adam(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr)


def adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr, weight_decay=1e-4)


def nadam(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.NAdam(model.parameters(), lr)


def lion(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    import pytorch_optimizer

    return pytorch_optimizer.Lion(model.parameters(), lr)


def muon(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The matrices between hidden layers; the rest is AdamW's."""
    import pytorch_optimizer

    hidden = [one for one in model.parameters() if one.ndim == 2 and min(one.shape) > 3]
    others = [one for one in model.parameters() if all(one is not other for other in hidden)]
    groups = [{"params": hidden, "use_muon": True}, {"params": others, "use_muon": False}]
    return pytorch_optimizer.Muon(groups, lr=lr, adamw_lr=lr)


def soap(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    import pytorch_optimizer

    return pytorch_optimizer.SOAP(model.parameters(), lr, weight_decay=0.0)


def schedule_free(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    import schedulefree

    return schedulefree.AdamWScheduleFree(model.parameters(), lr, warmup_steps=100)


ACCELERATED: dict[str, tuple[MakeOptimizer, Sequence[float]]] = {
    "SGD": (sgd, (1e-4, 1e-3, 1e-2)),
    "Adam": (adam, (1e-3, 3e-3, 1e-2)),
    "AdamW": (adamw, (1e-3, 3e-3, 1e-2)),
    "NAdam": (nadam, (1e-3, 3e-3, 1e-2)),
    "Lion": (lion, (1e-4, 3e-4, 1e-3)),
    "Muon": (muon, (1e-3, 3e-3, 1e-2)),
    "SOAP": (soap, (1e-3, 3e-3, 1e-2)),
}
OTHERS: dict[str, Sequence[float]] = {
    "Schedule-Free": (1e-3, 3e-3, 1e-2),
    "L-BFGS": (1.0,),
    "Adam, then L-BFGS": (1e-3, 3e-3, 1e-2),
}
OPTIMIZERS = [*ACCELERATED, *OTHERS]


class Progress:
    """The error at the lowest loss, and what was spent."""

    def __init__(self, problem: Problem, model: nn.Module) -> None:
        self.problem, self.model = problem, model
        self.gradients, self.evaluations = 0, 0
        self.loss, self.error = math.inf, math.nan
        self._due = 0.0

    @property
    def cost(self) -> float:
        return self.gradients + self.evaluations / 3

    def see(self, loss: float) -> None:
        """The loss at the weights of now."""
        if self.cost >= self._due and loss < self.loss:
            self.loss, self.error = loss, self.problem.error(self.model)
            self._due = self.cost + 20


def first_order(
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    budget: float,
    *,
    cosine: bool,
    anderson: bool,
) -> AndersonAccelerator | None:
    """Steps until the budget is spent."""
    problem, model = progress.problem, progress.model
    schedule = CosineAnnealingLR(optimizer, int(budget)) if cosine else None
    accelerator = AndersonAccelerator(optimizer) if anderson else None
    averaged: Any = optimizer if hasattr(optimizer, "eval") else None  # Schedule-Free

    def loss_of_all() -> Tensor:
        return problem.loss(model)

    for step in itertools.count():
        if progress.cost >= budget:
            break
        if averaged is not None and step % 20 == 0:
            averaged.eval()
            progress.see(float(loss_of_all().detach()))
            averaged.train()
        optimizer.zero_grad()
        loss = loss_of_all()
        loss.backward()
        progress.gradients += 1
        if averaged is None:
            progress.see(float(loss.detach()))
        optimizer.step()
        if schedule is not None:
            schedule.step()
        if accelerator is not None:
            report = accelerator.step(loss_of_all, stochastic=False)
            progress.evaluations += report.loss_evaluations
    return accelerator


def lbfgs(progress: Progress, budget: float) -> None:
    """Of torch, with a line search that satisfies the strong Wolfe conditions."""
    optimizer = torch.optim.LBFGS(
        progress.model.parameters(), max_iter=20, history_size=50, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = progress.problem.loss(progress.model)
        loss.backward()
        progress.gradients += 1
        return loss

    while progress.cost < budget:
        before = progress.gradients
        optimizer.step(closure)
        progress.see(float(progress.problem.loss(progress.model).detach()))
        if progress.gradients - before <= 1:  # converged, or the line search failed
            break


def run(problem: str, optimizer: str, lr: float, anderson: bool, seed: int) -> dict[str, Any]:
    """One run."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    task = PROBLEMS[problem](seed)
    model = network(task.outputs)
    progress, accelerator, started = Progress(task, model), None, time.process_time()
    if optimizer in ACCELERATED:
        made = ACCELERATED[optimizer][0](model, lr)
        accelerator = first_order(made, progress, BUDGET, cosine=True, anderson=anderson)
    elif optimizer == "Schedule-Free":
        made = schedule_free(model, lr)
        first_order(made, progress, BUDGET, cosine=False, anderson=False)
    else:
        if optimizer == "Adam, then L-BFGS":
            first_order(adam(model, lr), progress, BUDGET / 2, cosine=True, anderson=False)
        lbfgs(progress, BUDGET)
    return {
        "problem": problem,
        "optimizer": optimizer,
        "lr": lr,
        "anderson": anderson,
        "seed": seed,
        "error": progress.error,
        "loss": progress.loss,
        "cost": progress.cost,
        "accepted": None if accelerator is None else [accelerator.accepted, accelerator.attempted],
        "seconds": round(time.process_time() - started, 1),
    }


def key(one: dict[str, Any]) -> tuple[Any, ...]:
    """What a run is known by."""
    return tuple(one[k] for k in ("problem", "optimizer", "lr", "anderson", "seed"))


def tuning(problems: Sequence[str], optimizers: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Plain runs of every setting."""
    for problem, optimizer in itertools.product(problems, optimizers):
        rates = ACCELERATED[optimizer][1] if optimizer in ACCELERATED else OTHERS[optimizer]
        for lr in rates:
            yield problem, optimizer, lr, False, TUNING_SEED


def tuned(runs: Sequence[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """The rate of lowest training loss, for each problem and optimizer."""
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for one in runs:
        if one["seed"] != TUNING_SEED:
            continue
        name = one["problem"], one["optimizer"]
        if name not in best or one["loss"] < best[name]["loss"]:
            best[name] = one
    return {name: one["lr"] for name, one in best.items()}


def ratios(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """By optimizer and problem: logarithms of the accelerated over the plain error of a seed."""
    errors = {
        key(one)[:2] + key(one)[3:]: one["error"] for one in runs if one["seed"] != TUNING_SEED
    }
    found: dict[str, dict[str, list[float]]] = {}
    for (problem, optimizer, anderson, seed), error in errors.items():
        plain = errors.get((problem, optimizer, False, seed))
        if anderson and plain is not None and math.isfinite(error) and math.isfinite(plain):
            logs = found.setdefault(optimizer, {}).setdefault(problem, [])
            logs.append(math.log(error / plain))
    return {one: found[one] for one in OPTIMIZERS if one in found}


def mean_ratio(problems: dict[str, list[float]]) -> tuple[float, float, float]:
    """Geometric mean over all runs, and its bootstrap interval of 95 %."""
    logs = [one for own in problems.values() for one in own]
    interval = bootstrap((logs,), np.mean, rng=0, method="percentile").confidence_interval
    mean, low, high = (math.exp(x) for x in (statistics.fmean(logs), *interval))
    return mean, low, high


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Errors in the geometric mean over seeds, plain and accelerated, and their ratio."""
    found: dict[tuple[str, str, bool], dict[int, float]] = {}
    for one in runs:
        if one["seed"] != TUNING_SEED and math.isfinite(one["error"]):
            name = one["problem"], one["optimizer"], one["anderson"]
            found.setdefault(name, {})[one["seed"]] = one["error"]
    problems = [p for p in PROBLEMS if any(name[0] == p for name in found)]
    lines = [f"| optimizer | {' | '.join(problems)} | ratio over all problems, 95 % |"]
    lines.append("|---" * (2 + len(problems)) + "|")
    accelerated = ratios(runs)
    for optimizer in OPTIMIZERS:
        cells = []
        for problem in problems:
            plain = found.get((problem, optimizer, False), {})
            ours = found.get((problem, optimizer, True), {})
            if not plain:
                cells.append("")
                continue
            text = f"{statistics.geometric_mean(plain.values()):.2g}"
            if ours:
                text += f" → {statistics.geometric_mean(ours.values()):.2g}"
            cells.append(text)
        ratio, own = "", accelerated.get(optimizer, {})
        if sum(map(len, own.values())) > 1:
            mean, low, high = mean_ratio(own)
            ratio = f"{mean:.2f} ({low:.2f} to {high:.2f})"
        if any(cells):
            lines.append(f"| {optimizer} | {' | '.join(cells)} | {ratio} |")
    ranks = _ranks(found, problems)
    lines += ["", "| rank | " + " | ".join(problems) + " | median |"]
    lines.append("|---" * (2 + len(problems)) + "|")
    for name, own in sorted(ranks.items(), key=lambda one: statistics.median(one[1].values())):
        cells = [str(own.get(problem, "")) for problem in problems]
        lines.append(f"| {name} | {' | '.join(cells)} | {statistics.median(own.values()):g} |")
    return "\n".join([*lines, ""])


def _ranks(
    found: dict[tuple[str, str, bool], dict[int, float]], problems: Sequence[str]
) -> dict[str, dict[str, int]]:
    """Rank of every method on every problem, by its geometric mean."""
    ranks: dict[str, dict[str, int]] = {}
    for problem in problems:
        means = {
            f"{optimizer}{' + Anderson' if anderson else ''}": statistics.geometric_mean(
                errors.values()
            )
            for (p, optimizer, anderson), errors in found.items()
            if p == problem
        }
        for rank, name in enumerate(sorted(means, key=lambda one: means[one]), start=1):
            ranks.setdefault(name, {})[problem] = rank
    return ranks


def main(words: Sequence[str] | None = None) -> None:
    """Tune, run what is missing, and write the table."""
    parser = argparse.ArgumentParser(description="acceleration of other optimizers, on PINNs")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args(words)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    path = arguments.folder / "runs.jsonl"
    runs = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def make(jobs: Sequence[tuple[Any, ...]]) -> None:
        done = {key(one) for one in runs}
        missing = [one for one in jobs if one not in done]
        with (
            ProcessPoolExecutor(arguments.jobs, mp_context=get_context("fork")) as pool,
            path.open("a") as file,
        ):
            for future in as_completed([pool.submit(run, *one) for one in missing]):
                runs.append(future.result())
                file.write(json.dumps(runs[-1]) + "\n")
                file.flush()

    make(list(tuning(arguments.problems, arguments.optimizers)))
    settings = tuned(runs)
    make(
        [
            (problem, optimizer, settings[problem, optimizer], anderson, seed)
            for seed in range(arguments.seeds)
            for problem, optimizer in itertools.product(arguments.problems, arguments.optimizers)
            for anderson in ([False, True] if optimizer in ACCELERATED else [False])
        ]
    )
    text = table(runs)
    (arguments.folder / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
