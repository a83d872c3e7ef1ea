"""Metrics that torchmetrics lacks."""

import torch
from torch import Tensor
from torchmetrics import Metric


class RelativeL2Error(Metric):
    """||prediction - target||_2 / ||target||_2 over everything seen since the last reset."""

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    squared_error: Tensor
    squared_target: Tensor

    def __init__(self) -> None:
        super().__init__()
        # float64: 25,600 squares summed in float32 would cost the last digits of a small error
        for name in ("squared_error", "squared_target"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Adds one batch; both tensors have the same shape."""
        self.squared_error += (prediction - target).double().square().sum()
        self.squared_target += target.double().square().sum()

    def compute(self) -> Tensor:
        """The error of all batches together, a float64 scalar."""
        return (self.squared_error / self.squared_target).sqrt()
