"""Ablation of the method: the engine without each of its rules, and with it alone.

    pip install scikit-learn scipy
    python -m benchmarks.ablation FOLDER                     # all problems and variants
    python -m benchmarks.ablation FOLDER --problems admissions@10x --seeds 20,21 --jobs 2

Problems: those of ``benchmarks.unseen``, the equations of ``benchmarks.pinns``, and the recipes
that train in minutes on one core, some at several learning rates or with a cosine schedule. Seeds
start at 20: no seed below chose a rule.

``FOLDER/runs.jsonl`` has one line a run, and a run that has its line is not made again;
``FOLDER/table.md`` compares each variant with the plain run of the same seed by the best validation
so far at equal cost, by the training loss at the end, and by the worst seed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning
import numpy as np
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from scipy.stats import bootstrap
from torch.utils.data import DataLoader

from benchmarks.pinns import PROBLEMS as EQUATIONS
from benchmarks.pinns import network
from benchmarks.unseen import PROBLEMS as UNSEEN
from lightning_stableaa import AndersonCallback, SmoothingMonitor

Patches = Sequence[tuple[str, Any]]

_ACCEPTANCE = "lightning_stableaa.core.acceptance"
_NO_GATE: Patches = [(f"{_ACCEPTANCE}.NOISE_DOMINATED", math.inf)]
_FIXED_RADIUS: Patches = [(f"{_ACCEPTANCE}.TrustRegion.update", lambda *_, **__: None)]
TEXTBOOK = {
    "lag_compensation": 0.0,
    "max_horizon": 0.0,
    "safeguard": "none",
    "regularization": 1e-8,
}
_MONITOR = {"smoothing_monitor": {}}
# Recipes that would train for hours on one core, made smaller.
_REDUCED = [
    "data.interior_points=200",
    "data.data_points=50",
    "trainer.max_steps=600",
    "trainer.val_check_interval=50",
]
REDUCED = {"burgers100d": _REDUCED, "burgers100d_product": _REDUCED}

# Options of AndersonCallback (None: no callback), and what is patched.
VARIANTS: dict[str, tuple[dict[str, Any] | None, Patches]] = {
    "plain": (None, []),
    "default": ({}, []),
    "no lag compensation": ({"lag_compensation": 0.0}, []),
    "no drift": ({"max_horizon": 0.0}, []),
    "no noise gate": ({}, _NO_GATE),
    "fixed radius": ({}, _FIXED_RADIUS),
    "ridge 3e-2": ({"regularization": 3e-2}, []),
    "step at most 50": ({"max_extrapolation": 50.0}, []),
    "smoothing": (_MONITOR, []),
    "smoothing always": ({"smoothing_monitor": {"rsd_threshold": 0.0}}, []),
    "textbook": (TEXTBOOK, []),
    "textbook, safeguard": (TEXTBOOK | {"safeguard": "loss"}, _NO_GATE),
}


class Recorder(Callback):
    """Cost, decisive metric and mean training loss at every validation."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.gradients = 0
        self.losses: list[torch.Tensor] = []
        self.steps_with_average = 0
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One gradient."""
        self.gradients += 1
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        self.losses.append(loss.detach())
        for one in trainer.callbacks:
            if isinstance(one, AndersonCallback) and one.accelerator is not None:
                self.steps_with_average += bool(one.accelerator.smoothing_on)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """One row."""
        evaluations = sum(
            one.loss_evaluations for one in trainer.callbacks if isinstance(one, AndersonCallback)
        )
        recent = torch.stack(self.losses).double().mean().item() if self.losses else math.nan
        self.losses = []
        self.rows.append(
            {
                "cost": self.gradients + evaluations / 3,
                "value": float(trainer.callback_metrics[self.metric]),
                "loss": recent,
            }
        )


class LearningRate(Callback):
    """Another learning rate, or a cosine schedule to zero."""

    def __init__(self, multiple: float, cosine: bool) -> None:
        self.multiple = multiple
        self.cosine = cosine

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Before the first step."""
        steps = int(trainer.estimated_stepping_batches)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] *= self.multiple
        if self.cosine:
            self.schedules = [
                torch.optim.lr_scheduler.CosineAnnealingLR(one, steps) for one in trainer.optimizers
            ]

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After every step."""
        if self.cosine:
            for one in self.schedules:
                one.step()


class Equation(lightning.LightningModule):
    """A PINN on the same points at every step, validated by its error against the solution."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.problem = EQUATIONS[name](torch.initial_seed())
        self.network = network(self.problem.outputs)
        self.lr = 3e-3 if name == "Kovasznay" else 1e-2  # with a cosine schedule

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.problem.loss(self.network)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/error", self.problem.error(self.network), batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.lr)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(range(20), batch_size=None)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(range(1), batch_size=None)


def _problem(name: str, batch_size: int | None = None) -> tuple[Any, Any, str, dict[str, Any], Any]:
    """Module, data, metric, settings of the Trainer, and whether the loss is stochastic."""
    for one in UNSEEN:
        if one.module.__name__ == name:
            every = {"max_epochs": one.epochs, "check_val_every_n_epoch": one.validated_every}
            module = one.module()
            module.batch_size = batch_size or module.batch_size
            return module, None, "val/loss", every, "auto"
    if name in EQUATIONS:
        return Equation(name), None, "val/error", {"max_epochs": 100}, False
    with initialize_config_module("lightning_stableaa.conf", version_base="1.3"):
        overrides = [f"recipe={name}", "run_folder=.", "logger=none", *REDUCED.get(name, [])]
        if name == "admissions_mlp" and "STABLEAA_ADMISSIONS_CSV" in os.environ:
            overrides.append(f"data.csv={os.environ['STABLEAA_ADMISSIONS_CSV']}")
        if batch_size is not None:
            overrides.append(f"data.batch_size={batch_size}")
        config = compose("train", overrides)
    module: Any = instantiate(config.module, _convert_="all")
    data: Any = instantiate(config.data, _convert_="all")
    settings = {
        name: config.trainer[name]
        for name in ("max_epochs", "max_steps", "val_check_interval", "check_val_every_n_epoch")
    }
    return module, data, module.monitor, settings, config.stochastic


Variants = dict[str, tuple[dict[str, Any] | None, Patches]]


def run(problem: str, variant: str, seed: int, variants: Variants | None = None) -> dict[str, Any]:
    """One run: costs, values and training losses at its validations.

    Args:
        problem: a name, with modifiers: ``@10x`` the learning rate, ``@cosine`` a schedule to
            zero, ``@b100`` the batch size.
        variant: one of ``variants``, by default those of the ablation.
        seed: of weights and batches.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    name, *modifiers = problem.split("@")
    rates = [float(one[:-1]) for one in modifiers if one.endswith("x")]
    sizes = [int(one[1:]) for one in modifiers if one.startswith("b")]
    lightning.seed_everything(seed, verbose=False)
    module, data, metric, settings, stochastic = _problem(name, *sizes)
    if data is not None and hasattr(data, "seed"):
        data.seed = seed
    options, patches = (variants or VARIANTS)[variant]
    recorder = Recorder(metric)
    callbacks: list[Any] = [LearningRate(rates[0] if rates else 1.0, "cosine" in modifiers)]
    with contextlib.ExitStack() as stack:
        for target, replacement in patches:
            stack.enter_context(patch(target, replacement))
        if options is not None:
            smoothing = options.get("smoothing_monitor")
            own = {k: v for k, v in options.items() if k != "smoothing_monitor"}
            callbacks += [SmoothingMonitor(**smoothing)] if smoothing is not None else []
            callbacks.append(AndersonCallback(**({"stochastic": stochastic} | own)))
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            callbacks=[*callbacks, recorder],
            **settings,
        )
        started = time.process_time()
        trainer.fit(module, data)
    engines = [one for one in callbacks if isinstance(one, AndersonCallback)]
    counts = [str(one.state_dict()["counters"]["accepted"]) for one in engines]
    return {
        "problem": problem,
        "variant": variant,
        "seed": seed,
        "seconds": round(time.process_time() - started, 2),
        "accepted": counts[0] if counts else None,
        "average on": recorder.steps_with_average / max(1, recorder.gradients),
        **{key: [row[key] for row in recorder.rows] for key in ("cost", "value", "loss")},
    }


def best_within(run: dict[str, Any], budget: float) -> float:
    """Least value of a validation that cost at most ``budget``, linear in the last interval."""
    best, before = math.inf, None
    for cost, value in zip(run["cost"], run["value"], strict=True):
        if cost > budget + 1e-6:
            if before is not None and math.isfinite(value):
                share = (budget - before[0]) / (cost - before[0])
                best = min(best, before[1] + share * (value - before[1]))
            break
        if math.isfinite(value):
            best = min(best, value)
        before = cost, value
    return best


def value_at(run: dict[str, Any], budget: float) -> float:
    """The value of a validation at that cost, linear between two of them."""
    return float(np.interp(budget, run["cost"], run["value"]))


def table(runs: Sequence[dict[str, Any]], variants: Sequence[str]) -> str:
    """Ratios with plain of the same seed, in Markdown."""
    found = {(one["problem"], one["variant"], one["seed"]): one for one in runs}
    problems = list(dict.fromkeys(one["problem"] for one in runs))
    lines = [
        "| variant | best validation at equal cost | worst problem (median) | worst seed "
        "| training loss at the end | problems better / worse by 1 % | accepted |",
        "|---|---|---|---|---|---|---|",
    ]
    heads = ["|---" * (1 + len(variants)) + "|"]
    details = [
        *("", f"| best validation at equal cost | {' | '.join(variants)} |", *heads),
        *(_row(found, problem, variants, best_within) for problem in problems),
        *("", f"| validation at equal cost | {' | '.join(variants)} |", *heads),
        *(_row(found, problem, variants, value_at) for problem in problems),
    ]
    medians: dict[tuple[str, str], float] = {}
    for variant in variants:
        logs, losses, worst, accepted = [], [], (0.0, ""), 0
        for problem in problems:
            ratios = []
            for seed in sorted({s for p, v, s in found if (p, v) == (problem, variant)}):
                ours, plain = found[problem, variant, seed], found.get((problem, "plain", seed))
                if plain is None:
                    continue
                budget = plain["cost"][-1]
                ratio = best_within(ours, budget) / best_within(plain, budget)
                ratios.append(ratio)
                accepted += int(ours["accepted"] or 0)
                worst = max(worst, (ratio, f"{problem}, seed {seed}"))
                end = ours["loss"][-1] / plain["loss"][-1]
                losses.append(math.log(end) if end > 0 and math.isfinite(end) else math.log(1e6))
            if ratios:
                medians[problem, variant] = statistics.median(ratios)
                logs.append(math.log(min(1e6, medians[problem, variant])))
        if not logs:
            continue
        own = {p: medians[p, variant] for p in problems if (p, variant) in medians}
        hardest = max(own, key=lambda p: own[p])
        better, worse = sum(v < 0.99 for v in own.values()), sum(v > 1.01 for v in own.values())
        lines.append(
            f"| {variant} | {math.exp(statistics.fmean(logs)):.3f} "
            f"| {own[hardest]:.2f} ({hardest}) | {worst[0]:.2f} ({worst[1]}) "
            f"| {math.exp(statistics.fmean(losses)):.3f} | {better} / {worse} of {len(own)} "
            f"| {accepted} |"
        )
    return "\n".join([*lines, *details, ""])


def _row(
    found: dict[tuple[str, str, int], dict[str, Any]],
    problem: str,
    variants: Sequence[str],
    measure: Callable[[dict[str, Any], float], float],
) -> str:
    """Geometric means over plain's of the same seed; of five seeds and more with 95 % intervals."""
    cells = []
    for variant in variants:
        logs = []
        for seed in sorted({s for p, v, s in found if (p, v) == (problem, variant)}):
            plain = found.get((problem, "plain", seed))
            if plain is not None:
                budget = plain["cost"][-1]
                ours = measure(found[problem, variant, seed], budget)
                logs.append(math.log(ours / measure(plain, budget)))
        cells.append(f"{math.exp(statistics.fmean(logs)):.2f}" if logs else "")
        if len(logs) >= 5 and variant != "plain":
            interval = bootstrap((logs,), np.mean, method="percentile", rng=0).confidence_interval
            cells[-1] += f" ({math.exp(interval.low):.2f} to {math.exp(interval.high):.2f})"
    return f"| {problem} | {' | '.join(cells)} |"


SMALL = [one.module.__name__ for one in UNSEEN]
ADMISSIONS = ["admissions_mlp", "admissions_mlp@3x", "admissions_mlp@10x"]
PINNS = [f"{name}@cosine" for name in EQUATIONS]
BURGERS = ["burgers2d", "burgers2d@cosine", "burgers100d"]


def _jobs(arguments: argparse.Namespace, done: set[tuple[str, str, int]]) -> Iterator[Any]:
    seeds = [int(one) for one in arguments.seeds.split(",")]
    for job in itertools.product(seeds, arguments.problems, arguments.variants):
        one = (job[1], job[2], job[0])
        if one not in done:
            yield one


def main(words: Sequence[str] | None = None, *, report: Callable[[str], object] = print) -> None:
    """Make the runs that are missing, and write the table."""
    parser = argparse.ArgumentParser(description="the method without each of its rules")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--problems", nargs="+", default=[*SMALL, *ADMISSIONS, *PINNS, *BURGERS])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", default="20,21,22")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    arguments = parser.parse_args(words)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    path = arguments.folder / "runs.jsonl"
    runs = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(one["problem"], one["variant"], one["seed"]) for one in runs}
    context = multiprocessing.get_context("fork")
    with (
        ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool,
        path.open("a") as file,
    ):
        futures = [pool.submit(run, *job) for job in _jobs(arguments, done)]
        for future in as_completed(futures):
            runs.append(future.result())
            file.write(json.dumps(runs[-1]) + "\n")
            file.flush()
            print(*(runs[-1][key] for key in ("problem", "variant", "seed", "seconds")))
    text = table(runs, arguments.variants)
    (arguments.folder / "table.md").write_text(text)
    report(text)


if __name__ == "__main__":
    sys.exit(main())
