"""``stableaa-compare``: variants x seeds of one recipe, and a verdict."""

import importlib.util
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lightning_stableaa.recipes.cli_errors import exit_on_user_error
from lightning_stableaa.recipes.comparison.runner import (
    LOG,
    Run,
    finished_run,
    finished_runs,
    run_all,
)
from lightning_stableaa.recipes.comparison.variants import (
    BASELINE,
    OWN_MODULE,
    Plan,
    make_plan,
)
from lightning_stableaa.recipes.errors import UserError
from lightning_stableaa.recipes.files import disk_errors, locked
from lightning_stableaa.recipes.train import run_command

COMMAND = "stableaa-compare"
EXTRA = ("pandas", "scipy", "pytorch_optimizer", "schedulefree")


@dataclass(frozen=True)
class Outcome:
    """What a comparison showed."""

    notes: list[str]  # sentences that stand above the verdict
    verdict: list[dict[str, str]]  # one row a variant
    report: Path
    failure: str | None  # of the first variant that failed with a seed


def compare(config: DictConfig, overrides: list[str], title: str) -> Outcome:
    """Makes the runs that are missing, and reports on all runs with the same settings.

    Args:
        config: composed from ``compare.yaml``.
        overrides: those that led to ``config``, for the variants to be composed with.
        title: of the report, and name of its folder where ``compare.folder`` does not say.

    Raises:
        UserError, or an error of Hydra or OmegaConf that means a wrong configuration.
    """
    try:
        plan = make_plan(config, overrides, title)
        with _exclusive_folder(plan.folder):
            runs: list[Run] = []
            try:
                _make_runs(plan, runs)
            finally:  # an interrupted comparison reports what is there
                plain = [run for run in runs if run.variant == BASELINE and run.error is None]
                outcome = _report(plan, runs) if plain else None
            assert outcome is not None  # where plain failed, _make_runs raised
            return outcome
    except UserError as error:
        if config.compare.module is None:
            raise
        message = str(error)  # with the names that the options have on the command line
        for key, option in (("module", "module"), ("data", "datamodule"), ("metric", "metric")):
            message = re.sub(rf"^{key}(?=[:=]|\._target_)", f"compare.{option}", message)
            message = re.sub(rf"^{key}\.", f"compare.{option}_args.", message)
        raise UserError(message) from error


def _make_runs(plan: Plan, runs: list[Run]) -> None:
    """Appends every run to ``runs``; shows the runs to make, and the time left."""
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    missing = [job for job in plan.jobs if finished_run(job) is None]
    total, there = len(plan.jobs), len(plan.jobs) - len(missing)
    console.print(
        f"{plan.title}: {len(plan.variants)} variants x {len(plan.seeds)} seeds = "
        f"{total} runs, {there} of them are there already"
    )
    for name in plan.variants:
        seeds = [str(job.seed) for job in missing if job.variant == name]
        if seeds:
            console.print(f"  to make: {name}, seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}")
    began, note = time.monotonic(), ""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    note_column = TextColumn("{task.fields[note]}")
    with Progress(*columns, TimeElapsedColumn(), note_column, console=console) as progress:
        bar = progress.add_task(plan.title, total=total, note="")
        made = run_all(plan.jobs, processes=plan.workers["side_by_side"])
        for count, run in enumerate(made, start=1):
            runs.append(run)
            if count > there:
                seconds = (time.monotonic() - began) / (count - there) * (total - count)
                left = timedelta(seconds=round(seconds))
                note = f"{run.variant}, seed {run.seed}; {left} left"
                if not console.is_terminal:  # a log file has no bar
                    console.print(f"{count} of {total} runs: {note}")
            progress.update(bar, completed=count, note=note)
            if run.error is not None:
                console.print(f"{run.variant}, seed {run.seed}, failed: {run.error}")
                if (run.variant, run.seed) == (BASELINE, plan.seeds[0]):
                    raise UserError(  # all others are compared with plain
                        f"{run.variant} failed with its first seed, {run.error}; fix that first, "
                        f"what a run printed is in {plan.folder}/runs/VARIANT/SEED/{LOG}"
                    )


def _report(plan: Plan, runs: Sequence[Run]) -> Outcome:
    """Covers finished runs of earlier commands too: fewer variants never shrink a report."""
    from lightning_stableaa.recipes.comparison import plots, report, statistics

    failed = [run for run in runs if run.error is not None]
    covered = [*finished_runs(plan), *failed]
    names = list(dict.fromkeys([*plan.variants, *(run.variant for run in covered)]))
    covered.sort(key=lambda run: (names.index(run.variant), run.seed))
    summary = statistics.summarise(covered, names, plan.mode)
    notes = list(report.notes_on(plan, covered, len(plan.jobs) - len(runs), summary))
    _keep_larger_report(plan, len(covered))
    report.write_report(plan, covered, summary, notes)
    plots.draw(plan, covered, summary)
    failure = None
    for run in failed[:1]:
        errors = summary.variants[run.variant]["errors"]
        every = not summary.variants[run.variant]["seeds"]
        count = "every seed" if every else f"{len(errors)} of the seeds"
        failure = f"{run.variant} failed with {count}: {run.error}"
    return Outcome(notes, report.verdict(summary), plan.folder / "table.md", failure)


def _keep_larger_report(plan: Plan, count: int) -> None:
    """Moves a report on more runs, with other settings, into a folder of its own."""
    with suppress(FileNotFoundError, ValueError, KeyError):
        kept = json.loads((plan.folder / "results.json").read_text())
        if kept["comparison"] != plan.comparison and len(kept["runs"]) > count:
            beside = plan.folder / f"report-{kept['comparison']}"
            beside.mkdir(exist_ok=True)
            for pattern in ("results.*", "table.md", "*.png"):
                for path in list(plan.folder.glob(pattern)):
                    path.replace(beside / path.name)


@contextmanager
def _exclusive_folder(folder: Path) -> Iterator[None]:
    """Locks the folder for this comparison; it can be written to."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"compare.folder={folder}: is a file; choose another folder")
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    with disk_errors("compare.folder", folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with locked(folder):
                yield
        except BlockingIOError:
            raise UserError(
                f"compare.folder={folder}: another comparison is running there; wait for it, or "
                "choose another folder"
            ) from None
        finally:
            with suppress(OSError):  # not empty: something was written
                for one in made:
                    one.rmdir()


def _print(outcome: Outcome) -> None:
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    for note in outcome.notes:
        console.print(note, markup=False)
    rows = [[cell.replace("[", r"\[") for cell in row.values()] for row in outcome.verdict]
    if rows:
        caption = "ratio [95 % interval]; seeds better; p of a sign test"
        table = Table(*outcome.verdict[0], caption=caption)
        width = sum(max(map(len, column)) + 3 for column in zip(*rows, strict=True))
        for row in rows:  # what does not fit into a line breaks between its parts
            table.add_row(*(c.replace("; ", "\n") if width > console.width else c for c in row))
        console.print(table)
    print(f"report: {outcome.report}")


@hydra.main(version_base="1.3", config_path="pkg://lightning_stableaa.conf", config_name="compare")
def _compare_from_command_line(config: DictConfig) -> None:
    # inside Hydra too, or it announces the failed job with two lines of its own
    with exit_on_user_error(COMMAND):
        hydra_config = HydraConfig.get()
        title = hydra_config.runtime.choices["recipe"]
        outcome = compare(config, list(hydra_config.overrides.task), title)
        _print(outcome)
        if outcome.failure is not None:
            raise UserError(outcome.failure)


def _check_arguments(arguments: Sequence[str]) -> None:
    for package in EXTRA:
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"{package} is not installed: pip install 'lightning-stableaa[recipes,compare]'"
            )
    for argument in {"-m", "--multirun"} & set(arguments):  # before Hydra writes for a sweep
        raise UserError(
            f"{argument}: a comparison makes its own runs, and the points of a sweep would "
            "overwrite one report; call it once for each, with compare.folder"
        )


def main() -> None:
    """Entry point of ``stableaa-compare``."""
    with exit_on_user_error(COMMAND):
        _check_arguments(sys.argv[1:])
    names = {argument.split("=")[0].lstrip("+") for argument in sys.argv[1:]}
    if "compare.module" in names and "recipe" not in names:
        sys.argv.insert(1, OWN_MODULE)
    run_command(COMMAND, _compare_from_command_line, "the same command goes on from here")


if __name__ == "__main__":
    main()
