"""Judges for tests of the engine."""

from __future__ import annotations

from lightning_stableaa.safeguard import LossFunction, WholeBatch


class OfPart(WholeBatch):
    """Judges by a part of the batch, and knows what the whole of it says."""

    def __init__(self, loss_fn: LossFunction, whole: LossFunction | None = None) -> None:
        super().__init__(loss_fn)
        self._whole = whole
        self.asked = False

    @property
    def of_part(self) -> bool:
        return True

    def confirming(self) -> LossFunction | None:
        self.asked = True
        return self._whole
