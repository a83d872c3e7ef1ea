"""Costs, reaching a target, divergence and the summary, on curves made by hand."""

import math
from dataclasses import astuple

import pytest

from lightning_stableaa.recipes.comparison.cost import (
    Mode,
    cost_to_reach,
    cost_to_stay,
    diverged,
    quantile,
    ranks,
    seconds_to_reach,
    sign_test,
    value_within,
    worst_after_best,
)
from lightning_stableaa.recipes.comparison.runner import Run
from lightning_stableaa.recipes.comparison.summary import Spread, summarise
from tests.helpers.curves import curve

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("values", "mode", "target", "cost"),
    [
        ([4, 3, 2, 1], "min", 2, 30),  # equal is good enough
        ([4, 1, 2, 3], "min", 2, 20),  # the first time, though it got worse again
        ([4, 3, 2, 1], "min", 0.5, INF),
        ([NAN, 3, NAN, 1], "min", 2, 40),  # NaN reaches nothing
        ([0.1, 0.3, 0.2, 0.5], "max", 0.25, 20),
        ([0.1, 0.3, 0.2, 0.5], "max", 0.6, INF),
    ],
)
def test_cost_to_reach_is_first_validation_at_target(
    values: list[float], mode: Mode, target: float, cost: float
) -> None:
    assert cost_to_reach(curve(values), target, mode) == cost
    assert seconds_to_reach(curve(values), target, mode) == cost / 10


@pytest.mark.parametrize(
    ("values", "cost"),
    [
        ([1, 3, 2, 1], 30),
        ([2, 2, 2, 2], 10),
        ([1, 1, 1, 3], INF),
        ([3, NAN, 1, 2], 30),
        ([1, 1, 1, NAN], INF),
    ],
)
def test_cost_to_stay_ignores_lucky_validations(values: list[float], cost: float) -> None:
    assert cost_to_stay(curve(values), 2, "min") == cost


def test_value_within_budget_interpolates() -> None:
    made = curve([4, 3, 2, 1], losses=1)
    assert made.costs[2] == pytest.approx(31)
    assert value_within(made, 31, "min") == pytest.approx(2)
    assert value_within(made, 31 - 31 / 12, "min") == pytest.approx(2.25)
    assert value_within(made, 1000, "min") == 1
    broken = curve([4, 3, NAN, 1], losses=1)
    assert value_within(broken, 30, "min") == 3
    assert value_within(broken, 32, "min") == INF
    assert value_within(made, 1, "min") == INF
    assert value_within(made, 1, "max") == -INF


@pytest.mark.parametrize(
    ("values", "mode", "first", "expected"),
    [
        ([1, 100, 1, 1], "min", 2, False),  # in the first half
        ([1, 1, 20, 1], "min", 2, False),  # ten times, and not more
        ([1, 1, 20.5, 1], "min", 2, True),
        ([1, 1, 1, NAN], "min", 2, True),
        ([1, 1, 1, 1], "min", INF, False),
        ([-1, -1, 8, -1], "min", -1, False),
        ([-1, -1, 8.5, -1], "min", -1, True),
        ([0.1, 0.1, 0.2, 0.4], "max", 0.4, False),
        ([0.1, 0.1, 0.4, 0.19], "max", 0.4, True),
    ],
)
def test_diverged_second_half_is_compared_with_first_of_plain(
    values: list[float], mode: Mode, first: float, expected: bool
) -> None:
    assert diverged(curve(values), first, mode) is expected


def test_worst_after_best_counts_from_best_on() -> None:
    assert worst_after_best(curve([9, 1, 3, 2]), "min") == 3
    assert worst_after_best(curve([9, 3, 2, 1]), "min") == 1
    assert worst_after_best(curve([9, 1, NAN, 2]), "min") == INF
    assert worst_after_best(curve([0.1, 0.9, 0.7, 0.8]), "max") == 0.7


def test_quantile_interpolates_and_allows_infinity() -> None:
    assert quantile([1, 2, 3, 4], 0.25) == 1.75
    assert [quantile([1, 2, INF], share) for share in (0.5, 0.75)] == [2, INF]
    assert quantile([-INF, 1, 2], 0.5) == 1


def test_ranks_ties_share_mean() -> None:
    assert ranks([3, 1, 3, INF], "min") == [2.5, 1, 2.5, 4]
    assert ranks([3, 1, 3, -INF], "max") == [1.5, 3, 1.5, 4]


def test_sign_test_exact_p() -> None:
    assert [sign_test(*one) for one in ((5, 0), (1, 3), (2, 2), (0, 0))] == [2 / 32, 10 / 16, 1, 1]


def runs(name: str, *values: list[float], losses: int = 0) -> list[Run]:
    return [
        Run(name, seed, "fingerprint", curve(made, losses=losses), peak_memory=seed * 100)
        for seed, made in enumerate(values)
    ]


def test_summary_two_seeds_has_exact_ratios() -> None:
    made = [
        # seed 0 reaches its final value 2 already at its second validation: its cost is 20
        *runs("plain", [4, 2, 3, 2], [4, 3, 2, 1]),
        *runs("plain@3x", [2, 2, 1, 0.5], [1, 1, 1, 0.8]),
        *runs("anderson", [2, 2, 2, 2], [9, 9, 99, 1], losses=6),
    ]
    summary = summarise(made, ["plain", "plain@3x", "anderson"], "val/mse", "min")
    assert summary.tuned_baseline == "plain@3x"
    plain, tuned, anderson = summary.variants.values()
    assert [plain.seeds[seed].cost_ratio for seed in (0, 1)] == [1, 1]
    assert [tuned.seeds[seed].cost_ratio for seed in (0, 1)] == [10 / 20, 10 / 40]
    # twelve for ten, and at the end 48 against 40
    assert [anderson.seeds[seed].cost_ratio for seed in (0, 1)] == [12 / 20, 48 / 40]
    # the first stays at its target from the first validation on, plain only at its last
    assert [anderson.seeds[seed].stay_ratio for seed in (0, 1)] == [12 / 40, 48 / 40]
    assert [plain.seeds[seed].stay_ratio for seed in (0, 1)] == [1, 1]
    assert [anderson.seeds[seed].seconds_ratio for seed in (0, 1)] == [1 / 2, 4 / 4]
    assert [anderson.seeds[seed].tuned_ratio for seed in (0, 1)] == [INF, INF]
    # of 40 gradients, its third validation cost 36 and its fourth 48: a third of the way
    equal_cost = [2, pytest.approx(99 - 98 / 3)]
    assert [anderson.seeds[seed].equal_cost for seed in (0, 1)] == equal_cost
    assert [anderson.seeds[seed].best for seed in (0, 1)] == [2, 9]
    assert [plain.seeds[seed].best for seed in (0, 1)] == [2, 1]
    assert (plain.diverged, anderson.diverged) == (0, 1)
    assert [plain.seeds[seed].worst_after_best for seed in (0, 1)] == [3, 1]
    assert astuple(anderson.cost_ratio) == pytest.approx((0.9, 0.75, 1.05, 1.2, 0, 2))  # rounded
    assert anderson.tuned_ratio == Spread(INF, INF, INF, INF, 2, 2)
    assert (anderson.final.median, anderson.final.worst) == (1.5, 2)
    assert anderson.extra_cost == pytest.approx(0.2)
    assert [one.rank for one in summary.variants.values()] == [2.25, 1, 2.75]
    assert anderson.peak_memory == 50


def test_summary_failed_run_is_left_out() -> None:
    made = [*runs("plain", [2, 1], [2, 1]), *runs("ema", [1, 1])]
    made.append(Run("ema", 1, "fingerprint", error="RuntimeError: no"))
    ema = summarise(made, ["plain", "ema"], "val/mse", "min").variants["ema"]
    assert ema.cost_ratio == Spread(0.5, 0.5, 0.5, 0.5, 0, 1)
    assert ema.errors == {1: "RuntimeError: no"}
    assert ema.rank == 1.75  # shares the first place, and is last where it failed
