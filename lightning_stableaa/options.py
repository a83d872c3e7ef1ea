"""Options of the engine: one definition, validated at construction, named in every error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

Safeguard = Literal["loss", "none"]
OptimizerState = Literal["keep", "mix", "reset"]
ApplyTo = Literal["training", "evaluation", "both"]
HistoryPlacement = Literal["auto", "replicated", "sharded"]
RsdKind = Literal["norm", "max"]
RsdOf = Literal["iterates", "updates"]
SmoothingApplyTo = Literal["history", "weights"]

# What a candidate has to take off the loss of a sample, unless it is said.
DECREASE_OF_SAMPLE = 0.1


def _check_choice(option: str, value: object, choices: Any) -> None:
    allowed = get_args(choices)
    if value not in allowed:
        names = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"{option} must be one of {names}, got {value!r}")


def check_integer(option: str, value: object, minimum: int) -> None:
    """Raises TypeError or ValueError unless ``value`` is an integer of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{option} must be an integer, got {value!r}")
    if value < minimum:
        raise ValueError(f"{option} must be >= {minimum}, got {value}")


def _check_real(option: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{option} must be a number, got {value!r}")
    return float(value)


def _as_grid(regularization: float | Sequence[float]) -> tuple[float, ...]:
    if isinstance(regularization, Sequence) and not isinstance(regularization, str):
        return tuple(regularization)
    return (regularization,)  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class Smoothing:
    """Moving average of the iterates, switched by their relative standard deviation (RSD).

    Args:
        average_window: iterates averaged, the last ones of every cycle; ``None`` takes the
            whole cycle (``store_every_n_steps``), or 10 steps where there is no cycle.
        rsd_threshold: RSD above which the average is on; dimensionless. It goes off below
            0.8 of it, so that it does not flap.
        rsd: ``"norm"`` is ||sigma||_2 / ||mu||_2, ``"max"`` is max sigma_i / max |mu_i|.
        of: what the RSD is measured on: ``"iterates"`` (the paper) or ``"updates"`` (their
            consecutive differences, the noise-to-signal ratio of the steps).
        apply_to: ``"history"`` puts the averages into the history, ``"weights"`` writes them
            over the weights as well (as the authors' code does).

    Raises:
        TypeError, ValueError: an option has the wrong type or is out of range.

    Source: arXiv:2110.14813, the criterion on the RSD of consecutive iterates.
    """

    average_window: int | None = None
    rsd_threshold: float = 0.1
    rsd: RsdKind = "norm"
    of: RsdOf = "iterates"
    apply_to: SmoothingApplyTo = "history"

    def __post_init__(self) -> None:
        if self.average_window is not None:
            check_integer("average_window", self.average_window, 2)
        threshold = _check_real("rsd_threshold", self.rsd_threshold)
        if not threshold >= 0:
            raise ValueError(f"rsd_threshold must be >= 0, got {threshold}")
        _check_choice("rsd", self.rsd, RsdKind)
        _check_choice("of", self.of, RsdOf)
        _check_choice("apply_to", self.apply_to, SmoothingApplyTo)
        if (self.rsd, self.of) == ("max", "updates"):
            raise ValueError(
                "rsd='max' is defined on iterates only, got of='updates'; use rsd='norm'"
            )


@dataclass(frozen=True, kw_only=True)
class Options:
    """All options of ``AndersonAccelerator`` but the optimizer and the process group.

    The defaults are the recommended setting; the reasons stand in ``benchmarks/NOTES.md``.
    Meanings: the docstring of :class:`~lightning_stableaa.AndersonAccelerator`.

    Raises:
        TypeError, ValueError: an option has the wrong type or is out of range.
    """

    history_depth: int = 10
    store_every_n_steps: int = 10
    accelerate_every_n_steps: int = 20
    warmup_steps: int = 0
    relaxation: float = 1.0
    lag_compensation: float = 0.75
    look_ahead_cycles: float = 40.0
    regularization: float | Sequence[float] | None = None
    max_extrapolation: float = 1000.0
    safeguard: Safeguard = "loss"
    sufficient_decrease: float | None = None
    optimizer_state: OptimizerState = "keep"
    smoothing: Smoothing | None = None
    apply_to: ApplyTo = "training"
    history: HistoryPlacement = "auto"
    history_device: str | None = None

    def __post_init__(self) -> None:
        check_integer("history_depth", self.history_depth, 2)
        check_integer("store_every_n_steps", self.store_every_n_steps, 1)
        check_integer("accelerate_every_n_steps", self.accelerate_every_n_steps, 1)
        check_integer("warmup_steps", self.warmup_steps, 0)
        if self.accelerate_every_n_steps % self.store_every_n_steps:
            raise ValueError(
                "accelerate_every_n_steps must be a multiple of store_every_n_steps "
                f"({self.store_every_n_steps}), got {self.accelerate_every_n_steps}"
            )
        relaxation = _check_real("relaxation", self.relaxation)
        if not 0 < relaxation <= 1:
            raise ValueError(f"relaxation must be in (0, 1], got {relaxation}")
        compensation = _check_real("lag_compensation", self.lag_compensation)
        if not (compensation >= 0 and math.isfinite(compensation)):
            raise ValueError(
                f"lag_compensation must be finite and >= 0 (0 for none), got {compensation}"
            )
        cycles = _check_real("look_ahead_cycles", self.look_ahead_cycles)
        if not (cycles >= 0 and math.isfinite(cycles)):
            raise ValueError(
                f"look_ahead_cycles must be finite and >= 0 (0 for none), got {cycles}"
            )
        self._check_regularization()
        cap = _check_real("max_extrapolation", self.max_extrapolation)
        if not cap > 0:
            raise ValueError(f"max_extrapolation must be > 0 (inf for no cap), got {cap}")
        _check_choice("safeguard", self.safeguard, Safeguard)
        if self.sufficient_decrease is not None:
            decrease = _check_real("sufficient_decrease", self.sufficient_decrease)
            if not 0 <= decrease < 1:
                raise ValueError(f"sufficient_decrease must be in [0, 1), got {decrease}")
        _check_choice("optimizer_state", self.optimizer_state, OptimizerState)
        _check_choice("apply_to", self.apply_to, ApplyTo)
        _check_choice("history", self.history, HistoryPlacement)
        self._check_history_device()
        self._check_smoothing()

    def _check_regularization(self) -> None:
        if self.regularization is None:
            return
        grid = _as_grid(self.regularization)
        if not grid:
            raise ValueError("regularization must hold at least one value, got an empty list")
        for one in grid:
            number = _check_real("regularization", one)
            if not (number >= 0 and math.isfinite(number)):
                raise ValueError(f"regularization must be finite and >= 0, got {number}")
        if len(grid) > 1 and self.safeguard == "none":
            raise ValueError(
                f"regularization must be a single value when safeguard is 'none', got {list(grid)}:"
                " only the safeguard can choose from a grid"
            )

    def _check_history_device(self) -> None:
        if self.history_device is None:
            return
        sentence = (
            "history_device must be None or the name of a device, such as 'cpu', "
            f"got {self.history_device!r}"
        )
        if not isinstance(self.history_device, str):
            raise TypeError(sentence)
        try:
            device = torch.device(self.history_device)
        except RuntimeError as error:
            raise ValueError(sentence) from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"{sentence}, where there is no CUDA device")

    def _check_smoothing(self) -> None:
        if self.smoothing is None:
            return
        if not isinstance(self.smoothing, Smoothing):
            raise TypeError(f"smoothing must be None or a Smoothing, got {self.smoothing!r}")
        window = self.smoothing.average_window
        if window is not None and window > self.store_every_n_steps:
            raise ValueError(
                "average_window must be <= store_every_n_steps "
                f"({self.store_every_n_steps}), got {window}"
            )
        if self.smoothing.apply_to == "weights" and self.apply_to == "evaluation":
            raise ValueError(
                "smoothing.apply_to='weights' changes training, got apply_to='evaluation'; "
                "use smoothing.apply_to='history'"
            )

    @property
    def regularization_grid(self) -> tuple[float, ...] | None:
        """The values of lambda to try, one or more; ``None`` where residuals tell the one."""
        if self.regularization is None:
            return None
        return tuple(float(one) for one in _as_grid(self.regularization))

    def least_decrease(self, *, of_sample: bool) -> float:
        """Share of the loss that a candidate takes off it, where residuals are noise.

        Args:
            of_sample: the loss is that of samples of many.
        """
        if self.sufficient_decrease is None:
            return DECREASE_OF_SAMPLE if of_sample else 0.0
        return float(self.sufficient_decrease)
