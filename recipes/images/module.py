"""Classification of images."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lightning_stableaa.recipes.base import RecipeModule
from lightning_stableaa.recipes.images.data import UNREADABLE


class ImageClassifier(RecipeModule):
    """Cross-entropy of a network that maps (n, 3, h, w) to (n, num_classes).

    Weight decay of the optimizer acts on weights alone, not on norms and biases.

    Args:
        network: the model.
        optimizer: called with two parameter groups.
        scheduler: called with the optimizer and the number of steps.
        num_classes: number of logits.
        label_smoothing: share of the target spread over all classes; of training alone.
        compile: compiles the network, not the training step around it.
    """

    monitor = "val/top1"
    monitor_mode = "max"

    def __init__(
        self,
        network: nn.Module,
        optimizer: Callable[[Iterable[Any]], Optimizer],
        scheduler: Callable[[Optimizer, int], LRScheduler] | None = None,
        *,
        num_classes: int,
        label_smoothing: float = 0.1,
        compile: bool = False,
    ) -> None:
        # the data arrive channels last; the weights must match, or every convolution converts
        super().__init__(network.to(memory_format=torch.channels_last), optimizer, scheduler)  # pyright: ignore[reportCallIssue]  # "No overloads for "to" match"
        if compile:
            self.network.compile()  # in place: the names in the checkpoint stay the same
        self.label_smoothing = label_smoothing
        self.validation_loss = MeanMetric()
        self.top1, self.top5 = (
            MulticlassAccuracy(
                num_classes,
                top_k=min(k, num_classes),
                average="micro",
                ignore_index=UNREADABLE,
                validate_args=False,  # the checks wait for the device
            )
            for k in (1, 5)
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Weights, and the rest without weight decay."""
        return decay_groups(self)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Smoothed cross-entropy of one batch."""
        images, labels = batch
        loss = readable_cross_entropy(self.network(images), labels, self.label_smoothing)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Adds one batch to loss and accuracies."""
        images, labels = batch
        logits = self.network(images)
        self.validation_loss(
            readable_cross_entropy(logits, labels), weight=(labels != UNREADABLE).sum()
        )
        self.top1(logits, labels)
        self.top5(logits, labels)
        self.log("val/loss", self.validation_loss)
        self.log("val/top1", self.top1, prog_bar=True)
        self.log("val/top5", self.top5)


def decay_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups: those with two or more dimensions, and norms and biases undecayed."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def readable_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean over the images that could be decoded; zero, with a gradient, where none could."""
    total = cross_entropy(
        logits, labels, ignore_index=UNREADABLE, label_smoothing=label_smoothing, reduction="sum"
    )
    return total / (labels != UNREADABLE).sum().clamp(min=1)
