"""Stable Anderson acceleration for PyTorch and Lightning."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_stableaa.accelerator import AndersonAccelerator
    from lightning_stableaa.callbacks import AndersonCallback, SmoothingMonitor
    from lightning_stableaa.model.objective import preserve_state
    from lightning_stableaa.options import Smoothing
    from lightning_stableaa.report import Status, StepReport

__version__ = "0.2.0"

__all__ = [
    "AndersonAccelerator",
    "AndersonCallback",
    "Smoothing",
    "SmoothingMonitor",
    "Status",
    "StepReport",
    "preserve_state",
]

_MODULES = {
    "AndersonAccelerator": "accelerator",
    "AndersonCallback": "callbacks",
    "Smoothing": "options",
    "SmoothingMonitor": "callbacks",
    "Status": "report",
    "StepReport": "report",
    "preserve_state": "model.objective",
}


def __getattr__(name: str) -> Any:
    """Imports a name when it is first used: the commands need no torch to answer."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Lists the names for completion, imported or not."""
    return sorted({*globals(), *__all__})
