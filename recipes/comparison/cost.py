"""What a run cost until it reached a target; pure functions of recorded curves.

Cost is counted in gradients of a batch. A further evaluation of the loss, such as the safeguard's,
counts one third: a backward pass takes about twice the time of a forward pass.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Mode = Literal["min", "max"]

LOSS_COST = 1 / 3  # of a gradient
DIVERGED = 10  # times the first validation


@dataclass
class Curve:
    """One entry a validation, oldest first.

    ``gradients`` and ``loss_evaluations`` count those so far, ``seconds`` is the training time so
    far (without validations), ``processor_seconds`` what the process used of the processor in that
    time, ``values`` the monitored metric as validation logged it, and ``accepted`` and
    ``attempted`` count the extrapolations so far. ``disabled`` is why acceleration was switched
    off.
    """

    gradients: list[int] = field(default_factory=list)
    loss_evaluations: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    attempted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    disabled: str | None = None

    @property
    def costs(self) -> list[float]:
        """Gradients, and evaluations of the loss at one third."""
        return [
            gradients + LOSS_COST * losses
            for gradients, losses in zip(self.gradients, self.loss_evaluations, strict=True)
        ]


def worst_value(mode: Mode) -> float:
    """What a run that never validated, or was not finite, counts as."""
    return math.inf if mode == "min" else -math.inf


def at_least_as_good(value: float, target: float, mode: Mode) -> bool:
    """Whether ``value`` reaches ``target``; NaN reaches nothing."""
    return value <= target if mode == "min" else value >= target


def first_reaching(curve: Curve, target: float, mode: Mode) -> int | None:
    """Index of the first validation at least as good as ``target``; None where there is none."""
    hits = (i for i, value in enumerate(curve.values) if at_least_as_good(value, target, mode))
    return next(hits, None)


def cost_to_reach(curve: Curve, target: float, mode: Mode) -> float:
    """Cost at the first validation at least as good as ``target``; inf if never."""
    index = first_reaching(curve, target, mode)
    return math.inf if index is None else curve.costs[index]


def cost_to_stay(curve: Curve, target: float, mode: Mode) -> float:
    """Cost at the validation from which on all are at least as good as ``target``; inf if none.

    Where the metric oscillates, the first hit may be luck; this is not.
    """
    stayed = math.inf
    for cost, value in zip(reversed(curve.costs), reversed(curve.values), strict=True):
        if not at_least_as_good(value, target, mode):
            break
        stayed = cost
    return stayed


def seconds_to_reach(curve: Curve, target: float, mode: Mode) -> float:
    """Training time at the first validation at least as good as ``target``; inf if never."""
    index = first_reaching(curve, target, mode)
    return math.inf if index is None else curve.seconds[index]


def value_within(curve: Curve, budget: float, mode: Mode) -> float:
    """The metric at a cost of ``budget``: interpolated linearly between two validations.

    A few percent of losses more would otherwise cost a run its last validation. The last one
    where a run ended before, or where the next is not finite; the worst value before the first.
    """
    within = _within(curve, budget)
    if not within:
        return worst_value(mode)
    value, count = within[-1], len(within)
    if count < len(curve.values) and math.isfinite(curve.values[count]):
        low, high = curve.costs[count - 1], curve.costs[count]
        value += max(0.0, budget - low) / (high - low) * (curve.values[count] - value)
    return _or_worst(value, mode)


def best_within(curve: Curve, budget: float, mode: Mode) -> float:
    """The metric at the best validation that cost at most ``budget``, or there, by the line."""
    known = [*_within(curve, budget), value_within(curve, budget, mode)]
    finite = [value for value in known if math.isfinite(value)]
    return (min if mode == "min" else max)(finite, default=worst_value(mode))


def _within(curve: Curve, budget: float) -> list[float]:
    # the budget is itself a sum of thirds: rounding must not exclude an equal cost
    return [v for c, v in zip(curve.costs, curve.values, strict=True) if c <= budget + 1e-6]


def final_value(curve: Curve, mode: Mode) -> float:
    """The metric at the last validation."""
    return _or_worst(curve.values[-1], mode) if curve.values else worst_value(mode)


def diverged(curve: Curve, first: float, mode: Mode) -> bool:
    """Whether the second half of a run is far worse than where training began.

    Its worst validation is not finite, or more than 10 times ``first`` where less is better; less
    than half of it where more is better.

    Args:
        curve: of the run.
        first: the first validation of the plain run with the same seed.
        mode: which values are better.
    """
    late = curve.values[len(curve.values) // 2 :]
    if not all(map(math.isfinite, late)):
        return True
    if not math.isfinite(first):
        return False
    if mode == "min":
        return max(late) > first + (DIVERGED - 1) * abs(first)
    return min(late) < first - abs(first) / 2


def worst_after_best(curve: Curve, mode: Mode) -> float:
    """The worst validation from the best one of the run on: what a run loses again."""
    values = [_or_worst(value, mode) for value in curve.values]
    best, worst = (min, max) if mode == "min" else (max, min)
    return worst(values[values.index(best(values)) :])


def same_values(curve: Curve, other: Curve) -> bool:
    """Whether all validations gave the same numbers, bit by bit; NaN is like NaN."""
    return len(curve.values) == len(other.values) and all(
        a == b or (math.isnan(a) and math.isnan(b))
        for a, b in zip(curve.values, other.values, strict=True)
    )


def quantile(values: Sequence[float], share: float) -> float:
    """Linearly interpolated quantile of values that may be infinite; NaN of none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    weight = position - low
    if weight == 0 or ordered[low] == ordered[low + 1]:
        return ordered[low]
    return (1 - weight) * ordered[low] + weight * ordered[low + 1]


def ranks(values: Sequence[float], mode: Mode) -> list[float]:
    """1 for the best; equal values share the mean of their ranks."""
    signed = [value if mode == "min" else -value for value in values]
    return [
        sum(other < value for other in signed) + (sum(other == value for other in signed) + 1) / 2
        for value in signed
    ]


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p of so uneven a split of wins and losses between equals."""
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(max(wins, losses), n + 1)) / 2**n
    return min(1.0, 2 * tail)


def _or_worst(value: float, mode: Mode) -> float:
    return worst_value(mode) if math.isnan(value) else value
