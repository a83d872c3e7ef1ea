"""Averaging of the last weights."""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


class LateWeightAveraging(WeightAveraging):
    """Lightning's ``WeightAveraging`` over the last part of the run.

    Until then the average is the current weights, so that every validation shows what training
    would end with. Lightning's ``StochasticWeightAveraging`` needs ``max_epochs`` and shows the
    average only after the last validation.

    Args:
        start_share: share of the run after which averaging begins.

    Source: Izmailov et al. 2018, Averaging Weights Leads to Wider Optima.
    """

    def __init__(self, start_share: float = 0.75) -> None:
        super().__init__(multi_avg_fn=self._average)
        self.start_share = start_share
        self.start_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Computes the step at which averaging begins."""
        super().on_train_start(trainer, pl_module)
        self.start_step = int(self.start_share * trainer.estimated_stepping_batches)

    def _average(self, averages: Any, currents: Any, steps: Tensor | int) -> None:
        """The mean from the first step on, in place; integer buffers are copied."""
        weight = 1 / max(1, int(steps) - self.start_step + 1)
        for average, current in zip(averages, currents, strict=True):
            if average.is_floating_point():
                average.lerp_(current, weight)
            else:
                average.copy_(current)
