"""PINNs of PINA's problem zoo, with and without acceleration.

    pip install pina-mathlab
    python -m benchmarks.pina_zoo FILE --seeds 5

Every problem whose exact solution PINA knows, by PINA's own solver and Trainer: a tanh network with
three hidden layers of 32, 1,000 points inside and 100 on every other part of the domain, full batch
or mini-batches, Adam. The error is relative in L2, on 4,000 new points: at the end, and at the
checkpoint of lowest training loss, which is what a user can keep.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from lightning_stableaa import AndersonCallback, SmoothingMonitor

PROBLEMS = (
    "Poisson2DSquareProblem",
    "HelmholtzProblem",
    "AdvectionProblem",
    "DiffusionReactionProblem",
    "AcousticWaveProblem",
)
VARIANTS: dict[str, Any] = {
    "plain": list,
    "anderson": lambda: [AndersonCallback()],
    "anderson, smoothing": lambda: [SmoothingMonitor(), AndersonCallback()],
    "no lag compensation": lambda: [AndersonCallback(lag_compensation=0.0)],
    "no drift": lambda: [AndersonCallback(max_horizon=0.0)],
    "step at most 50": lambda: [AndersonCallback(max_extrapolation=50.0)],
    "ridge 3e-2": lambda: [AndersonCallback(regularization=3e-2)],
    "textbook": lambda: [
        AndersonCallback(
            lag_compensation=0.0, max_horizon=0.0, safeguard="none", regularization=1e-8
        )
    ],
}


SIZES = {"inside": 1000, "border": 100, "width": 32, "layers": 3}  # also options of the command


class BestLoss(Callback):
    """The error at the lowest training loss so far, looked at every 20 steps."""

    def __init__(self, error: Any) -> None:
        self.error, self.loss, self.value = error, math.inf, math.nan

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Before any other callback: the loss is that of these weights but one step."""
        loss = float(outputs["loss"].detach().as_subclass(torch.Tensor))
        if trainer.global_step % 20 == 10 and loss < self.loss:
            self.loss, self.value = loss, self.error()


def run(
    problem: str, variant: str, seed: int, steps: int, lr: float, batch: int | None
) -> dict[str, Any]:
    """One run."""
    import lightning
    import pina
    import pina.problem.zoo as zoo
    from pina.model import FeedForward
    from pina.optim import TorchOptimizer
    from pina.solver import PhysicsInformedSingleModelSolver

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    lightning.seed_everything(seed, verbose=False)
    task = getattr(zoo, problem)()
    domains = list(task.domains)
    inside = [one for one in domains if one == "D"] or domains[:1]
    border = [one for one in domains if one not in inside]
    task.discretise_domain(SIZES["inside"], "random", domains=inside)
    task.discretise_domain(SIZES["border"], "random", domains=border)
    model = FeedForward(
        len(task.input_variables),
        len(task.output_variables),
        layers=[SIZES["width"]] * SIZES["layers"],
        func=torch.nn.Tanh,
    )
    solver = PhysicsInformedSingleModelSolver(
        task, model, optimizer=TorchOptimizer(torch.optim.Adam, lr=lr)
    )
    domain = task.domains[inside[0]]
    points = domain.sample(4000, "random")
    exact = task.solution(points).as_subclass(torch.Tensor)

    def error() -> float:
        with torch.no_grad():
            found = solver.forward(points).as_subclass(torch.Tensor)
        return float((found - exact).norm() / exact.norm())

    best, added = BestLoss(error), VARIANTS[variant]()
    trainer = pina.Trainer(
        solver,
        max_steps=steps,
        max_epochs=-1,
        batch_size=batch,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[best, *added],
    )
    started = time.process_time()
    trainer.train()
    counters = added[-1].state_dict()["counters"] if added else {}
    return {
        "problem": problem,
        "variant": variant,
        "seed": seed,
        "seconds": round(time.process_time() - started, 1),
        "end": error(),
        "at best loss": best.value,
        "loss": best.loss,
        "accepted": counters.get("accepted"),
    }


def main(words: Sequence[str] | None = None) -> None:
    """Make the runs, and print the table."""
    parser = argparse.ArgumentParser(description="PINA's problem zoo")
    parser.add_argument("file", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--batch", type=int, help="points of a condition; all without")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    for name, size in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    arguments = parser.parse_args(words)
    SIZES.update({name: getattr(arguments, name) for name in SIZES})  # processes are forked
    settings = (arguments.steps, arguments.lr, arguments.batch)
    jobs = list(itertools.product(arguments.problems, arguments.variants, range(arguments.seeds)))
    runs: list[dict[str, Any]] = []
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool:
        for future in as_completed([pool.submit(run, *job, *settings) for job in jobs]):
            runs.append(future.result())
            arguments.file.write_text(json.dumps(runs, indent=1) + "\n")
    found = {(one["problem"], one["variant"], one["seed"]): one for one in runs}
    print(f"| variant | {' | '.join(arguments.problems)} | geometric mean |")
    for variant in arguments.variants:
        cells, logs = [], []
        for problem in arguments.problems:
            rows = [found[problem, variant, seed] for seed in range(arguments.seeds)]
            plain = [found[problem, "plain", seed] for seed in range(arguments.seeds)]
            ratios = [
                one["at best loss"] / other["at best loss"]
                for one, other in zip(rows, plain, strict=True)
            ]
            ends = [one["end"] / other["end"] for one, other in zip(rows, plain, strict=True)]
            middle = statistics.median(ratios)
            logs.append(math.log(middle))
            cells.append(f"{middle:.2f} ({max(ratios):.2f}; end {statistics.median(ends):.2f})")
        mean = math.exp(statistics.fmean(logs))
        print(f"| {variant} | {' | '.join(cells)} | {mean:.2f} |")


if __name__ == "__main__":
    main()
