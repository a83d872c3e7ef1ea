"""Pictures of a run, drawn from the ``metrics.csv`` in its folder."""

import csv
import io
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from omegaconf import OmegaConf

from lightning_stableaa.recipes.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# of Okabe and Ito's palette, but for the black and the grey: distinct for colour-blind readers
PLAIN, ACCELERATED, ORANGE, GREY = "#222222", "#D55E00", "#E69F00", "#7F7F7F"


class Series(NamedTuple):
    """Values of one metric against the optimizer step at which each was logged."""

    steps: np.ndarray
    values: np.ndarray


def read_metrics(path: Path) -> dict[str, Series]:
    """Every metric of a ``metrics.csv``, without the rows where it was not logged."""
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name != "step":
                    points[name].append((float(row["step"]), float(value)))
    return {name: Series(*np.array(values).T) for name, values in points.items()}


def draw_run(folder: Path, monitor: str) -> None:
    """Draws ``pictures/loss.png`` and, where smoothing was monitored, ``pictures/rsd.png``.

    A run without ``metrics.csv`` (``logger=none``) has no pictures.
    """
    if not (folder / "metrics.csv").exists():
        return
    metrics = read_metrics(folder / "metrics.csv")
    title = f"{folder.parent.name}, {folder.name}"
    with figure(folder / "pictures" / "loss.png", rows=2) as (_, axes):
        if "train/loss" in metrics:  # trainer.log_every_n_steps=0 logs none
            draw_loss(axes[0], metrics)
        axes[0].set(title=title, xlabel="")
        if monitor in metrics:
            draw_curve(axes[1], metrics[monitor], monitor, marker=".")
    if "smoothing/rsd" in metrics:
        with figure(folder / "pictures" / "rsd.png") as (_, axes):
            draw_rsd(axes, metrics, _threshold(folder / "config.yaml"))
            axes.set_title(title)


def accepted_steps(metrics: dict[str, Series]) -> np.ndarray:
    """Steps at which an extrapolation was accepted."""
    if "anderson/accepted" not in metrics:
        return np.empty(0)
    steps, counts = metrics["anderson/accepted"]
    return steps[np.diff(counts, prepend=0) > 0]


@contextmanager
def save_figure(path: Path, size: tuple[float, float]) -> Iterator["Figure"]:
    """A figure of ``size`` in inches, written to ``path`` at the end.

    No display is touched, and matplotlib is imported only here.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(drawing)
    yield drawing
    picture = io.BytesIO()
    drawing.savefig(picture, format=path.suffix[1:])
    write_atomically(path, picture.getvalue())


@contextmanager
def figure(path: Path, rows: int = 1, columns: int = 1) -> Iterator[tuple["Figure", Any]]:
    """A figure and its axes (an array where there are several), written to ``path`` at the end."""
    with save_figure(path, (4 + 3.5 * columns, 1.2 + 2.8 * rows)) as drawing:
        yield drawing, drawing.subplots(rows, columns, sharex=True)


def draw_loss(axes: "Axes", metrics: dict[str, Series]) -> None:
    """The training loss, marked where an extrapolation was accepted."""
    steps, values = metrics["train/loss"]
    draw_curve(axes, metrics["train/loss"], "training loss")
    accepted = accepted_steps(metrics)
    if len(accepted):
        axes.plot(
            accepted,
            np.interp(accepted, steps, values),
            linestyle="none",
            marker="v",
            markersize=4,
            color=ACCELERATED,
            label=f"accepted extrapolation ({len(accepted)})",
        )
        axes.legend()


def draw_rsd(axes: "Axes", metrics: dict[str, Series], threshold: float | None) -> None:
    """The RSD over the bands in which it had switched the moving average on."""
    steps, on = metrics["smoothing/on"]
    if on.any():
        axes.fill_between(
            steps,
            0,
            1,
            where=on > 0,
            step="pre",
            transform=axes.get_xaxis_transform(),
            color=ORANGE,
            alpha=0.3,
            linewidth=0,
            label="moving average on",
        )
    draw_curve(axes, metrics["smoothing/rsd"], "relative standard deviation")
    if threshold:
        axes.axhline(threshold, color=GREY, linestyle="--", label=f"threshold {threshold:g}")
    axes.legend()


def draw_curve(axes: "Axes", series: Series, name: str, **style: Any) -> None:
    """One metric against the optimizer step, on a logarithmic scale."""
    axes.plot(*series, **{"color": PLAIN, "linewidth": 1, "label": name, **style})
    axes.set(xlabel="optimizer step", ylabel=name, yscale="log")
    axes.grid(alpha=0.3)
    label_within_decades(axes, "y")


def label_within_decades(axes: "Axes", name: Literal["x", "y"]) -> None:
    """Numbers to read on a logarithmic scale of fewer than three decades."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    axis = axes.xaxis if name == "x" else axes.yaxis
    low, high = axes.get_xlim() if name == "x" else axes.get_ylim()
    if low > 0 and high / low < 1e3:
        axis.set_major_locator(MaxNLocator(5) if high / low < 5 else LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())


def _threshold(configuration: Path) -> float | None:
    return OmegaConf.select(OmegaConf.load(configuration), "callbacks.smoothing.rsd_threshold")
