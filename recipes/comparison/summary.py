"""From single runs to what is reported of each variant."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lightning_stableaa.recipes.comparison.cost import (
    Mode,
    best_within,
    cost_to_reach,
    cost_to_stay,
    diverged,
    final_value,
    quantile,
    ranks,
    same_values,
    seconds_to_reach,
    value_within,
    worst_after_best,
    worst_value,
)
from lightning_stableaa.recipes.comparison.runner import Run

DEFINITIONS = (
    "Cost: gradients of a batch (backward passes, including those of L-BFGS's line search), and "
    "every further evaluation of the loss, such as the safeguard's, at one third.",
    "Cost to target (time to target, in units of cost): cost at a seed's first validation at least "
    "as good as the target, divided by the cost at which the reference run with the same seed "
    "reached it. The target is the final value of the reference run, which has 1 by definition.",
    "Cost to stay at target: cost from which on all validations of a seed are at least as good as "
    "the target, over the cost of the whole plain run; a single lucky validation does not count.",
    "Final: the last validation of the run. Every variant takes as many optimizer steps as plain "
    "(L-BFGS as many gradients). At equal cost: where the cost is that of the plain run with the "
    "same seed, interpolated between the validations before and after. Best: the best validation "
    "up to there, or the value there, as a checkpoint of the best keeps it. A run without any "
    "accepted candidate whose validations equal plain's is a tie with plain, whatever its attempts "
    "cost.",
    "Diverged: seeds in whose second half a validation was not finite, or more than 10 times the "
    "first validation of plain (less than half of it, where more is better).",
    "Worst after best: the worst validation from the best one of the run on, over the whole run.",
    "Brackets: quartiles over seeds, then the worst seed, or the number of seeds that never "
    "reached the target.",
    "Rank: median over seeds of the rank by the value at equal cost, 1 is best.",
    "Time: median over seeds of the training time of the whole run without validations, over that "
    "of plain; processor time likewise, without the time that other programs had the processor. "
    "Memory: median of the peak; of the device on CUDA, else of the process.",
    "Accepted: extrapolations over all seeds. Average on: median share of the windows in which the "
    "RSD had switched the moving average on; at 0 % a SmoothingMonitor has no effect.",
    "Tuned baseline: the variant of plain (learning rates, schedules) with the best median of "
    "final values.",
)


@dataclass(frozen=True)
class Spread:
    """A quantity over seeds."""

    median: float
    lower: float  # quartiles
    upper: float
    worst: float
    never: int  # seeds in which it is not finite
    count: int


@dataclass(frozen=True)
class SeedResult:
    """One finished run, compared with the plain run of the same seed."""

    final: float
    equal_cost: float
    best: float  # at equal cost
    worst_after_best: float  # of the whole run
    diverged: bool
    cost_ratio: float  # to the plain run's final value
    stay_ratio: float  # until it stays there, of the cost of the whole plain run
    seconds_ratio: float  # as cost_ratio, in training time
    tuned_ratio: float  # to the tuned baseline's final value
    time_ratio: float  # of the whole run
    processor_ratio: float
    same: bool  # as plain: no candidate accepted, and every validation equal


@dataclass(frozen=True)
class VariantSummary:
    """What is reported of a variant; spreads are over the seeds that it and plain finished."""

    name: str
    seeds: dict[int, SeedResult]
    errors: dict[int, str]
    final: Spread
    equal_cost: Spread
    best: Spread
    worst_after_best: Spread
    diverged: int  # seeds
    cost_ratio: Spread
    stay_ratio: Spread
    seconds_ratio: Spread
    tuned_ratio: Spread
    time_ratio: float
    processor_ratio: float
    rank: float
    peak_memory: float  # bytes
    extra_cost: float  # losses at one third, as a share of the gradients
    gradients: float  # median of the whole run
    attempted: int
    accepted: int
    smoothing_on: float  # median share of the windows in which the moving average was on
    disabled: dict[int, str]  # seeds in which acceleration was switched off, and why


@dataclass(frozen=True)
class Summary:
    """A whole comparison; the baseline is the first of ``variants``."""

    metric: str
    mode: Mode
    baseline: str
    tuned_baseline: str
    variants: dict[str, VariantSummary]


def summarise(runs: Iterable[Run], names: Sequence[str], metric: str, mode: Mode) -> Summary:
    """Compares every run with the run of ``names[0]`` that has the same seed.

    Args:
        runs: of any order, finished or failed.
        names: variants to report; the first is the baseline, and those that begin with its name
            and ``@`` are tried as its tuned baseline.
    """
    by_variant: dict[str, dict[int, Run]] = {name: {} for name in names}
    for run in runs:
        by_variant[run.variant][run.seed] = run
    finished = {
        name: {seed: run for seed, run in of_seed.items() if run.error is None}
        for name, of_seed in by_variant.items()
    }
    baseline = names[0]
    tuned_baseline = _tuned_baseline(finished, baseline, mode)
    plain, tuned = finished[baseline], finished[tuned_baseline]
    results = {
        name: {
            seed: _compare(run, plain[seed], tuned.get(seed), mode)
            for seed, run in sorted(of_seed.items())
            if seed in plain
        }
        for name, of_seed in finished.items()
    }
    rank = _median_ranks(results, sorted(plain), mode)
    return Summary(
        metric,
        mode,
        baseline,
        tuned_baseline,
        {
            name: _summarise_variant(name, by_variant[name], results[name], rank[name], mode)
            for name in names
        },
    )


def _tuned_baseline(finished: dict[str, dict[int, Run]], baseline: str, mode: Mode) -> str:
    rates = [
        name
        for name, runs in finished.items()
        if name.split("@")[0] == baseline and len(runs) == len(finished[baseline])
    ]

    def median_final(name: str) -> float:
        return quantile([final_value(run.curve, mode) for run in finished[name].values()], 0.5)

    # the first of equals: the baseline itself
    return (min if mode == "min" else max)(rates, key=median_final) if rates else baseline


def _compare(run: Run, plain: Run, tuned: Run | None, mode: Mode) -> SeedResult:
    plain_final = final_value(plain.curve, mode)
    comparable = math.isfinite(plain_final)  # whatever is finite beats a run that is not
    same = not any(run.curve.accepted[-1:]) and same_values(run.curve, plain.curve)
    # between validations, the cost of attempts alone would set the same run back
    at_equal_cost = plain.curve if same else run.curve

    def ratio(reach: Callable[..., float], reference: Run) -> float:
        target = final_value(reference.curve, mode)
        return _ratio(reach(run.curve, target, mode), reach(reference.curve, target, mode))

    return SeedResult(
        final=final_value(run.curve, mode),
        equal_cost=value_within(at_equal_cost, plain.curve.costs[-1], mode),
        best=best_within(at_equal_cost, plain.curve.costs[-1], mode),
        worst_after_best=worst_after_best(run.curve, mode),
        diverged=diverged(run.curve, plain.curve.values[0], mode),
        cost_ratio=ratio(cost_to_reach, plain) if comparable else math.nan,
        stay_ratio=_ratio(cost_to_stay(run.curve, plain_final, mode), plain.curve.costs[-1])
        if comparable
        else math.nan,
        seconds_ratio=ratio(seconds_to_reach, plain) if comparable else math.nan,
        tuned_ratio=ratio(cost_to_reach, tuned)
        if tuned is not None and math.isfinite(final_value(tuned.curve, mode))
        else math.nan,
        time_ratio=_ratio(run.curve.seconds[-1], plain.curve.seconds[-1]),
        processor_ratio=_ratio(run.curve.processor_seconds[-1], plain.curve.processor_seconds[-1]),
        same=same,
    )


def _ratio(value: float, reference: float) -> float:
    return value / reference if reference else math.nan


def _median_ranks(
    results: dict[str, dict[int, SeedResult]], seeds: Sequence[int], mode: Mode
) -> dict[str, float]:
    of_seeds = []
    for seed in seeds:
        values = [
            of_seed[seed].equal_cost if seed in of_seed else worst_value(mode)
            for of_seed in results.values()
        ]
        of_seeds.append(ranks(values, mode))
    return {
        name: quantile([ranked[i] for ranked in of_seeds], 0.5) for i, name in enumerate(results)
    }


def _summarise_variant(
    name: str, runs: dict[int, Run], seeds: dict[int, SeedResult], rank: float, mode: Mode
) -> VariantSummary:
    curves = [runs[seed].curve for seed in seeds]
    on = [run.smoothing_on for run in runs.values()]
    memory = [run.peak_memory for run in runs.values() if run.peak_memory is not None]

    def over_seeds(quantity: str, mode: Mode = "min") -> Spread:
        return spread([getattr(result, quantity) for result in seeds.values()], mode)

    return VariantSummary(
        name=name,
        seeds=seeds,
        errors={seed: run.error for seed, run in sorted(runs.items()) if run.error is not None},
        final=over_seeds("final", mode),
        equal_cost=over_seeds("equal_cost", mode),
        best=over_seeds("best", mode),
        worst_after_best=over_seeds("worst_after_best", mode),
        diverged=sum(result.diverged for result in seeds.values()),
        cost_ratio=over_seeds("cost_ratio"),
        stay_ratio=over_seeds("stay_ratio"),
        seconds_ratio=over_seeds("seconds_ratio"),
        tuned_ratio=over_seeds("tuned_ratio"),
        time_ratio=over_seeds("time_ratio").median,
        processor_ratio=over_seeds("processor_ratio").median,
        rank=rank,
        peak_memory=quantile(memory, 0.5),
        extra_cost=quantile([_ratio(c.costs[-1], c.gradients[-1]) - 1 for c in curves], 0.5),
        gradients=quantile([curve.gradients[-1] for curve in curves], 0.5),
        attempted=sum(curve.attempted[-1] for curve in curves),
        accepted=sum(curve.accepted[-1] for curve in curves),
        smoothing_on=quantile([share for share in on if share is not None], 0.5),
        disabled={
            seed: runs[seed].curve.disabled or "" for seed in seeds if runs[seed].curve.disabled
        },
    )


def spread(values: Iterable[float], mode: Mode) -> Spread:
    """Median, quartiles and worst of values where less (``min``) or more is better.

    NaN, which stands for what could not be compared, is left out.
    """
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return Spread(math.nan, math.nan, math.nan, math.nan, 0, 0)
    return Spread(
        median=quantile(values, 0.5),
        lower=quantile(values, 0.25),
        upper=quantile(values, 0.75),
        worst=max(values) if mode == "min" else min(values),
        never=sum(not math.isfinite(value) for value in values),
        count=len(values),
    )
