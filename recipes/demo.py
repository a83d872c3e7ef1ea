"""``make demo``: burgers2d with and without stable Anderson acceleration, at equal cost."""

from datetime import datetime
from pathlib import Path

import hydra
import numpy as np
from hydra import initialize_config_module

from lightning_stableaa.recipes.plots import (
    ACCELERATED,
    PLAIN,
    Series,
    draw_curve,
    figure,
    read_metrics,
)
from lightning_stableaa.recipes.train import filter_warnings, train

ACCELERATED_STEPS = 1300
LOSS_COST = 1 / 3  # of a gradient: a forward pass without the backward pass
ERROR = "val/relative_l2"


def main() -> None:
    """Trains both ways, prints the comparison and where the pictures are."""
    filter_warnings()
    folder = Path("runs/demo") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    print(f"1/2  burgers2d with stable Anderson acceleration, {ACCELERATED_STEPS} steps")
    accelerated = _train("stable_aa", ACCELERATED_STEPS, folder / "accelerated")
    budget = round(cost(accelerated))
    print(f"2/2  burgers2d without it, {budget} steps: the same cost")
    plain = _train("none", budget, folder / "plain")

    curves = {
        name: with_cost(read_metrics(folder / name / "metrics.csv"))
        for name in ("plain", "accelerated")
    }
    _draw_comparison(folder / "comparison.png", curves)
    print(table({"plain Adam": plain, "Adam + stable AA": accelerated}))
    print("one seed only: stableaa-compare recipe=burgers2d repeats this with several")
    print(f"\npictures: {folder / 'comparison.png'}")
    for name in ("plain", "accelerated"):
        print(f"          {folder / name / 'pictures'}")


def cost(results: dict[str, float]) -> float:
    """Gradient evaluations of a run, and the loss evaluations of its safeguard at one third."""
    return results["cost/gradients"] + LOSS_COST * results.get("cost/loss_evaluations", 0)


def with_cost(metrics: dict[str, Series]) -> dict[str, Series]:
    """The metrics against the cost so far in place of the step."""
    steps, gradients = metrics["cost/gradients"]
    losses = metrics["cost/loss_evaluations"].values if "cost/loss_evaluations" in metrics else 0
    known = np.concatenate([[0], steps]), np.concatenate([[0], gradients + LOSS_COST * losses])
    return {
        name: Series(np.interp(series.steps, *known), series.values)
        for name, series in metrics.items()
    }


def table(runs: dict[str, dict[str, float]]) -> str:
    """One line a run."""
    lines = [f"\n{'':18}{'cost':>8}{'steps':>8}{'training loss':>16}{'error':>9}{'best error':>12}"]
    lines += [
        f"{name:18}{cost(run):8.0f}{run['cost/gradients']:8.0f}{run['train/loss']:16.2e}"
        f"{run[ERROR]:9.3f}{run[f'best/{ERROR}']:12.3f}"
        for name, run in runs.items()
    ]
    lines.append(
        "cost: gradient evaluations, a loss for the safeguard counted as one third; "
        "error: relative L2"
    )
    return "\n".join(lines)


def _train(callbacks: str, steps: int, folder: Path) -> dict[str, float]:
    with initialize_config_module("lightning_stableaa.conf", version_base="1.3"):
        config = hydra.compose(
            "train",
            [
                "recipe=burgers2d",
                f"callbacks={callbacks}",
                "scheduler=cosine",  # at a constant rate the last error is a matter of luck
                f"trainer.max_steps={steps}",
                f"trainer.val_check_interval={steps // 20}",
                "+trainer.enable_model_summary=false",
                f"run_folder={folder}",
            ],
        )
    return train(config)


def _draw_comparison(path: Path, curves: dict[str, dict[str, Series]]) -> None:
    with figure(path, rows=2) as (_, axes):
        for (name, metrics), colour in zip(curves.items(), (PLAIN, ACCELERATED), strict=True):
            draw_curve(axes[0], metrics["train/loss"], "training loss", color=colour, label=name)
            draw_curve(axes[1], metrics[ERROR], "relative $L^2$ error", color=colour, label=name)
        axes[0].set(title="burgers2d, plain and accelerated at equal cost", xlabel="")
        axes[1].set(xlabel="gradient evaluations (a loss counts one third)")
        axes[0].legend()


if __name__ == "__main__":
    main()
