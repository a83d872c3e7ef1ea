"""Judges for tests of the engine."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_stableaa import MiniBatchLoss
from lightning_stableaa.safeguard import LossFunction


class OfSample(MiniBatchLoss):
    """Judges by a mini-batch, and knows what more of them say."""

    def __init__(
        self,
        loss_fn: LossFunction,
        whole: LossFunction | None = None,
        *,
        training_loss: float | None = None,
    ) -> None:
        super().__init__(loss_fn, None if training_loss is None else torch.tensor(training_loss))
        self._whole = whole
        self.asked = False

    def confirming(self) -> LossFunction | None:
        return None if self._whole is None else self._ask

    def _ask(self) -> Tensor:
        assert self._whole is not None
        self.asked = True
        return self._whole()
