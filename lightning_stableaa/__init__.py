"""Stable Anderson acceleration for PyTorch and Lightning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_stableaa.accelerator import AndersonAccelerator
from lightning_stableaa.options import Smoothing
from lightning_stableaa.report import Status, StepReport

if TYPE_CHECKING:
    from lightning_stableaa.callbacks import AndersonCallback, SmoothingMonitor

__version__ = "0.2.0"

__all__ = [
    "AndersonAccelerator",
    "AndersonCallback",
    "Smoothing",
    "SmoothingMonitor",
    "Status",
    "StepReport",
]


def __getattr__(name: str) -> Any:
    """Import the callbacks when they are first used: the engine needs no Lightning."""
    if name in ("AndersonCallback", "SmoothingMonitor"):
        from lightning_stableaa import callbacks

        return getattr(callbacks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Names for completion, those of the callbacks included."""
    return sorted([*globals(), *__all__])
