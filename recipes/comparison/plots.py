"""Pictures of a comparison; a variant has one colour in all of them."""

import math
import textwrap
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pandas as pd

from lightning_stableaa.recipes.comparison.runner import Run
from lightning_stableaa.recipes.comparison.statistics import LOSS_COST, Summary
from lightning_stableaa.recipes.comparison.variants import BASELINE, Plan
from lightning_stableaa.recipes.plots import (
    ACCELERATED,
    GREY,
    PLAIN,
    label_within_decades,
    save_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COST = "cost, in gradients (a further loss evaluation is one third)"
# Reds and purples extrapolate, blues average, greens change the optimizer.
COLORS = {
    "plain": PLAIN,
    "anderson": ACCELERATED,
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
DASHES = ("--", "-.", ":")


def style(name: str) -> dict[str, Any]:
    """Colour and line of a variant, the same in any comparison; dashes mark another rate."""
    base, _, change = name.partition("@")
    color = COLORS.get(base, f"C{zlib.crc32(base.encode()) % 10}")
    dashes = DASHES[zlib.crc32(change.encode()) % len(DASHES)]
    return {"color": color, "linestyle": dashes if change else "-"}


def draw(plan: Plan, runs: Sequence[Run], summary: Summary) -> None:
    """Draws ``curves.png``, ``variants.png``, ``seeds.png`` and ``ratios.png``."""
    finished = [run for run in runs if run.error is None]
    curves = _table(finished, lambda run: run.curve)
    curves["cost"] = curves["gradients"] + LOSS_COST * curves["loss_evaluations"]
    curves["share"] = curves["accepted"] / curves["attempted"].where(curves["attempted"] > 0)
    rsd = _table(finished, lambda run: {"cost": run.rsd_gradients, "rsd": run.rsd})
    _draw_curves(plan, curves, rsd, summary)
    _draw_variants(plan, curves)
    _draw_seeds(plan, curves, summary)
    _draw_ratios(plan, summary)


def _table(runs: Sequence[Run], columns: Callable[[Run], dict[str, list[float]]]) -> pd.DataFrame:
    """What all runs recorded, one below the other; NaN for all that is not finite."""
    tables = [pd.DataFrame(columns(run)).assign(variant=run.variant, seed=run.seed) for run in runs]
    table = pd.concat(tables).rename_axis("validation")
    return table.replace([math.inf, -math.inf], math.nan)


def _draw_curves(plan: Plan, curves: pd.DataFrame, rsd: pd.DataFrame, summary: Summary) -> None:
    """The variants that the verdict is about, with RSD and acceptance below."""
    names = _main_variants(summary)
    curves = curves.loc[curves["variant"].isin(names)]
    rsd = rsd.loc[rsd["variant"].isin(names)]
    below = ["rsd"] * (not rsd.empty) + ["accepted"] * bool(curves["attempted"].any())
    mosaic: list[Any] = [["cost", "time"], *([one, "legend"] for one in below or ["legend"])]
    height = 4.2 + 1.9 * len(mosaic[1:])
    with _figure(plan, "curves", 10, height) as figure:
        axes = figure.subplot_mosaic(mosaic, height_ratios=[3, *[1.3] * len(mosaic[1:])])
        for name in names:
            _band(axes["cost"], curves, name)
            _band(axes["time"], curves, name, x="seconds")
        for key, label in (("cost", COST), ("time", "training time, s")):
            axes[key].set(xlabel=label, ylabel=plan.metric)
            _scale(axes[key], curves["values"], plan)
        if "rsd" in below:
            for name in rsd["variant"].unique():
                _band(axes["rsd"], rsd, name, y="rsd")
            axes["rsd"].set(ylabel="RSD", yscale="log")
            label_within_decades(axes["rsd"], "y")
        if "accepted" in below:
            for name in curves.loc[curves["attempted"] > 0, "variant"].unique():
                _band(axes["accepted"], curves, name, y="share")
            axes["accepted"].set(ylabel="accepted\nshare", ylim=(-0.05, 1.05))
        for key in below:
            axes[key].sharex(axes["cost"])
            axes[key].set(xlabel=COST if key == below[-1] else "")
        handles, labels = axes["cost"].get_legend_handles_labels()
        title = f"median and quartiles of {curves['seed'].nunique()} seeds"
        axes["legend"].axis("off")
        axes["legend"].legend(handles, labels, title=title, loc="center")


def _draw_variants(plan: Plan, curves: pd.DataFrame) -> None:
    """Median and quartiles of every variant beside those of plain."""
    names = [name for name in curves["variant"].unique() if name != BASELINE] or [BASELINE]
    with _panels(plan, "variants", names, f"median and quartiles, {BASELINE} in black") as panels:
        for name, axes in panels.items():
            for drawn in dict.fromkeys([BASELINE, name]):
                _band(axes, curves, drawn)
        _scale(next(iter(panels.values())), curves["values"], plan)


def _draw_seeds(plan: Plan, curves: pd.DataFrame, summary: Summary) -> None:
    """Every run of every variant; crosses at the upper edge are validations without a number."""
    names = list(curves["variant"].unique())
    with _panels(plan, "seeds", names, "every seed; crosses: not finite") as panels:
        for name, axes in panels.items():
            color = style(name)["color"]
            own = curves.loc[curves["variant"] == name]
            seeds = own.pivot(columns="seed", values=["cost", "values"])
            axes.plot(seeds["cost"], seeds["values"], color=color, lw=0.9)
            lost = own["cost"][own["values"].isna()]
            upper = axes.get_xaxis_transform()
            axes.plot(lost, [0.97] * len(lost), "x", color=color, transform=upper)
            one = summary.variants[name]
            if one["diverged"]:
                label = f"{one['diverged']} of {one['seeds']} diverged"
                axes.text(0.97, 0.9, label, transform=axes.transAxes, ha="right", va="top")
        _scale(next(iter(panels.values())), curves["values"], plan, largest_range=1e8)


def _draw_ratios(plan: Plan, summary: Summary) -> None:
    """The primary figures: every seed, geometric mean and interval."""
    effects = {name: one["effects"] for name, one in summary.variants.items() if one["seeds"]}
    figures = [one for one, effect in effects[BASELINE].items() if effect.seeds]
    names = [name for name in effects if name != BASELINE][::-1]
    if not figures or not names:
        return
    heading = "seeds (circles), geometric mean (diamond), 95 % interval (bar)"
    width, height = 2.5 + 3.5 * len(figures), 1.7 + 0.34 * len(names)
    with _figure(plan, "ratios", width, height, heading) as figure:
        grid = figure.subplots(1, len(figures), sharey=True, squeeze=False)[0]
        for key, axes in zip(figures, grid, strict=True):
            for row, name in enumerate(names):
                color, effect = style(name)["color"], effects[name][key]
                seeds = summary.runs.loc[name, key]
                axes.plot([effect.lower, effect.upper], [row, row], color=color, lw=5, alpha=0.3)
                axes.plot(seeds, [row] * len(seeds), "o", color=color, ms=4, mfc="none")
                axes.plot(effect.ratio, row, "D", color=color, ms=6)
            axes.axvline(1, color=GREY, linestyle="--", linewidth=1)
            axes.set_title(summary.figures[key], fontsize=9)
            axes.set(xscale="log", yticks=range(len(names)), yticklabels=names)
            axes.margins(x=0.1)
            axes.grid(axis="x", which="both", alpha=0.25)
            label_within_decades(axes, "x")


def _main_variants(summary: Summary) -> list[str]:
    """Both baselines, the accelerated variants, and the best of the others."""
    variants = {name: one for name, one in summary.variants.items() if one["seeds"]}
    tried = [name for name in variants if variants[name]["attempted"]]
    rest = [one for one in variants if one not in tried and one.split("@")[0] != BASELINE]
    groups = ([name for name in tried if "@" in name], rest)
    best = [min(names, key=lambda name: variants[name]["rank"]) for names in groups if names]
    names = [BASELINE, summary.tuned_baseline, *(name for name in tried if "@" not in name), *best]
    return list(dict.fromkeys(names))


def _band(
    axes: "Axes", table: pd.DataFrame, name: str, *, x: str = "cost", y: str = "values"
) -> None:
    """Median and quartiles of the i-th values of all seeds, at the median of their i-th ``x``."""
    own = table.loc[table["variant"] == name, [x, y]].groupby("validation")
    lower, middle, upper = (own.quantile(share) for share in (0.25, 0.5, 0.75))
    color = style(name)["color"]
    axes.fill_between(middle[x], lower[y], upper[y], color=color, alpha=0.15, linewidth=0)
    axes.plot(middle[x], middle[y], **style(name), linewidth=1.5, label=name)
    axes.grid(alpha=0.25)


def _scale(axes: "Axes", values: Any, plan: Plan, *, largest_range: float = 1e3) -> None:
    """Logarithmic for errors, up to ``largest_range`` times the median."""
    if plan.mode == "min" and values.min() > 0:  # not of no values, whose least is NaN
        top = min(values.max(), largest_range * values.median())
        axes.set(yscale="log", ylim=(values.min() / 1.2, top * 1.2))
        label_within_decades(axes, "y")


@contextmanager
def _panels(
    plan: Plan, file: str, names: Sequence[str], heading: str
) -> Iterator[dict[str, "Axes"]]:
    """One panel a variant, all with the same axes."""
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    with _figure(plan, file, 1.5 + 2.8 * columns, 1.4 + 2.2 * rows, heading) as figure:
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        panels = dict(zip(names, grid.flat, strict=False))
        for name, axes in panels.items():
            axes.set_title(name, fontsize=9)
        for axes in grid.flat[max(0, len(names) - columns) : len(names)]:
            axes.tick_params(labelbottom=True)  # the lowest panel of its column
        yield panels
        for axes in grid.flat[len(names) :]:
            axes.axis("off")
        figure.supxlabel(textwrap.fill(COST, 28 * columns), fontsize=10)
        figure.supylabel(plan.metric, fontsize=10)


@contextmanager
def _figure(
    plan: Plan, file: str, width: float, height: float, heading: str = ""
) -> Iterator["Figure"]:
    """A figure written whole at the end, its title wrapped into its width."""
    with save_figure(plan.folder / f"{file}.png", (width, height)) as figure:
        title = f"{plan.title}: {heading}" if heading else plan.title
        figure.suptitle(textwrap.fill(title, max(20, int(width * 10))), fontsize=11)
        yield figure
