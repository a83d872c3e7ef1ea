"""Costs, reaching a target, and the summary, on curves made by hand."""

import math
from dataclasses import astuple

import pytest

from lightning_stableaa.recipes.comparison.cost import (
    Curve,
    Mode,
    cost_to_keep,
    cost_to_reach,
    final_value,
    quantile,
    ranks,
    seconds_to_reach,
    sign_test,
    value_within,
)
from lightning_stableaa.recipes.comparison.runner import Run
from lightning_stableaa.recipes.comparison.summary import Spread, summarise

NAN, INF = math.nan, math.inf


def curve(values: list[float], *, losses: int = 0, every: int = 10) -> Curve:
    """A validation every ``every`` gradients and ``losses`` extra losses, and every second."""
    counts = range(1, len(values) + 1)
    return Curve(
        gradients=[every * i for i in counts],
        losses=[losses * i for i in counts],
        seconds=[float(i) for i in counts],
        processor_seconds=[float(i) / 2 for i in counts],
        values=values,
        attempted=[0] * len(values),
        accepted=[0] * len(values),
    )


def test_an_extra_loss_costs_a_third_of_a_gradient() -> None:
    assert curve([1.0, 0.5], losses=6).costs == [12, 24]


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
def test_cost_to_reach_is_that_of_the_first_validation_as_good(
    values: list[float], mode: Mode, target: float, cost: float
) -> None:
    assert cost_to_reach(curve(values), target, mode) == cost
    assert seconds_to_reach(curve(values), target, mode) == cost / 10


def test_value_within_a_budget() -> None:
    made = curve([4, 3, 2, 1], losses=1)
    assert made.costs[2] == pytest.approx(31)
    assert value_within(made, 31, "min") == pytest.approx(2)
    assert value_within(made, 31 - 31 / 12, "min") == pytest.approx(2.25)
    assert value_within(made, 1000, "min") == 1
    broken = curve([4, 3, math.nan, 1], losses=1)
    assert value_within(broken, 30, "min") == 3
    assert value_within(broken, 32, "min") == INF
    assert value_within(made, 1, "min") == INF
    assert value_within(made, 1, "max") == -INF


def test_a_run_that_ends_without_a_number_is_the_worst() -> None:
    assert final_value(curve([1, NAN]), "min") == INF
    assert final_value(curve([1, NAN]), "max") == -INF


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([3, 1, 2], 0.5, 2),
        ([1, 2, 3, 4], 0.5, 2.5),
        ([1, 2, 3, 4], 0.25, 1.75),
        ([1, 2, INF], 0.5, 2),
        ([1, 2, INF], 0.75, INF),
        ([1, INF], 0.5, INF),
        ([INF, INF], 0.25, INF),
        ([-INF, 1, 2], 0.5, 1),
    ],
)
def test_quantiles_of_values_that_may_be_infinite(
    values: list[float], share: float, expected: float
) -> None:
    assert quantile(values, share) == expected


def test_quantile_of_nothing_is_unknown() -> None:
    assert math.isnan(quantile([], 0.5))


def test_equal_values_share_their_rank() -> None:
    assert ranks([3, 1, 3, INF], "min") == [2.5, 1, 2.5, 4]
    assert ranks([3, 1, 3, -INF], "max") == [1.5, 3, 1.5, 4]


@pytest.mark.parametrize(
    ("values", "cost"),
    [
        ([1, 3, 2, 1], 30),
        ([2, 2, 2, 2], 10),
        ([1, 1, 1, 3], INF),
        ([3, math.nan, 1, 2], 30),
        ([1, 1, 1, math.nan], INF),
    ],
)
def test_cost_to_keep_forgets_lucky_validations(values: list[float], cost: float) -> None:
    assert cost_to_keep(curve(values), 2, "min") == cost


def test_sign_test() -> None:
    assert sign_test(5, 0) == 2 / 32
    assert sign_test(1, 3) == 10 / 16
    assert sign_test(2, 2) == 1
    assert sign_test(0, 0) == 1


def runs(name: str, *curves: Curve) -> list[Run]:
    return [
        Run(name, seed, "fingerprint", made, peak_memory=seed * 100)
        for seed, made in enumerate(curves)
    ]


def test_summary_of_two_seeds() -> None:
    made = [
        # seed 0 reaches its final value 2 already at its second validation: its cost is 20
        *runs("plain", curve([4, 2, 3, 2]), curve([4, 3, 2, 1])),
        *runs("plain@3x", curve([2, 2, 1, 0.5]), curve([1, 1, 1, 0.8])),
        *runs("anderson", curve([2, 2, 2, 2], losses=6), curve([9, 9, 9, 1], losses=6)),
    ]
    summary = summarise(made, ["plain", "plain@3x", "anderson"], "val/mse", "min")
    assert summary.best_swept == "plain@3x"
    plain, swept, anderson = summary.variants.values()
    assert [plain.seeds[seed].cost_ratio for seed in (0, 1)] == [1, 1]
    assert [swept.seeds[seed].cost_ratio for seed in (0, 1)] == [10 / 20, 10 / 40]
    # twelve for ten, and at the end 48 against 40
    assert [anderson.seeds[seed].cost_ratio for seed in (0, 1)] == [12 / 20, 48 / 40]
    # the first stays at its target from the first validation on, plain only at its last
    assert [anderson.seeds[seed].keep_ratio for seed in (0, 1)] == [12 / 40, 48 / 40]
    assert [plain.seeds[seed].keep_ratio for seed in (0, 1)] == [1, 1]
    assert [anderson.seeds[seed].seconds_ratio for seed in (0, 1)] == [1 / 2, 4 / 4]
    assert [anderson.seeds[seed].swept_ratio for seed in (0, 1)] == [INF, INF]
    # of 40 gradients, its third validation cost 36 and its fourth 48: a third of the way
    assert [anderson.seeds[seed].equal_cost for seed in (0, 1)] == [2, 9 - 8 / 3]
    # a run whose last validation costs a little more than plain's has got nearly as far
    assert [anderson.seeds[seed].best for seed in (0, 1)] == [2, 9 - 8 / 3]
    assert [plain.seeds[seed].best for seed in (0, 1)] == [2, 1]
    assert astuple(anderson.cost_ratio) == pytest.approx((0.9, 0.75, 1.05, 1.2, 0, 2))  # rounded
    assert anderson.swept_ratio == Spread(INF, INF, INF, INF, 2, 2)
    assert (anderson.final.median, anderson.final.worst) == (1.5, 2)
    assert anderson.extra_cost == pytest.approx(0.2)
    assert [one.rank for one in summary.variants.values()] == [2.25, 1, 2.75]
    assert anderson.peak_memory == 50


def test_failed_runs_are_left_out_and_named() -> None:
    made = [
        *runs("plain", curve([2, 1]), curve([2, 1])),
        *runs("ema", curve([1, 1])),
        Run("ema", 1, "fingerprint", error="RuntimeError: no"),
    ]
    ema = summarise(made, ["plain", "ema"], "val/mse", "min").variants["ema"]
    assert ema.cost_ratio == Spread(0.5, 0.5, 0.5, 0.5, 0, 1)
    assert ema.errors == {1: "RuntimeError: no"}
    assert ema.rank == 1.75  # shares the first place, and is last where it failed


def test_nothing_is_said_where_the_plain_run_is_missing() -> None:
    made = [Run("plain", 0, "fingerprint", error="no"), *runs("ema", curve([1, 1]))]
    summary = summarise(made, ["plain", "ema"], "val/mse", "min")
    assert [one.cost_ratio.count for one in summary.variants.values()] == [0, 0]
    assert summary.variants["plain"].errors == {0: "no"}
