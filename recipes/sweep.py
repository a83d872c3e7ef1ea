"""The points of a sweep (``-m``): what is checked before, and the table at the end."""

import json
import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from lightning_stableaa.recipes.cli_errors import exit_on_user_error
from lightning_stableaa.recipes.launch import check_sweep

RESULTS = "results.json"  # in the run folder: overrides and results


class Sweep(Callback):
    """Runs ``check_sweep`` before Hydra writes anything, and shows the results at the end."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Ends the program where the sweep cannot work, and names the folders."""
        launcher = config.hydra.launcher
        with exit_on_user_error("stableaa-train"):
            check_sweep(config, launcher)
        folder = config.hydra.sweep.dir
        logs = launcher.get("submitit_folder")
        of_logs = f"; what they print is in {Path(logs).parent}/JOB" if logs else ""
        print(f"sweep: the runs are in {folder}/0, {folder}/1, ...{of_logs}", flush=True)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Prints one line for each point."""
        folder = Path(config.hydra.sweep.dir)
        parent, recipe, name = folder.parent.parent, folder.parent.name, folder.name
        # where recipes are swept, each point knows its own
        pattern = f"*/{name}/*/{RESULTS}" if recipe == "RECIPE" else f"{recipe}/{name}/*/{RESULTS}"
        found = sorted(parent.glob(pattern), key=lambda path: int(path.parent.name))
        points = {path.parent.name: json.loads(path.read_text()) for path in found}
        if points:
            Console(width=None if Console().is_terminal else 200).print(table(points))
            print(f"everything about these runs: {folder}")


def table(points: dict[str, dict[str, Any]]) -> Table:
    """One row for each point: what differs, and what all have to show."""
    overrides = {point: dict.fromkeys(one["overrides"]) for point, one in points.items()}
    shared = set.intersection(*map(set, overrides.values()))
    names = sorted({name for one in points.values() for name in one["results"]})
    shown = [name for name in names if name.startswith(("best/", "train/loss", "val/", "cost/"))]
    result = Table("#", "point", *shown)
    for point, one in points.items():
        differs = " ".join(text for text in overrides[point] if text not in shared)
        values = [one["results"].get(name) for name in shown]
        cells = ["" if value is None else f"{value:.4g}" for value in values]
        result.add_row(point, differs, *cells)
    return result


def number_of_point() -> str:
    """``#3 `` within a sweep, else nothing."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return ""
    return f"#{HydraConfig.get().job.num} "


def point() -> str:
    """``#3 optimizer.lr=0.01: `` within a sweep, else nothing.

    A process of its own, as submitit starts it, has no command line to tell what is swept, and
    names all overrides.
    """
    number = number_of_point()
    arguments = [one for one in sys.argv[1:] if "=" in one and one[0] != "-"]
    given = OverridesParser.create().parse_overrides(arguments) if number else []
    fixed = {one.key_or_group for one in given if not one.is_sweep_override()}
    overrides = HydraConfig.get().overrides.task if number else []
    swept = [one for one in overrides if one.lstrip("+~").partition("=")[0] not in fixed]
    return f"{number}{' '.join(swept)}: " if number else ""
