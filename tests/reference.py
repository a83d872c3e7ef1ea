"""The method written plainly in float64 NumPy, slow and without tricks: what the engine must equal.

Equations are numbered as in docs/method.md:

    (1) r_j = g_j - x_j
    (2) K = R^T R
    (3) (K + lambda tr(K)/m I) z = 1,  alpha = z / sum(z)
    (4) x_new = sum_j alpha_j (x_j + (beta + theta) r_j)
        theta = min(1, c rho) tau, tau = max(0, sum_j alpha_j (m - j)), and where there is a judge,
        for the last lambda, min(1, max(0, rho - 1)) / max(1, |alpha|) times ``look_ahead_cycles``
        more
        rho = min(m, m |R alpha|^2 / (tr(K)/m)), with alpha of the first lambda
    (5) |x_new - x| <= cap * sqrt(tr(K)/m), by shortening the jump
    (6) accepted if loss(x_new) < loss(x) - d |loss(x)|; of several lambdas the one of least loss
        d = ``sufficient_decrease`` (``None``: 0) times the noisiness, min(1, h / 1e-3)^2 (1 -
        min(1, max(0, rho - 1))); and of a sample, where that is 1/2 or more, of four residuals or
        more, and ``sufficient_decrease`` above 0, only
    (7) where the loss l of training, or loss(x) where that is not known, leapt, to more than ten
        times the mean of those at the last four extrapolations and more than that at the first one,
        and loss(x_new) is not above loss(x) times that mean over l; then the momentum becomes zero
    (8) ``look_ahead_cycles`` counts for one half; of the loss of a sample for 1.4 times as much as
        before, at most all, after a candidate of the last lambda with rho > 1, and for 0.6 times as
        much, at least a twentieth, where that had too large a loss or none; for as many cycles as
        were trained so far at most
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


def mixing_weights(residuals: Sequence[Vector], regularization: float) -> Vector:
    """Equations (2) and (3); zero residuals get the weight zero."""
    m = len(residuals)
    gram = np.array([[float(np.dot(a, b)) for b in residuals] for a in residuals])
    moved = np.diag(gram) > 0
    ridge = max(regularization, m * np.finfo(float).eps) * np.trace(gram) / moved.sum()
    z = np.linalg.solve(gram + ridge * np.eye(m), moved.astype(float))
    return z / z.sum()


def noisy_share(residuals: Sequence[Vector]) -> float:
    """By h, the harmonic mean of the eigenvalues of K over their mean: what noise there is."""
    moved = np.array([one for one in residuals if one.any()])
    eigenvalues = np.linalg.eigvalsh(moved @ moved.T) / np.square(moved).sum(axis=1).mean()
    noise = len(moved) / (1 / (eigenvalues + 1e-9)).sum()
    return float(min(1.0, max(noise, 1e-9) / 1e-3) ** 2)


def suitable_lambda(residuals: Sequence[Vector]) -> float:
    """By the noise of the residuals."""
    return 3e-2 * noisy_share(residuals)


def noisiness(residuals: Sequence[Vector], alpha: Vector) -> float:
    """1 where residuals are noise, 0 where they are eliminated or a steady drift."""
    drift = min(1.0, max(0.0, remaining(residuals, alpha) - 1.0))
    return noisy_share(residuals) * (1.0 - drift)


def leap(loss: float, earlier: Sequence[float]) -> float | None:
    """Equation (7): the loss over the mean of the last ones, where that is a leap."""
    if not earlier:
        return None
    mean = float(np.mean(earlier[-4:]))
    return loss / mean if mean > 0 and loss > 10 * mean and loss > earlier[0] else None


def mends(
    before: float, after: float, earlier: Sequence[float], of_training: float | None = None
) -> bool:
    """Equation (7): whether training leapt away from earlier losses, and a candidate ends that."""
    excess = leap(before if of_training is None else of_training, earlier)
    return excess is not None and after * excess <= before


def candidate(
    pairs: Sequence[tuple[Vector, Vector]], alpha: Vector, relaxation: float, advance: float = 0.0
) -> Vector:
    """Equation (4), for pairs (x_j, g_j)."""
    total = np.zeros_like(pairs[0][0])
    for weight, (x, g) in zip(alpha, pairs, strict=True):
        total += weight * (x + (relaxation + advance) * (g - x))
    return total


def remaining(residuals: Sequence[Vector], alpha: Vector) -> float:
    """rho, what a mixture leaves of the residuals, in units of what a mean leaves of noise."""
    mixed, m = alpha @ np.array(residuals), len(residuals)
    squares = np.mean([float(np.dot(r, r)) for r in residuals])
    return float(min(m, m * float(np.dot(mixed, mixed)) / squares))


def lag(alpha: Vector) -> float:
    """tau: cycles from the mean time of the mixture to the newest point."""
    m = len(alpha)
    return max(0.0, float(sum(weight * (m - j) for j, weight in enumerate(alpha, start=1))))


def shorten(new: Vector, current: Vector, residuals: Sequence[Vector], cap: float) -> Vector:
    """Equation (5)."""
    longest = cap * math.sqrt(np.mean([float(np.dot(r, r)) for r in residuals]))
    jump = new - current
    length = float(np.linalg.norm(jump))
    return current + jump * (longest / length) if length > longest else new


def next_share(share: float, *, accepted: bool) -> float:
    """Equation (8): of ``look_ahead_cycles``."""
    return min(1.0, max(0.05, share * (1.4 if accepted else 0.6)))


@dataclass
class ReferenceAccelerator:
    """Observe, extrapolate, accept or reject; ``step`` takes the weights and returns them."""

    history_depth: int
    store_every_n_steps: int
    accelerate_every_n_steps: int
    regularization: Sequence[float] | None
    relaxation: float = 1.0
    warmup_steps: int = 0
    max_extrapolation: float = math.inf
    lag_compensation: float = 0.75
    look_ahead_cycles: float = 40.0
    look_ahead_share: float = 1.0
    trained: int = 0  # cycles
    of_sample: bool = False  # is the loss that of samples?
    sufficient_decrease: float | None = None
    points: list[Vector] = field(default_factory=list)
    linked: list[bool] = field(default_factory=list)  # is the point the end of a cycle?
    decisions: list[bool] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # at extrapolations
    waited: bool = False
    steps: int = 0
    cycle: int = 0
    since_attempt: int = 0

    def pairs(self) -> list[tuple[Vector, Vector]]:
        """(x_j, g_j) of every residual, equation (1), oldest first."""
        return [
            (self.points[k - 1], self.points[k])
            for k in range(1, len(self.points))
            if self.linked[k]
        ]

    def start(self, x: Vector) -> None:
        """Begin a cycle at weights that no cycle ended at."""
        self.add(x, linked=False)

    def step(self, x: Vector, loss: Callable[[Vector], float] | None) -> Vector:
        """Note the weights after an optimizer step, return those to go on from."""
        self.steps += 1
        self.cycle += 1
        self.since_attempt += 1
        if self.cycle < self.store_every_n_steps:
            return x
        self.cycle = 0
        self.add(x, linked=True)
        self.trained += 1
        if self.since_attempt < self.accelerate_every_n_steps or self.steps < self.warmup_steps:
            return x
        pairs = self.pairs()
        if len(pairs) < 2:
            return x
        self.since_attempt = 0
        residuals = [g - start for start, g in pairs]
        candidates = []
        for alpha, advance in self.mixtures(residuals, look_ahead=loss is not None):
            new = candidate(pairs, alpha, self.relaxation, advance)
            candidates.append(shorten(new, x, residuals, self.max_extrapolation))
        best = candidates[0] if loss is None else min(candidates, key=loss)
        accepted = loss is None or self.judge(residuals, loss(x), loss(best))
        self.decisions.append(accepted)
        left = remaining(residuals, mixing_weights(residuals, self.lambdas(residuals)[0]))
        too_far = not accepted and not self.waited
        if (
            loss is not None
            and self.of_sample
            and left > 1
            and (too_far or (accepted and best is candidates[-1]))
        ):
            self.look_ahead_share = next_share(self.look_ahead_share, accepted=accepted)
        if not accepted:
            return x
        self.start(best)
        return best

    def lambdas(self, residuals: Sequence[Vector]) -> Sequence[float]:
        """Of all candidates."""
        return self.regularization or [suitable_lambda(residuals)]

    def judge(self, residuals: Sequence[Vector], before: float, after: float) -> bool:
        """Equations (6) and (7)."""
        noisy = noisiness(residuals, mixing_weights(residuals, self.lambdas(residuals)[0]))
        asked = self.sufficient_decrease or 0.0
        waits = self.of_sample and asked > 0 and noisy >= 0.5 and len(residuals) >= 4
        waits = waits and not mends(before, after, self.losses)
        self.losses.append(before)
        share = asked * noisy
        enough = after < before - share * abs(before)
        self.waited = enough and waits
        return enough and not waits

    def mixtures(
        self, residuals: Sequence[Vector], *, look_ahead: bool
    ) -> list[tuple[Vector, float]]:
        """alpha and theta of every candidate, in equation (4)."""
        alphas = [mixing_weights(residuals, value) for value in self.lambdas(residuals)]
        left = remaining(residuals, alphas[0])
        share = min(1.0, self.lag_compensation * left)
        found = [(alpha, share * lag(alpha)) for alpha in alphas]
        if look_ahead:
            alpha, theta = found[-1]
            drift = min(1.0, max(0.0, left - 1.0)) / max(1.0, float(np.linalg.norm(alpha)))
            share = self.look_ahead_share if self.of_sample else 0.5
            cycles = min(self.look_ahead_cycles * share, self.trained)
            found[-1] = alpha, theta + cycles * drift
        return found

    def add(self, x: Vector, *, linked: bool) -> None:
        """Append a point; ``linked`` says that it ends a cycle begun at the newest one."""
        if not linked and self.points and not self.linked[-1]:
            self.points.pop()  # a start that no cycle followed
            self.linked.pop()
        self.points.append(x.copy())
        self.linked.append(linked)
        while len(self.points) > self.history_depth + 1 or (
            len(self.points) > 1 and not self.linked[1]
        ):
            del self.points[0], self.linked[0]
