"""Whether Anderson acceleration helped, in one sentence for each accelerated variant."""

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

from lightning_stableaa.recipes.comparison.cost import quantile, sign_test
from lightning_stableaa.recipes.comparison.summary import Spread, Summary, VariantSummary

ACCELERATED = ("anderson", "textbook_aa", "paper", "aadl")  # how names of such variants begin
AVERAGING = ("smoothing", "smoothing_always", "history_average", "ema", "ema_slow", "swa")
MARGIN = 0.05  # smaller relative differences in cost do not count
TIE = 0.002  # values closer than this, relative, are ties
EVIDENCE = 0.07  # p of a sign test: five seeds of five have 0.0625
FEW = 5  # with fewer seeds, no sign test can reach that
UNDECIDED = "is undecided"


class WinLoss(NamedTuple):
    """Seeds in which a variant was better, and worse, than another."""

    wins: int
    losses: int


def verdict(summary: Summary) -> list[str]:
    """One sentence for each accelerated variant, and one that names the best variant."""
    sentences = [
        _tuned_sentence(one, summary) if "@" in one.name else _sentence(one, summary)
        for one in accelerated(summary)
    ]
    return [*sentences, _best_sentence(summary)]


def accelerated(summary: Summary) -> list[VariantSummary]:
    """The accelerated variants as they are, and the best of those with another rate."""
    variants = [one for one in summary.variants.values() if is_accelerated(one.name)]
    unchanged = [one for one in variants if "@" not in one.name]
    best = _best_of((one for one in variants if one not in unchanged), summary)
    return unchanged if best is None else [*unchanged, best]


def is_accelerated(name: str) -> bool:
    """Whether the variant extrapolates."""
    return name.split("@")[0].startswith(ACCELERATED)


def had_no_effect(one: VariantSummary) -> bool:
    """Whether candidates were proposed, none was accepted, and every run equals plain's."""
    return one.attempted > 0 and all(result.same for result in one.seeds.values())


def best_averaging(summary: Summary) -> VariantSummary | None:
    """The variant that only averages and has the best median at equal cost."""
    averaging = [
        one
        for one in summary.variants.values()
        if one.name.split("@")[0] in AVERAGING
        and one.cost_ratio.count
        and one.smoothing_on != 0  # never on: nothing was averaged; NaN has no switch
    ]
    return _best_of(averaging, summary)


def outcome(one: VariantSummary, summary: Summary) -> str:
    """What the seeds show: ``helped``, ``made it worse``, something between, or undecided.

    By cost: the median cost to target differs from 1 by more than ``MARGIN``, and seeds agree on
    the side. By final value: seeds agree that the value at equal cost is better, or worse. Where
    they agree on neither, it did not help if costs are within the margin and no more values are
    better than worse. Else it is undecided.
    """
    cost, costs, finals = one.cost_ratio, _cost_wins(one), _final_wins(one, summary)
    seeds = len(one.seeds)
    sooner = cost.median < 1 - MARGIN and _agree(costs.wins, costs.losses, seeds)
    later = cost.median > 1 + MARGIN and _agree(costs.losses, costs.wins, seeds)
    better = _agree(finals.wins, finals.losses, seeds)
    worse = _agree(finals.losses, finals.wins, seeds)
    if sooner:
        return "was sooner but ended worse" if worse else "helped"
    if later:
        return "was later but ended better" if better else "made it worse"
    if better:
        return "helped" if cost.median < 1 - MARGIN else "was no sooner but ended better"
    if worse:
        return "made it worse" if cost.median > 1 + MARGIN else "was no sooner but ended worse"
    alike = cost.lower >= 1 - MARGIN and cost.upper <= 1 + MARGIN
    return "did not help" if alike and finals.wins <= finals.losses else UNDECIDED


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
        return f"{one.name}: {why} it and {plain.name}, so they cannot be compared."
    if had_no_effect(one):
        return (
            f"{one.name} had no effect: none of its {one.attempted} candidates was accepted, and "
            f"its runs equal those of {plain.name}, at {one.extra_cost:.1%} more cost"
            f"{_caution(one.cost_ratio)}"
        )
    if one.attempted == 0:
        return _not_tried(one)
    finals = _final_wins(one, summary)
    parts = [
        f"{one.name} {outcome(one, summary)}: {_reached(one.cost_ratio, plain.name, summary)}, "
        f"{_costs(one)}",
        f"{_medians(one, plain, summary)}, better in {_seeds(finals.wins, one)}",
    ]
    if one.diverged:
        parts.append(f"it diverged in {_seeds(one.diverged, one)} ({plain.name}: {plain.diverged})")
    same = sum(result.same for result in one.seeds.values())
    if same:
        parts.append(f"{_seeds(same, one)} equal {plain.name}, without any accepted candidate")
    best = _final_wins(one, summary, quantity="best")
    if finals.wins < finals.losses and best.wins > best.losses:
        parts.append(
            f"its best validation up to there was better in {_seeds(best.wins, one)}: it improved "
            "sooner and got worse again"
        )
    averaging = best_averaging(summary)
    if averaging is not None:
        parts.append(_against_averaging(one, averaging, summary))
    if summary.tuned_baseline != summary.baseline:
        parts.append(_against_tuned(one, summary))
    if outcome(one, summary) == UNDECIDED:
        parts.append(f"more seeds are needed (compare.seeds={max(10, 2 * len(one.seeds))})")
    return "; ".join(parts) + _caution(one.cost_ratio)


def _tuned_sentence(one: VariantSummary, summary: Summary) -> str:
    """Whether the best learning rate and schedule with acceleration beats the best without."""
    tuned = summary.variants[summary.tuned_baseline]
    if not one.tuned_ratio.count:
        return f"{one.name}: no seed ended in a finite number both of it and of {tuned.name}."
    if one.attempted == 0:
        return _not_tried(one)
    finals = _final_wins(one, summary, summary.tuned_baseline)
    is_tuned = any(name.startswith(f"{summary.baseline}@") for name in summary.variants)
    rival = "the tuned baseline" if is_tuned else f"{tuned.name} at its own rate"
    parts = [
        f"{one.name}, the best accelerated run with another learning rate or schedule, "
        f"{_beats_tuned(one, summary) or 'may have beaten'} {rival}: "
        f"{_reached(one.tuned_ratio, tuned.name, summary)}",
        f"{_medians(one, tuned, summary)}, better in {_seeds(finals.wins, one)}",
    ]
    if not is_tuned:
        parts.append(
            f"{tuned.name} was not tried with other rates, which compare.lr_sweep_of=[plain,"
            "anderson] does"
        )
    return "; ".join(parts) + _caution(one.tuned_ratio)


def _not_tried(one: VariantSummary) -> str:
    if one.disabled:
        return f"{one.name} was switched off: {next(iter(one.disabled.values()))}."
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
    costs = _cost_wins(one)
    return f"cheaper in {_seeds(costs.wins, one)} (sign test p = {sign_test(*costs):.2g})"


def _cost_wins(one: VariantSummary) -> WinLoss:
    """Seeds that reached the target sooner than plain, and later; runs equal to it are ties."""
    ratios = [result.cost_ratio for result in one.seeds.values() if not result.same]
    return WinLoss(sum(r < 1 for r in ratios), sum(r > 1 for r in ratios))


def _medians(one: VariantSummary, other: VariantSummary, summary: Summary) -> str:
    """Values at equal cost, of the seeds that both finished.

    Each median is that of another seed: one may be lower while most seeds are higher. Then the
    median of the ratios, seed by seed, stands beside them.
    """
    seeds = one.seeds.keys() & other.seeds.keys()
    mine, theirs = (
        [variant.seeds[seed].equal_cost for seed in sorted(seeds)] for variant in (one, other)
    )
    a, b = quantile(mine, 0.5), quantile(theirs, 0.5)
    text = f"at equal cost {summary.metric} is {a:.3g} against {b:.3g}"
    finals = _final_wins(one, summary, other.name)
    gain = (b - a) * (1 if summary.mode == "min" else -1) * (finals.wins - finals.losses)
    if gain < 0 and all(value > 0 for value in mine + theirs):
        ratio = quantile([x / y for x, y in zip(mine, theirs, strict=True)], 0.5)
        return f"{text} (medians; seed by seed {ratio:.2f} times that of {other.name})"
    return text


def _against_averaging(one: VariantSummary, averaging: VariantSummary, summary: Summary) -> str:
    alone, both = averaging.cost_ratio.median, one.cost_ratio.median
    finals = _final_wins(one, summary, averaging.name)
    text = (
        f"averaging alone ({averaging.name}, the best of its kind) "
        f"{'never reached it' if math.isinf(alone) else f'took {alone:.2f}'} and ended at "
        f"{averaging.equal_cost.median:.3g}, worse than {one.name} in {_seeds(finals.wins, one)}"
    )
    helped = outcome(one, summary) == "helped"
    if helped and alone > both + MARGIN and _agree(*finals, len(one.seeds)):
        return f"{text}, so extrapolation adds to it"
    if outcome(averaging, summary) == "helped" and finals.wins <= finals.losses:
        return f"{text}, so the gain comes from averaging"
    return text


def _against_tuned(one: VariantSummary, summary: Summary) -> str:
    ratio, name = one.tuned_ratio, f"the tuned baseline ({summary.tuned_baseline})"
    if not ratio.count:
        return f"{name} did not end in a finite number in any of these seeds"
    if math.isinf(ratio.median):
        return f"it never reached the final value of {name} in {ratio.never} of {ratio.count} seeds"
    finals = _final_wins(one, summary, summary.tuned_baseline)
    return (
        f"it {_beats_tuned(one, summary) or 'may have beaten'} {name} ({ratio.median:.2f} of the "
        f"cost; better at equal cost in {_seeds(finals.wins, one)})"
    )


def _beats_tuned(one: VariantSummary, summary: Summary) -> str:
    """Whether it ``beat`` the tuned baseline or ``did not beat`` it; empty if undecided.

    It did where seeds agree that it reached the target sooner, or was better at equal cost, and
    do not agree on the opposite of the other of the two.
    """
    seeds = len(one.seeds)
    ratios = [result.tuned_ratio for result in one.seeds.values()]
    sooner, later = sum(r < 1 for r in ratios), sum(r > 1 for r in ratios)
    better, worse = _final_wins(one, summary, summary.tuned_baseline)
    wins = _agree(sooner, later, seeds) and one.tuned_ratio.median < 1 - MARGIN
    wins |= _agree(better, worse, seeds)
    if wins and not _agree(later, sooner, seeds) and not _agree(worse, better, seeds):
        return "beat"
    return "" if one.tuned_ratio.median < 1 - MARGIN and better > worse else "did not beat"


def _best_sentence(summary: Summary) -> str:
    effective = [one for one in summary.variants.values() if not had_no_effect(one)]
    best = _best_of(effective, summary)
    if best is None:
        return "No run was finished."
    if not math.isfinite(best.equal_cost.median):
        return f"Of no variant was the median {summary.metric} at equal cost a finite number."
    return (
        f"The best median {summary.metric} at equal cost "
        f"({'less' if summary.mode == 'min' else 'more'} is better) was that of {best.name} "
        f"({best.equal_cost.median:.3g})."
    )


def _best_of(variants: Iterable[VariantSummary], summary: Summary) -> VariantSummary | None:
    """The variant with the best median at equal cost."""
    sign = 1 if summary.mode == "min" else -1
    finished = (one for one in variants if one.equal_cost.count)
    return min(finished, key=lambda one: sign * one.equal_cost.median, default=None)


def _final_wins(
    one: VariantSummary,
    summary: Summary,
    reference: str | None = None,
    *,
    quantity: Literal["equal_cost", "best"] = "equal_cost",
) -> WinLoss:
    """Values at equal cost against those of the reference, seed by seed; plain by default."""
    other = summary.variants[reference or summary.baseline].seeds
    sign = 1 if summary.mode == "min" else -1
    pairs = [
        (sign * getattr(result, quantity), sign * getattr(other[seed], quantity))
        for seed, result in one.seeds.items()
        if seed in other
    ]
    apart = [(a, b) for a, b in pairs if not math.isclose(a, b, rel_tol=TIE)]
    return WinLoss(sum(a < b for a, b in apart), sum(a > b for a, b in apart))


def _seeds(count: int, one: VariantSummary) -> str:
    return f"{count} of {len(one.seeds)} seeds"


def _number(value: float) -> str:
    return "never" if math.isinf(value) else f"{value:.2f}"
