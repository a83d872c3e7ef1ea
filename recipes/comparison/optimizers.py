"""Variants that replace a module's optimizer or its schedule, as callbacks.

They work on any module with one optimizer, whether its optimizer comes from a configuration or
from its own code.
"""

import importlib
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_stableaa.recipes.errors import UserError


class OptimizerChange(Callback):
    """Replaces the optimizer once Lightning has set it up, before a checkpoint is restored."""

    def change(self, optimizer: Optimizer, trainer: Trainer) -> Optimizer:
        """The optimizer to train with in place of ``optimizer``."""
        raise NotImplementedError

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Several changes apply in the order of the callbacks."""
        if len(trainer.optimizers) != 1:
            raise UserError(
                f"configure_optimizers returns {len(trainer.optimizers)} optimizers: leave out the "
                "variants that change it (lookahead, schedule_free, lbfgs, lr_sweep, @3x, @cosine)"
            )
        trainer.optimizers = [self.change(trainer.optimizers[0], trainer)]


class LearningRateMultiple(OptimizerChange):
    """Multiplies every learning rate, those that a scheduler has taken note of included."""

    def __init__(self, multiple: float) -> None:
        self.multiple = multiple

    def change(self, optimizer: Optimizer, trainer: Trainer) -> Optimizer:
        """The same optimizer with other rates."""
        for group in optimizer.param_groups:
            for name in {"lr", "initial_lr", "max_lr", "min_lr"} & group.keys():
                group[name] *= self.multiple
        for config in trainer.lr_scheduler_configs:
            self._rescale(config.scheduler)
        return optimizer

    def _rescale(self, scheduler: Any) -> None:
        for nested in getattr(scheduler, "_schedulers", ()):  # SequentialLR, ChainedScheduler
            self._rescale(nested)
        for name in {"base_lrs", "_last_lr"} & vars(scheduler).keys():
            setattr(scheduler, name, [rate * self.multiple for rate in getattr(scheduler, name)])


class CosineSchedule(OptimizerChange):
    """Half a cosine from the learning rate to zero over the run, in place of any scheduler."""

    def change(self, optimizer: Optimizer, trainer: Trainer) -> Optimizer:
        """The same optimizer with another schedule."""
        for group in optimizer.param_groups:
            group["lr"] = _full_rate(group)
        scheduler = CosineAnnealingLR(optimizer, int(trainer.estimated_stepping_batches))
        trainer.strategy.lr_scheduler_configs = [LRSchedulerConfig(scheduler, interval="step")]
        return optimizer


class Lookahead(OptimizerChange):
    """Lookahead of the package pytorch_optimizer; validation sees its slow weights.

    Args:
        k: steps between two updates of the slow weights.
        alpha: share of the way that the slow weights go.

    Source: Zhang, Lucas, Hinton, Ba 2019, Lookahead Optimizer: k steps forward, 1 step back.
    """

    def __init__(self, k: int = 5, alpha: float = 0.5) -> None:
        self.k = k
        self.alpha = alpha
        self.optimizer: Any = None

    def change(self, optimizer: Optimizer, trainer: Trainer) -> Optimizer:
        """The optimizer inside a Lookahead."""
        package: Any = importlib.import_module("pytorch_optimizer")
        self.optimizer = package.Lookahead(optimizer, k=self.k, alpha=self.alpha)
        return self.optimizer

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the slow weights in place."""
        self.optimizer.backup_and_load_cache()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restores the fast weights."""
        self.optimizer.clear_and_load_backup()


class ScheduleFree(OptimizerChange):
    """Schedule-Free SGD or AdamW of the package schedulefree, in place of SGD or Adam.

    SGD's rate becomes lr / (1 - momentum), the length of a step in the long run, since
    Schedule-Free has no momentum of that kind; its README advises 10 to 50 times the rate of SGD
    with momentum 0.9. Any other scheduler is dropped.

    Args:
        warmup_share: share of the run in which the rate rises.

    Source: Defazio et al. 2024, The Road Less Scheduled.
    """

    def __init__(self, warmup_share: float = 0.0) -> None:
        self.warmup_share = warmup_share
        self.optimizer: Any = None

    def change(self, optimizer: Optimizer, trainer: Trainer) -> Optimizer:
        """The optimizer of the package, with the rates and weight decays of the module's own."""
        schedulefree: Any = importlib.import_module("schedulefree")
        if not isinstance(optimizer, SGD | Adam | AdamW):
            raise UserError(
                f"schedule_free replaces SGD, Adam and AdamW, and the optimizer is "
                f"{type(optimizer).__name__}: leave it out of compare.variants"
            )
        trainer.strategy.lr_scheduler_configs = []
        warmup = int(self.warmup_share * trainer.estimated_stepping_batches)
        groups: list[dict[str, Any]] = [
            {"params": g["params"], "lr": _full_rate(g), "weight_decay": g["weight_decay"]}
            for g in optimizer.param_groups
        ]
        first = optimizer.param_groups[0]
        if isinstance(optimizer, SGD):
            for group in groups:
                group["lr"] /= 1 - first["momentum"]
            momentum = first["momentum"] or 0.9  # must be positive: its default
            self.optimizer = schedulefree.SGDScheduleFree(
                groups, momentum=momentum, warmup_steps=warmup
            )
        else:
            self.optimizer = schedulefree.AdamWScheduleFree(
                groups, betas=first["betas"], eps=first["eps"], warmup_steps=warmup
            )
        return self.optimizer

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Trains at the point at which gradients are taken."""
        self.optimizer.train()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validates the average."""
        self.optimizer.eval()

    on_validation_end = on_train_start

    on_train_end = on_validation_start  # leaves the average in the module


class LBFGS(OptimizerChange):
    """L-BFGS with a strong Wolfe line search, within the plain run's number of gradients.

    One optimizer step evaluates many gradients, so the run stops, and validates, by their number.

    Args:
        max_iter: iterations in one optimizer step.
        history_size: pairs kept.
    """

    def __init__(self, max_iter: int = 20, history_size: int = 100) -> None:
        self.max_iter = max_iter
        self.history_size = history_size
        self.max_eval = max_iter * 5 // 4  # torch's default
        self.budget = 0
        self.gradients = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Validates as often, counted in gradients, as the plain run does."""
        if isinstance(trainer.val_check_interval, int):
            trainer.val_check_interval = max(1, trainer.val_check_interval // self.max_eval)

    def change(self, optimizer: Optimizer, trainer: Trainer) -> Optimizer:
        """L-BFGS over all parameters."""
        self.budget = int(trainer.estimated_stepping_batches) * trainer.accumulate_grad_batches
        trainer.strategy.lr_scheduler_configs = []
        return torch.optim.LBFGS(
            [p for group in optimizer.param_groups for p in group["params"]],
            max_iter=self.max_iter,
            max_eval=self.max_eval,
            history_size=self.history_size,
            line_search_fn="strong_wolfe",
        )

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts one evaluation of the closure."""
        self.gradients += 1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops where another step might exceed the budget."""
        trainer.should_stop = self.gradients + self.max_eval > self.budget


def _full_rate(group: dict[str, Any]) -> float:
    """The learning rate of a group before a scheduler lowered it."""
    return group.get("initial_lr", group["lr"])
