"""``stableaa-compare``: variants x seeds of one recipe, and a verdict."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lightning_stableaa.recipes.cli_errors import exit_on_user_error
from lightning_stableaa.recipes.comparison.plots import draw
from lightning_stableaa.recipes.comparison.report import write_report
from lightning_stableaa.recipes.comparison.runner import LOG, Run, read_run, run_all
from lightning_stableaa.recipes.comparison.summary import Summary, summarise
from lightning_stableaa.recipes.comparison.variants import OWN_MODULE, Plan, make_plan
from lightning_stableaa.recipes.comparison.verdict import verdict
from lightning_stableaa.recipes.errors import UserError
from lightning_stableaa.recipes.files import disk_errors, locked
from lightning_stableaa.recipes.train import config_only_mode, filter_warnings


def compare(config: DictConfig, overrides: list[str], title: str) -> Summary:
    """Makes the runs that are missing, and writes the report on all of them.

    Args:
        config: composed from ``compare.yaml``.
        overrides: those that led to ``config``, for the variants to be composed with.
        title: of the report, and name of its folder where ``compare.folder`` does not say.

    Raises:
        UserError, or an error of Hydra or OmegaConf that means a wrong configuration.
    """
    options = config.compare
    if type(options.jobs) is not int or options.jobs < 0:
        raise UserError(f"compare.jobs={options.jobs}: expected a whole number >= 0")
    try:
        plan = make_plan(config, overrides, title)
        with _exclusive_folder(plan.folder):
            return _compare(plan, config, overrides)
    except UserError as error:
        if options.module is None:
            raise
        raise UserError(_of_own_module(str(error))) from error


def _compare(plan: Plan, config: DictConfig, overrides: list[str]) -> Summary:
    options = config.compare
    runs: list[Run] = []
    console = Console(stderr=True)
    kept = sum(read_run(job) is not None for job in plan.jobs)
    if kept:
        console.print(f"{kept} of {len(plan.jobs)} runs are there already, from {plan.folder}/runs")
    try:
        with _progress(console) as progress:
            bar = progress.add_task(plan.title, total=len(plan.jobs), note="")
            for run in run_all(plan.jobs, processes=options.jobs):
                runs.append(run)
                progress.update(bar, advance=1, note=f"{run.variant}, seed {run.seed}")
                if run.error is not None:
                    progress.print(f"{run.variant}, seed {run.seed}, failed: {run.error}")
                    _refuse_without_baseline(run, plan)
    finally:
        finished = any(run.error is None for run in runs)
        summary = _report(plan, runs, overrides, config, console) if finished else None
    if summary is None:
        raise UserError(f"no run was finished, and there is nothing to report; {_logs(plan)}")
    return summary


@contextmanager
def _exclusive_folder(folder: Path) -> Iterator[None]:
    """Holds the folder for this comparison alone; it can be written to."""
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


def _of_own_module(message: str) -> str:
    """With the names that its options have on the command line."""
    message = re.sub(r"^module(?=:|\._target_)", "compare.module", message)
    message = re.sub(r"^data(?=:|\._target_)", "compare.datamodule", message)
    message = re.sub(r"^module\.", "compare.module_args.", message)
    return re.sub(r"^data\.", "compare.datamodule_args.", message)


def _refuse_without_baseline(run: Run, plan: Plan) -> None:
    """Ends the comparison where plain fails with its first seed: all others depend on it."""
    first = plan.jobs[0]
    if (run.variant, run.seed) == (first.variant, first.seed):
        raise UserError(
            f"{run.variant} failed with its first seed, {run.error}; fix that first, {_logs(plan)}"
        )


def _logs(plan: Plan) -> str:
    return f"what a run printed is in {plan.folder}/runs/VARIANT/SEED/{LOG}"


def _report(
    plan: Plan, runs: list[Run], overrides: list[str], config: DictConfig, console: Console
) -> Summary:
    runs = sorted(runs, key=lambda run: (plan.variants.index(run.variant), run.seed))
    summary = summarise(runs, plan.variants, plan.metric, plan.mode)
    cautions = list(_cautions(plan, runs, summary))
    for sentence in cautions:
        console.print(sentence, soft_wrap=True)
    write_report(
        plan.folder,
        plan,
        runs,
        summary,
        [*cautions, *verdict(summary)],
        overrides=overrides,
        jobs=config.compare.jobs,
        threads=config.threads,
    )
    draw(plan.folder, plan.title, runs, summary)
    return summary


def _cautions(plan: Plan, runs: list[Run], summary: Summary) -> Iterator[str]:
    """Warnings that stand above the verdict."""
    if len(runs) < len(plan.jobs):
        yield (
            f"Only {len(runs)} of {len(plan.jobs)} runs were made; the same command makes the "
            "others."
        )
    for one in summary.variants.values():
        for reason in sorted(set(one.disabled.values())):
            seeds = [seed for seed, text in one.disabled.items() if text == reason]
            yield (
                f"{one.name}: acceleration was switched off in {len(seeds)} of {len(one.seeds)} "
                f"seeds: {reason}."
            )
    processors = sorted({run.processor for run in runs if run.processor is not None})
    if len(processors) > 1:
        yield (
            f"Runs were made on {' and on '.join(processors)}: times do not compare, and the same "
            "seed may end elsewhere."
        )


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


@hydra.main(version_base="1.3", config_path="pkg://lightning_stableaa.conf", config_name="compare")
def _compare_from_command_line(config: DictConfig) -> None:
    # inside Hydra too, or it announces the failed job with two lines of its own
    with exit_on_user_error("stableaa-compare"):
        hydra_config = HydraConfig.get()
        overrides = list(hydra_config.overrides.task)
        title = hydra_config.runtime.choices["recipe"]
        summary = compare(config, overrides, title)
        for sentence in verdict(summary):
            print(sentence)
        for one in summary.variants.values():
            if one.errors:
                first, *_ = one.errors.values()
                count = "every seed" if not one.seeds else f"{len(one.errors)} of the seeds"
                raise UserError(f"{one.name} failed with {count}: {first}")


def main() -> None:
    """Entry point of ``stableaa-compare``; a user error ends in one sentence and exit code 2."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    sys.path.insert(0, str(Path.cwd()))  # a module of the user's own, as python -m would find it
    names = {argument.split("=")[0].lstrip("+") for argument in sys.argv[1:]}
    if "compare.module" in names and "recipe" not in names:
        sys.argv.insert(1, OWN_MODULE)
    filter_warnings()
    with exit_on_user_error("stableaa-compare"), config_only_mode(sys.argv):
        for argument in sys.argv[1:]:
            if argument in ("-m", "--multirun"):  # before Hydra writes what belongs to a sweep
                raise UserError(
                    f"{argument}: a comparison makes its own runs, and the points of a sweep would "
                    "overwrite one report; call it once for each, with compare.folder"
                )
        try:
            _compare_from_command_line()
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from here", file=sys.stderr)
            sys.exit(130)


if __name__ == "__main__":
    main()
