"""Pictures of a comparison; a variant has one colour in all of them."""

import io
import math
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lightning_stableaa.recipes.comparison.cost import Curve, Mode
from lightning_stableaa.recipes.comparison.runner import Run
from lightning_stableaa.recipes.comparison.summary import Summary
from lightning_stableaa.recipes.comparison.verdict import (
    accelerated,
    best_averaging,
    is_accelerated,
)
from lightning_stableaa.recipes.files import write_atomically
from lightning_stableaa.recipes.plots import GREY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COST = "cost, in gradients (a further loss evaluation is one third)"
SECONDS = "training time, s"

# Reds and purples extrapolate, blues average, greens change the optimizer.
COLORS = {
    "plain": "#222222",
    "anderson": "#D55E00",
    "anderson_smoothing": "#F5A300",
    "paper": "#8E24AA",
    "paper_safeguard": "#CC79A7",
    "textbook_aa": "#B71C1C",
    "textbook_aa_safeguard": "#F06292",
    "textbook_aa_smoothing_always": "#5E35B1",
    "aadl": "#795548",
    "smoothing": "#0072B2",
    "smoothing_always": "#56B4E9",
    "history_average": "#3949AB",
    "ema": "#00ACC1",
    "ema_slow": "#00838F",
    "swa": "#90A4AE",
    "lookahead": "#7CB342",
    "schedule_free": "#009E73",
    "lbfgs": "#B0A000",
}
OTHERS = ("#6D4C41", "#AD1457", "#2E7D32", "#1565C0", "#EF6C00", "#6A1B9A")
LARGEST_RANGE = 1e8  # of a logarithmic scale, times the median


class Style(NamedTuple):
    """How a variant is drawn; dashes mark another learning rate or schedule."""

    color: str
    linestyle: str


class Band(NamedTuple):
    """Median and quartiles over seeds."""

    x: np.ndarray
    lower: np.ndarray
    median: np.ndarray
    upper: np.ndarray


def draw(folder: Path, title: str, runs: Sequence[Run], summary: Summary) -> None:
    """Draws ``curves.png``, ``variants.png``, ``seeds.png`` and ``ratios.png`` into ``folder``."""
    curves: dict[str, list[Run]] = {name: [] for name in summary.variants}
    for run in runs:
        if run.error is None:
            curves[run.variant].append(run)
    curves = {name: of_variant for name, of_variant in curves.items() if of_variant}
    if not curves:
        return
    styles = variant_styles(summary.variants)
    _draw_curves(folder / "curves.png", title, curves, summary, styles)
    _draw_variants(folder / "variants.png", title, curves, summary, styles)
    _draw_seeds(folder / "seeds.png", title, curves, summary, styles)
    _draw_ratios(folder / "ratios.png", title, summary, styles)


def variant_styles(names: Iterable[str]) -> dict[str, Style]:
    """The style of each variant; of the standard ones, the same in every comparison."""
    listed = list(names)
    others = dict.fromkeys(base for name in listed if (base := name.split("@")[0]) not in COLORS)
    colors = COLORS | {base: OTHERS[i % len(OTHERS)] for i, base in enumerate(others)}
    dashes = ("--", "-.", ":")
    styles: dict[str, Style] = {}
    modified: dict[str, int] = {}
    for name in listed:
        base, at, _ = name.partition("@")
        count = modified[base] = modified.get(base, -1) + bool(at)
        styles[name] = Style(colors[base], dashes[max(0, count) % len(dashes)] if at else "-")
    return styles


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


def _draw_curves(
    path: Path,
    title: str,
    runs: dict[str, list[Run]],
    summary: Summary,
    styles: dict[str, Style],
) -> None:
    """The variants that the verdict is about, with RSD and acceptance below."""
    names = [name for name in _main_variants(summary) if name in runs]
    extrapolating = [name for name in names if is_accelerated(name)]
    smoothed = [name for name in names if any(run.rsd for run in runs[name])]
    below = (["rsd"] if smoothed else []) + (["accepted"] if extrapolating else [])
    rows: list[Any] = [["cost", "time"], *([name, "legend"] for name in below or ["legend"])]
    with _figure(path, 10, 4.2 + 1.9 * len(rows[1:]), title) as figure:
        axes = figure.subplot_mosaic(rows, height_ratios=[3, *[1.3] * len(rows[1:])])
        for name in names:
            curves = [run.curve for run in runs[name]]
            _plot(axes["cost"], band((c.costs, c.values) for c in curves), styles[name], name)
            _plot(axes["time"], band((c.seconds, c.values) for c in curves), styles[name])
        for name in smoothed:
            series = ((run.rsd_gradients, run.rsd) for run in runs[name] if run.rsd)
            _plot(axes["rsd"], band(series), styles[name])
        for name in extrapolating:
            series = [(run.curve.costs, _acceptance(run.curve)) for run in runs[name]]
            _plot(axes["accepted"], band(series), styles[name])
        values = [v for name in names for run in runs[name] for v in run.curve.values]
        for key, label in (("cost", COST), ("time", SECONDS)):
            axes[key].set(xlabel=label, ylabel=summary.metric)
            _scale(axes[key], values, summary.mode, largest_range=1e3)
        if smoothed:
            axes["rsd"].set(ylabel="RSD", yscale="log")
        if extrapolating:
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


def _draw_variants(
    path: Path,
    title: str,
    runs: dict[str, list[Run]],
    summary: Summary,
    styles: dict[str, Style],
) -> None:
    """Median and quartiles of every variant, with the baseline in grey."""
    names = [name for name in runs if name != summary.baseline] or list(runs)
    heading = f"{title}: median and quartiles, {summary.baseline} in grey ({_seeds(runs)})"
    values = [v for of_variant in runs.values() for r in of_variant for v in r.curve.values]
    with _panels(path, names, heading, summary) as panels:
        for name, axes in panels.items():
            for drawn, style in ((summary.baseline, Style(GREY, "-")), (name, styles[name])):
                curves = [run.curve for run in runs.get(drawn, ())]
                if curves:
                    _plot(axes, band((c.costs, c.values) for c in curves), style, drawn)
        _scale(next(iter(panels.values())), values, summary.mode, largest_range=1e3)


def _draw_seeds(
    path: Path,
    title: str,
    runs: dict[str, list[Run]],
    summary: Summary,
    styles: dict[str, Style],
) -> None:
    """Every run of every variant; crosses at the upper edge are validations without a number."""
    values = [v for of_variant in runs.values() for r in of_variant for v in r.curve.values]
    heading = f"{title}: every seed; crosses: not finite"
    with _panels(path, list(runs), heading, summary) as panels:
        for name, axes in panels.items():
            for run in runs[name]:
                costs, y = np.array(run.curve.costs), np.array(run.curve.values, float)
                axes.plot(
                    costs, np.where(np.isfinite(y), y, np.nan), color=styles[name].color, lw=0.9
                )
                axes.plot(
                    costs[~np.isfinite(y)],
                    np.full((~np.isfinite(y)).sum(), 0.97),
                    "x",
                    color=styles[name].color,
                    transform=axes.get_xaxis_transform(),
                )
            axes.grid(alpha=0.25)
            count = summary.variants[name].diverged
            if count:
                label = f"{count} of {len(runs[name])} diverged"
                axes.text(0.97, 0.97, label, transform=axes.transAxes, ha="right", va="top")
        _scale(next(iter(panels.values())), values, summary.mode, largest_range=LARGEST_RANGE)


def _draw_ratios(path: Path, title: str, summary: Summary, styles: dict[str, Style]) -> None:
    """Cost to target: every seed, quartiles and median."""
    ranked = sorted(
        (one for one in summary.variants.values() if one.cost_ratio.count),
        key=lambda one: (-one.cost_ratio.median, -one.cost_ratio.never),
    )
    if not ranked:
        return
    ratios = {one.name: [r.cost_ratio for r in one.seeds.values()] for one in ranked}
    finite = [r for of_variant in ratios.values() for r in of_variant if math.isfinite(r)]
    never = max([*finite, 1.0]) * 1.6  # where seeds are drawn that never reached the target
    heading = f"{title}: seeds (circles), median (diamond), quartiles (bar)"
    with _figure(path, 8, 1.5 + 0.34 * len(ranked), heading) as figure:
        axes = figure.subplots()
        for height, one in enumerate(ranked):
            color = styles[one.name].color
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


def _main_variants(summary: Summary) -> list[str]:
    """The baseline, the tuned baseline, accelerated variants, and the best that only averages."""
    names = [summary.baseline, summary.tuned_baseline]
    names += [one.name for one in accelerated(summary)]
    names += ["smoothing"] if "smoothing" in summary.variants else []
    averaging = best_averaging(summary)
    names += [averaging.name] if averaging is not None else []
    return list(dict.fromkeys(names))


def _plot(axes: "Axes", drawn: Band, style: Style, label: str | None = None) -> None:
    color, linestyle = style
    axes.fill_between(drawn.x, drawn.lower, drawn.upper, color=color, alpha=0.15, linewidth=0)
    axes.plot(drawn.x, drawn.median, color=color, linestyle=linestyle, linewidth=1.5, label=label)
    axes.grid(alpha=0.25)


def _scale(axes: "Axes", values: Sequence[float], mode: Mode, *, largest_range: float) -> None:
    """Logarithmic for errors, up to ``largest_range`` times the median."""
    finite = np.array([value for value in values if math.isfinite(value)])
    if mode == "min" and len(finite) and finite.min() > 0:
        top = min(finite.max(), largest_range * np.median(finite))
        axes.set_yscale("log")
        axes.set_ylim(finite.min() / 1.2, top * 1.2)
        _label_within_decades(axes)


def _label_within_decades(axes: "Axes") -> None:
    """Numbers to read where fewer than three decades are shown."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    low, high = axes.get_ylim()
    if high / low < 1e3:
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
def _panels(
    path: Path, names: Sequence[str], heading: str, summary: Summary
) -> Iterator[dict[str, "Axes"]]:
    """One panel a variant, all with the same axes."""
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    with _figure(path, 1 + 2.8 * columns, 1.2 + 2.2 * rows, heading) as figure:
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        panels = dict(zip(names, grid.flat, strict=False))
        for name, axes in panels.items():
            axes.set_title(name, fontsize=9)
        for axes in grid.flat[max(0, len(names) - columns) : len(names)]:
            axes.tick_params(labelbottom=True)  # the lowest panel of its column
        yield panels
        for axes in grid.flat[len(names) :]:
            axes.axis("off")
        figure.supxlabel(COST, wrap=True, fontsize=10)
        figure.supylabel(summary.metric, fontsize=10)


@contextmanager
def _figure(path: Path, width: float, height: float, heading: str) -> Iterator["Figure"]:
    """A figure written whole at the end; no display is touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    per_line = max(20, int(width * 10))  # characters of a heading in the figure's width
    figure.suptitle(textwrap.fill(heading, per_line), fontsize=11)
    yield figure
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_atomically(path, picture.getvalue())
