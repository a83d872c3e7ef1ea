"""From recorded curves to the table of runs, and to effects with intervals.

Cost is counted in gradients of a batch. A further evaluation of the loss, such as the safeguard's,
counts one third: a backward pass takes about twice the time of a forward pass.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import binomtest, bootstrap

from lightning_stableaa.recipes.comparison.runner import Run
from lightning_stableaa.recipes.comparison.variants import BASELINE, Mode

LOSS_COST = 1 / 3  # of a gradient
DIVERGED = {1: 9.0, -1: 0.5}  # times the first validation, beyond it, by the sign of the metric
NEVER = 2.0  # times the whole cost: what a run that never reached a target counts as (PAR2)
TIE = 0.002  # values closer than this, relative, are ties
ENOUGH_SEEDS = 5
SPREADS = ("final", "equal_cost", "best", "worst_after_best")
MEDIANS = ("rank", "time_ratio", "processor_ratio", "peak_memory", "smoothing_on")
APPENDIX = ("cost_to_end_of_plain", "cost_to_stay")  # over the cost of plain, less is better


class Curve(NamedTuple):
    """Cost of each validation, and its value with the sign for which less is better."""

    costs: np.ndarray
    losses: np.ndarray  # NaN counts as inf

    def reach(self, target: float) -> float:
        """Cost of the first validation at least as good as ``target``; inf if there is none."""
        hits = np.flatnonzero(self.losses <= target)
        return float(self.costs[hits[0]]) if hits.size else math.inf

    def stay(self, target: float) -> float:
        """Cost from which on all validations are at least as good as ``target``; inf if none."""
        start = np.max(np.flatnonzero(self.losses > target), initial=-1) + 1
        return float(self.costs[start]) if start < len(self.costs) else math.inf

    def value_at(self, budget: float) -> float:
        """The value at a cost of ``budget``, interpolated linearly between two validations.

        The last one where a run ended before, or where the next is not finite; inf before the
        first.
        """
        # the budget is itself a sum of thirds: rounding must not exclude an equal cost
        count = int(np.sum(self.costs <= budget + 1e-6))
        if count == 0:
            return math.inf
        pair = slice(count - 1, count + 1)
        if count < len(self.costs) and np.isfinite(self.losses[pair]).all():
            return float(np.interp(budget, self.costs[pair], self.losses[pair]))
        return self.losses[count - 1]

    def best_at(self, budget: float) -> float:
        """The best value up to a cost of ``budget``."""
        return min([self.value_at(budget), *self.losses[self.costs <= budget]])


@dataclass(frozen=True)
class Effect:
    """Geometric mean of the ratios of all seeds, with its 95 % bootstrap interval."""

    ratio: float
    lower: float  # NaN of fewer than two seeds
    upper: float
    better: int  # seeds
    worse: int
    seeds: int
    p: float  # two-sided sign test
    side: int  # 1 where the interval is on the better side of 1, -1 on the worse, else 0
    never: int  # seeds that never reached the target


@dataclass(frozen=True)
class Summary:
    """A whole comparison."""

    tuned_baseline: str  # the best of plain's learning rates and schedules; plain if it is best
    runs: pd.DataFrame  # one row a finished run, by (variant, seed)
    figures: dict[str, str]  # headings of the primary figures
    variants: dict[str, dict[str, Any]]  # all that is reported of each, as in results.json


def summarise(runs: Sequence[Run], names: Sequence[str], mode: Mode) -> Summary:
    """Compares every run with those of plain and of the tuned baseline that have the same seed.

    Args:
        runs: of any order, finished or failed.
        names: variants to report, plain among them.
        mode: whether less (``min``) or more of the metric is better.
    """
    sign = 1 if mode == "min" else -1
    finished = {(run.variant, run.seed): run for run in runs if run.error is None}
    curves = {key: _curve(run, sign) for key, run in finished.items()}
    tuned = _tuned_baseline(curves)
    table = pd.DataFrame(
        _row(run, finished[BASELINE, run.seed], curves, tuned, sign)
        for _, run in sorted(finished.items())
        if (BASELINE, run.seed) in finished
    ).set_index(["variant", "seed"])
    table["rank"] = (sign * table["equal_cost"]).groupby("seed").rank()
    figures = {"time_to_target": f"time to target of {tuned}"}
    figures |= {"best_over_plain": f"best, over that of {BASELINE}"}
    figures |= {"best_over_tuned": f"best, over that of {tuned}"} if tuned != BASELINE else {}
    variants: dict[str, dict[str, Any]] = {}
    for name in names:
        of_variant = [run for run in runs if run.variant == name]
        labels = of_variant[0].labels if of_variant else {}
        own: Any = table[table.index.get_level_values("variant") == name]
        effects = {one: effect(own[one], sign) for one in figures}
        never = int((~own["reached_target"]).sum())
        effects["time_to_target"] = effect(own["time_to_target"], 1, never)
        variants[name] = {
            "about": labels.get("about"),
            "seeds": len(own),
            "errors": {run.seed: run.error for run in of_variant if run.error is not None},
            "effects": effects,
            "outcome": outcome(own, effects, "anderson" in labels.get("callbacks", {})),
            **{one: spread(own[one], sign) for one in SPREADS},
            **{one: spread(own[one], 1) for one in APPENDIX},
            **{one: int(own[one].sum()) for one in ("diverged", "attempted", "accepted")},
            "too_late": int((~own["validated"]).sum()),
            **{one: own[one].astype(float).quantile(0.5) for one in MEDIANS},
            "disabled": own["disabled"].dropna().droplevel("variant").to_dict(),
        }
    return Summary(tuned, table, figures, variants)


def effect(ratios: pd.Series, sign: int, never: int = 0) -> Effect:
    """Effect over seeds; ``sign`` is 1 where a ratio below 1 is better, else -1.

    NaN, which stands for what could not be compared, is left out.
    """
    with np.errstate(divide="ignore"):
        logs = np.log(ratios.dropna().to_numpy(float))
    lower = upper = math.nan
    if not len(logs):
        return Effect(math.nan, lower, upper, 0, 0, 0, math.nan, 0, never)
    if not np.isfinite(logs).all():
        lower = upper = logs.mean()
    elif len(logs) > 1:
        lower, upper = bootstrap((logs,), np.mean, method="percentile", rng=0).confidence_interval
    better, worse = int(np.sum(sign * logs < -TIE)), int(np.sum(sign * logs > TIE))
    side = int(max(sign * lower, sign * upper) < -TIE) - int(min(sign * lower, sign * upper) > TIE)
    p = binomtest(better, better + worse).pvalue if better + worse else 1.0
    ratio, lower, upper = (float(np.exp(one)) for one in (logs.mean(), lower, upper))
    return Effect(ratio, lower, upper, better, worse, len(logs), float(p), side, never)


def outcome(runs: pd.DataFrame, effects: dict[str, Effect], extrapolates: bool) -> str:
    """One word for what the runs of a variant show; the definitions are in the report."""
    if runs.empty:
        return "failed"
    if extrapolates and not runs["accepted"].any() and runs["disabled"].notna().any():
        return "disabled"
    if extrapolates and not runs["attempted"].any():
        return "untried"
    if extrapolates and runs["same"].all():
        return "unchanged"
    if not any(one.seeds for one in effects.values()):
        return "incomparable"
    sides = {one.side for one in effects.values()}
    if {1, -1} <= sides:
        return "mixed"
    return "helped" if 1 in sides else "worse" if -1 in sides else "undecided"


def spread(values: pd.Series, sign: int) -> dict[str, float | int]:
    """Median, quartiles and worst; ``sign`` is 1 where less is better, else -1."""
    signed = (sign * values.dropna().astype(float)).clip(upper=1e300)  # inf has no quantiles
    shares = signed.quantile([0.5, 0.25, 0.75, 1.0]).mask(lambda share: share > 1e290, math.inf)
    names = ("median", "lower", "upper", "worst")
    counts = {"never": int(np.sum(signed > 1e290)), "count": len(signed)}
    return dict(zip(names, (sign * shares).tolist(), strict=True)) | counts


def _curve(run: Run, sign: int) -> Curve:
    values = np.array(run.curve["values"], float)
    costs = np.array(run.curve["gradients"]) + LOSS_COST * np.array(run.curve["loss_evaluations"])
    return Curve(costs, np.where(np.isnan(values), math.inf, sign * values))


def _tuned_baseline(curves: dict[tuple[str, int], Curve]) -> str:
    """Of plain's rates and schedules with as many seeds as plain, the best median at the end."""
    ends: Any = pd.Series({key: curve.losses[-1] for key, curve in curves.items()}, dtype=float)
    medians = {BASELINE: math.inf}
    for name in dict.fromkeys(name for name, _ in curves if name.split("@")[0] == BASELINE):
        if len(ends[name]) == len(ends[BASELINE]):
            medians[name] = float(ends[name].median())
    return min(medians, key=lambda name: medians[name])  # the first of equals: plain


def _row(
    run: Run, plain: Run, curves: dict[tuple[str, int], Curve], tuned: str, sign: int
) -> dict[str, Any]:
    own, base = curves[run.variant, run.seed], curves[BASELINE, run.seed]
    goal = curves.get((tuned, run.seed))
    same = not run.curve["accepted"][-1] and np.array_equal(own.losses, base.losses)
    # between validations, the cost of attempts alone would set the same run back
    shown = base if same else own
    budget, end = base.costs[-1], base.losses[-1]
    best = shown.best_at(budget)
    late = own.losses[len(own.losses) // 2 :]
    limit = base.losses[0] + DIVERGED[sign] * abs(base.losses[0])
    last = {name: values[-1] for name, values in run.curve.items() if name != "values"}
    first = {name: values[-1] for name, values in plain.curve.items()}
    return {
        "variant": run.variant,
        "seed": run.seed,
        "final": sign * own.losses[-1],
        "equal_cost": sign * shown.value_at(budget),
        "best": sign * best,
        "validated": bool(shown.costs[0] <= budget),
        "worst_after_best": sign * own.losses[own.losses.argmin() :].max(),
        "diverged": bool(not np.isfinite(late).all() or late.max() > limit),
        "same": same,
        "time_to_target": _time_to_target(shown, goal),
        "reached_target": bool(goal and shown.reach(goal.losses[-1]) < math.inf),
        "best_over_plain": _ratio(best, base.best_at(budget), sign),
        "best_over_tuned": _ratio(best, goal.best_at(budget), sign) if goal else math.nan,
        "cost_to_end_of_plain": own.reach(end) / base.reach(end) if end < math.inf else math.nan,
        "cost_to_stay": own.stay(end) / budget if end < math.inf else math.nan,
        "time_ratio": _ratio(last["seconds"], first["seconds"], 1),
        "processor_ratio": _ratio(last["processor_seconds"], first["processor_seconds"], 1),
        "cost": own.costs[-1],
        **last,
        "peak_memory": run.peak_memory,
        "smoothing_on": run.smoothing_on,
        "disabled": run.disabled,
    }


def _time_to_target(curve: Curve, goal: Curve | None) -> float:
    """Cost to the end of ``goal``, over the cost at which ``goal`` first was as good."""
    if goal is None or not np.isfinite(goal.losses[-1]):
        return math.nan
    cost = curve.reach(goal.losses[-1])
    return min(cost, NEVER * max(curve.costs[-1], goal.costs[-1])) / goal.reach(goal.losses[-1])


def _ratio(value: float, reference: float, sign: int) -> float:
    """Of two positive numbers; NaN where there is none, infinitely bad where a run has none."""
    if not (0 < sign * reference < math.inf):
        return math.nan
    if math.isinf(value):
        return math.inf**sign
    return value / reference if sign * value > 0 else math.nan
