"""Options of the method: one definition, validated at construction, named in every error."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args

Safeguard = Literal["loss", "none"]
HistoryPlacement = Literal["auto", "replicated", "sharded"]
RsdKind = Literal["norm", "max"]
RsdOf = Literal["updates", "iterates"]
SmoothingApplyTo = Literal["history", "weights"]


def check_choice(option: str, value: object, choices: Any) -> None:
    """Raises ValueError unless ``value`` is one of a Literal's."""
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


def check_real(
    option: str, value: object, interval: str, is_inside: Callable[[float], bool]
) -> None:
    """Raises TypeError or ValueError unless ``value`` is a number inside the interval."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{option} must be a number, got {value!r}")
    if not is_inside(value):
        raise ValueError(f"{option} must be {interval}, got {float(value)}")


def _use_plain_numbers(options: Any) -> None:
    """Turns numbers of NumPy into those of Python, which every checkpoint can hold."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if isinstance(value, Real) and type(value) not in (int, float, bool):
            plain = int(value) if isinstance(value, Integral) else float(value)
            object.__setattr__(options, field.name, plain)


def describe(name: str, options: Any, **others: Any) -> str:
    """``name(option=value, ...)`` with what differs from the defaults of a dataclass."""
    given = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options)
        if getattr(options, field.name) != field.default
    }
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in (given | others).items())})"


def _is_finite_and_not_negative(value: float) -> bool:
    return 0 <= value < math.inf


@dataclass(frozen=True, kw_only=True)
class Smoothing:
    """The paper's moving average, switched by a relative standard deviation (RSD).

    Args:
        average_window: iterates averaged, the last ones of every cycle; ``None`` takes the
            whole cycle (``store_every_n_steps``), or 10 steps where there is no cycle.
        rsd_threshold: RSD above which the average is on; dimensionless. 0 keeps it on, inf off.
        rsd: ``"norm"`` is ||sigma||_2 / ||mu||_2, ``"max"`` is max sigma_i / max |mu_i|.
        of: what the RSD is measured on: ``"updates"``, the differences of consecutive iterates
            (noise to signal of the steps), or ``"iterates"`` themselves.
        apply_to: ``"history"`` puts the averages into the history, ``"weights"`` writes them
            over the weights as well (as the authors' code does).

    Raises:
        TypeError, ValueError: an option has the wrong type or is out of range.

    Source: arXiv:2110.14813, the criterion on the RSD of consecutive iterates.
    """

    average_window: int | None = None
    rsd_threshold: float = 0.1
    rsd: RsdKind = "norm"
    of: RsdOf = "updates"
    apply_to: SmoothingApplyTo = "history"

    def __post_init__(self) -> None:
        _use_plain_numbers(self)
        if self.average_window is not None:
            check_integer("average_window", self.average_window, 2)
        check_real("rsd_threshold", self.rsd_threshold, ">= 0", lambda value: value >= 0)
        check_choice("rsd", self.rsd, RsdKind)
        check_choice("of", self.of, RsdOf)
        check_choice("apply_to", self.apply_to, SmoothingApplyTo)
        if (self.rsd, self.of) == ("max", "updates"):
            raise ValueError(
                "rsd='max' is defined on iterates only, got of='updates'; use of='iterates', or "
                "rsd='norm'"
            )


@dataclass(frozen=True, kw_only=True)
class Options:
    """All options of ``AndersonAccelerator`` but the optimizer and the process group.

    The defaults are the recommended setting; the evidence is in ``docs/method.md`` and in
    ``benchmarks/NOTES.md``.
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
    max_horizon: float = 40.0
    regularization: float | None = None
    max_extrapolation: float = 1000.0
    safeguard: Safeguard = "loss"
    smoothing: Smoothing | None = None
    history: HistoryPlacement = "auto"
    history_device: str | None = None

    def __post_init__(self) -> None:
        _use_plain_numbers(self)
        check_integer("history_depth", self.history_depth, 2)
        check_integer("store_every_n_steps", self.store_every_n_steps, 1)
        check_integer("accelerate_every_n_steps", self.accelerate_every_n_steps, 1)
        check_integer("warmup_steps", self.warmup_steps, 0)
        if self.accelerate_every_n_steps % self.store_every_n_steps:
            raise ValueError(
                "accelerate_every_n_steps must be a multiple of store_every_n_steps "
                f"({self.store_every_n_steps}), got {self.accelerate_every_n_steps}"
            )
        check_real("relaxation", self.relaxation, "in (0, 1]", lambda value: 0 < value <= 1)
        for option in ("lag_compensation", "max_horizon"):
            interval = "finite and >= 0 (0 for none)"
            check_real(option, getattr(self, option), interval, _is_finite_and_not_negative)
        if self.regularization is not None:
            value, interval = self.regularization, "finite and >= 0"
            check_real("regularization", value, interval, _is_finite_and_not_negative)
        cap = self.max_extrapolation
        check_real("max_extrapolation", cap, "> 0 (inf for no cap)", lambda value: value > 0)
        check_choice("safeguard", self.safeguard, Safeguard)
        check_choice("history", self.history, HistoryPlacement)
        self._check_history_device()
        self._check_smoothing()

    def _check_history_device(self) -> None:
        if self.history_device is None:
            return
        sentence = (
            "history_device must be None or the name of a device, such as 'cpu', "
            f"got {self.history_device!r}"
        )
        if not isinstance(self.history_device, str):
            raise TypeError(sentence)
        import torch  # takes a second; the command line checks the other options without it

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
