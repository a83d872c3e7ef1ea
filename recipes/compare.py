"""``stableaa-compare``: variants x seeds of one recipe, and a verdict."""

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lightning_stableaa.recipes.comparison.drawing import draw
from lightning_stableaa.recipes.comparison.report import write_report
from lightning_stableaa.recipes.comparison.runner import LOG, Run, read_run, run_all
from lightning_stableaa.recipes.comparison.summary import Summary, summarise
from lightning_stableaa.recipes.comparison.variants import Plan, make_plan
from lightning_stableaa.recipes.comparison.verdict import verdict
from lightning_stableaa.recipes.errors import UserError
from lightning_stableaa.recipes.mistakes import mistakes_in_one_sentence
from lightning_stableaa.recipes.train import add_recipe_to_show, quieten

OWN_MODULE = "recipe=_own"


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
    plan = make_plan(config, overrides, title)
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
        summary = _report(plan, runs, overrides, config) if finished else None
    if summary is None:
        raise UserError(f"no run was finished, and there is nothing to report; {_logs(plan)}")
    return summary


def _refuse_without_baseline(run: Run, plan: Plan) -> None:
    """Ends the comparison where plain fails with its first seed: all others would be in vain."""
    first = plan.jobs[0]
    if (run.variant, run.seed) == (first.variant, first.seed):
        raise UserError(
            f"{run.variant} failed with its first seed, {run.error}; mend that first, {_logs(plan)}"
        )


def _logs(plan: Plan) -> str:
    return f"what a run printed is in {plan.folder}/runs/VARIANT/SEED/{LOG}"


def _report(plan: Plan, runs: list[Run], overrides: list[str], config: DictConfig) -> Summary:
    runs = sorted(runs, key=lambda run: (plan.variants.index(run.variant), run.seed))
    summary = summarise(runs, plan.variants, plan.metric, plan.mode)
    write_report(
        plan.folder,
        plan,
        runs,
        summary,
        verdict(summary),
        overrides=overrides,
        jobs=config.compare.jobs,
        threads=config.threads,
    )
    draw(plan.folder, plan.title, runs, summary)
    return summary


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
    with mistakes_in_one_sentence("stableaa-compare"):
        hydra_config = HydraConfig.get()
        overrides = list(hydra_config.overrides.task)
        title = hydra_config.runtime.choices["recipe"]
        summary = compare(config, overrides, title)
        for sentence in verdict(summary):
            print(sentence)


def main() -> None:
    """Entry point of ``stableaa-compare``; a mistake ends in one sentence and exit code 2."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    sys.path.insert(0, str(Path.cwd()))  # a module of the user's own, as python -m would find it
    names = {argument.split("=")[0] for argument in sys.argv[1:]}
    if "compare.module" in names and "recipe" not in names:
        sys.argv.append(OWN_MODULE)
    add_recipe_to_show(sys.argv)
    quieten()
    with mistakes_in_one_sentence("stableaa-compare"):
        try:
            _compare_from_command_line()
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from here", file=sys.stderr)
            sys.exit(130)


if __name__ == "__main__":
    main()
