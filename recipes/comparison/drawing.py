"""Pictures of a comparison."""

import io
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lightning_stableaa.recipes.comparison.cost import Curve, Mode
from lightning_stableaa.recipes.comparison.runner import Run
from lightning_stableaa.recipes.comparison.summary import Summary
from lightning_stableaa.recipes.comparison.verdict import best_averaging, contenders, is_anderson
from lightning_stableaa.recipes.files import write_atomically
from lightning_stableaa.recipes.pictures import BLUE, GREEN, GREY, ORANGE, VERMILLION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLACK, PURPLE = "#000000", "#CC79A7"  # of the same palette
COST = "cost, in gradients (an extra loss is one third)"
SECONDS = "training time, s"


class Style(NamedTuple):
    """How a variant is drawn; dashes tell apart what colours may not."""

    color: str
    linestyle: str


class Band(NamedTuple):
    """Median and quartiles over seeds."""

    x: np.ndarray
    lower: np.ndarray
    median: np.ndarray
    upper: np.ndarray


def draw(folder: Path, title: str, runs: Sequence[Run], summary: Summary) -> None:
    """Draws ``curves.png``, ``variants.png`` and ``ratios.png`` into ``folder``."""
    curves: dict[str, list[Run]] = {name: [] for name in summary.variants}
    for run in runs:
        if run.error is None:
            curves[run.variant].append(run)
    curves = {name: of_variant for name, of_variant in curves.items() if of_variant}
    if not curves:
        return
    _draw_curves(folder / "curves.png", title, curves, summary)
    _draw_variants(folder / "variants.png", title, curves, summary)
    _draw_ratios(folder / "ratios.png", title, summary)


def band(series: Iterable[tuple[Sequence[float], Sequence[float]]]) -> Band:
    """Quartiles of the i-th values of all (x, y), at the median of their i-th x.

    The seeds of a variant validate after the same steps; the shortest one ends the band.
    """
    listed = list(series)
    length = min(len(x) for x, _ in listed)
    x = np.array([x[:length] for x, _ in listed], float)
    y = np.array([y[:length] for _, y in listed], float)
    with warnings.catch_warnings():
        # between infinities, or of values that are all unknown: NaN, which is not drawn
        warnings.simplefilter("ignore", RuntimeWarning)
        return Band(np.median(x, axis=0), *np.nanquantile(y, [0.25, 0.5, 0.75], axis=0))


def _draw_curves(path: Path, title: str, runs: dict[str, list[Run]], summary: Summary) -> None:
    """The variants that the verdict speaks of, with RSD and acceptance below."""
    styles = {name: style for name, style in _styles(summary).items() if name in runs}
    accelerated = [name for name in styles if is_anderson(name)]
    smoothed = [name for name in styles if any(run.rsd for run in runs[name])]
    below = (["rsd"] if smoothed else []) + (["accepted"] if accelerated else [])
    rows: list[Any] = [["cost", "time"], *([name, "legend"] for name in below or ["legend"])]
    with _figure(path, 10, 4.2 + 1.9 * len(rows[1:])) as figure:
        axes = figure.subplot_mosaic(rows, height_ratios=[3, *[1.3] * len(rows[1:])])
        for name, style in styles.items():
            curves = [run.curve for run in runs[name]]
            _plot(axes["cost"], band((c.costs, c.values) for c in curves), style, name)
            _plot(axes["time"], band((c.seconds, c.values) for c in curves), style)
        for name in smoothed:
            series = ((run.rsd_gradients, run.rsd) for run in runs[name] if run.rsd)
            _plot(axes["rsd"], band(series), styles[name])
        for name in accelerated:
            series = [(run.curve.costs, _acceptance(run.curve)) for run in runs[name]]
            _plot(axes["accepted"], band(series), styles[name])
        values = [v for name in styles for run in runs[name] for v in run.curve.values]
        for key, label in (("cost", COST), ("time", SECONDS)):
            axes[key].set(xlabel=label, ylabel=summary.metric)
            _scale(axes[key], values, summary.mode)
        if smoothed:
            axes["rsd"].set(ylabel="RSD")
            _log_scale(axes["rsd"])
        if accelerated:
            axes["accepted"].set(ylabel="accepted\nshare", ylim=(-0.05, 1.05))
        for key in below:
            axes[key].sharex(axes["cost"])
            axes[key].set(xlabel=COST if key == below[-1] else "")
        axes["legend"].axis("off")
        axes["legend"].legend(
            *axes["cost"].get_legend_handles_labels(),
            title=f"median and quartiles of {_seeds(runs)}",
            loc="center",
        )
        figure.suptitle(title)


def _draw_variants(path: Path, title: str, runs: dict[str, list[Run]], summary: Summary) -> None:
    """Every variant beside the plain one."""
    names = [name for name in runs if name != summary.baseline] or list(runs)
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    with _figure(path, 1 + 2.8 * columns, 1 + 2.2 * rows) as figure:
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, name in zip(grid.flat, names, strict=False):
            for drawn, style in (
                (summary.baseline, Style(GREY, "-")),
                (name, Style(VERMILLION if is_anderson(name) else BLUE, "-")),
            ):
                curves = [run.curve for run in runs.get(drawn, ())]
                if curves:
                    _plot(axes, band((c.costs, c.values) for c in curves), style, drawn)
            axes.set_title(name, fontsize=10)
        values = [v for of_variant in runs.values() for r in of_variant for v in r.curve.values]
        _scale(grid.flat[0], values, summary.mode)
        for axes in grid.flat[len(names) :]:
            axes.axis("off")
        figure.supxlabel(COST)
        figure.supylabel(summary.metric)
        figure.suptitle(f"{title}: each variant, and {summary.baseline} in grey ({_seeds(runs)})")


def _draw_ratios(path: Path, title: str, summary: Summary) -> None:
    """Cost to reach the plain run's final value: every seed, quartiles and median."""
    ranked = sorted(
        (one for one in summary.variants.values() if one.cost_ratio.count),
        key=lambda one: (-one.cost_ratio.median, -one.cost_ratio.never),
    )
    if not ranked:
        return
    ratios = {one.name: [r.cost_ratio for r in one.seeds.values()] for one in ranked}
    finite = [r for of_variant in ratios.values() for r in of_variant if math.isfinite(r)]
    never = max([*finite, 1.0]) * 1.6  # where those are drawn that never got there
    with _figure(path, 8, 1.4 + 0.34 * len(ranked)) as figure:
        axes = figure.subplots()
        for height, one in enumerate(ranked):
            color = VERMILLION if is_anderson(one.name) else BLUE
            seeds = [r if math.isfinite(r) else never for r in ratios[one.name]]
            quartiles = [min(one.cost_ratio.lower, never), min(one.cost_ratio.upper, never)]
            axes.plot(quartiles, [height, height], color=color, linewidth=5, alpha=0.3)
            axes.plot(seeds, [height] * len(seeds), "o", color=color, markersize=4, mfc="none")
            axes.plot(min(one.cost_ratio.median, never), height, "D", color=color, markersize=6)
        axes.axvline(1, color=GREY, linestyle="--", linewidth=1)
        axes.set(
            yticks=range(len(ranked)),
            yticklabels=[one.name for one in ranked],
            xscale="log",
            xlabel=f"cost to reach the final {summary.metric} of {summary.baseline}, over its own",
            title=f"{title}: seeds (circles), median (diamond), quartiles (bar)",
        )
        axes.grid(axis="x", which="both", alpha=0.25)
        _plain_ticks(axes, [min([*finite, 1.0]), max([*finite, 1.0])], never)


def _plain_ticks(axes: "Axes", bounds: list[float], never: float) -> None:
    """Ticks that read as ratios, and one named never where something stands there."""
    from matplotlib.ticker import FixedLocator, NullLocator

    nice = [m * 10.0**e for e in range(-4, 5) for m in (1, 1.5, 2, 3, 5, 7)]
    shown = [tick for tick in nice if bounds[0] * 0.9 <= tick <= bounds[1] * 1.1]
    axes.xaxis.set_major_locator(FixedLocator([*shown, never]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([*(f"{tick:g}" for tick in shown), "never"])
    axes.set_xlim(bounds[0] * 0.85, never * 1.15)


def _styles(summary: Summary) -> dict[str, Style]:
    """Plain, its best sweep, what the verdict speaks of, and the best that only averages.

    What may lie on top of another line is dashed.
    """
    styles = {summary.baseline: Style(BLACK, "-")}
    styles.setdefault(summary.best_swept, Style(BLACK, "--"))
    spare = iter([(BLUE, "-"), (VERMILLION, "--"), (PURPLE, "-")])
    for one in contenders(summary):
        styles[one.name] = Style(*next(spare, (PURPLE, ":")))
    if "smoothing" in summary.variants:
        styles["smoothing"] = Style(ORANGE, "-.")
    averaging = best_averaging(summary)
    if averaging is not None:
        styles.setdefault(averaging.name, Style(GREEN, "-."))
    return styles


def _plot(axes: "Axes", drawn: Band, style: Style, label: str | None = None) -> None:
    color, linestyle = style
    axes.fill_between(drawn.x, drawn.lower, drawn.upper, color=color, alpha=0.15, linewidth=0)
    axes.plot(drawn.x, drawn.median, color=color, linestyle=linestyle, linewidth=1.5, label=label)
    axes.grid(alpha=0.25)


def _scale(axes: "Axes", values: Sequence[float], mode: Mode) -> None:
    """Logarithmic for errors; a diverged run must not squeeze all others together."""
    finite = np.array([value for value in values if math.isfinite(value)])
    if mode == "min" and len(finite) and finite.min() > 0:
        _log_scale(axes)
        top = min(finite.max(), 1e3 * np.median(finite))
        axes.set_ylim(finite.min() / 1.2, top * 1.2)


def _log_scale(axes: "Axes") -> None:
    """Logarithmic, with numbers to read even where less than a decade is shown."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _acceptance(curve: Curve) -> list[float]:
    return [
        accepted / attempted if attempted else math.nan
        for accepted, attempted in zip(curve.accepted, curve.attempted, strict=True)
    ]


def _seeds(runs: dict[str, list[Run]]) -> str:
    count = max(len(of_variant) for of_variant in runs.values())
    return f"{count} seed{'s' * (count != 1)}"


@contextmanager
def _figure(path: Path, width: float, height: float) -> Iterator["Figure"]:
    """A figure written whole at the end; no display is touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    yield figure
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_atomically(path, picture.getvalue())
