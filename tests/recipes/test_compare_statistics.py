"""Costs, effects with intervals and outcomes, on curves made by hand."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from benchmarks import paper_tables
from lightning_stableaa.recipes.comparison.report import verdict
from lightning_stableaa.recipes.comparison.runner import Run
from lightning_stableaa.recipes.comparison.statistics import (
    Curve,
    Summary,
    effect,
    spread,
    summarise,
)
from lightning_stableaa.recipes.comparison.variants import Mode

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
NAN, INF = math.nan, math.inf
PLAIN = [8.0, 4.0, 2.0, 1.0]
SOONER = [4.0, 1.0, 0.5, 0.25]


def run(name: str, seed: int, values: Sequence[float], *, losses: int = 0, **more: Any) -> Run:
    """A validation every ten gradients and every second, with ``losses`` loss evaluations each.

    Acceleration, where there is any, accepts every candidate.
    """
    counts = range(1, len(values) + 1)
    accelerated = name.startswith(("anderson", "paper"))
    curve: dict[str, list[float]] = {
        "gradients": [10 * i for i in counts],
        "loss_evaluations": [losses * i for i in counts],
        "seconds": [float(i) for i in counts],
        "processor_seconds": [i / 2 for i in counts],
        "values": list(values),
        "attempted": [accelerated * i for i in counts],
        "accepted": [accelerated * i for i in counts],
    }
    labels = {"about": name, "callbacks": {"anderson": {}} if accelerated else {}}
    return Run(name, seed, labels, curve | more.pop("curve", {}), **more)


def compare(variants: dict[str, Sequence[Sequence[float]]], mode: Mode = "min") -> Summary:
    """One curve for each seed of each variant."""
    runs = [run(name, i, one) for name, curves in variants.items() for i, one in enumerate(curves)]
    return summarise(runs, list(variants), mode)


def against_plain(name: str, values: Sequence[float], seeds: int = 5) -> Summary:
    """Every seed of a variant has the same curve."""
    return compare({"plain": [PLAIN] * seeds, name: [values] * seeds})


def outcomes(summary: Summary) -> dict[str, str]:
    return {name: one["outcome"] for name, one in summary.variants.items() if name != "plain"}


def curve(values: Sequence[float], losses: int = 0) -> Curve:
    counts = np.arange(1, len(values) + 1)
    return Curve(counts * (10 + losses / 3), np.nan_to_num(np.array(values), nan=INF, posinf=INF))


@pytest.mark.parametrize(
    ("values", "target", "first", "stays"),
    [
        ([4, 3, 2, 1], 2, 30, 30),  # equal is good enough
        ([4, 1, 3, 2], 2, 20, 40),  # the first time, though it got worse again
        ([4, 1, 2, 3], 2, 20, INF),
        ([4, 3, 2, 1], 0.5, INF, INF),
        ([NAN, 3, NAN, 1], 2, 40, 40),  # NaN reaches nothing
        ([2, 2, 2, 2], 2, 10, 10),
    ],
)
def test_curve_target_reached_first_and_for_good(
    values: list[float], target: float, first: float, stays: float
) -> None:
    assert (curve(values).reach(target), curve(values).stay(target)) == (first, stays)


def test_curve_value_at_budget_interpolates() -> None:
    made = curve([4, 3, 2, 1], losses=1)
    assert made.value_at(31) == pytest.approx(2)
    assert made.value_at(31 - 31 / 12) == pytest.approx(2.25)
    assert made.value_at(1000) == 1
    assert made.value_at(1) == INF
    broken = curve([4, 3, NAN, 1], losses=1)
    assert (broken.value_at(30), broken.value_at(32), broken.best_at(32)) == (3, INF, 3)


@pytest.mark.parametrize(
    ("values", "mode", "first", "expected"),
    [
        ([1, 100, 1, 1], "min", 2, False),  # in the first half
        ([1, 1, 20, 1], "min", 2, False),  # ten times, and not more
        ([1, 1, 20.5, 1], "min", 2, True),
        ([1, 1, 1, NAN], "min", 2, True),
        ([-1, -1, 8, -1], "min", -1, False),
        ([-1, -1, 8.5, -1], "min", -1, True),
        ([0.1, 0.1, 0.2, 0.4], "max", 0.4, False),
        ([0.1, 0.1, 0.4, 0.19], "max", 0.4, True),
    ],
)
def test_diverged_second_half_is_compared_with_first_of_plain(
    values: list[float], mode: Mode, first: float, expected: bool
) -> None:
    summary = compare({"plain": [[first] * 4], "ema": [values]}, mode)
    assert summary.variants["ema"]["diverged"] == expected


@pytest.mark.parametrize(
    ("values", "mode", "expected"),
    [([9, 1, 3, 2], "min", 3), ([9, 1, NAN, 2], "min", INF), ([0.1, 0.9, 0.7, 0.8], "max", 0.7)],
)
def test_worst_after_best_counts_from_best_on(
    values: list[float], mode: Mode, expected: float
) -> None:
    summary = compare({"plain": [values]}, mode)
    assert summary.variants["plain"]["worst_after_best"]["median"] == expected


def test_spread_infinite_values_have_quartiles() -> None:
    assert spread(pd.Series([1, 2, INF]), 1) == {
        **{"median": 2, "lower": 1.5, "upper": INF, "worst": INF},
        **{"never": 1, "count": 3},
    }
    more_is_better = spread(pd.Series([0.1, 0.4, 0.2, NAN]), -1)
    assert (more_is_better["median"], more_is_better["worst"]) == (0.2, 0.1)
    assert (more_is_better["never"], more_is_better["count"]) == (0, 3)


def test_summary_two_seeds_has_exact_figures() -> None:
    runs = [
        # seed 0 reaches its final value 2 already at its second validation: its cost is 20
        *(run("plain", i, one) for i, one in enumerate([[4, 2, 3, 2], [4, 3, 2, 1]])),
        *(run("plain@3x", i, one) for i, one in enumerate([[2, 2, 1, 0.5], [1, 1, 1, 0.8]])),
        *(run("anderson", i, one, losses=6) for i, one in enumerate([[2, 2, 2, 2], [9, 9, 99, 1]])),
    ]
    summary = summarise(runs, ["plain", "plain@3x", "anderson"], "min")
    assert summary.tuned_baseline == "plain@3x"
    seeds = summary.runs.unstack("seed")
    # never, which counts as twice 48, over 40
    assert list(seeds.loc["anderson", "time_to_target"]) == pytest.approx([96 / 40] * 2)
    assert list(seeds.loc["plain", "time_to_target"]) == [2, 2]
    # of 40 gradients, its third validation cost 36 and its fourth 48: a third of the way
    assert list(seeds.loc["anderson", "equal_cost"]) == [2, pytest.approx(99 - 98 / 3)]
    assert list(seeds.loc["anderson", "best"]) == [2, 9]
    assert list(seeds.loc["anderson", "best_over_plain"]) == [1, 9]
    assert list(seeds.loc["anderson", "best_over_tuned"]) == [4, 9 / 0.8]
    # twelve for ten, and at the end 48 against 40
    assert list(seeds.loc["anderson", "cost_to_end_of_plain"]) == [12 / 20, 48 / 40]
    assert list(seeds.loc["plain@3x", "cost_to_end_of_plain"]) == [10 / 20, 10 / 40]
    assert list(seeds.loc["anderson", "cost_to_stay"]) == [12 / 40, 48 / 40]
    assert [one["rank"] for one in summary.variants.values()] == [2.25, 1, 2.75]
    assert summary.variants["anderson"]["diverged"] == 1
    assert summary.variants["anderson"]["final"]["median"] == 1.5


@pytest.mark.parametrize(
    "path", sorted(RESULTS.rglob("*/results.json")), ids=lambda p: p.parent.name
)
def test_summary_committed_runs_give_committed_medians(path: Path) -> None:
    report = json.loads(path.read_text())
    for one in report["runs"]:
        one["curve"]["values"] = [NAN if v is None else v for v in one["curve"]["values"]]
    runs = [Run(one["variant"], one["seed"], {}, one["curve"]) for one in report["runs"]]
    made = summarise(runs, list(report["variants"]), report["mode"]).variants
    for name, committed in report["variants"].items():
        assert made[name]["diverged"] == committed["diverged"]
        for figure in ("final", "best", "worst_after_best"):  # with six digits
            expected = pytest.approx(committed[figure]["median"], rel=1e-5)
            assert made[name][figure]["median"] == expected
    rows = paper_tables.table(report).splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(report["variants"])


def test_summary_failed_run_is_left_out() -> None:
    runs = [run("plain", seed, [2, 1]) for seed in (0, 1)] + [run("ema", 0, [1, 1])]
    runs.append(Run("ema", 1, {}, error="RuntimeError: no"))
    ema = summarise(runs, ["plain", "ema"], "min").variants["ema"]
    assert (ema["seeds"], ema["errors"]) == (1, {1: "RuntimeError: no"})
    assert ema["cost_to_end_of_plain"]["median"] == 0.5


def test_effect_is_geometric_mean_with_interval_and_sign_test() -> None:
    made = effect(pd.Series([0.5, 0.8, 1.25, 0.4, 0.9, NAN]), 1)
    assert made.ratio == pytest.approx((0.5 * 0.8 * 1.25 * 0.4 * 0.9) ** (1 / 5))
    assert (made.better, made.worse, made.seeds) == (4, 1, 5)
    assert made.p == pytest.approx(12 / 32)  # five or four of a side, and the other side
    assert 0.4 < made.lower < made.ratio < made.upper < 1.25
    # of two seeds, a quarter of the resamples has the first twice, a quarter the second
    pair = effect(pd.Series([0.5, 0.8]), 1)
    assert (pair.lower, pair.upper) == pytest.approx((0.5, 0.8))


@pytest.mark.parametrize(
    ("ratios", "sign", "side"),
    [
        ([0.5, 0.6, 0.7], 1, 1),
        ([0.5, 0.6, 0.7], -1, -1),
        ([1.5, 1.6], 1, -1),
        ([0.5, 2.0, 0.9], 1, 0),
        ([0.999] * 5, 1, 0),  # a tie
        ([0.5], 1, 0),  # one seed has no interval
        ([0.5, INF], 1, -1),
        ([], 1, 0),
    ],
)
def test_effect_side_is_that_of_interval(ratios: list[float], sign: int, side: int) -> None:
    assert effect(pd.Series(ratios, dtype=float), sign).side == side


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (SOONER, "helped"),
        (PLAIN, "undecided"),
        ([8, 8, 8, 2], "worse"),
        ([8, 4, 2, NAN], "worse"),
        ([1, 1.5, 1.5, 2], "helped"),  # its best is kept, whatever comes after
        ([0.999, 9, 9, 9], "helped"),  # sooner, and as good
        ([8, 8, 8, 0.5], "helped"),
    ],
)
def test_outcome_primary_figures_decide(values: list[float], expected: str) -> None:
    assert outcomes(against_plain("anderson", values)) == {"anderson": expected}


def test_outcome_tuned_baseline_is_better_is_mixed() -> None:
    tuned = [[2, 0.2, 0.15, 0.1]] * 5
    summary = compare({"plain": [PLAIN] * 5, "plain@3x": tuned, "anderson": [SOONER] * 5})
    assert outcomes(summary) == {"plain@3x": "helped", "anderson": "mixed"}
    (row,) = [row for row in verdict(summary) if row["variant"] == "anderson"]
    assert row == {
        "variant": "anderson",
        "time to target of plain@3x": "2 [2, 2]; 0 of 5; p = 0.062; never in 5",
        "best, over that of plain": "0.25 [0.25, 0.25]; 5 of 5; p = 0.062",
        "best, over that of plain@3x": "2.5 [2.5, 2.5]; 0 of 5; p = 0.062",
        "outcome": "mixed",
    }


def test_outcome_more_is_better_has_other_side() -> None:
    plain, better = [0.1, 0.3, 0.4, 0.5], [0.2, 0.5, 0.6, 0.7]
    summary = compare({"plain": [plain] * 3, "anderson": [better] * 3}, "max")
    assert outcomes(summary) == {"anderson": "helped"}
    assert summary.variants["anderson"]["effects"]["best_over_plain"].ratio == pytest.approx(1.4)
    summary = compare({"plain": [better] * 3, "anderson": [plain] * 3}, "max")
    assert outcomes(summary) == {"anderson": "worse"}


def test_outcome_values_below_zero_have_no_ratio() -> None:
    summary = compare({"plain": [[0, -1, -2]] * 3, "anderson": [[-2, -3, -4]] * 3})
    assert summary.variants["anderson"]["effects"]["best_over_plain"].seeds == 0
    assert outcomes(summary) == {"anderson": "helped"}  # by the time to target


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"curve": {"accepted": [0] * 4}}, "unchanged"),
        ({"curve": {"accepted": [0] * 4, "attempted": [0] * 4}}, "untried"),
        (
            {"curve": {"accepted": [0] * 4, "attempted": [0] * 4}, "disabled": "losses differ"},
            "disabled",
        ),
        ({}, "undecided"),  # with accepted candidates, it is another run
    ],
)
def test_outcome_runs_equal_to_plain(changes: dict[str, Any], expected: str) -> None:
    """The cost of attempts alone is no difference between the runs."""
    runs = [run("plain", seed, PLAIN) for seed in range(5)]
    runs += [dataclasses.replace(run("anderson", 0, PLAIN, **changes), seed=i) for i in range(5)]
    summary = summarise(runs, ["plain", "anderson"], "min")
    assert outcomes(summary) == {"anderson": expected}


def test_outcome_no_finished_or_finite_run() -> None:
    failed = Run("ema", 0, {}, error="RuntimeError: no")
    runs = [run("plain", 0, [NAN] * 4), run("anderson", 0, PLAIN), failed]
    summary = summarise(runs, ["plain", "anderson", "ema"], "min")
    assert outcomes(summary) == {"anderson": "incomparable", "ema": "failed"}


def test_best_of_run_validated_too_late_is_none_in_time(tmp_path: Path) -> None:
    late = run("lbfgs", 0, [1.0], curve={"gradients": [50]})  # the whole plain run costs 40
    summary = summarise([run("plain", 0, PLAIN), late], ["plain", "lbfgs"], "min")
    assert summary.variants["lbfgs"]["too_late"] == 1
    assert summary.variants["plain"]["too_late"] == 0
    (row,) = verdict(summary)
    assert row["best, over that of plain"].startswith("none in time; 0 of 1")
