"""Stable Anderson acceleration for PyTorch and Lightning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_stableaa.accelerator import AndersonAccelerator
from lightning_stableaa.options import Smoothing
from lightning_stableaa.report import StepReport
from lightning_stableaa.safeguard import MiniBatchLoss
from lightning_stableaa.status import Status

if TYPE_CHECKING:
    from lightning_stableaa.callbacks import AndersonCallback, SmoothingMonitor

__version__ = "0.1.0"

__all__ = [
    "AndersonAccelerator",
    "AndersonCallback",
    "MiniBatchLoss",
    "Smoothing",
    "SmoothingMonitor",
    "Status",
    "StepReport",
]


def __getattr__(name: str) -> Any:
    """Import the callbacks when they are first asked for: the engine needs no Lightning."""
    if name in ("AndersonCallback", "SmoothingMonitor"):
        from lightning_stableaa import callbacks

        return getattr(callbacks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
