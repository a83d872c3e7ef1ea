"""Judges for tests of the engine."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_stableaa.safeguard import LossFunction, WholeLoss


class OfSample(WholeLoss):
    """Judges by a sample, and knows what more of them say."""

    def __init__(
        self,
        loss_fn: LossFunction,
        whole: LossFunction | None = None,
        *,
        training_loss: float | None = None,
    ) -> None:
        super().__init__(loss_fn)
        self._whole = whole
        self._training_loss = training_loss
        self.asked = False

    @property
    def of_sample(self) -> bool:
        return True

    @property
    def surely_of_sample(self) -> bool:
        return True

    @property
    def training_loss(self) -> Tensor | None:
        return None if self._training_loss is None else torch.tensor(self._training_loss)

    def confirming(self) -> LossFunction | None:
        return None if self._whole is None else self._ask

    def _ask(self) -> Tensor:
        assert self._whole is not None
        self.asked = True
        return self._whole()
