"""Random options, events and resumes: the accelerator does what a plain model of it does.

A few examples by default, always the same ones; ``make nightly`` draws 100,000 new ones
(``STABLEAA_EXAMPLES=100000``).
"""

from __future__ import annotations

import io
import math
import os
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from torch import Tensor, nn

from lightning_stableaa import AndersonAccelerator, Smoothing, Status, StepReport
from lightning_stableaa.core.acceptance import NOISE_DOMINATED, ROUNDING_ERRORS
from lightning_stableaa.options import Options
from tests.helpers.model_based import Model
from tests.reference import EPS, Vector

EXAMPLES = int(os.environ.get("STABLEAA_EXAMPLES", "0"))

CYCLES = st.integers(1, 3)


@st.composite
def valid_options(draw: st.DrawFn) -> Options:
    cycle = draw(CYCLES)
    smoothing = Smoothing(
        average_window=draw(st.none() | st.integers(2, cycle)) if cycle > 1 else None,
        rsd_threshold=draw(st.sampled_from([0.0, 0.1, 1.0])),
        of=draw(st.sampled_from(["updates", "iterates"])),
        apply_to=draw(st.sampled_from(["history", "weights"])),
    )
    return Options(
        history_depth=draw(st.integers(2, 5)),
        store_every_n_steps=cycle,
        accelerate_every_n_steps=cycle * draw(CYCLES),
        warmup_steps=draw(st.sampled_from([0, 7])),
        relaxation=draw(st.sampled_from([1.0, 0.5])),
        lag_compensation=draw(st.sampled_from([0.75, 0.0, 10.0])),
        max_horizon=draw(st.sampled_from([40.0, 0.0, 0.5])),
        regularization=draw(st.sampled_from([None, 1e-4, 1e-2, 1.0])),
        max_extrapolation=draw(st.sampled_from([1000.0, 1.0, math.inf])),
        safeguard=draw(st.sampled_from(["loss", "loss", "none"])),
        smoothing=draw(st.sampled_from([None, smoothing])),
    )


class AcceleratorMachine(RuleBasedStateMachine):
    """Two parameters moved by given steps, with what else happens to them in a training."""

    @initialize(options=valid_options(), stochastic=st.booleans(), seed=st.integers(0, 2**32 - 1))
    def start(self, options: Options, stochastic: bool, seed: int) -> None:
        self.options, self.stochastic, self.written = options, stochastic, False
        self.random = np.random.default_rng(seed)
        self.drift = self.random.normal(size=5)
        self.weights = [nn.Parameter(torch.ones(n, dtype=torch.float64)) for n in (2, 3)]
        self.tracked = self.weights
        self.optimizer = torch.optim.SGD(self.weights, lr=1.0)
        self.engine = self.new_engine()
        self.model = Model(options)
        self.attempted = self.accepted = self.cycles = 0
        self.started = False

    def new_engine(self) -> AndersonAccelerator:
        names = self.options.__dataclass_fields__
        return AndersonAccelerator(self.optimizer, **{k: getattr(self.options, k) for k in names})

    @property
    def moving(self) -> list[nn.Parameter]:
        return [one for one in self.weights if one.requires_grad]

    def tracked_weights(self) -> Vector:
        return torch.cat([one.detach() for one in self.tracked]).numpy()

    def begin(self) -> None:
        """The first iterate is stored before a step, of the parameters of the construction."""
        if not self.started:
            self.started = True
            self.model.history.push(self.tracked_weights())

    def evaluate(self, x: Any, kind: str) -> Any:  # of tensors or arrays
        return (x * x).sum() * (math.nan if kind == "nan" else -1.0 if kind == "worse" else 1.0)

    @rule(
        noise=st.sampled_from([0.0, 0.1, 1.0]),
        drift=st.sampled_from([0.0, -0.01, 1.0]),
        loss=st.sampled_from(["bowl", "bowl", "bowl", "worse", "nan", "raises"]),
        count=st.integers(1, 6),
    )
    def train(self, noise: float, drift: float, loss: str, count: int) -> None:
        for _ in range(count):
            self.begin()
            step = torch.from_numpy(noise * self.random.normal(size=5) + drift * self.drift)
            for one, update in zip(self.weights, step.split([2, 3]), strict=True):
                one.grad = -update if one.requires_grad else None
            self.optimizer.step()
            own, self.raised = self.tracked_weights(), False
            evaluated: list[Vector] = []  # first at the weights, which an average may have replaced

            def loss_fn(evaluated: list[Vector] = evaluated) -> Tensor:
                evaluated.append(self.tracked_weights())
                if loss == "raises" and not np.array_equal(evaluated[0], evaluated[-1]):
                    self.raised = True
                    raise ArithmeticError("outside of the domain")
                return self.evaluate(torch.cat([*self.tracked]), loss)

            self.check(self.engine.step(loss_fn, stochastic=self.stochastic), own, loss)

    @rule()
    def step_without_gradient(self) -> None:
        self.begin()
        self.optimizer.zero_grad()
        self.optimizer.step()
        report = self.engine.step(lambda: torch.zeros(()))
        assert report == StepReport(status=Status.NO_OPTIMIZER_STEP)

    @rule()
    def write(self) -> None:
        with torch.no_grad():
            self.weights[0].mul_(0.5)
        self.written = self.started

    @rule()
    def freeze_or_unfreeze(self) -> None:
        self.weights[1].requires_grad_(not self.weights[1].requires_grad)
        self.weights[1].grad = None

    @rule()
    def save_and_load(self) -> None:
        if len(self.moving) != len(self.tracked) or not self.started:  # such a history is dropped
            return
        file = io.BytesIO()
        torch.save(self.engine.state_dict(), file)
        file.seek(0)
        self.engine.detach()
        self.engine = self.new_engine()
        self.engine.load_state_dict(torch.load(file, weights_only=True))
        self.train(noise=0.1, drift=1.0, loss="bowl", count=1)  # the state is in use

    def check(self, report: StepReport, own: Vector, loss: str) -> None:
        """The report and the weights after one real step of the optimizer."""
        model, weights = self.model, self.tracked_weights()
        event(report.status.value)
        status: Status | None = None
        if not model.observe(own):
            status = Status.ACCUMULATING
        elif len(self.moving) != len(self.tracked):
            status, self.model = Status.PARAMETERS_CHANGED, Model(self.options)
            self.model.steps, self.model.since_attempt = model.steps, model.since_attempt
            self.tracked, self.written = self.moving, False
            own = weights = self.tracked_weights()
            self.model.history.push(own)
        elif self.written:
            status, self.written = Status.EXTERNAL_UPDATE, False
            model.restart_at(own)
        else:
            self.cycles += 1
            own = model.store(own, averaging=bool(report.smoothing_on))
            status = model.due()
        if status is None:
            self.check_attempt(report, own, loss)
            model.since_attempt = 0
        else:
            assert report.status is status
            np.testing.assert_allclose(weights, own, rtol=1e-14, atol=1e-14)  # of an average
        assert self.engine.optimizer_steps == self.model.steps
        counters = (self.engine.attempted, self.engine.accepted)
        assert counters == (self.attempted, self.accepted)

    def check_attempt(self, report: StepReport, own: Vector, loss: str) -> None:
        options, weights = self.options, self.tracked_weights()
        self.attempted += 1
        self.accepted += report.accepted
        assert report.horizon is not None
        assert 0 <= report.horizon <= min(options.max_horizon, self.cycles)
        predicted = self.model.candidate(report.horizon)
        if predicted is None:
            assert report.status is Status.REJECTED_ZERO_RESIDUAL
            return
        candidate, gain, error = predicted
        if error == math.inf and report.status is Status.REJECTED_ZERO_RESIDUAL:
            return
        assert report.gain is not None
        informative = error < 1e-6
        if informative:
            assert math.isclose(report.gain, gain, rel_tol=1e-6, abs_tol=1e-9)
        if not report.accepted:
            np.testing.assert_allclose(weights, own, rtol=1e-14, atol=1e-14)  # of an average
        elif informative:
            event("candidate compared")
            assert np.linalg.norm(weights - candidate) <= error
        if report.accepted:
            self.model.restart_at(weights)
        assert report.status is self.expected_status(report, loss)
        if report.loss_before is not None:
            assert math.isclose(report.loss_before, self.evaluate(own, loss), rel_tol=1e-12)
        if report.loss_after is not None and report.accepted:
            assert math.isclose(report.loss_after, self.evaluate(weights, loss), rel_tol=1e-12)

    def expected_status(self, report: StepReport, loss: str) -> Status:
        if self.options.safeguard == "none":
            return Status.ACCEPTED
        assert report.gain is not None
        assert report.noise is not None
        weight = report.noise * min(max(2.0 - report.gain, 0.0), 1.0) * self.stochastic
        if weight >= NOISE_DOMINATED:
            return Status.SKIPPED_NOISE_DOMINATED
        if loss == "nan":
            return Status.REJECTED_NON_FINITE_LOSS
        if self.raised:  # not where the candidate equals the weights
            return Status.REJECTED_ERROR
        assert report.loss_before is not None
        assert report.loss_after is not None
        decrease, size = report.loss_before - report.loss_after, abs(report.loss_before)
        if not decrease > ROUNDING_ERRORS * EPS * size:
            return Status.REJECTED_LOSS_INCREASE
        return Status.ACCEPTED


TestAcceleratorMachine = AcceleratorMachine.TestCase
TestAcceleratorMachine.settings = settings(
    max_examples=EXAMPLES or 80,
    stateful_step_count=20,
    derandomize=not EXAMPLES,
    deadline=None,  # one slow example on a busy machine is no failure
    database=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),  # explaining traces every line
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
pytestmark = pytest.mark.timeout(0 if EXAMPLES else 300)
