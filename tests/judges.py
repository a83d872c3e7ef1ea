"""Judges for tests of the engine."""

from __future__ import annotations

from torch import Tensor

from lightning_stableaa.safeguard import LossFunction, WholeLoss


class OfSample(WholeLoss):
    """Judges by a sample, and knows what more of them say."""

    def __init__(self, loss_fn: LossFunction, whole: LossFunction | None = None) -> None:
        super().__init__(loss_fn)
        self._whole = whole
        self.asked = False

    @property
    def of_sample(self) -> bool:
        return True

    def confirming(self) -> LossFunction | None:
        return None if self._whole is None else self._ask

    def _ask(self) -> Tensor:
        assert self._whole is not None
        self.asked = True
        return self._whole()
