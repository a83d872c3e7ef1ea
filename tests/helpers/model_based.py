"""The accelerator as a plain NumPy model: schedule, history, averages, candidate.

It is given the weights that the accelerator really has, and predicts what one call of ``step``
does to them: error bounds hold for one step, and nothing accumulates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from lightning_stableaa import Status
from lightning_stableaa.options import Options
from tests import reference
from tests.reference import EPS, Vector


@dataclass
class Model:
    """History, schedule and smoothing of one set of parameters."""

    options: Options
    window: list[Vector] = field(default_factory=list)
    averaging: bool = False
    cycle_steps: int = 0
    since_attempt: int = 0
    steps: int = 0

    def __post_init__(self) -> None:
        self.history = reference.Sequences(self.options.history_depth)

    def restart_at(self, x: Vector) -> None:
        self.history.restart()
        self.window.clear()
        if not self.averages_into_history:
            self.history.push(x)

    @property
    def averages_into_history(self) -> bool:
        smoothing = self.options.smoothing
        return smoothing is not None and smoothing.apply_to == "history" and self.averaging

    def observe(self, x: Vector) -> bool:
        """Count a step; whether it ends a cycle."""
        options, smoothing = self.options, self.options.smoothing
        self.steps += 1
        self.since_attempt += 1
        self.cycle_steps = self.cycle_steps % options.store_every_n_steps + 1
        cycle = options.store_every_n_steps
        if smoothing and self.cycle_steps > cycle - (smoothing.average_window or cycle):
            self.window.append(x)
        return self.cycle_steps == cycle

    def store(self, x: Vector, *, averaging: bool) -> Vector:
        """End a cycle; the weights, which an average may have replaced."""
        if self.options.smoothing is None:
            self.history.push(x)
            return x
        before, self.averaging = self.averages_into_history, averaging
        average = np.mean(self.window, axis=0)
        self.window.clear()
        if self.averages_into_history != before:
            self.history.restart()
        if self.averages_into_history:
            self.history.push(average)
            return x
        self.history.push(average if averaging else x)
        return average if averaging else x

    def due(self) -> Status | None:
        """Why no extrapolation is due; ``None`` where one is."""
        options = self.options
        if self.since_attempt < options.accelerate_every_n_steps:
            return Status.STORED
        if self.steps < options.warmup_steps:
            return Status.WARMUP
        return Status.HISTORY_TOO_SHORT if len(self.history.pairs()) < 2 else None

    def candidate(self, horizon: float) -> tuple[Vector, float, float] | None:
        """The candidate, its gain, and a bound of its rounding error; ``None`` if nothing moved."""
        options, pairs, newest = self.options, self.history.pairs(), self.history.iterates[-1]
        starts = np.array([x for x, _ in pairs])
        residuals = np.array([end - x for x, end in pairs])
        if not residuals.any():
            return None
        step = reference.anderson(
            pairs,
            newest,
            regularization=options.regularization,
            relaxation=options.relaxation,
            lag_compensation=options.lag_compensation,
            horizon=horizon,
            max_extrapolation=options.max_extrapolation,
        )
        # whether the rounding of an average is a residual decides about the coefficients
        if np.linalg.norm(residuals, axis=1).min() < 1e-13 * float(np.abs(starts).max()):
            return step.candidate, step.gain, math.inf
        terms = np.abs(step.alpha) @ (np.abs(starts - newest) + step.mixing * np.abs(residuals))
        scale = float(np.linalg.norm(terms)) + float(np.linalg.norm(newest))
        # a solve loses the condition of its matrix, at most (values + ridge) / ridge
        gram = residuals @ residuals.T
        largest = np.linalg.eigvalsh(gram)[-1] * len(gram) / np.trace(gram)
        ridge = reference.ridge(list(residuals), options.regularization)
        error = 1e3 * EPS * scale * (1 + largest / ridge) * (1 + step.mixing)
        return step.candidate, step.gain, error
