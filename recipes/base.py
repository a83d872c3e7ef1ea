"""What the modules of all recipes share."""

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import lightning
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_stableaa.recipes.errors import UserError, attribute_to, check_type


class RecipeModule(lightning.LightningModule):
    """A network, the optimizer that trains it, and the metric that decides which run is better.

    Args:
        network: the model to train.
        optimizer: called with the parameters or parameter groups.
        scheduler: called with the optimizer and the number of optimizer steps of the whole run;
            stepped after every optimizer step.

    Raises:
        TypeError: ``network`` is no module.
    """

    monitor: ClassVar[str]
    monitor_mode: ClassVar[str] = "min"
    shardable: ClassVar[bool] = True  # FSDP2 cannot differentiate a network by its inputs twice

    def __init__(
        self,
        network: nn.Module,
        optimizer: Callable[[Iterable[Any]], Optimizer],
        scheduler: Callable[[Optimizer, int], LRScheduler] | None = None,
    ) -> None:
        if not isinstance(network, nn.Module):
            raise TypeError(f"network must be a torch.nn.Module, got {type(network).__name__}")
        super().__init__()
        self.network = network
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler

    def parameter_groups(self) -> Iterable[Any]:
        """What the optimizer gets; recipes override it to treat some parameters differently."""
        return self.parameters()

    def features(self) -> tuple[int, int] | None:
        """Numbers that the network takes and returns for a sample; None where any will do."""
        return None

    def setup(self, stage: str) -> None:
        """Refuses a network that does not fit the data before anything is trained."""
        features = self.features()
        if features is not None:
            _check_features(self.network, *features)

    def shard_weights(self) -> None:
        """FSDP2, as ``configure_model`` where the strategy is ModelParallelStrategy.

        Not under that name for every run: Lightning's averaging callbacks expect the worst of a
        module that has a ``configure_model`` of its own.
        """
        strategy: Any = self.trainer.strategy
        if not isinstance(self.network, FSDPModule):  # called by every fit and test
            fully_shard(self.network, mesh=strategy.device_mesh["data_parallel"])

    def draw(self, folder: Path) -> None:
        """Draws what is particular to the recipe into ``folder``, after training."""

    def configure_optimizers(self) -> Any:
        """Builds the optimizer, and the scheduler with the length of the run."""
        with attribute_to("optimizer"):
            optimizer = self.make_optimizer(self.parameter_groups())
        check_type(optimizer, "Optimizer", "optimizer")
        if self.make_scheduler is None:
            return optimizer
        with attribute_to("scheduler"):
            scheduler = self.make_scheduler(optimizer, int(self.trainer.estimated_stepping_batches))
        check_type(scheduler, "LRScheduler", "scheduler")
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


@torch.no_grad()
def _check_features(network: nn.Module, inputs: int, outputs: int) -> None:
    network = copy.deepcopy(network).eval()  # neither statistics nor modes may change
    like = next(network.parameters(), torch.empty(0))
    try:
        returned = network(torch.zeros(1, inputs, dtype=like.dtype, device=like.device)).shape
    except RuntimeError:  # "mat1 and mat2 shapes cannot be multiplied"
        returned = None
    if returned != (1, outputs):
        linear = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
        widths = [one.in_features for one in linear[:1]] + [one.out_features for one in linear]
        raise UserError(
            f"module.network: the data have {inputs} inputs and {outputs} outputs, got a network "
            f"of widths {widths}; set model.widths=[{inputs},...,{outputs}]"
        )
