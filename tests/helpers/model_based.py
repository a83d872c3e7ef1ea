"""The accelerator as a plain NumPy model: schedule, history, averages, candidate.

It is given the weights that the accelerator really has, and predicts what one call of ``step``
does to them: error bounds hold for one step, and nothing accumulates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lightning_stableaa import Status
from lightning_stableaa.core.anderson import NOISY, REGULARIZATION
from lightning_stableaa.options import Options

Vector = np.ndarray[Any, np.dtype[np.float64]]

EPS = 2.0**-52


@dataclass
class Model:
    """History, schedule and smoothing of one set of parameters."""

    options: Options
    iterates: list[Vector] = field(default_factory=list)
    ends_cycle: list[bool] = field(default_factory=list)
    window: list[Vector] = field(default_factory=list)
    contiguous: bool = False
    averaging: bool = False
    cycle_steps: int = 0
    since_attempt: int = 0
    steps: int = 0

    def push(self, x: Vector) -> None:
        if len(self.iterates) == self.options.history_depth + 1:
            drop = next((k for k in range(2, len(self.iterates)) if self.ends_cycle[k]), None)
            drop = len(self.iterates) if drop is None else drop
            del self.iterates[: drop - 1], self.ends_cycle[: drop - 1]
            self.ends_cycle[0] = False
        self.iterates.append(x)
        self.ends_cycle.append(self.contiguous)
        self.contiguous = True

    def restart(self) -> None:
        if self.ends_cycle and not self.ends_cycle[-1]:
            del self.iterates[-1], self.ends_cycle[-1]
        self.contiguous = False

    def restart_at(self, x: Vector) -> None:
        self.restart()
        self.window.clear()
        if not self.averages_into_history:
            self.push(x)

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
            self.push(x)
            return x
        before, self.averaging = self.averages_into_history, averaging
        average = np.mean(self.window, axis=0)
        self.window.clear()
        if self.averages_into_history != before:
            self.restart()
        if self.averages_into_history:
            self.push(average)
            return x
        self.push(average if averaging else x)
        return average if averaging else x

    def due(self) -> Status | None:
        """Why no extrapolation is due; ``None`` where one is."""
        options = self.options
        if self.since_attempt < options.accelerate_every_n_steps:
            return Status.STORED
        if self.steps < options.warmup_steps:
            return Status.WARMUP
        return Status.HISTORY_TOO_SHORT if sum(self.ends_cycle[1:]) < 2 else None

    def candidate(self, horizon: float) -> tuple[Vector, float, float] | None:
        """The candidate, its gain, and a bound of its rounding error; ``None`` if nothing moved."""
        options = self.options
        starts = [k for k in range(len(self.iterates) - 1) if self.ends_cycle[k + 1]]
        x = np.array([self.iterates[k] for k in starts])
        residuals = np.array([self.iterates[k + 1] - self.iterates[k] for k in starts])
        gram = residuals @ residuals.T
        size, m = np.trace(gram) / len(gram), len(gram)
        if size == 0:
            return None
        moved = np.flatnonzero(gram.diagonal())
        # whether the rounding of an average is a residual decides about the coefficients
        ambiguous = math.sqrt(gram.diagonal().min()) < 1e-13 * float(np.abs(x).max())
        scaled = gram[np.ix_(moved, moved)] / (np.trace(gram) / len(moved))
        values = np.maximum(np.linalg.eigvalsh(scaled), 0)
        ridge = options.regularization
        if ridge is None:
            noise = min(1.0, len(moved) / float((1 / (values + EPS)).sum()) / NOISY) ** 2
            ridge = REGULARIZATION * noise
        ridge = max(ridge, len(moved) * EPS)
        alpha = np.zeros(m)
        alpha[moved] = np.linalg.solve(scaled + ridge * np.eye(len(moved)), np.ones(len(moved)))
        alpha /= alpha.sum()
        mixed = alpha @ residuals
        gain = min(m * float(mixed @ mixed) / size, m)
        lag = max(0.0, float(alpha @ np.arange(m - 1, -1, -1)))
        mixing = options.relaxation + min(1.0, options.lag_compensation * gain) * lag
        mixing += np.clip(gain - 1, 0, 1) * horizon / max(1.0, float(np.linalg.norm(alpha)))
        newest = self.iterates[-1]
        step = alpha @ (x - newest) + mixing * mixed
        longest = options.max_extrapolation * math.sqrt(size)
        step *= min(1.0, longest / max(float(np.linalg.norm(step)), 1e-300))
        terms = np.abs(alpha) @ (np.abs(x - newest) + mixing * np.abs(residuals))
        scale = float(np.linalg.norm(terms)) + float(np.linalg.norm(newest))
        # a solve loses the condition of its matrix, at most (values + ridge) / ridge
        error = 1e3 * EPS * scale * (1 + values[-1] / ridge) * (1 + mixing)
        return newest + step, gain, math.inf if ambiguous else error
