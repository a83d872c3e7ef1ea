"""When should the moving average be on? Criteria of the switch, beside always and never.

    pip install scikit-learn
    python -m benchmarks.criterion FOLDER --jobs 2

Textbook Anderson acceleration without and with the safeguard, and the defaults of this package,
each with the average off, always on, and switched by a relative standard deviation (RSD): of the
updates at several thresholds, of the iterates by the norm and by the largest component.
``FOLDER/table.md`` has for each problem the best validation so far at equal cost, the worst
validation of the second half (both over the same of the plain run), and the share of steps with
the average on; medians over the seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks.ablation import TEXTBOOK, Variants, best_within, run

CRITERIA: dict[str, dict[str, Any] | None] = {
    "off": None,
    "always": {"rsd_threshold": 0.0},
    "updates .02": {"rsd_threshold": 0.02},
    "updates .1": {"rsd_threshold": 0.1},
    "updates .3": {"rsd_threshold": 0.3},
    "updates 1": {"rsd_threshold": 1.0},
    "updates 3.2": {"rsd_threshold": math.sqrt(10)},  # the cycle makes no net progress
    "iterates .1": {"of": "iterates"},
    "iterates max .1": {"of": "iterates", "rsd": "max"},
}
METHODS: dict[str, dict[str, Any]] = {
    "textbook": TEXTBOOK,
    "textbook, safeguard": TEXTBOOK | {"safeguard": "loss"},
    "default": {},
}
VARIANTS: Variants = {"plain": (None, [])} | {
    f"{method} | {name}": (
        options | ({} if criterion is None else {"smoothing_monitor": criterion}),
        [],
    )
    for method, options in METHODS.items()
    for name, criterion in CRITERIA.items()
}
PROBLEMS = [
    *(f"admissions_mlp@b{size}" for size in (10, 40, 100, 400)),
    "DigitsAdam",
    "FriedmanSGD",
    "FriedmanAdam",
    "CancerSGD",
    "CancerWhole",
    "WineAdam",
    "WavesSGD",
    "DigitsConvolution",
    "burgers2d",
]


def figures(found: dict[str, Any], plain: dict[str, Any]) -> tuple[float, float, float]:
    """Best at equal cost and worst of the second half, over plain's; share with the average."""
    budget = plain["cost"][-1]
    half = len(found["value"]) // 2
    late = [one if math.isfinite(one) else math.inf for one in found["value"][half:]]
    return (
        best_within(found, budget) / best_within(plain, budget),
        max(late) / max(plain["value"][half:]),
        found["average on"],
    )


def table(runs: Sequence[dict[str, Any]]) -> str:
    """One block a method: a row a criterion, a column a problem."""
    found = {(one["problem"], one["variant"], one["seed"]): one for one in runs}
    problems = [one for one in PROBLEMS if any(key[0] == one for key in found)]
    seeds = sorted({key[2] for key in found})
    lines = []
    for method in METHODS:
        heads = [*problems, "geometric mean", "worst late"]
        lines += [f"**{method}**", "", f"| average | {' | '.join(heads)} |"]
        lines.append("|---" * (1 + len(heads)) + "|")
        for name in CRITERIA:
            cells, logs, worst = [], [], 0.0
            for problem in problems:
                rows = [
                    figures(found[problem, f"{method} | {name}", s], found[problem, "plain", s])
                    for s in seeds
                    if (problem, f"{method} | {name}", s) in found
                    and (problem, "plain", s) in found
                ]
                if not rows:
                    cells.append("")
                    continue
                best, late, on = (statistics.median(column) for column in zip(*rows, strict=True))
                cells.append(f"{best:.2f} ({late:.3g}; {on:.0%})")
                logs.append(math.log(min(best, 1e6)))
                worst = max([worst, *(row[1] for row in rows)])
            if logs:
                cells += [f"{math.exp(statistics.fmean(logs)):.3f}", f"{worst:.3g}"]
                lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    """Make the runs that are missing, and write the table."""
    parser = argparse.ArgumentParser(description="criteria for the moving average")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--problems", nargs="+", default=PROBLEMS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    arguments = parser.parse_args(words)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    path = arguments.folder / "runs.jsonl"
    runs = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(one["problem"], one["variant"], one["seed"]) for one in runs}
    seeds = [int(one) for one in arguments.seeds.split(",")]
    jobs = [
        (problem, variant, seed)
        for seed, problem, variant in itertools.product(seeds, arguments.problems, VARIANTS)
        if (problem, variant, seed) not in done
        and variant.split(" | ")[0] in ("plain", *arguments.methods)
    ]
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool, path.open("a") as file:
        for future in as_completed([pool.submit(run, *job, VARIANTS) for job in jobs]):
            runs.append(future.result())
            file.write(json.dumps(runs[-1]) + "\n")
            file.flush()
    (arguments.folder / "table.md").write_text(table(runs))
    print(table(runs))


if __name__ == "__main__":
    main()
