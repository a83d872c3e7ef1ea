"""The sentences of the verdict, for curves made by hand."""

import dataclasses
import math
from collections.abc import Sequence

import pytest

from lightning_stableaa.recipes.comparison.cost import Curve
from lightning_stableaa.recipes.comparison.runner import Run
from lightning_stableaa.recipes.comparison.summary import Summary, summarise
from lightning_stableaa.recipes.comparison.verdict import is_anderson, outcome, verdict
from tests.recipes.test_compare_cost import curve

PLAIN = [8.0, 4.0, 2.0, 1.0]


def made_by(name: str, values: list[float], losses: int = 0) -> Curve:
    """A curve on which acceleration, where there is any, accepted every candidate."""
    made = curve(values, losses=losses)
    tried = list(range(1, len(values) + 1)) if is_anderson(name) else made.attempted
    return dataclasses.replace(made, attempted=tried, accepted=tried)


def compare(variants: dict[str, list[float] | Curve], seeds: int = 5) -> Summary:
    """Every seed of a variant has the same curve; accelerated ones accepted what they tried."""
    curves = {"plain": PLAIN, **variants}
    runs = [
        Run(name, seed, "", made if isinstance(made, Curve) else made_by(name, made))
        for name, made in curves.items()
        for seed in range(seeds)
    ]
    return summarise(runs, list(curves), "val/mse", "min")


def test_helped() -> None:
    assert verdict(compare({"anderson": [4, 1, 0.5, 0.25]})) == [
        "anderson helped: it reached the final val/mse of plain at 0.50 of the cost (median; "
        "quartiles 0.50 to 0.50; worst 0.50), cheaper in 5 of 5 seeds (sign test p = 0.062); "
        "at equal cost val/mse is 0.25 against 1, better in 5 of 5 seeds.",
        "The best median val/mse at equal cost (less is better) was that of anderson (0.25).",
    ]


def test_did_not_help() -> None:
    assert verdict(compare({"anderson": PLAIN}, seeds=2)) == [
        "anderson did not help: it reached the final val/mse of plain at 1.00 of the cost (median; "
        "quartiles 1.00 to 1.00; worst 1.00), cheaper in 0 of 2 seeds (sign test p = 1); "
        "at equal cost val/mse is 1 against 1, better in 0 of 2 seeds; "
        "fewer than five seeds prove little.",
        "The best median val/mse at equal cost (less is better) was that of plain (1).",
    ]


def test_changed_nothing() -> None:
    """Where no candidate is accepted, the last validation that cost as much says nothing."""
    same = dataclasses.replace(curve([8.0, 4.0, 2.0, 1.0], losses=1), attempted=[1, 2, 3, 4])
    assert verdict(compare({"anderson": same})) == [
        "anderson changed nothing: of 20 candidates none entered training, so that its runs are "
        "those of plain, at 3.3% more cost.",
        "The best median val/mse at equal cost (less is better) was that of plain (1).",
    ]
    another = dataclasses.replace(same, values=[8.0, 4.0, 2.0, 1.5])
    assert "made it worse" in verdict(compare({"anderson": another}))[0]


def test_few_seeds_that_changed_nothing_prove_little() -> None:
    same = dataclasses.replace(curve(PLAIN, losses=1), attempted=[1, 2, 3, 4])
    sentence = verdict(compare({"anderson": same}, seeds=2))[0]
    assert sentence.startswith("anderson changed nothing: of 8 candidates none entered training")
    assert sentence.endswith("at 3.3% more cost; fewer than five seeds prove little.")


@pytest.mark.parametrize("name", ["anderson", "anderson@3x"])
def test_what_was_never_due_was_not_tried(name: str) -> None:
    assert verdict(compare({name: curve(PLAIN)})) == [
        f"{name} was not tried: no extrapolation was due in 40 gradients; train longer, or lower "
        "callbacks.anderson.store_every_n_steps and callbacks.anderson.accelerate_every_n_steps.",
        "The best median val/mse at equal cost (less is better) was that of plain (1).",
    ]


def test_plains_own_runs_are_ties() -> None:
    """Attempts alone cost them their last validation, which is no difference of the runs."""
    own = dataclasses.replace(curve(PLAIN, losses=2), attempted=[1, 2, 3, 4])
    better = made_by("anderson", [4, 1, 0.5, 0.25])
    runs = [Run("plain", seed, "", curve(PLAIN)) for seed in range(12)]
    runs += [Run("anderson", seed, "", own if seed < 9 else better) for seed in range(12)]
    summary = summarise(runs, ["plain", "anderson"], "val/mse", "min")
    plain, anderson = summary.variants.values()
    assert (plain.rank, anderson.rank) == (1.5, 1.5)
    assert [one.seeds[0].equal_cost for one in (plain, anderson)] == [1, 1]
    assert anderson.seeds[0].cost_ratio == pytest.approx(1 + 2 / 30)  # what it cost is told
    sentence = verdict(summary)[0]
    assert "cheaper in 3 of 12 seeds (sign test p = 0.25)" in sentence
    assert "better in 3 of 12 seeds; 9 of 12 seeds are plain's own runs" in sentence
    # an equal curve that candidates have entered is another run
    summary = compare({"anderson": made_by("anderson", PLAIN, 2)})
    assert not summary.variants["anderson"].seeds[0].same
    assert "plain's own" not in verdict(summary)[0]


def test_plain_that_was_not_swept_is_no_swept_rival() -> None:
    sentence = verdict(compare({"anderson@3x": [4, 1, 0.5, 0.25]}, seeds=2))[0]
    assert "beat plain at its own rate" in sentence
    assert "plain was not tried with other rates" in sentence
    assert sentence.endswith("fewer than five seeds prove little.")


def test_made_it_worse() -> None:
    assert verdict(compare({"anderson": [8, 8, 8, 8]})) == [
        "anderson made it worse: it never reached the final val/mse of plain in 5 of 5 seeds, "
        "cheaper in 0 of 5 seeds (sign test p = 0.062); "
        "at equal cost val/mse is 8 against 1, better in 0 of 5 seeds.",
        "The best median val/mse at equal cost (less is better) was that of plain (1).",
    ]


@pytest.mark.parametrize(
    ("values", "losses", "expected"),
    [
        ([1, 1, 1, 2], 0, "was sooner but ended worse"),
        ([8, 1, 0.5, 0.5], 3, "helped"),  # at its second validation, 22 of 40
        ([8, 4, 2, 1], 6, "made it worse"),  # the same curve at a fifth more
        ([8, 4, 2, math.nan], 0, "made it worse"),
    ],
)
def test_outcome_weighs_cost_and_end(values: list[float], losses: int, expected: str) -> None:
    summary = compare({"anderson": made_by("anderson", values, losses)})
    assert outcome(summary.variants["anderson"], summary) == expected


def test_what_overfits_sooner_is_told_from_what_is_worse() -> None:
    summary = compare({"anderson": [4, 0.5, 1, 2]})
    sentence, _ = verdict(summary)
    assert (
        "better in 0 of 5 seeds; its best validation up to there was better in 5 of 5" in sentence
    )
    assert "sooner and went on too long" in sentence
    assert "best validation" not in verdict(compare({"anderson": [4, 1, 2, 2]}))[0]


def test_later_but_better() -> None:
    """Plain met its final value early by luck; the variant came there later and went on."""
    lucky = curve([1, 2, 2, 1])
    runs = [
        Run("plain", 0, "", lucky),
        Run("anderson", 0, "", made_by("anderson", [8, 1, 0.5, 0.5])),
    ]
    summary = summarise(runs, ["plain", "anderson"], "val/mse", "min")
    assert outcome(summary.variants["anderson"], summary) == "was later but ended better"


@pytest.mark.parametrize(
    ("end", "seeds", "expected"),
    [
        (0.5, 5, "was no sooner but ended better"),
        (2.0, 5, "was no sooner but ended worse"),
        (2.0, 2, "was no sooner but ended worse"),
        (1.001, 10, "did not help"),  # so close is a tie
        (1.0, 10, "did not help"),
    ],
)
def test_no_sooner_but_elsewhere_in_the_end(end: float, seeds: int, expected: str) -> None:
    summary = compare({"plain": [4, 1, 2, 1], "anderson": [4, 1, 2, end]}, seeds=seeds)
    assert outcome(summary.variants["anderson"], summary) == expected


SOONER, LATER = [4, 1, 0.5, 0.25], [8, 8, 8, 2]


@pytest.mark.parametrize(
    ("good", "bad", "expected"),
    [
        (SOONER, 0, "helped"),
        (SOONER, 1, "is undecided"),  # p = 0.38
        (SOONER, 2, "is undecided"),
        (SOONER, 4, "is undecided"),
        (SOONER, 5, "made it worse"),
        # as soon as plain, and ends that one seed does not agree with
        ([8, 4, 2, 0.5], 1, "is undecided"),
    ],
)
def test_words_need_seeds_that_agree(good: list[float], bad: int, expected: str) -> None:
    assert outcome_of([good] * (5 - bad) + [LATER] * bad) == expected


def outcome_of(anderson: Sequence[Sequence[float]]) -> str:
    """One curve a seed."""
    runs = [Run("plain", seed, "", curve(PLAIN)) for seed in range(len(anderson))]
    runs += [
        Run("anderson", i, "", made_by("anderson", list(made))) for i, made in enumerate(anderson)
    ]
    summary = summarise(runs, ["plain", "anderson"], "val/mse", "min")
    sentence = verdict(summary)[0]
    said = outcome(summary.variants["anderson"], summary)
    assert sentence.startswith(f"anderson {said}: ")
    assert ("more seeds decide (compare.seeds=" in sentence) == (said == "is undecided")
    return said


def test_of_few_seeds_all_have_to_agree() -> None:
    assert outcome_of([SOONER] * 4) == "helped"
    assert outcome_of([SOONER] * 3 + [LATER]) == "is undecided"
    assert outcome_of([LATER] * 2) == "made it worse"
    # nine of ten on the cost are enough, whichever way one end in ten goes
    assert outcome_of([SOONER] * 9 + [LATER]) == "helped"
    assert outcome_of([[1, 1, 1, 2]] * 9 + [SOONER]) == "was sooner but ended worse"


@pytest.mark.parametrize(
    ("alone", "sentence"),
    [
        (
            [4, 1, 0.5, 0.25],
            "averaging alone (smoothing, the best of its kind) took 0.50 and ended at 0.25, "
            "worse than anderson in 0 of 5 seeds, so what there is to gain comes from averaging.",
        ),
        (  # as soon, but not as far
            [4, 1, 0.5, 0.5],
            "averaging alone (smoothing, the best of its kind) took 0.50 and ended at 0.5, "
            "worse than anderson in 5 of 5 seeds.",
        ),
        (
            PLAIN,
            "averaging alone (smoothing, the best of its kind) took 1.00 and ended at 1, "
            "worse than anderson in 5 of 5 seeds, so extrapolation adds to it",
        ),
        (
            [8, 8, 8, 8],
            "averaging alone (smoothing, the best of its kind) never did and ended at 8, "
            "worse than anderson in 5 of 5 seeds, so extrapolation adds to it",
        ),
    ],
)
def test_averaging_alone_stands_beside(alone: list[float], sentence: str) -> None:
    summary = compare({"anderson": [4, 1, 0.5, 0.25], "smoothing": alone, "ema": [9, 9, 9, 9]})
    assert sentence in verdict(summary)[0]


def test_a_switch_that_never_came_on_is_no_averaging() -> None:
    """It equals plain, so that acceleration would seem to add to averaging."""
    seeds = range(5)
    never_on = [Run("smoothing", seed, "", curve(PLAIN), smoothing_on=0.0) for seed in seeds]
    others = {"plain": PLAIN, "anderson": [4, 1, 0.5, 0.25], "ema": [8.0, 4.0, 2.0, 1.5]}
    made = [Run(name, seed, "", made_by(name, v)) for name, v in others.items() for seed in seeds]
    summary = summarise(never_on + made, [*others, "smoothing"], "val/mse", "min")
    assert "averaging alone (ema, the best of its kind) never did" in verdict(summary)[0]


def test_extrapolation_that_did_not_help_adds_nothing() -> None:
    summary = compare({"anderson": PLAIN, "ema": [8, 8, 8, 8]})
    assert "never did and ended at 8, worse than anderson in 5 of 5 seeds." in verdict(summary)[0]


@pytest.mark.parametrize(
    ("swept", "sentence"),
    [
        (
            [0.5, 0.5, 0.4, 0.1],
            "the best-swept plain run (plain@3x) ended better than it ever was in 5 of 5 seeds",
        ),
        (
            [4, 2, 0.8, 0.7],
            "the best-swept plain run (plain@3x) it beat as well (0.75 of the cost; better at "
            "equal cost in 5 of 5 seeds)",
        ),
        (
            [2, 0.6, 0.5, 0.5],
            "the best-swept plain run (plain@3x) it beat as well (1.00 of the cost; better at "
            "equal cost in 5 of 5 seeds)",
        ),
        (
            [2, 0.3, 0.26, 0.25],
            "the best-swept plain run (plain@3x) it did not beat (1.00 of the cost; better at "
            "equal cost in 0 of 5 seeds)",
        ),
    ],
)
def test_the_best_learning_rate_stands_beside(swept: list[float], sentence: str) -> None:
    summary = compare({"anderson": [4, 1, 0.5, 0.25], "plain@3x": swept})
    assert sentence in verdict(summary)[0]


def test_the_best_of_both_sweeps_meet() -> None:
    summary = compare(
        {
            "anderson@3x": [2, 0.5, 0.2, 0.1],
            "anderson@10x": [8, 8, 8, 8],
            "plain@3x": [2, 1, 0.6, 0.5],
        }
    )
    assert verdict(summary)[0] == (
        "anderson@3x, the best accelerated run with another learning rate or schedule, beat the "
        "best-swept plain run: it reached the final val/mse of plain@3x at 0.50 of the cost "
        "(median; quartiles 0.50 to 0.50; worst 0.50); at equal cost val/mse is 0.1 against 0.5, "
        "better in 5 of 5 seeds."
    )
    summary = compare({"anderson@3x": [2, 1, 0.8, 0.7], "plain@3x": [2, 1, 0.6, 0.5]})
    assert verdict(summary)[0].endswith(
        "did not beat the best-swept plain run: it never reached the final val/mse of plain@3x in "
        "5 of 5 seeds; at equal cost val/mse is 0.7 against 0.5, better in 0 of 5 seeds."
    )


@pytest.mark.parametrize(("better", "said"), [(5, "beat"), (4, "may have beaten"), (2, "did not")])
def test_the_best_learning_rate_is_beaten_where_seeds_agree(better: int, said: str) -> None:
    swept = {"plain": PLAIN, "plain@3x": [2.0, 1.0, 0.6, 0.5]}
    runs = [Run(one, seed, "", curve(v)) for one, v in swept.items() for seed in range(5)]
    for seed in range(5):
        values = [2, 0.5, 0.2, 0.1] if seed < better else [2, 1, 0.8, 0.7]
        runs.append(Run("anderson@3x", seed, "", made_by("anderson@3x", values)))
    summary = summarise(runs, ["plain", "plain@3x", "anderson@3x"], "val/mse", "min")
    assert f", {said}" in verdict(summary)[0]


def test_medians_that_most_seeds_contradict_do_not_stand_alone() -> None:
    plain, anderson = [3.0, 2.0, 1.9, 0.2, 0.1], [3.1, 1.5, 1.99, 0.21, 0.11]
    runs = [
        Run(name, seed, "", made_by(name, [8.0, 4.0, 2.0, end]))
        for name, ends in {"plain": plain, "anderson": anderson}.items()
        for seed, end in enumerate(ends)
    ]
    text = verdict(summarise(runs, ["plain", "anderson"], "val/mse", "min"))[0]
    assert "at equal cost val/mse is 1.5 against 1.9 (medians; seed by seed 1.05 times that" in text
    assert "that of plain), better in 1 of 5 seeds" in text


def test_a_swept_run_that_diverged_is_no_goal() -> None:
    swept = {0: [2.0, 1.0, math.nan, math.nan]}
    runs = [Run("plain", seed, "", curve(PLAIN)) for seed in range(5)]
    for seed in range(5):
        good = [2.0, 1.0, 0.6, 0.5]
        runs.append(Run("plain@3x", seed, "", curve(swept.get(seed, good))))
        runs.append(Run("anderson@3x", seed, "", made_by("anderson@3x", [2.0, 0.5, 0.2, 0.1], 3)))
    summary = summarise(runs, ["plain", "plain@3x", "anderson@3x"], "val/mse", "min")
    one = summary.variants["anderson@3x"]
    assert math.isnan(one.seeds[0].swept_ratio)
    assert one.swept_ratio.count == 4
    assert one.swept_ratio.worst < 1
    assert ", beat" in verdict(summary)[0]


def test_a_best_swept_run_without_an_end_is_no_rival() -> None:
    runs = [Run("plain", seed, "", curve(PLAIN)) for seed in range(3)]
    good = [2.0, 1.0, 0.6, 0.5]
    for seed in range(3):
        swept = [2.0, 1.0, math.nan, math.nan] if seed == 0 else good
        runs.append(Run("plain@3x", seed, "", curve(swept)))
    for name in ("anderson", "anderson@3x"):
        runs.append(Run(name, 0, "", made_by(name, good, 3)))
    names = ["plain", "plain@3x", "anderson", "anderson@3x"]
    text = " ".join(verdict(summarise(runs, names, "val/mse", "min")))
    assert "the best-swept plain run (plain@3x) did not end in a finite number in any of" in text
    assert "anderson@3x: no seed ended in a finite number both of it and of plain@3x." in text
    assert "nan" not in text


def test_without_a_common_seed_nothing_is_known() -> None:
    runs = [Run("plain", 0, "", curve(PLAIN)), Run("anderson", 0, "", error="no")]
    sentences = verdict(summarise(runs, ["plain", "anderson"], "val/mse", "min"))
    assert sentences[0] == (
        "anderson: no seed was finished by both it and plain, so nothing is known."
    )


def test_accuracy_is_better_when_it_is_more() -> None:
    runs = [
        Run(name, seed, "", made_by(name, values))
        for name, values in {"plain": [0.2, 0.4, 0.6], "anderson": [0.6, 0.7, 0.8]}.items()
        for seed in range(5)
    ]
    sentences = verdict(summarise(runs, ["plain", "anderson"], "val/top1", "max"))
    assert sentences[0].startswith("anderson helped: ")
    assert "val/top1 is 0.8 against 0.6, better in 5 of 5 seeds" in sentences[0]
