"""Writes ``results.json``, ``results.csv`` and ``table.md``."""

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from lightning_stableaa.recipes.comparison.provenance import hardware, versions
from lightning_stableaa.recipes.comparison.runner import Run
from lightning_stableaa.recipes.comparison.statistics import ENOUGH_SEEDS, Effect, Summary
from lightning_stableaa.recipes.comparison.variants import BASELINE, Plan
from lightning_stableaa.recipes.files import write_atomically

DEFINITIONS = """\
- Cost: gradients of a batch (backward passes, including those of L-BFGS's line search), and every
  further evaluation of the loss, such as the safeguard's, at one third.
- Tuned baseline: the variant of plain (learning rates, schedules) with the best median at the end.
- Time to target: cost at which a run first is as good as the tuned baseline of its seed at its end,
  over the cost at which the tuned baseline first was. A run that never is counts as one that needs
  twice its whole cost, or twice the tuned baseline's where that is more.
- Best: the best validation up to the cost of the whole plain run of the same seed, as a checkpoint
  of the best keeps it; interpolated to that cost. Values of zero or less have no ratio.
- Ratios: geometric mean over seeds [95 % percentile bootstrap interval]; seeds better; p of a
  two-sided sign test. Differences within 0.2 % are ties.
- Outcome: *helped* where the interval of one figure is on the better side of 1 and none on the
  worse, *worse* the reverse, *mixed* both, *undecided* none. *Unchanged*: no candidate was
  accepted, and every run equals plain's. *Untried*: no extrapolation was due.
- Medians over seeds; in brackets, quartiles and the worst seed. At equal cost: at that of the whole
  plain run. Worst after best: the worst validation from the best one of the run on. Diverged: seeds
  in whose second half a validation was not finite, or more than 10 times the first validation of
  plain (less than half of it, where more is better). Rank: by the value at equal cost, 1 is best.
  Time: of training, without validations, over that of plain; processor time likewise, without the
  time that other programs had the processor. Memory: the peak, of the device on CUDA, else of the
  process. Accepted: extrapolations over all seeds. Average on: share of the windows in which the
  RSD had switched the moving average on.
- Cost to plain's own end: as time to target, for the last validation of plain. To stay there: cost
  from which on all validations are at least as good, over that of the whole plain run. Inf: never.
"""


def write_report(plan: Plan, runs: Sequence[Run], summary: Summary, notes: Sequence[str]) -> None:
    """Leaves the three files in the folder of ``plan``, each of them whole or as it was.

    Args:
        plan: what was compared.
        runs: finished and failed ones.
        summary: of the runs.
        notes: sentences that stand above the verdict.
    """
    own = ("callbacks", "logger", "run_folder", "seed")  # of a variant, or of a single run
    settings = next(job.settings for job in plan.jobs if job.variant == BASELINE)
    contents = {
        "title": plan.title,
        "metric": plan.metric,
        "mode": plan.mode,
        "comparison": plan.comparison,
        "seeds": sorted({run.seed for run in runs}),
        "notes": list(notes),
        "verdict": verdict(summary),
        "tuned_baseline": summary.tuned_baseline,
        "variants": summary.variants,
        "hardware": hardware(),
        "versions": versions(),
        "workers": plan.workers,
        "command_line": plan.command_line,
        "config": {name: value for name, value in settings.items() if name not in own},
        "callbacks": {run.variant: run.labels["callbacks"] for run in runs},
        "runs": [
            {key: value for key, value in vars(run).items() if key != "labels"}
            | {"fingerprint": run.labels["fingerprint"]}
            for run in runs
        ],
    }
    write_atomically(plan.folder / "results.json", to_json(contents))
    write_atomically(plan.folder / "results.csv", summary.runs.to_csv())
    write_atomically(plan.folder / "table.md", _table(plan, summary, notes, contents["seeds"]))


def verdict(summary: Summary) -> list[dict[str, str]]:
    """One row for each variant but plain: the primary figures, and the outcome in a word."""
    return [
        {
            "variant": name,
            **{title: _effect(one["effects"][key]) for key, title in summary.figures.items()},
            "outcome": one["outcome"],
        }
        for name, one in summary.variants.items()
        if name != BASELINE
    ]


def notes_on(plan: Plan, runs: Sequence[Run], missing: int, summary: Summary) -> Iterator[str]:
    """Sentences that stand above the verdict, the caveat of few seeds first."""
    fewest = min((one["seeds"] for one in summary.variants.values() if one["seeds"]), default=0)
    if fewest < ENOUGH_SEEDS:
        yield (
            f"Fewer than {ENOUGH_SEEDS} seeds prove little, and a variant here has {fewest}: add "
            "seeds before you rely on an outcome (compare.seeds=10)."
        )
    if missing:
        yield (
            f"Only {len(plan.jobs) - missing} of {len(plan.jobs)} runs were made; the same command "
            "makes the others."
        )
    for name, one in summary.variants.items():
        for reason, count in sorted(Counter(one["disabled"].values()).items()):
            yield (
                f"{name}: acceleration was switched off in {count} of {one['seeds']} seeds: "
                f"{reason}."
            )
        if one["too_late"]:
            yield (
                f"{name}: in {one['too_late']} of {one['seeds']} seeds the first validation costs "
                "more than the whole run of plain, so none is the best at equal cost; validate "
                "more often (trainer.val_check_interval)."
            )
    processors = sorted({run.processor for run in runs if run.processor is not None})
    if len(processors) > 1:
        yield (
            f"Runs were made on {' and on '.join(processors)}: times do not compare, and the same "
            "seed may end elsewhere."
        )


def to_json(contents: Any) -> str:
    """Indented JSON without absolute paths; what is not finite becomes null."""
    text = json.dumps(_plain(contents), indent=1, allow_nan=False)
    # lists of numbers stay on one line
    return re.sub(r"\[[^\[\]{}\"]*\]", lambda numbers: " ".join(numbers[0].split()), text)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, str):  # absolute paths reduced to their last part: results are shared
        return re.sub(r"(^|=)/(?:[^/\s]+/)*|(?<=[\s'\"(])/(?:[^/\s]+/)+", r"\1", value)
    return value


def _table(plan: Plan, summary: Summary, notes: Sequence[str], seeds: Sequence[int]) -> str:
    less = "less" if plan.mode == "min" else "more"
    count = "1 seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
    medians, appendix, failures = [], [], []
    for name, one in summary.variants.items():
        medians.append(
            {
                "variant": name + (f" ({len(one['errors'])} failed)" if one["errors"] else ""),
                "final": _spread(one["final"]),
                "at equal cost": _spread(one["equal_cost"]),
                "best": _spread(one["best"]),
                "worst after best": _spread(one["worst_after_best"]),
                "diverged": f"{one['diverged']} of {one['seeds']}",
                "rank": _number(one["rank"]),
                "time": _number(one["time_ratio"]),
                "processor time": _number(one["processor_ratio"]),
                "memory, MiB": _number(one["peak_memory"] / 2**20, ".4g"),
                "accepted": f"{one['accepted']} of {one['attempted']}" if one["attempted"] else "",
                "average on": _number(one["smoothing_on"], ".0%"),
            }
        )
        cost, stay = (_spread(one[figure]) for figure in ("cost_to_end_of_plain", "cost_to_stay"))
        appendix.append({"variant": name, "cost to plain's own end": cost, "to stay there": stay})
        failures += [f"- {name}, seed {seed}: {error}" for seed, error in one["errors"].items()]
    parts = [
        f"# {plan.title}: {plan.metric} ({less} is better), {count}",
        *notes,
        _markdown(verdict(summary)),
        "## Medians",
        _markdown(medians),
        *(["Failed runs, left out above:", _plain("\n".join(failures))] if failures else []),
        "## Variants",
        "\n".join(f"- {name}: {one['about']}" for name, one in summary.variants.items()),
        "## Definitions",
        DEFINITIONS.rstrip(),
        "## Appendix: cost to plain's own end",
        _markdown(appendix),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown(rows: Sequence[dict[str, str]]) -> str:
    if not rows:
        return ""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _effect(one: Effect) -> str:
    if not one.seeds:
        return ""
    ratio = "none in time" if math.isinf(one.ratio) else f"{one.ratio:.3g}"
    interval = "" if not math.isfinite(one.upper) else f" [{one.lower:.3g}, {one.upper:.3g}]"
    never = f"; never in {one.never}" if one.never else ""
    return f"{ratio}{interval}; {one.better} of {one.seeds}; p = {one.p:.2g}{never}"


def _spread(one: dict[str, Any]) -> str:
    if not one["count"]:
        return ""
    return "{median:.3g} ({lower:.3g} to {upper:.3g}; worst {worst:.3g})".format(**one)


def _number(value: float, style: str = ".3g") -> str:
    return "" if math.isnan(value) else format(value, style)
