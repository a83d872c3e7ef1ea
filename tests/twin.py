"""The whole engine beside the reference: one random history, every step checked.

The twin is told the weights that the engine really has and computes in float64 what must become of
them, so that an error bound holds for one step and nothing accumulates. Bounds are first-order: u
is the unit roundoff of the stored points, and a solve loses the condition number of its matrix.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_stableaa import AndersonAccelerator, Smoothing, Status, StepReport
from lightning_stableaa.options import Options
from lightning_stableaa.safeguard import LossFunction
from tests import reference
from tests.judges import OfSample
from tests.reference import ReferenceAccelerator, Vector

HYSTERESIS = 0.8
# Beyond it the first-order bound says nothing: then a result must only be finite and short enough.
UNINFORMATIVE = 0.05
TOO_FAR = (
    Status.REJECTED_LOSS,
    Status.REJECTED_SMALL_DECREASE,
    Status.REJECTED_NON_FINITE_LOSS,
)


@dataclass(frozen=True)
class Scenario:
    """Options, weights, and what happens to them."""

    options: dict[str, Any]
    sizes: tuple[tuple[int, ...], ...]  # shape of every parameter
    dtypes: tuple[torch.dtype, ...]  # of every parameter
    scale: float  # of the updates
    offset: float  # of the weights, in units of the updates
    events: tuple[str, ...]  # one for every call of the optimizer
    losses: str
    with_loss: bool  # is a loss given where the safeguard does not need one?
    seed: int
    of_sample: bool = False  # are the losses those of samples?
    tells_training_loss: bool = False  # does the judge know it?


@dataclass
class Outcome:
    """What a scenario led to, for statistics."""

    statuses: list[Status] = field(default_factory=list)
    compared: int = 0  # candidates held against the reference
    uninformative: int = 0
    refused: str | None = None


class Scripted(torch.optim.Optimizer):
    """Adds to every parameter what it is told to, and keeps a momentum that it is told."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__(list(parameters), {})
        self.updates: list[Tensor] = []
        self.momenta: list[Tensor] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for parameter, update, momentum in zip(
            self.param_groups[0]["params"], self.updates, self.momenta, strict=True
        ):
            if parameter.grad is not None:
                parameter.add_(update)
                self.state[parameter]["momentum_buffer"] = momentum.clone()


class JudgeError(Exception):
    """Raised by a loss."""


class Drive:
    """One scenario, from the first step to the last."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.random = np.random.default_rng(scenario.seed)
        self.options = Options(**scenario.options)
        self.parameters = [
            nn.Parameter(self._array(shape, scenario.offset * scenario.scale).to(dtype))
            for shape, dtype in zip(scenario.sizes, scenario.dtypes, strict=True)
        ]
        self.optimizer = Scripted(self.parameters)
        self.engine = AndersonAccelerator(self.optimizer, **scenario.options)
        self.outcome = Outcome()
        self.seen: list[Vector] = []  # the weights at every call of the loss
        self.values: list[float] = []  # what it answered
        self.active = self._trainable()
        self.steps = self.since = self.attempted = self.accepted = 0
        self._forget()

    def run(self) -> Outcome:
        """Every event; a documented refusal ends it."""
        for event in self.scenario.events:
            try:
                self._event(event)
            except JudgeError:
                self.outcome.refused = "the loss raised"
            except ValueError as error:
                self.outcome.refused = self._documented(error)
            if self.outcome.refused:
                break
        return self.outcome

    # What happens

    def _event(self, event: str) -> None:
        if event == "reload":
            self._reload()
            return
        if event == "freeze":
            one = self.parameters[self.random.integers(len(self.parameters))]
            one.requires_grad_(not one.requires_grad)
            one.grad = None
            return
        if event == "edit":
            self._edit()
        self._prepare_update(event)
        self._before_step()
        self.optimizer.step()
        if event == "no gradient":
            assert self._call_engine().status is Status.NO_OPTIMIZER_STEP
            return
        if event == "late edit":
            self._edit()
        self._after_step()

    def _prepare_update(self, event: str) -> None:
        scale = 0.0 if event == "stand still" else self.scenario.scale
        if event == "same again" and self.optimizer.updates:
            pass
        else:
            self.optimizer.updates = [
                self._array(one.shape, scale).to(one.dtype) for one in self.parameters
            ]
        if event in ("nan", "inf"):
            spoiled = self.optimizer.updates[self.random.integers(len(self.parameters))]
            if spoiled.numel():
                spoiled.view(-1)[self.random.integers(spoiled.numel())] = float(event)
        self.optimizer.momenta = [
            self._array(one.shape, self.scenario.scale).to(one.dtype) for one in self.parameters
        ]
        for one in self.parameters:
            with_gradient = event != "no gradient" and one.requires_grad
            one.grad = torch.zeros_like(one) if with_gradient else None

    @torch.no_grad()
    def _edit(self) -> None:
        """Somebody else sets the weights anew, and mends what is not finite."""
        for one in self.active:
            one.copy_(self._array(one.shape, self.scenario.offset * self.scenario.scale))
        self.disturbed = bool(self.active)
        if self.reloaded:
            self._forget()  # the history of a checkpoint belongs to its weights

    def _reload(self) -> None:
        """A new engine takes up what the old one left in a file."""
        file = io.BytesIO()
        torch.save(self.engine.state_dict(), file)
        file.seek(0)
        self.engine.detach()
        self.engine = AndersonAccelerator(self.optimizer, **self.scenario.options)
        self.engine.load_state_dict(torch.load(file, weights_only=True))
        trainable = self._trainable()
        if not self.built or not _same(self.active, trainable):
            self._forget()
        self.active = trainable
        self.reloaded = True

    # What must follow

    def _forget(self) -> None:
        """A history begins anew."""
        options = self.options
        settings: dict[str, Any] = {
            "history_depth": options.history_depth,
            "store_every_n_steps": 1,
            "accelerate_every_n_steps": 1,
            "regularization": options.regularization_grid,
            "lag_compensation": options.lag_compensation,
            "look_ahead_cycles": options.look_ahead_cycles,
            "of_sample": self.scenario.of_sample,
        }
        self.points = ReferenceAccelerator(**settings)
        self.momenta = ReferenceAccelerator(**settings)
        self.window: list[Vector] = []
        self.cycle = 0
        self.losses: list[float] = []
        self.amid_noise = False
        self.chained = self.disturbed = self.smoothing_on = self.built = False
        self.reloaded = False
        self.evaluation: Vector | None = None

    def _before_step(self) -> None:
        if not self.built:
            if not self.active:
                return  # refused by the engine
            self.built = True
        elif self.disturbed:
            self._break()
        self.disturbed = self.reloaded = False
        if not self.chained and not self._averages_into_history():
            self._push(self._weights(), self._momentum(), linked=False)
            self.chained = True

    def _after_step(self) -> None:
        options = self.options
        own, momentum = self._weights(), self._momentum()
        self.steps += 1
        self.since += 1
        self.cycle += 1
        smoothing = options.smoothing
        if smoothing is not None:
            skipped = options.store_every_n_steps - (
                smoothing.average_window or options.store_every_n_steps
            )
            if self.cycle > skipped:
                self.window.append(own)
        if not any(one.grad is not None for one in self.parameters):
            self.steps, self.since, self.cycle = self.steps - 1, self.since - 1, self.cycle - 1
            if smoothing is not None and self.window:
                self.window.pop()
            assert self._call_engine().status is Status.NO_OPTIMIZER_STEP
            return
        report = self._call_engine()
        if self.cycle < options.store_every_n_steps:
            self._expect(report, Status.CYCLE_OPEN)
            self._unchanged(own)
            return
        self.cycle = 0
        trainable = self._trainable()
        if not _same(self.active, trainable):
            self._expect(report, Status.PARAMETERS_CHANGED)
            self._forget()
            self.active = trainable
            return
        if self.disturbed:
            self._break()
            self._expect(report, Status.WEIGHTS_CHANGED)
            self._unchanged(own)
            return
        own = self._store(own, momentum, report)
        self._decide(own, report)
        self._check_history()
        counted = (self.engine.optimizer_steps, self.engine.attempted, self.engine.accepted)
        assert counted == (self.steps, self.attempted, self.accepted)

    def _break(self) -> None:
        self.chained = self.disturbed = False
        self.losses = []
        self.cycle = 0
        self.window = []

    def _store(self, own: Vector, momentum: Vector, report: StepReport) -> Vector:
        """The end of a cycle enters the history; returns the weights that are judged."""
        before = self._averages_into_history()
        if self.options.smoothing is not None:
            self._check_smoothing(self.options.smoothing, report)
        window, self.window = self.window, []
        if self._averages_into_history() != before:
            self.chained = False
        newest = own
        if self.smoothing_on:
            newest = self._check_average(window)
            if not self._averages_into_history():
                own = newest = self._rounded(newest)  # written over the weights
                self.evaluation = None
        self._push(newest, momentum, linked=self.chained)
        self.points.trained += 1
        self.chained = True
        return own

    def _decide(self, own: Vector, report: StepReport) -> None:
        options = self.options
        if self.since < options.accelerate_every_n_steps:
            self._expect(report, Status.STORED)
        elif self.steps < options.warmup_steps:
            self._expect(report, Status.WARMUP)
        elif len(self.points.pairs()) < 2:
            self._expect(report, Status.HISTORY_TOO_SHORT)
        else:
            self.since = 0
            self.attempted += 1
            self.evaluation = None
            self._check_attempt(own, report)
            return
        self._unchanged(own)
        self._check_evaluation()

    def _check_attempt(self, own: Vector, report: StepReport) -> None:
        guarded = self.options.safeguard == "loss"
        self.squares = self._residual_squares()
        self.expected: dict[tuple[bool, int], tuple[Vector, float | None]] = {}
        self._check_who_was_asked(report)
        status, best, replaces = self._expected_status(guarded, report)
        self.outcome.statuses.append(report.status)
        assert report.attempted
        assert report.status is status, (report.status, status)
        candidates = self._check_candidates(own) if self.values else []
        if status is Status.ACCEPTED:
            self.accepted += 1
            assert report.accepted
            self._check_lambda(report, self._lambdas()[best])
            assert report.looked_ahead in self._may_look_ahead(best)
            assert report.replaced is replaces
            taken = candidates[best] if guarded else self._taken()
            self._check_accepted(own, taken, best, replaces=replaces)
        else:
            assert not report.accepted
            assert not report.replaced
            self._unchanged(own)
        self._follow_look_ahead(self.kept_out or status, best)
        if status is Status.REJECTED_NON_FINITE_HISTORY:
            self.points.points.clear()
            self.points.linked.clear()
            self.momenta.points.clear()
            self.momenta.linked.clear()
            self.chained = False
        self._check_evaluation()

    def _check_who_was_asked(self, report: StepReport) -> None:
        """Whether there are losses, and whether a candidate mends a leap."""
        if self.options.safeguard == "none":
            self.mends = False
            return
        noise = self._is_noise(report)
        told = math.isfinite(self.training)
        loss = self.training if told else (*self.values, math.nan)[0]
        leapt = math.isfinite(loss) and reference.leap(loss, self.losses) is not None
        left_alone = self.amid_noise and self.options.apply_to == "training"
        assert bool(self.values) is (not left_alone or leapt or not noise)
        self.mends = bool(self.scenario.of_sample and leapt and self.values)
        if self.mends:
            before, *after = self.values
            least = min(after, key=lambda one: (math.isnan(one), one))
            self.mends = reference.mends(before, least, self.losses, loss)
        self.losses += [loss] if math.isfinite(loss) else []
        self.amid_noise = told and noise

    def _expected_status(self, guarded: bool, report: StepReport) -> tuple[Status, int, bool]:
        """Status, best candidate, and whether it replaces the weights."""
        self.kept_out: Status | None = None  # why training does not have what validation sees
        replaces = self.options.apply_to != "evaluation"
        if not (np.isfinite(self.squares.mean()) and self._all_differences_are_finite()):
            return Status.REJECTED_NON_FINITE_HISTORY, 0, False
        if self.squares.sum() == 0:
            return Status.REJECTED_STAGNATION, 0, False
        if not guarded:
            edge = Status.REJECTED_NON_FINITE_CANDIDATE
            refused = self._at_the_edge(0) and report.status is edge
            return (edge if refused else Status.ACCEPTED), 0, replaces
        if not self.values:
            return Status.REJECTED_NOISE, 0, False
        before, *after = self.values
        # NaN after every number
        best = min(range(len(after)), key=lambda k: (math.isnan(after[k]), after[k]))
        if not (math.isfinite(before) and math.isfinite(after[best])):
            return Status.REJECTED_NON_FINITE_LOSS, best, False
        if not after[best] < before:
            return Status.REJECTED_LOSS, best, False
        asked = self._least_decrease() * self._checked_noisiness(report)
        of_training = Status.ACCEPTED
        if not after[best] < before - asked * abs(before):
            of_training = Status.REJECTED_SMALL_DECREASE
        elif not self.mends and self._is_noise(report):
            of_training = Status.REJECTED_NOISE
        enters = of_training is Status.ACCEPTED
        if self.options.apply_to == "training" and not enters:
            return of_training, best, False
        finite = np.isfinite(self.seen[1 + best]).all()
        if not finite:
            return Status.REJECTED_NON_FINITE_CANDIDATE, best, False
        if self.options.apply_to == "both" and not enters:
            self.kept_out = of_training
        return Status.ACCEPTED, best, replaces and enters

    def _check_candidates(self, own: Vector) -> list[Vector]:
        """Every candidate that the judge saw, against equations (3) to (5)."""
        seen, first = self.seen[1:], self.seen[0]
        assert np.array_equal(first, own, equal_nan=True)
        assert len(seen) == len(self._lambdas())
        for index, candidate in enumerate(seen):
            self._compare(self.points, candidate, index)
        return seen

    def _compare(self, points: ReferenceAccelerator, found: Vector, index: int) -> None:
        expected, bound = self._candidate(points, index)
        if bound is None:
            self.outcome.uninformative += 1
        elif np.isfinite(expected).all():
            self.outcome.compared += 1
            assert np.abs(found - expected).max() <= bound, (found - expected, bound)

    def _check_accepted(self, own: Vector, taken: Vector, best: int, *, replaces: bool) -> None:
        assert np.isfinite(taken).all(), "an accepted candidate is finite"
        if self.options.safeguard == "none":
            self._compare(self.points, taken, best)
        if not replaces:
            self._unchanged(own)
        else:
            assert np.array_equal(self._weights(), taken)
            self._check_momentum(best)
            self.chained = False
        if self.options.apply_to != "training":
            self.evaluation = taken

    def _check_momentum(self, best: int) -> None:
        momentum = self._momentum()
        if self.options.optimizer_state == "reset" or self.mends:
            assert not momentum.any()
        elif self.options.optimizer_state == "keep":
            assert np.array_equal(momentum, self.momenta.points[-1])
        elif not (self._at_the_edge(best) and np.array_equal(momentum, self.momenta.points[-1])):
            self._compare(self.momenta, momentum, best)

    def _check_evaluation(self) -> None:
        own = self._weights()
        assert self.engine.evaluation_weights_ready == (self.evaluation is not None)
        with self.engine.evaluation_weights():
            inside = self._weights()
        shown = own if self.evaluation is None else self.evaluation
        assert _identical(inside, shown)
        self._unchanged(own)

    def _check_smoothing(self, smoothing: Smoothing, report: StepReport) -> None:
        assert report.rsd is not None
        rsd, bound = relative_deviation(self.window, smoothing, self._roundoff())
        if math.isnan(rsd):
            assert not math.isfinite(report.rsd)
        elif bound is not None:
            assert abs(report.rsd - rsd) <= bound, (report.rsd, rsd, bound)
        if not report.rsd <= smoothing.rsd_threshold:
            self.smoothing_on = True
        elif report.rsd < HYSTERESIS * smoothing.rsd_threshold or report.rsd == 0:
            self.smoothing_on = False
        assert report.smoothing_on is self.smoothing_on

    def _check_average(self, window: list[Vector]) -> Vector:
        """The engine's own average, once it is known to be right."""
        assert self.engine._cycles is not None
        assert self.engine._cycles.smoother is not None
        found = self.engine._cycles.smoother.average.double().numpy().copy()
        expected = np.mean(window, axis=0)
        if np.isfinite(expected).all():
            bound = 4 * self._roundoff() * len(window) * np.abs(window).max()
            assert np.abs(found - expected).max() <= bound
        else:
            assert np.array_equal(np.isfinite(found), np.isfinite(expected))
        return found

    def _check_history(self) -> None:
        """As many residuals as the reference; what they are, candidates tell."""
        assert self.engine._cycles is not None
        assert self.engine._cycles.points.history.residual_count == len(self.points.pairs())

    # The reference

    def _at_the_edge(self, index: int) -> bool:
        """Whether a candidate, or its momentum, may be beyond the precision of the points."""
        expected, _ = self._candidate(self.points, index)
        if np.isnan(expected).any():
            return True
        alpha, advance = self._mixture(index)
        largest = max(np.abs(self.points.points).max(), np.abs(self.momenta.points).max())
        return bool(np.abs(alpha).sum() * (1 + advance) * largest > 0.01 * self._range())

    def _lambdas(self) -> Sequence[float]:
        """Of all candidates that a judge sees."""
        grid = self.options.regularization_grid
        if grid:
            return grid
        with np.errstate(all="ignore"):
            residuals = [g - x for x, g in self.points.pairs()]
            squares = np.array([one @ one for one in residuals])
            usable = np.isfinite(squares).all() and squares.any()
        # of one that is not finite, or of none that moved, there is one candidate and no lambda
        return self.points.lambdas(residuals) if usable else [math.nan]

    def _check_lambda(self, report: StepReport, expected: float) -> None:
        if self.options.regularization is not None:
            assert report.regularization == expected
            return
        found = math.nan if report.regularization is None else report.regularization
        assert 0 <= found <= 3e-2
        residuals = [g - x for x, g in self.points.pairs()]
        error = _of_suitable(expected, len(residuals)) * self._gram_error(residuals)
        if self._is_ordinary() and error < UNINFORMATIVE * expected:
            assert abs(found - expected) <= error

    def _mixture(self, index: int) -> tuple[Vector, float]:
        """alpha and theta of the index-th candidate."""
        residuals = [g - x for x, g in self.points.pairs()]
        guarded = self.options.safeguard == "loss"
        return self.points.mixtures(residuals, look_ahead=guarded)[index]

    def _candidate(self, points: ReferenceAccelerator, index: int) -> tuple[Vector, float | None]:
        """The same for everyone who asks during one attempt."""
        key = (points is self.momenta, index)
        if key not in self.expected:
            self.expected[key] = self._compute_candidate(points, index)
        return self.expected[key]

    def _compute_candidate(
        self, points: ReferenceAccelerator, index: int
    ) -> tuple[Vector, float | None]:
        """Candidate of the index-th lambda, and how far rounding may lead from it.

        The bound is None where the problem is too ill-conditioned for one.
        """
        newest, current = self.points.points[-1], points.points[-1]
        # where float64 loses digits of the squares, or the newest point, which need not end a
        # residual, is infinite, no candidate is defined
        finite = np.isfinite(newest).all() and np.isfinite(current).all()
        if not (finite and 1e-280 < self.squares.sum() < 1e300):
            return np.full_like(current, math.nan), None
        pairs, mixed = self.points.pairs(), points.pairs()
        residuals = [g - x for x, g in pairs]
        value = self._lambdas()[index]
        alpha, advance = self._mixture(index)
        free = reference.candidate(pairs, alpha, self.options.relaxation, advance)
        short = reference.shorten(free, newest, residuals, self.options.max_extrapolation)
        length = np.linalg.norm(free - newest)
        share = 1.0 if np.array_equal(free, short) else np.linalg.norm(short - newest) / length
        expected = current + share * (
            reference.candidate(mixed, alpha, self.options.relaxation, advance) - current
        )

        u, gram_error = self._roundoff(), self._gram_error(residuals)
        weights_error = self._weights_error(residuals, value)
        steps = np.diff(points.points, axis=0)
        size = np.abs(alpha).sum()
        if advance:
            weights_error *= self._advance_error(residuals, index)
        far = size * (1 + advance)
        reach = far * sum(np.linalg.norm(step) for step in steps)
        span = far * sum(np.linalg.norm(step) for step in np.diff(self.points.points, axis=0))
        if share < 1.0:
            weights_error += gram_error * (span / length) ** 2
        if not weights_error < UNINFORMATIVE:
            return expected, None
        # the sum of a row of products, each rounded, and the weights rounded to the points' dtype
        rounding = 4 * u * (len(steps) + 2) * (np.abs(current).max() + share * reach)
        return expected, float(rounding + share * weights_error * reach)

    def _gram_error(self, residuals: Sequence[Vector]) -> float:
        """Of a product of two residuals, relative to their norms."""
        u = self._roundoff()
        return 2 * (u if u > 1e-15 else 0.0) + (len(residuals[0]) + len(residuals)) * 2.2e-16

    def _weights_error(self, residuals: Sequence[Vector], value: float) -> float:
        """Of alpha, for one lambda."""
        m = len(residuals)
        solving = 4 * math.sqrt(m) * m * condition(residuals, value)
        if self.options.regularization is None:
            solving *= 1 + _of_suitable(value, m)
        return solving * self._gram_error(residuals)

    def _may_look_ahead(self, index: int) -> set[bool]:
        """What may be said of the accepted candidate; both where rounding decides."""
        options, last = self.options, len(self._lambdas()) - 1
        if options.safeguard == "none" or options.look_ahead_cycles == 0 or index < last:
            return {False}
        if not self._is_ordinary():
            return {True, False}
        left, error = self._remaining([g - x for x, g in self.points.pairs()])
        return {left + error > 1, left - error > 1}

    def _follow_look_ahead(self, status: Status, best: int) -> None:
        """How far the next candidate goes on; the engine's word where rounding decides."""
        assert self.engine._cycles is not None
        found = self.engine._cycles._look_ahead.share
        accepted, last = status is Status.ACCEPTED, len(self._lambdas()) - 1
        tells = self.points.of_sample and (status in TOO_FAR or (accepted and best == last))
        follows = reference.next_share(self.points.look_ahead_share, accepted=accepted)
        allowed = {True: follows, False: self.points.look_ahead_share}
        assert found in {allowed[drifts and tells] for drifts in self._may_look_ahead(last)}
        self.points.look_ahead_share = found

    def _least_decrease(self) -> float:
        if self.options.sufficient_decrease is None:
            return 0.1 if self.scenario.of_sample else 0.0
        return float(self.options.sufficient_decrease)

    def _is_noise(self, report: StepReport) -> bool:
        """By the engine's own number, which is checked where a candidate is judged."""
        assert report.noisiness is not None
        asked = self.scenario.of_sample and self._least_decrease() > 0
        return bool(asked and report.noisiness >= 0.5 and len(self.points.pairs()) >= 4)

    def _checked_noisiness(self, report: StepReport) -> float:
        """The engine's own, once it is known to be right."""
        found = report.noisiness
        assert found is not None
        residuals = [g - x for x, g in self.points.pairs()]
        share = reference.noisy_share(residuals) if self._is_ordinary() else math.nan
        of_share = 2e3 * math.sqrt(share) * len(residuals) ** 2 * self._gram_error(residuals)
        if self._is_ordinary() and of_share < UNINFORMATIVE * share:
            assert 0 <= found <= 1
            left, of_drift = self._remaining(residuals)
            expected = share * (1 - min(1.0, max(0.0, left - 1)))
            assert abs(found - expected) <= of_share + of_drift
        return found

    def _is_ordinary(self) -> bool:
        """Whether products of residuals are far from the ends of float64."""
        return bool(1e-280 < self.squares.sum() < 1e300)

    def _remaining(self, residuals: Sequence[Vector]) -> tuple[float, float]:
        """rho, and its error."""
        m, first = len(residuals), self._mixture(0)[0]
        size = np.abs(first).sum()
        error = 2 * m * size * m * self._weights_error(residuals, self._lambdas()[0])
        error += m * size**2 * self._gram_error(residuals)
        return reference.remaining(residuals, first), error

    def _advance_error(self, residuals: Sequence[Vector], index: int) -> float:
        """By how much more an error of alpha reaches the candidate through theta."""
        m, options = len(residuals), self.options
        (first, _), (alpha, _) = self._mixture(0), self._mixture(index)
        # of tau: m a unit of alpha; of rho: 2 m |alpha|_1 max|r|^2 / mean |r|^2 a unit
        of_remaining = 2 * m * np.abs(first).sum() * m
        share = options.lag_compensation * reference.lag(alpha) + options.look_ahead_cycles
        return float(1 + m + share * of_remaining)

    def _all_differences_are_finite(self) -> bool:
        """Also across breaks, and their squares."""
        points = torch.from_numpy(np.array(self.points.points)).to(self._dtype())
        return bool(points.diff(dim=0).double().square().sum().isfinite())

    def _residual_squares(self) -> Vector:
        """Squared norms of the residuals, as formed in the precision of the points."""
        pairs = torch.from_numpy(np.array(self.points.pairs())).to(self._dtype())
        return (pairs[:, 1] - pairs[:, 0]).double().square().sum(dim=1).numpy()

    # Access

    def _call_engine(self) -> StepReport:
        self.seen, self.values = [], []
        self.training = math.nan
        guarded = self.options.safeguard == "loss"
        try:
            if guarded or self.scenario.with_loss:
                return self.engine.step(self._judge())
            return self.engine.step()
        except JudgeError:
            self._unchanged(self.seen[0])
            raise

    def _judge(self) -> LossFunction:
        if not self.scenario.of_sample:
            return self._loss
        if not self.scenario.tells_training_loss:
            return OfSample(self._loss)
        self.training = math.exp(self.random.normal(scale=2.0))
        if self.random.random() < 0.1:
            self.training = math.nan
        return OfSample(self._loss, training_loss=self.training)

    def _loss(self) -> Any:
        weights = self._weights()
        self.seen.append(weights)
        kind = self.scenario.losses
        if kind == "raises" and self.random.random() < 0.1:
            raise JudgeError
        if kind == "vector":
            return torch.zeros(2)
        if kind == "nothing":
            self.values.append(math.nan)
            return None
        if kind == "bowl":
            value = float(np.dot(weights, weights))
        else:
            value = float(self.random.choice([0.0, 1.0, 2.0, math.nan, math.inf, -math.inf]))
            if kind == "finite":
                value = float(self.random.normal())
        self.values.append(value)
        return value if kind == "finite" else torch.tensor(value, dtype=torch.float64)

    def _documented(self, error: ValueError) -> str:
        message = str(error)
        known = ("a loss must be a single number", "the optimizer holds no trainable param")
        assert message.startswith(known), message
        return message

    def _taken(self) -> Vector:
        if self.options.apply_to != "evaluation":
            return self._weights()
        with self.engine.evaluation_weights():
            return self._weights()

    def _expect(self, report: StepReport, status: Status) -> None:
        assert report.status is status, (report.status, status)
        assert not self.seen, "the loss is evaluated for an extrapolation alone"

    def _unchanged(self, own: Vector) -> None:
        assert _identical(self._weights(), own)

    def _push(self, x: Vector, momentum: Vector, *, linked: bool) -> None:
        self.points.add(x, linked=linked)
        self.momenta.add(momentum, linked=linked)

    def _averages_into_history(self) -> bool:
        smoothing = self.options.smoothing
        return self.smoothing_on and smoothing is not None and smoothing.apply_to == "history"

    def _trainable(self) -> list[nn.Parameter]:
        return [one for one in self.parameters if one.requires_grad and one.numel()]

    def _weights(self) -> Vector:
        return _flat([one.detach() for one in self.active])

    def _momentum(self) -> Vector:
        states = [self.optimizer.state[one].get("momentum_buffer") for one in self.active]
        if any(one is None for one in states):
            return np.zeros(sum(one.numel() for one in self.active))
        return _flat([one for one in states if one is not None])

    def _rounded(self, vector: Vector) -> Vector:
        """What is left of a vector when it is written to the parameters."""
        pieces = np.split(vector, np.cumsum([one.numel() for one in self.active])[:-1])
        return _flat(
            [
                torch.from_numpy(piece).to(one.dtype)
                for piece, one in zip(pieces, self.active, strict=True)
            ]
        )

    def _dtype(self) -> torch.dtype:
        dtype = self.active[0].dtype
        for one in self.active:
            dtype = torch.promote_types(dtype, one.dtype)
        return dtype

    def _range(self) -> float:
        """Of the narrowest parameter."""
        return min(torch.finfo(one.dtype).max for one in self.active)

    def _roundoff(self) -> float:
        """Of the coarsest parameter: candidates are written to it."""
        return max(torch.finfo(one.dtype).eps for one in self.active)

    def _array(self, shape: Sequence[int], scale: float) -> Tensor:
        return torch.from_numpy(np.asarray(self.random.normal(size=tuple(shape)) * scale))


def relative_deviation(
    window: Sequence[Vector], smoothing: Smoothing, u: float
) -> tuple[float, float | None]:
    """RSD of the iterates, or of their updates, and how far rounding may lead from it.

    NaN where they are not finite; no bound where squares leave the range of the precision.
    """
    iterates = np.array(window)
    count = len(iterates) - (smoothing.of == "updates")
    if count < 2:
        return 0.0, 0.0
    if not np.isfinite(iterates).all():
        return math.nan, None
    sample = np.diff(iterates, axis=0) if smoothing.of == "updates" else iterates
    largest = np.abs(iterates).max()
    if not 1e-15 < largest < 1e15:
        return 0.0, None
    mean, deviation = sample.mean(axis=0), sample.std(axis=0, ddof=1)
    if smoothing.rsd == "max":
        spread, level, size = deviation.max(), np.abs(mean).max(), largest
    else:
        spread, level = np.linalg.norm(deviation), np.linalg.norm(mean)
        size = np.linalg.norm(np.abs(sample).max(axis=0))
    if level == 0 or u * count * size > UNINFORMATIVE * level:
        return 0.0, None
    rsd = spread / level
    error = 8 * u * count * size / level
    # of the updates, the spread is a difference of squares
    return rsd, error * (1 + rsd) + (math.sqrt(8 * u) * size / level if spread < size else 0.0)


def _of_suitable(value: float, m: int) -> float:
    """What an error of K, relative to tr(K)/m, becomes in lambda where K tells it.

    By an error of size one, the harmonic mean h of its m eigenvalues changes by m^2 at most, and
    lambda = 3e4 h^2 by 6e4 h of that.
    """
    return 2 * math.sqrt(3e4 * value) * m**2


def condition(residuals: Sequence[Vector], regularization: float) -> float:
    """Of the matrix in equation (3), rows of zero residuals left out."""
    moved = np.array([one for one in residuals if one.any()])
    gram = moved @ moved.T
    eigenvalues = np.linalg.eigvalsh(gram)
    ridge = max(regularization, len(residuals) * np.finfo(float).eps) * gram.trace() / len(moved)
    return float((eigenvalues[-1] + ridge) / (max(eigenvalues[0], 0.0) + ridge))


def _flat(tensors: Sequence[Tensor]) -> Vector:
    if not tensors:
        return np.zeros(0)
    return torch.cat([one.flatten() for one in tensors]).double().numpy()


def _identical(one: Vector, other: Vector) -> bool:
    # the payload of a NaN may change on its way through another dtype
    return one.tobytes() == other.tobytes() or np.array_equal(one, other, equal_nan=True)


def _same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))
