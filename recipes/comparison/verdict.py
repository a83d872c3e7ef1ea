"""Whether Anderson acceleration helped, in a sentence that a sceptic may quote."""

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

from lightning_stableaa.recipes.comparison.cost import quantile, sign_test
from lightning_stableaa.recipes.comparison.summary import Spread, Summary, VariantSummary

ANDERSON = "anderson"
AVERAGING = ("smoothing", "smoothing_always", "history_average", "ema", "ema_slow", "swa")
MARGIN = 0.05  # differences in cost below five percent are called none
TIE = 0.002  # ends closer than this, relative, are ties
EVIDENCE = 0.07  # p of a sign test: five seeds of five have 0.0625
FEW = 5  # with fewer seeds, no sign test can have that
UNDECIDED = "is undecided"


class Duel(NamedTuple):
    """Seeds in which a variant was better or worse than another."""

    wins: int
    losses: int


def verdict(summary: Summary) -> list[str]:
    """One sentence for each variant with Anderson acceleration, and one that names the best."""
    sentences = [
        _tuned_sentence(one, summary) if "@" in one.name else _sentence(one, summary)
        for one in contenders(summary)
    ]
    return [*sentences, _best(summary)]


def contenders(summary: Summary) -> list[VariantSummary]:
    """The accelerated variants: each as it is, and the best of those with another rate."""
    accelerated = [one for one in summary.variants.values() if is_anderson(one.name)]
    unchanged = [one for one in accelerated if "@" not in one.name]
    best = _least((one for one in accelerated if one not in unchanged), summary)
    return unchanged if best is None else [*unchanged, best]


def is_anderson(name: str) -> bool:
    """Whether the variant accelerates."""
    return name.split("@")[0].startswith(ANDERSON)


def is_unchanged(one: VariantSummary) -> bool:
    """Whether candidates were tried, none was accepted, and every run is plain's own."""
    return one.attempted > 0 and all(result.same for result in one.seeds.values())


def best_averaging(summary: Summary) -> VariantSummary | None:
    """The variant that only averages and has the best median at equal cost."""
    averaging = [
        one
        for one in summary.variants.values()
        if one.name.split("@")[0] in AVERAGING
        and one.cost_ratio.count
        and one.smoothing_on != 0  # a switch that never came on averaged nothing; NaN has none
    ]
    return _least(averaging, summary)


def outcome(one: VariantSummary, summary: Summary) -> str:
    """In a few words what the seeds show: ``helped``, ``made it worse``, a way between, or nothing.

    By cost: the median cost to reach the plain run's final value differs from 1 by more than
    ``MARGIN``, and seeds agree on the side. By end: seeds agree that the value at equal cost is
    better, or worse. Where they agree on neither, it did not help if there is no sign of it: costs
    within the margin, and no more ends better than worse. Else it is undecided.
    """
    cost, costs, ends = one.cost_ratio, _costs_of(one), _ends(one, summary)
    seeds = len(one.seeds)
    sooner = cost.median < 1 - MARGIN and _agree(costs.wins, costs.losses, seeds)
    later = cost.median > 1 + MARGIN and _agree(costs.losses, costs.wins, seeds)
    better = _agree(ends.wins, ends.losses, seeds)
    worse = _agree(ends.losses, ends.wins, seeds)
    if sooner:
        return "was sooner but ended worse" if worse else "helped"
    if later:
        return "was later but ended better" if better else "made it worse"
    if better:
        return "helped" if cost.median < 1 - MARGIN else "was no sooner but ended better"
    if worse:
        return "made it worse" if cost.median > 1 + MARGIN else "was no sooner but ended worse"
    alike = cost.lower >= 1 - MARGIN and cost.upper <= 1 + MARGIN
    return "did not help" if alike and ends.wins <= ends.losses else UNDECIDED


def _agree(count: int, against: int, seeds: int) -> bool:
    """Whether so many of the seeds are more than chance; of few, all have to be."""
    if seeds < FEW:
        return count == seeds
    return count > against and sign_test(count, against) <= EVIDENCE


def _sentence(one: VariantSummary, summary: Summary) -> str:
    plain = summary.variants[summary.baseline]
    if not one.cost_ratio.count:
        why = "no seed was finished by both"
        if one.seeds:
            why = f"{summary.metric} did not end in a finite number in any seed finished by both"
        return f"{one.name}: {why} it and {plain.name}, so nothing is known."
    if is_unchanged(one):
        return (
            f"{one.name} changed nothing: of {one.attempted} candidates none entered training, so "
            f"that its runs are those of {plain.name}, at {one.extra_cost:.1%} more cost"
            f"{_caution(one.cost_ratio)}"
        )
    if one.attempted == 0:
        return _not_tried(one)
    ends = _ends(one, summary)
    parts = [
        f"{one.name} {outcome(one, summary)}: {_reached(one.cost_ratio, plain.name, summary)}, "
        f"{_costs(one)}",
        f"{_medians(one, plain, summary)}, better in {_of(ends.wins, one)}",
    ]
    own = sum(result.same for result in one.seeds.values())
    if own:
        parts.append(f"{_of(own, one)} are {plain.name}'s own runs, which no candidate entered")
    best = _ends(one, summary, quantity="best")
    if ends.wins < ends.losses and best.wins > best.losses:
        parts.append(
            f"its best validation up to there was better in {_of(best.wins, one)}, so it got there "
            "sooner and went on too long"
        )
    averaging = best_averaging(summary)
    if averaging is not None:
        parts.append(_beside(one, averaging, summary))
    if summary.best_swept != summary.baseline:
        parts.append(_against_swept(one, summary))
    if outcome(one, summary) == UNDECIDED:
        parts.append(f"more seeds decide (compare.seeds={max(10, 2 * len(one.seeds))})")
    return "; ".join(parts) + _caution(one.cost_ratio)


def _tuned_sentence(one: VariantSummary, summary: Summary) -> str:
    """Whether the best learning rate and schedule with acceleration beats the best without."""
    swept = summary.variants[summary.best_swept]
    if not one.swept_ratio.count:
        return f"{one.name}: no seed ended in a finite number both of it and of {swept.name}."
    if one.attempted == 0:
        return _not_tried(one)
    ends = _ends(one, summary, summary.best_swept)
    is_swept = any(name.startswith(f"{summary.baseline}@") for name in summary.variants)
    rival = "the best-swept plain run" if is_swept else f"{swept.name} at its own rate"
    parts = [
        f"{one.name}, the best accelerated run with another learning rate or schedule, "
        f"{_beaten(one, summary) or 'may have beaten'} {rival}: "
        f"{_reached(one.swept_ratio, swept.name, summary)}",
        f"{_medians(one, swept, summary)}, better in {_of(ends.wins, one)}",
    ]
    if not is_swept:
        parts.append(
            f"{swept.name} was not tried with other rates, which compare.lr_sweep_of=[plain,"
            "anderson] does"
        )
    return "; ".join(parts) + _caution(one.swept_ratio)


def _not_tried(one: VariantSummary) -> str:
    return (
        f"{one.name} was not tried: no extrapolation was due in {one.gradients:.0f} gradients; "
        "train longer, or lower callbacks.anderson.store_every_n_steps and "
        "callbacks.anderson.accelerate_every_n_steps."
    )


def _caution(spread: Spread) -> str:
    return "; fewer than five seeds prove little." if spread.count < FEW else "."


def _reached(spread: Spread, target: str, summary: Summary) -> str:
    if math.isinf(spread.median):
        return (
            f"it never reached the final {summary.metric} of {target} in {spread.never} of "
            f"{spread.count} seeds"
        )
    text = (
        f"it reached the final {summary.metric} of {target} at {spread.median:.2f} of the cost "
        f"(median; quartiles {_number(spread.lower)} to {_number(spread.upper)}"
    )
    if spread.never:
        return f"{text}; never in {spread.never} of {spread.count} seeds)"
    return f"{text}; worst {spread.worst:.2f})"


def _costs(one: VariantSummary) -> str:
    costs = _costs_of(one)
    return f"cheaper in {_of(costs.wins, one)} (sign test p = {sign_test(*costs):.2g})"


def _costs_of(one: VariantSummary) -> Duel:
    """Seeds that were as good as plain sooner, and later; plain's own runs are neither."""
    ratios = [result.cost_ratio for result in one.seeds.values() if not result.same]
    return Duel(sum(r < 1 for r in ratios), sum(r > 1 for r in ratios))


def _medians(one: VariantSummary, other: VariantSummary, summary: Summary) -> str:
    """At equal cost, of the seeds that both finished; where they mislead, that of ratios as well.

    Each is that of another seed. One may be lower while most seeds are higher.
    """
    seeds = one.seeds.keys() & other.seeds.keys()
    mine, theirs = (
        [variant.seeds[seed].equal_cost for seed in sorted(seeds)] for variant in (one, other)
    )
    a, b = quantile(mine, 0.5), quantile(theirs, 0.5)
    text = f"at equal cost {summary.metric} is {a:.3g} against {b:.3g}"
    ends = _ends(one, summary, other.name)
    gain = (b - a) * (1 if summary.mode == "min" else -1) * (ends.wins - ends.losses)
    if gain < 0 and all(value > 0 for value in mine + theirs):
        ratio = quantile([x / y for x, y in zip(mine, theirs, strict=True)], 0.5)
        return f"{text} (medians; seed by seed {ratio:.2f} times that of {other.name})"
    return text


def _beside(one: VariantSummary, averaging: VariantSummary, summary: Summary) -> str:
    alone, both = averaging.cost_ratio.median, one.cost_ratio.median
    ends = _ends(one, summary, averaging.name)
    took = (
        f"averaging alone ({averaging.name}, the best of its kind) "
        f"{'never did' if math.isinf(alone) else f'took {alone:.2f}'} and ended at "
        f"{averaging.equal_cost.median:.3g}, worse than {one.name} in {_of(ends.wins, one)}"
    )
    helped = outcome(one, summary) == "helped"
    if helped and alone > both + MARGIN and _agree(*ends, len(one.seeds)):
        return f"{took}, so extrapolation adds to it"
    if outcome(averaging, summary) == "helped" and ends.wins <= ends.losses:
        return f"{took}, so what there is to gain comes from averaging"
    return took


def _against_swept(one: VariantSummary, summary: Summary) -> str:
    ratio = one.swept_ratio
    head = f"the best-swept plain run ({summary.best_swept}) "
    if not ratio.count:
        return f"{head}did not end in a finite number in any of these seeds"
    if math.isinf(ratio.median):
        return f"{head}ended better than it ever was in {ratio.never} of {ratio.count} seeds"
    said = {"beat": "it beat as well", "did not beat": "it did not beat"}
    beaten = said.get(_beaten(one, summary), "it may have beaten, too")
    ends = _ends(one, summary, summary.best_swept)
    return (
        f"{head}{beaten} ({ratio.median:.2f} of the cost; better at equal cost in "
        f"{_of(ends.wins, one)})"
    )


def _beaten(one: VariantSummary, summary: Summary) -> str:
    """Whether it ``beat`` the best-swept plain run or ``did not beat`` it; empty if undecided.

    It did where seeds agree that it was as good sooner, or better at equal cost, and not that the
    other of the two was against it.
    """
    seeds = len(one.seeds)
    ratios = [result.swept_ratio for result in one.seeds.values()]
    sooner, later = sum(r < 1 for r in ratios), sum(r > 1 for r in ratios)
    better, worse = _ends(one, summary, summary.best_swept)
    wins = _agree(sooner, later, seeds) and one.swept_ratio.median < 1 - MARGIN
    wins |= _agree(better, worse, seeds)
    if wins and not _agree(later, sooner, seeds) and not _agree(worse, better, seeds):
        return "beat"
    return "" if one.swept_ratio.median < 1 - MARGIN and better > worse else "did not beat"


def _best(summary: Summary) -> str:
    changed = [one for one in summary.variants.values() if not is_unchanged(one)]
    best = _least(changed, summary)
    if best is None:
        return "No run was finished."
    if not math.isfinite(best.equal_cost.median):
        return f"Of no variant was the median {summary.metric} at equal cost a finite number."
    return (
        f"The best median {summary.metric} at equal cost "
        f"({'less' if summary.mode == 'min' else 'more'} is better) was that of {best.name} "
        f"({best.equal_cost.median:.3g})."
    )


def _least(variants: Iterable[VariantSummary], summary: Summary) -> VariantSummary | None:
    """The variant with the best median at equal cost."""
    sign = 1 if summary.mode == "min" else -1
    finished = (one for one in variants if one.equal_cost.count)
    return min(finished, key=lambda one: sign * one.equal_cost.median, default=None)


def _ends(
    one: VariantSummary,
    summary: Summary,
    reference: str | None = None,
    *,
    quantity: Literal["equal_cost", "best"] = "equal_cost",
) -> Duel:
    """Values at equal cost beside those of the reference, seed by seed; of plain by default."""
    other = summary.variants[reference or summary.baseline].seeds
    sign = 1 if summary.mode == "min" else -1
    pairs = [
        (sign * getattr(result, quantity), sign * getattr(other[seed], quantity))
        for seed, result in one.seeds.items()
        if seed in other
    ]
    apart = [(a, b) for a, b in pairs if not math.isclose(a, b, rel_tol=TIE)]
    return Duel(sum(a < b for a, b in apart), sum(a > b for a, b in apart))


def _of(count: int, one: VariantSummary) -> str:
    return f"{count} of {len(one.seeds)} seeds"


def _number(value: float) -> str:
    return "never" if math.isinf(value) else f"{value:.2f}"
