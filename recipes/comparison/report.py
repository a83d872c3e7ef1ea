"""Writes ``results.json``, ``results.csv`` and ``table.md``."""

import csv
import dataclasses
import io
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning_stableaa.recipes.comparison.environment import hardware, versions
from lightning_stableaa.recipes.comparison.runner import Run
from lightning_stableaa.recipes.comparison.summary import (
    DEFINITIONS,
    Spread,
    Summary,
    VariantSummary,
)
from lightning_stableaa.recipes.comparison.variants import Plan
from lightning_stableaa.recipes.files import write_atomically

RECORDER = "recorder"
MIB = 2**20


def write_report(
    folder: Path,
    plan: Plan,
    runs: Sequence[Run],
    summary: Summary,
    sentences: Sequence[str],
    *,
    overrides: Iterable[str],
    jobs: int,
    threads: int | None,
) -> None:
    """Leaves the three files in ``folder``, each of them whole or as it was."""
    contents = {
        "title": plan.title,
        "metric": plan.metric,
        "mode": plan.mode,
        "seeds": plan.seeds,
        "verdict": list(sentences),
        "definitions": list(DEFINITIONS),
        "tuned_baseline": summary.tuned_baseline,
        "variants": {
            name: {"about": plan.about[name], **_asdict(one)}
            for name, one in summary.variants.items()
        },
        "hardware": hardware(),
        "workers": {"side_by_side": jobs, "threads": threads},
        "versions": versions(),
        "command_line": [shorten_paths(override) for override in overrides],
        **_configuration(plan),
        "runs": [_run(run, summary) for run in runs],
    }
    write_atomically(folder / "results.json", to_json(contents))
    write_atomically(folder / "results.csv", _csv(runs, summary))
    write_atomically(folder / "table.md", table(plan, summary, sentences))


def table(plan: Plan, summary: Summary, sentences: Sequence[str]) -> str:
    """Verdict, table, legend and definitions in Markdown."""
    better = "less" if plan.mode == "min" else "more"
    tuned = summary.tuned_baseline != summary.baseline
    lines = [
        f"# {plan.title}: {plan.metric} ({better} is better), {_plural(len(plan.seeds), 'seed')}",
        "",
        *(f"- {sentence}" for sentence in sentences),
        "",
        f"| variant | cost to target (final value of {summary.baseline}) | cost to stay at target "
        + (f"| cost to target of {summary.tuned_baseline} " if tuned else "")
        + "| final | at equal cost | best | diverged | worst after best | rank | time "
        "| processor time | memory, MiB | accepted | average on |",
        "|---" * (14 + tuned) + "|",
    ]
    for name, one in summary.variants.items():
        cells = [
            name + (f" ({len(one.errors)} failed)" if one.errors else ""),
            _ratio_cell(one.cost_ratio),
            _ratio_cell(one.stay_ratio),
            *([_ratio_cell(one.tuned_ratio)] if tuned else []),
            _value_cell(one.final),
            _significant(one.equal_cost.median),
            _significant(one.best.median),
            f"{one.diverged} of {len(one.seeds)}" if one.seeds else "",
            _value_cell(one.worst_after_best),
            _significant(one.rank, 2),
            _significant(one.time_ratio, 3),
            _significant(one.processor_ratio, 3),
            _significant(one.peak_memory / MIB, 4),
            f"{one.accepted} of {one.attempted}" if one.attempted else "",
            "" if math.isnan(one.smoothing_on) else f"{one.smoothing_on:.0%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    failures = [
        f"- {name}, seed {seed}: {shorten_paths(error)}"
        for name, one in summary.variants.items()
        for seed, error in one.errors.items()
    ]
    if failures:
        lines += ["", "Failed runs, left out above:", "", *failures]
    lines += ["", "Variants:", "", *(f"- {name}: {text}" for name, text in plan.about.items())]
    lines += ["", "Definitions:", "", *(f"- {text}" for text in DEFINITIONS), ""]
    return "\n".join(lines)


def to_json(contents: Any) -> str:
    """Indented JSON; what is not finite becomes null, and lists of numbers stay on one line."""
    text = json.dumps(_finite(contents), indent=1, allow_nan=False)
    return re.sub(r"\[[^\[\]{}\"]*\]", lambda numbers: " ".join(numbers[0].split()), text)


def shorten_paths(value: Any) -> Any:
    """Absolute paths reduced to their last part: results are meant to be shared."""
    if isinstance(value, dict):
        return {name: shorten_paths(one) for name, one in value.items()}
    if isinstance(value, list):
        return [shorten_paths(one) for one in value]
    if isinstance(value, str):
        return re.sub(r"(^|=)/(?:[^/\s]+/)*|(?<=[\s'\"(])/(?:[^/\s]+/)+", r"\1", value)
    return value


def _configuration(plan: Plan) -> dict[str, Any]:
    """The settings that all variants share, and the callbacks that make the difference."""
    settings = {job.variant: job.settings for job in reversed(plan.jobs)}
    shared = {
        name: value
        for name, value in settings[plan.variants[0]].items()
        if name not in ("callbacks", "logger", "run_folder", "seed")
    }
    callbacks = {
        name: {key: value for key, value in settings[name]["callbacks"].items() if key != RECORDER}
        for name in plan.variants
    }
    return {"config": shorten_paths(shared), "callbacks": shorten_paths(callbacks)}


def _asdict(one: VariantSummary) -> dict[str, Any]:
    errors = {seed: shorten_paths(error) for seed, error in one.errors.items()}
    return dataclasses.asdict(one) | {"seeds": len(one.seeds), "errors": errors}


def _run(run: Run, summary: Summary) -> dict[str, Any]:
    """Everything that was recorded, and what came of it."""
    result = summary.variants[run.variant].seeds.get(run.seed)
    return dataclasses.asdict(run) | {
        "error": shorten_paths(run.error),
        "compared": result and dataclasses.asdict(result),
    }


def _csv(runs: Sequence[Run], summary: Summary) -> str:
    text = io.StringIO()
    rows = [_row(run, summary) for run in runs]
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _row(run: Run, summary: Summary) -> dict[str, Any]:
    """One line of the CSV; what never happened is inf, what is unknown is empty."""
    result = summary.variants[run.variant].seeds.get(run.seed)
    curve = run.curve
    ended = bool(curve.values)
    return {
        "variant": run.variant,
        "seed": run.seed,
        "final": result and result.final,
        "at_equal_cost": result and result.equal_cost,
        "best_at_equal_cost": result and result.best,
        "worst_after_best": result and result.worst_after_best,
        "diverged": result and int(result.diverged),
        "cost_to_target_ratio": result and result.cost_ratio,
        "cost_to_stay_ratio": result and result.stay_ratio,
        "seconds_to_target_ratio": result and result.seconds_ratio,
        "cost_to_tuned_target_ratio": result and result.tuned_ratio,
        "gradients": curve.gradients[-1] if ended else None,
        "loss_evaluations": curve.loss_evaluations[-1] if ended else None,
        "cost": curve.costs[-1] if ended else None,
        "seconds": curve.seconds[-1] if ended else None,
        "processor_seconds": curve.processor_seconds[-1] if ended else None,
        "peak_memory_mib": run.peak_memory and round(run.peak_memory / MIB, 1),
        "attempted": curve.attempted[-1] if ended else None,
        "accepted": curve.accepted[-1] if ended else None,
        "smoothing_on": run.smoothing_on,
        "disabled": curve.disabled,
        "error": run.error and shorten_paths(run.error),
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _ratio_cell(spread: Spread) -> str:
    if not spread.count:
        return ""
    if math.isinf(spread.median):
        return f"never ({spread.never} of {spread.count})"
    upper = _significant(spread.upper, infinite="never")
    worst = f"{spread.never} never" if spread.never else f"worst {_significant(spread.worst)}"
    return f"{_significant(spread.median)} ({_significant(spread.lower)} to {upper}; {worst})"


def _value_cell(spread: Spread) -> str:
    if not spread.count:
        return ""
    return (
        f"{_significant(spread.median)} ({_significant(spread.lower)} to "
        f"{_significant(spread.upper)}; worst {_significant(spread.worst)})"
    )


def _significant(value: float, digits: int = 3, infinite: str = "not finite") -> str:
    if math.isnan(value):
        return ""
    return infinite if math.isinf(value) else f"{value:.{digits}g}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"
