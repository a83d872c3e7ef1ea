"""Rows of docs/paper.md from the results of ``stableaa-compare ... compare=paper``.

python -m benchmarks.paper_tables benchmarks/results/paper/*/results.json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def number(value: float | None) -> str:
    """Two digits, or what it stands for where it is not finite."""
    if value is None or not math.isfinite(value):
        return "not finite"
    return f"{value:.2g}" if abs(value) < 1000 else f"{value:.1e}"


def row(name: str, variant: dict[str, Any], runs: Sequence[dict[str, Any]]) -> str:
    """One variant: medians over its seeds."""
    final, best = (variant[key]["median"] for key in ("final", "best"))
    worst = variant["worst_after_best"]["median"]
    on = [run["smoothing_on"] for run in runs if run["smoothing_on"] is not None]
    share = f"{statistics.median(on):.0%}" if on else ""
    accepted = f"{variant['accepted']} of {variant['attempted']}" if variant["attempted"] else ""
    cells = [f"`{name}`", number(final), number(best), number(worst), variant["diverged"]]
    return f"| {' | '.join(map(str, [*cells, share, accepted]))} |"


def table(report: dict[str, Any]) -> str:
    """One problem."""
    seeds = report["seeds"]
    lines = [
        f"| {report['title']}, {len(seeds)} seeds | final | best at equal cost "
        "| worst after its best | diverged | average on | accepted |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, variant in report["variants"].items():
        runs = [run for run in report["runs"] if run["variant"] == name]
        lines.append(row(name, variant, runs))
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="tables of docs/paper.md")
    parser.add_argument("results", nargs="+", type=Path)
    for path in parser.parse_args(words).results:
        print(table(json.loads(path.read_text())), end="\n\n")


if __name__ == "__main__":
    main()
