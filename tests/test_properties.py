"""Random options and histories: a result that equals the reference, or a documented refusal.

A few hundred examples by default, always the same ones; ``make nightly`` draws 100,000 new ones of
each property (``STABLEAA_EXAMPLES=100000``).
"""

from __future__ import annotations

import math
import os
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, event, example, given, settings
from hypothesis import strategies as st

from lightning_stableaa import AndersonAccelerator, Smoothing
from lightning_stableaa.options import Options, RsdKind, SmoothingApplyTo
from lightning_stableaa.solver import mixing_weights, propose
from tests import reference
from tests.twin import UNINFORMATIVE, Drive, Scenario, condition

EXAMPLES = int(os.environ.get("STABLEAA_EXAMPLES", "0"))

profile = settings(
    max_examples=EXAMPLES or 200,
    derandomize=not EXAMPLES,
    deadline=None,  # one slow example on a busy machine is no failure
    database=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),  # explaining traces every line
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
nightly = pytest.mark.timeout(0) if EXAMPLES else pytest.mark.timeout(300)

# Strategies that depend on nothing are built once: building them anew for every example would cost
# as much as the examples.
LAMBDAS = st.sampled_from([0.0, 1e-12, 1e-8, 1e-4, 1e-2, 0.3, 1.0, 100.0, 1])
CAPS = st.sampled_from([math.inf, 1e6, 1000.0, 10, 1.0, 0.3])
BOOLEANS = st.booleans()
SEEDS = st.integers(0, 2**32 - 1)


def smoothings(cycle: int) -> list[Smoothing]:
    """All that fit a cycle of that many steps."""
    return [
        Smoothing(average_window=window, rsd_threshold=threshold, rsd=rsd, of=of, apply_to=apply_to)
        for window in (None, *range(2, cycle + 1))
        for threshold in (0, 0.01, 0.1, 0.5, 2.0, math.inf)
        for rsd in get_args(RsdKind)
        for of in (("iterates",) if rsd == "max" else ("iterates", "updates"))
        for apply_to in get_args(SmoothingApplyTo)
    ]


CYCLES = st.integers(1, 4)
SMOOTHINGS = {cycle: st.none() | st.sampled_from(smoothings(cycle)) for cycle in range(1, 5)}
APPLICATIONS = st.sampled_from(["training", "evaluation", "both"])
APPLICATIONS_OF_AVERAGES = st.sampled_from(["training", "both"])
SAFEGUARDS = st.sampled_from(["loss", "none"])
ONE_LAMBDA = st.none() | LAMBDAS
GRIDS = ONE_LAMBDA | st.lists(LAMBDAS, min_size=1, max_size=3) | st.tuples(LAMBDAS, LAMBDAS)
FREE_OPTIONS = st.fixed_dictionaries(
    {
        "history_depth": st.integers(2, 8),
        "warmup_steps": st.sampled_from([0, 0, 1, 7]),
        "relaxation": st.sampled_from([1.0, 1, 0.5, 1e-3]),
        "lag_compensation": st.sampled_from([0.5, 0, 1.0, 100]),
        "look_ahead_cycles": st.sampled_from([10.0, 0, 0.5]),
        "sufficient_decrease": st.sampled_from([None, 0.03, 0, 0.3]),
        "max_extrapolation": CAPS,
        "optimizer_state": st.sampled_from(["keep", "mix", "reset"]),
        "history": st.sampled_from(["auto", "replicated", "sharded"]),
        "history_device": st.sampled_from([None, "cpu"]),
    }
)


@st.composite
def valid_options(draw: st.DrawFn) -> dict[str, Any]:
    safeguard, cycle = draw(SAFEGUARDS), draw(CYCLES)
    smoothing = draw(SMOOTHINGS[cycle])
    follows = smoothing is not None and smoothing.apply_to == "weights"
    return draw(FREE_OPTIONS) | {
        "safeguard": safeguard,
        "store_every_n_steps": cycle,
        "accelerate_every_n_steps": cycle * draw(CYCLES),
        "regularization": draw(GRIDS if safeguard == "loss" else ONE_LAMBDA),
        "smoothing": smoothing,
        "apply_to": draw(APPLICATIONS_OF_AVERAGES if follows else APPLICATIONS),
    }


RARE = ("same again", "stand still", "no gradient", "edit", "late edit", "reload", "freeze")
CALM = ("step",) * 24 + RARE
STORMY = ("step",) * 12 + RARE + ("nan", "inf")

VALID_OPTIONS = valid_options()
SHAPES = st.lists(
    st.sampled_from([(), (1,), (2,), (7,), (3, 4), (2, 1, 5), (0,), (20,)]), min_size=1, max_size=4
)
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
MIXED = st.sampled_from([False, False, False, True])
ORDINARY = [1.0, 1.0, 1e-3, 1e4, 1e-30, 1e37]
SCALES = st.sampled_from(ORDINARY)
SCALES_OF_DOUBLES = st.sampled_from([*ORDINARY, 1e-120, 1e120, 1e-200, 1e200])
OFFSETS = st.sampled_from([0.0, 1.0, 1.0, 100.0])
KINDS = st.sampled_from([CALM, CALM, CALM, STORMY])
EVENTS = st.binary(min_size=1, max_size=6) | st.binary(min_size=20, max_size=40)
LOSSES = st.sampled_from(["bowl", "bowl", "finite", "any", "nothing", "raises"])


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    shapes = draw(SHAPES)
    dtype, mixed = draw(DTYPES), draw(MIXED)
    other = torch.float32 if mixed else dtype
    doubles = dtype == torch.float64 and not mixed
    kinds = draw(KINDS)
    return Scenario(
        options=draw(VALID_OPTIONS),
        sizes=tuple(shapes),
        dtypes=tuple(dtype if k % 2 == 0 else other for k in range(len(shapes))),
        scale=draw(SCALES_OF_DOUBLES if doubles else SCALES),
        offset=draw(OFFSETS),
        events=tuple(kinds[one % len(kinds)] for one in draw(EVENTS)),
        losses=draw(LOSSES),
        with_loss=draw(BOOLEANS),
        seed=draw(SEEDS),
        of_sample=draw(BOOLEANS),
        tells_training_loss=draw(BOOLEANS),
    )


# A point that is not finite begins a cycle, and something else mends the weights.
MENDED = Scenario(
    options={
        "history_depth": 4,
        "store_every_n_steps": 2,
        "accelerate_every_n_steps": 2,
        "smoothing": Smoothing(average_window=2, rsd_threshold=0.5, rsd="max", apply_to="history"),
    },
    sizes=((), ()),
    dtypes=(torch.float64, torch.float64),
    scale=1.0,
    offset=0.0,
    events=("step",) * 7 + ("nan", "step", "edit") + ("step",) * 10,
    losses="bowl",
    with_loss=False,
    seed=1,
)


@nightly
@profile
@example(MENDED)
@given(scenarios())
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_every_history_gives_the_reference_or_a_documented_refusal(scenario: Scenario) -> None:
    outcome = Drive(scenario).run()
    for status in outcome.statuses:
        event(status.value)
    event(f"compared: {min(outcome.compared, 3)}, uninformative: {min(outcome.uninformative, 3)}")
    if outcome.refused:
        event(outcome.refused)


COUNTS, SIZES = st.integers(1, 8), st.integers(1, 40)
SCALES_OF_VECTORS = st.sampled_from([1.0, 1e-3, 1e-120, 1e120])
SPREADS = st.sampled_from([1.0, 1e-8])
ROWS = st.sampled_from(["own", "own", "own", "zero", "repeated", "collinear"])
SPOILED = st.sampled_from([None] * 9 + [math.nan, math.inf, -math.inf])


@st.composite
def residuals(draw: st.DrawFn) -> np.ndarray:  # (m, n)
    """Vectors of one history, some of them zero, repeated, collinear or not finite."""
    m, n = draw(COUNTS), draw(SIZES)
    random = np.random.default_rng(draw(SEEDS))
    rows = random.normal(size=(m, n)) * draw(SCALES_OF_VECTORS)
    rows *= random.choice([1.0, draw(SPREADS)], size=(m, 1))
    for row in range(m):
        match draw(ROWS):
            case "zero":
                rows[row] = 0.0
            case "repeated":
                rows[row] = rows[0]
            case "collinear":
                rows[row] = -3 * rows[0]
    spoiled = draw(SPOILED)
    if spoiled is not None:
        rows[random.integers(m), random.integers(n)] = spoiled
    return rows


RESIDUALS = residuals()


@nightly
@profile
@given(RESIDUALS, LAMBDAS)
def test_mixing_weights_equal_the_reference_or_are_nan(rows: np.ndarray, value: float) -> None:
    gram = torch.from_numpy(rows) @ torch.from_numpy(rows).T
    alpha = mixing_weights(gram, regularization=value).numpy()
    if not np.isfinite(rows).all() or not rows.any():
        event("nothing defined")
        assert np.isnan(alpha).all()
        return
    m = len(rows)
    expected = reference.mixing_weights(list(rows), value)
    assert not alpha[~rows.any(axis=1)].any()
    size = np.abs(expected).sum()
    # each term of the sum is rounded
    assert abs(alpha.sum() - 1) <= 8 * m * 2.2e-16 * np.abs(alpha).sum()
    # as good a minimum of equation (3), however ill-conditioned: of the norm of what is mixed
    ridge = max(value, m * np.finfo(float).eps) * np.trace(gram.numpy()) / rows.any(axis=1).sum()

    def objective(weights: np.ndarray) -> float:
        mixed = weights @ rows
        return float(mixed @ mixed + ridge * weights @ weights)

    rounding = 64 * m * 2.2e-16 * size * size * np.trace(gram.numpy())
    assert objective(alpha) <= objective(expected) * (1 + 1e-6) + rounding
    error = 16 * m * (rows.shape[1] + m) * 2.2e-16 * condition(list(rows), value)
    if error < UNINFORMATIVE:
        event("compared")
        assert np.abs(alpha - expected).max() <= error * size


STARTS = st.sampled_from([0.0, 1.0, 10.0])


@st.composite
def histories(draw: st.DrawFn) -> tuple[np.ndarray, list[bool]]:
    """Stored points (q + 1, n), and which of their differences are residuals."""
    rows = draw(RESIDUALS)
    linked = [draw(BOOLEANS) for _ in rows]
    linked[draw(COUNTS) % len(rows)] = True
    start = np.nan_to_num(rows[:1], posinf=1.0, neginf=1.0) * draw(STARTS)
    with np.errstate(invalid="ignore", over="ignore"):
        return np.concatenate([start, start + rows.cumsum(axis=0)]), linked


@nightly
@profile
@given(histories(), st.lists(LAMBDAS, min_size=1, max_size=3), CAPS, st.sampled_from([1.0, 0.5]))
def test_no_jump_is_longer_than_the_cap(
    history: tuple[np.ndarray, list[bool]], grid: list[float], cap: float, relaxation: float
) -> None:
    points, linked = history
    steps = torch.from_numpy(points).diff(dim=0)
    found = propose(
        steps @ steps.T,
        linked,
        regularization=grid,
        relaxation=relaxation,
        max_extrapolation=cap,
    )
    size = steps[torch.tensor(linked)].square().sum(dim=1).mean().sqrt().item()
    assert found.jumps.shape == (len(grid), len(linked))
    if not bool(steps.square().sum().isfinite()):
        event("not finite, perhaps across a break")
        assert not math.isfinite(found.residual_norm)
        return
    if size == 0:
        event("nothing moved")
        assert found.residual_norm == 0
        return
    # a sum of squares, and its root
    assert math.isclose(found.residual_norm, size, rel_tol=1e-12)
    # the length of a jump that nearly cancels is known to the square root of the rounding
    slack = (1e-14 * (found.jumps.abs() @ steps.norm(dim=1)).square()).sqrt()
    lengths = (found.jumps @ steps).norm(dim=1)
    assert bool((lengths <= cap * size * (1 + 1e-6) + slack).all())
    assert bool(((lengths - found.norms).abs() <= 1e-6 * lengths + slack).all())


WRONG_VALUES = st.one_of(
    st.sampled_from([math.nan, math.inf, -math.inf, -1, 0, -0.5, 2.5, 1e400, True, None, ""]),
    st.sampled_from(["loss", "cpu", "1e-3", "all", [], {}, [None], ["a"], [-1.0], [True], b"x"]),
    st.integers(-3, 10**30),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.floats(), max_size=3),
    st.builds(object),
)


@nightly
@profile
@given(VALID_OPTIONS, st.sampled_from(sorted(Options.__dataclass_fields__)), WRONG_VALUES)
def test_any_option_is_taken_or_refused_in_a_sentence_that_names_it(
    options: dict[str, Any], name: str, value: Any
) -> None:
    Options(**options)
    if name == "history_depth" and isinstance(value, int) and value > 10**4:
        value = -value  # a depth that only memory limits
    changed: dict[str, Any] = options | {name: value}
    try:
        taken = Options(**changed)
    except (TypeError, ValueError) as error:
        event(f"{name} refused")
        sentence = str(error)
        # a conflict may be told from either side
        assert sentence.startswith((*options, "average_window")), sentence
        assert name in sentence or "average_window" in sentence, sentence
        assert "\n" not in sentence
        with pytest.raises(type(error)):
            accelerator(changed)
        return
    event(f"{name} taken")
    assert all(math.isfinite(one) and one >= 0 for one in taken.regularization_grid or ())
    engine = accelerator(changed)
    assert engine.options == taken
    engine.detach()


def accelerator(options: dict[str, Any]) -> AndersonAccelerator:
    weight = torch.nn.Parameter(torch.zeros(2))
    return AndersonAccelerator(torch.optim.SGD([weight], lr=0.1), **options)
