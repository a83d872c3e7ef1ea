"""The pictures of the README and of ``docs/``, drawn from committed results.

    python -m benchmarks.figures          # draws all of them into docs/pictures
    python -m benchmarks.figures --train  # trains for burgers2d.png first: two runs, minutes

============================  ==================================================
``burgers2d.png``             ``results/figures/burgers2d.csv``
``batch_sizes.png``           ``results/batch_sizes/summary.json``
``optimizers.png``            ``results/optimizer_matrix/runs.jsonl``
``paper_admissions_mlp.png``  ``results/paper/admissions_mlp/results.json``
============================  ==================================================
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import batch_sizes, optimizer_matrix
from lightning_stableaa.recipes.comparison.plots import COLORS
from lightning_stableaa.recipes.comparison.statistics import LOSS_COST

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
PICTURES = Path(__file__).parents[1] / "docs/pictures"

THINNING = 10  # optimizer steps from one point of the loss to the next
COST = "cost in gradient evaluations (a further loss counts one third)"


def train_burgers2d(path: Path) -> None:
    """Trains ``recipe=burgers2d`` with seed 0 plain and accelerated; writes the curves as CSV."""
    from lightning_stableaa.recipes.plots import accepted_steps, read_metrics

    lines: list[dict[str, Any]] = []
    for variant, callbacks in {"plain": "none", "anderson": "stable_aa"}.items():
        with tempfile.TemporaryDirectory() as folder:
            results = _train(callbacks, Path(folder))
            metrics = read_metrics(Path(folder) / "metrics.csv")
        losses = dict(zip(*metrics["train/loss"], strict=True))
        errors = dict(zip(*metrics["val/relative_l2"], strict=True))
        accepted = set(accepted_steps(metrics))
        attempts = metrics.get("anderson/attempted")
        for step, loss in losses.items():
            if step % THINNING and step not in accepted and step not in errors:
                continue
            cost = step + 1
            if attempts is not None:  # all attempts evaluate the loss alike but the first two
                share = np.sum(attempts.steps <= step) / len(attempts.steps)
                cost += LOSS_COST * results["cost/loss_evaluations"] * share
            error = f"{errors[step]:.4g}" if step in errors else ""
            line = {"variant": variant, "step": int(step), "cost": f"{cost:.1f}"}
            line |= {"loss": f"{loss:.4g}", "error": error, "accepted": int(step in accepted)}
            lines.append(line)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def _train(callbacks: str, folder: Path) -> dict[str, float]:
    import hydra
    from hydra import initialize_config_module

    from lightning_stableaa.recipes.train import filter_warnings, train

    filter_warnings()
    options = ["recipe=burgers2d", "seed=0", "logger=csv", "pictures=false"]
    options += [f"callbacks={callbacks}", "trainer.val_check_interval=50"]
    with initialize_config_module("lightning_stableaa.conf", version_base="1.3"):
        config = hydra.compose("train", [*options, f"run_folder={folder}"])
    return train(config)


def burgers2d(path: Path) -> None:
    """Loss and error of plain Adam and of ``AndersonCallback()`` against cost."""
    columns: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with (RESULTS / "figures/burgers2d.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            values = columns[row.pop("variant")]
            for name, value in row.items():
                values[name].append(float(value or "nan"))
    figure = _figure(8, 4)
    loss, error = figure.subplots(1, 2, sharex=True)
    names = {"plain": "Adam", "anderson": "Adam with AndersonCallback(stochastic=False)"}
    for variant, label in names.items():
        one = {name: np.array(values) for name, values in columns[variant].items()}
        style: dict[str, Any] = {"color": COLORS[variant], "label": label}
        loss.semilogy(one["cost"], one["loss"], linewidth=0.8, **style)
        known = np.isfinite(one["error"])
        error.semilogy(one["cost"][known], one["error"][known], linewidth=1.2, **style)
        accepted = one["accepted"] > 0
        if accepted.any():
            loss.plot(
                one["cost"][accepted],
                one["loss"][accepted],
                "v",
                color=COLORS[variant],
                markeredgecolor="white",
                markeredgewidth=0.4,
                markersize=5,
                label="accepted extrapolation",
            )
    loss.set(title="training loss")
    error.set(title="relative $L^2$ error")
    for axes in (loss, error):
        axes.grid(alpha=0.25)
    figure.supxlabel(f"{COST}; one seed", fontsize=10)
    figure.legend(*loss.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.savefig(path)


def paper_admissions_mlp(path: Path) -> None:
    """Validation error of every seed and variant; crosses where it is not finite."""
    results = json.loads((RESULTS / "paper/admissions_mlp/results.json").read_text())
    variants = results["variants"]
    figure = _figure(11, 5.2)
    grid = figure.subplots(2, 4, sharex=True, sharey=True)
    for name, axes in zip(variants, grid.flat, strict=False):
        for curve in (run["curve"] for run in results["runs"] if run["variant"] == name):
            cost = np.array(curve["gradients"]) + LOSS_COST * np.array(curve["loss_evaluations"])
            values = np.array(curve["values"], float)
            axes.semilogy(cost, values, color=COLORS[name], linewidth=0.9)
            missing = cost[~np.isfinite(values)]
            edge = {"transform": axes.get_xaxis_transform(), "color": COLORS[name]}
            axes.plot(missing, np.full_like(missing, 0.96), "x", markersize=4, **edge)
        if count := variants[name]["diverged"]:
            label = f"{count} of {variants[name]['seeds']} diverged"
            axes.text(0.05, 0.86, label, transform=axes.transAxes, fontsize=9)
        axes.set_title(name, fontsize=9)
        axes.grid(alpha=0.25)
    for axes in grid.flat[len(variants) :]:
        axes.axis("off")
    for axes in grid.flat[len(variants) - 4 : 4]:
        axes.tick_params(labelbottom=True)  # the lowest of their columns
    grid[0, 0].set_ylim(1e-3, 1e7)
    figure.suptitle("Graduate Admissions, every seed (crosses: not finite)", fontsize=11)
    figure.supxlabel(COST, fontsize=10)
    figure.supylabel("validation MSE", fontsize=10)
    figure.savefig(path)


def optimizers(path: Path) -> None:
    """Error with acceleration over the same optimizer's without: problems, mean and interval."""
    lines = (RESULTS / "optimizer_matrix/runs.jsonl").read_text().splitlines()
    ratios = optimizer_matrix.ratios([json.loads(line) for line in lines])
    figure = _figure(8, 3.6)
    axes = figure.subplots()
    for row, problems in enumerate(ratios.values()):
        means = [np.exp(np.mean(logs)) for logs in problems.values()]
        mean, low, high = optimizer_matrix.mean_ratio(problems)
        axes.semilogx(means, [row] * len(means), "o", color="#7F7F7F", markersize=4, alpha=0.7)
        error = [[mean - low], [high - mean]]
        axes.errorbar(mean, row, xerr=error, fmt="D", color=COLORS["anderson"], capsize=3)
    axes.axvline(1, color=COLORS["plain"], linewidth=1)
    axes.set_yticks(range(len(ratios)), list(ratios))
    axes.invert_yaxis()
    axes.set_xticks([0.1, 0.2, 0.3, 0.5, 0.7, 1], ["0.1", "0.2", "0.3", "0.5", "0.7", "1"])
    axes.xaxis.set_minor_formatter("")
    axes.set_xlabel(
        "relative $L^2$ error with AndersonAccelerator over the optimizer's alone, equal cost\n"
        "dots: seven PDEs, each the mean of three seeds; diamond: their mean and its 95 % interval"
    )
    axes.grid(alpha=0.25)
    figure.savefig(path)


def noise_and_batch_size(path: Path) -> None:
    """Noise and gain against the batch size."""
    batch_sizes.draw(path, json.loads((RESULTS / "batch_sizes/summary.json").read_text()))


def _figure(width: float, height: float) -> Figure:
    """An empty figure that touches no display, ``width`` x ``height`` inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


FIGURES: dict[str, Callable[[Path], None]] = {
    "batch_sizes.png": noise_and_batch_size,
    "burgers2d.png": burgers2d,
    "optimizers.png": optimizers,
    "paper_admissions_mlp.png": paper_admissions_mlp,
}


def main(words: Sequence[str] | None = None) -> None:
    """Draws every picture; trains for the first one where that is wanted."""
    parser = argparse.ArgumentParser(description="pictures of the README and of docs/")
    parser.add_argument("--train", action="store_true", help="train for burgers2d.png first")
    parser.add_argument("--folder", type=Path, default=PICTURES, help="where to draw to")
    arguments = parser.parse_args(words)
    if arguments.train:
        train_burgers2d(RESULTS / "figures/burgers2d.csv")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        draw(arguments.folder / name)
        print(arguments.folder / name)


if __name__ == "__main__":
    main()
