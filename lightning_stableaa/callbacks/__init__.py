"""Lightning callbacks; the only part of the package that imports Lightning."""

from lightning_stableaa.callbacks.anderson import AndersonCallback
from lightning_stableaa.callbacks.smoothing import SmoothingMonitor

__all__ = ["AndersonCallback", "SmoothingMonitor"]
