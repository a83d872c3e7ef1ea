"""The sentences of the verdict, for curves made by hand."""

import math
from collections.abc import Sequence

import pytest

from lightning_stableaa.recipes.comparison.cost import Curve
from lightning_stableaa.recipes.comparison.plots import COLORS, variant_styles
from lightning_stableaa.recipes.comparison.runner import Run
from lightning_stableaa.recipes.comparison.summary import Summary, summarise
from lightning_stableaa.recipes.comparison.verdict import is_accelerated, outcome, verdict
from tests.helpers.curves import curve

PLAIN = [8.0, 4.0, 2.0, 1.0]
SOONER, LATER = [4, 1, 0.5, 0.25], [8, 8, 8, 2]
Made = Sequence[float] | Curve


def made_by(name: str, values: Made, losses: int = 0) -> Curve:
    """A curve on which acceleration, where there is any, accepted every candidate."""
    if isinstance(values, Curve):
        return values
    tried = int(is_accelerated(name))
    return curve(values, losses=losses, tried=tried, accepted=tried)


def of_seeds(variants: dict[str, Sequence[Made]], mode: str = "min") -> Summary:
    """One curve for each seed of each variant."""
    runs = [
        Run(name, seed, "", made_by(name, made))
        for name, curves in variants.items()
        for seed, made in enumerate(curves)
    ]
    return summarise(runs, list(variants), "val/mse", "max" if mode == "max" else "min")


def compare(variants: dict[str, Made], seeds: int = 5) -> Summary:
    """Every seed of a variant has the same curve."""
    return of_seeds({name: [one] * seeds for name, one in {"plain": PLAIN, **variants}.items()})


def best_is(name: str, value: str) -> str:
    return f"The best median val/mse at equal cost (less is better) was that of {name} ({value})."


def test_verdict_better_curve_helped() -> None:
    assert verdict(compare({"anderson": SOONER})) == [
        "anderson helped: it reached the final val/mse of plain at 0.50 of the cost (median; "
        "quartiles 0.50 to 0.50; worst 0.50), cheaper in 5 of 5 seeds (sign test p = 0.062); "
        "at equal cost val/mse is 0.25 against 1, better in 5 of 5 seeds.",
        best_is("anderson", "0.25"),
    ]


def test_verdict_equal_curve_did_not_help() -> None:
    assert verdict(compare({"anderson": PLAIN}, seeds=2)) == [
        "anderson did not help: it reached the final val/mse of plain at 1.00 of the cost (median; "
        "quartiles 1.00 to 1.00; worst 1.00), cheaper in 0 of 2 seeds (sign test p = 1); "
        "at equal cost val/mse is 1 against 1, better in 0 of 2 seeds; "
        "fewer than five seeds prove little.",
        best_is("plain", "1"),
    ]


def test_verdict_worse_curve_made_it_worse() -> None:
    assert verdict(compare({"paper": [8, 8, 8, 100]})) == [
        "paper made it worse: it never reached the final val/mse of plain in 5 of 5 seeds, "
        "cheaper in 0 of 5 seeds (sign test p = 0.062); at equal cost val/mse is 100 against 1, "
        "better in 0 of 5 seeds; it diverged in 5 of 5 seeds (plain: 0).",
        best_is("plain", "1"),
    ]


@pytest.mark.parametrize(("seeds", "end"), [(5, "."), (2, "; fewer than five seeds prove little.")])
def test_verdict_no_accepted_candidate_had_no_effect(seeds: int, end: str) -> None:
    same = curve(PLAIN, losses=1, tried=1)
    assert verdict(compare({"anderson": same}, seeds=seeds)) == [
        f"anderson had no effect: none of its {4 * seeds} candidates was accepted, and its runs "
        f"equal those of plain, at 3.3% more cost{end}",
        best_is("plain", "1"),
    ]
    another = curve([8, 4, 2, 1.5], losses=1, tried=1)
    assert "made it worse" in verdict(compare({"anderson": another}))[0]


@pytest.mark.parametrize("name", ["anderson", "anderson@3x"])
def test_verdict_no_attempt_was_not_tried(name: str) -> None:
    assert verdict(compare({name: curve(PLAIN)})) == [
        f"{name} was not tried: no extrapolation was due in 40 gradients; train longer, or lower "
        "callbacks.anderson.store_every_n_steps and callbacks.anderson.accelerate_every_n_steps.",
        best_is("plain", "1"),
    ]
    disabled = curve(PLAIN)
    disabled.disabled = "losses differ"
    assert verdict(compare({name: disabled}))[0] == f"{name} was switched off: losses differ."


def test_verdict_runs_equal_to_plain_are_ties() -> None:
    """The cost of attempts alone is no difference between the runs."""
    same = curve(PLAIN, losses=2, tried=1)
    summary = of_seeds({"plain": [PLAIN] * 12, "anderson": [same] * 9 + [SOONER] * 3})
    plain, anderson = summary.variants.values()
    assert (plain.rank, anderson.rank) == (1.5, 1.5)
    assert [one.seeds[0].equal_cost for one in (plain, anderson)] == [1, 1]
    assert anderson.seeds[0].cost_ratio == pytest.approx(1 + 2 / 30)
    sentence = verdict(summary)[0]
    assert "cheaper in 3 of 12 seeds (sign test p = 0.25)" in sentence
    assert "better in 3 of 12 seeds; 9 of 12 seeds equal plain, without any accepted" in sentence
    # an equal curve with accepted candidates is another run
    summary = compare({"anderson": made_by("anderson", PLAIN, 2)})
    assert not summary.variants["anderson"].seeds[0].same


@pytest.mark.parametrize(
    ("values", "losses", "expected"),
    [
        ([1, 1, 1, 2], 0, "was sooner but ended worse"),
        ([8, 1, 0.5, 0.5], 3, "helped"),  # at its second validation, 22 of 40
        ([8, 4, 2, 1], 6, "made it worse"),  # the same curve at a fifth more
        ([8, 4, 2, math.nan], 0, "made it worse"),
    ],
)
def test_outcome_weighs_cost_and_final_value(values: Made, losses: int, expected: str) -> None:
    summary = compare({"anderson": made_by("anderson", values, losses)})
    assert outcome(summary.variants["anderson"], summary) == expected


def test_verdict_overfitting_is_not_worse() -> None:
    sentence = verdict(compare({"anderson": [4, 0.5, 1, 2]}))[0]
    assert (
        "better in 0 of 5 seeds; its best validation up to there was better in 5 of 5 seeds: it "
        "improved sooner and got worse again"
    ) in sentence
    assert "best validation" not in verdict(compare({"anderson": [4, 1, 2, 2]}))[0]


def test_outcome_same_cost_other_final_value() -> None:
    for end, expected in ((0.5, "was no sooner but ended better"), (1.001, "did not help")):
        summary = compare({"plain": [4, 1, 2, 1], "anderson": [4, 1, 2, end]}, seeds=5)
        assert outcome(summary.variants["anderson"], summary) == expected  # 1.001 is a tie


def outcome_of(anderson: Sequence[Sequence[float]]) -> str:
    """One curve a seed."""
    summary = of_seeds({"plain": [PLAIN] * len(anderson), "anderson": anderson})
    sentence = verdict(summary)[0]
    text = outcome(summary.variants["anderson"], summary)
    assert sentence.startswith(f"anderson {text}: ")
    assert ("more seeds are needed (compare.seeds=" in sentence) == (text == "is undecided")
    return text


def test_outcome_few_seeds_all_have_to_agree() -> None:
    assert outcome_of([SOONER] * 4) == "helped"
    assert outcome_of([SOONER] * 3 + [LATER]) == "is undecided"
    assert outcome_of([LATER] * 2) == "made it worse"
    # nine of ten on the cost are enough, whichever way one end in ten goes
    assert outcome_of([SOONER] * 9 + [LATER]) == "helped"
    assert outcome_of([[1, 1, 1, 2]] * 9 + [SOONER]) == "was sooner but ended worse"


@pytest.mark.parametrize(
    ("alone", "sentence"),
    [
        (SOONER, "took 0.50 and ended at 0.25, worse than anderson in 0 of 5 seeds, so the gain"),
        ([4, 1, 0.5, 0.5], "took 0.50 and ended at 0.5, worse than anderson in 5 of 5 seeds."),
        (PLAIN, "took 1.00 and ended at 1, worse than anderson in 5 of 5 seeds, so extrapolation"),
        ([8] * 4, "never reached it and ended at 8, worse than anderson in 5 of 5 seeds, so extra"),
    ],
)
def test_verdict_names_best_averaging(alone: list[float], sentence: str) -> None:
    summary = compare({"anderson": SOONER, "smoothing": alone, "ema": [9, 9, 9, 9]})
    assert f"averaging alone (smoothing, the best of its kind) {sentence}" in verdict(summary)[0]


@pytest.mark.parametrize(
    ("tuned", "sentence"),
    [
        ([0.5, 0.5, 0.4, 0.1], "it never reached the final value of {} in 5 of 5 seeds"),
        ([4, 2, 0.8, 0.7], "it beat {} (0.75 of the cost; better at equal cost in 5 of 5 seeds)"),
        ([2, 0.6, 0.5, 0.5], "it beat {} (1.00 of the cost; better at equal cost in 5 of 5"),
        ([2, 0.3, 0.26, 0.25], "it did not beat {} (1.00 of the cost; better at equal cost in 0"),
    ],
)
def test_verdict_names_tuned_baseline(tuned: list[float], sentence: str) -> None:
    sentence = sentence.format("the tuned baseline (plain@3x)")
    assert sentence in verdict(compare({"anderson": SOONER, "plain@3x": tuned}))[0]


def test_verdict_tuned_acceleration_meets_tuned_baseline() -> None:
    rates = {"anderson@3x": [2, 0.5, 0.2, 0.1], "anderson@10x": [8, 8, 8, 8]}
    assert verdict(compare({**rates, "plain@3x": [2, 1, 0.6, 0.5]}))[0] == (
        "anderson@3x, the best accelerated run with another learning rate or schedule, beat the "
        "tuned baseline: it reached the final val/mse of plain@3x at 0.50 of the cost "
        "(median; quartiles 0.50 to 0.50; worst 0.50); at equal cost val/mse is 0.1 against 0.5, "
        "better in 5 of 5 seeds."
    )
    summary = compare({"anderson@3x": [2, 1, 0.8, 0.7], "plain@3x": [2, 1, 0.6, 0.5]})
    assert verdict(summary)[0].endswith(
        "did not beat the tuned baseline: it never reached the final val/mse of plain@3x in "
        "5 of 5 seeds; at equal cost val/mse is 0.7 against 0.5, better in 0 of 5 seeds."
    )


@pytest.mark.parametrize(("better", "text"), [(5, "beat"), (4, "may have beaten"), (2, "did not")])
def test_verdict_tuned_baseline_beaten_where_seeds_agree(better: int, text: str) -> None:
    anderson = [[2, 0.5, 0.2, 0.1]] * better + [[2, 1, 0.8, 0.7]] * (5 - better)
    variants = {"plain": [PLAIN] * 5, "plain@3x": [[2, 1, 0.6, 0.5]] * 5, "anderson@3x": anderson}
    assert f", {text}" in verdict(of_seeds(variants))[0]


def test_styles_variant_has_one_color_everywhere() -> None:
    first = variant_styles(["plain", "anderson", "anderson@3x", "anderson@10x", "mine"])
    second = variant_styles(["plain", "mine", "anderson"])
    assert {name: first[name] for name in second} == second
    assert {first[name].color for name in first if "anderson" in name} == {COLORS["anderson"]}
    assert len(set(first.values())) == len(first)
    assert len(set(COLORS.values())) == len(COLORS)
