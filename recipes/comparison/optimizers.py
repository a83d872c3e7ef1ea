"""Variants that change what a module's ``configure_optimizers`` returns, as callbacks.

They work on any module with one optimizer, whether its optimizer comes from a configuration or
from its own code.
"""

import importlib
import importlib.util
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_stableaa.recipes.errors import UserError

# What one variant alone needs.
PACKAGES = {"lookahead": "pytorch_optimizer", "schedule_free": "schedulefree"}


def check_installed(variant: str) -> None:
    """Before any run is made.

    Raises:
        UserError: the variant needs a package that is not installed.
    """
    package = PACKAGES.get(variant)
    if package is not None and importlib.util.find_spec(package) is None:
        raise UserError(
            f"compare.variants: {variant} needs {package}, which is not installed: pip install "
            f"'.[recipes,compare]' in a checkout, or leave {variant} out"
        )


class Training(NamedTuple):
    """One optimizer, and Lightning's settings of its learning-rate scheduler, if it has one."""

    optimizer: Optimizer
    scheduling: dict[str, Any] | None


class OptimizerChange(Callback):
    """Lets ``change`` have the module's optimizer before training."""

    @abstractmethod
    def change(self, training: Training, trainer: lightning.Trainer) -> Training:
        """The optimizer to train with in place of ``training.optimizer``."""

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Wraps ``configure_optimizers``; several changes apply in the order of the callbacks."""
        original = pl_module.configure_optimizers

        def configure_optimizers() -> Any:
            optimizer, scheduling = self.change(one_optimizer(original()), trainer)
            if scheduling is None:
                return optimizer
            return {"optimizer": optimizer, "lr_scheduler": scheduling}

        pl_module.configure_optimizers = configure_optimizers

    def teardown(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Gives the module its own method back."""
        vars(pl_module).pop("configure_optimizers", None)


def one_optimizer(configured: Any) -> Training:
    """Reads any form of ``configure_optimizers`` that holds one optimizer.

    Raises:
        UserError: there is none, or more than one.
    """
    schedulers: Any = None
    if isinstance(configured, Mapping):
        configured, schedulers = configured["optimizer"], configured.get("lr_scheduler")
    elif isinstance(configured, list | tuple) and len(configured) == 2:
        optimizers, listed = configured
        if isinstance(optimizers, list) and len(optimizers) == 1 and len(listed) <= 1:
            configured, schedulers = optimizers[0], next(iter(listed), None)
    elif isinstance(configured, list | tuple) and len(configured) == 1:
        return one_optimizer(configured[0])
    if not isinstance(configured, Optimizer):
        raise UserError(
            "configure_optimizers returns something else than one optimizer: leave out the "
            "variants that change it (lookahead, schedule_free, lbfgs, lr_sweep, @3x, @cosine)"
        )
    if schedulers is None:
        return Training(configured, None)
    named = schedulers if isinstance(schedulers, Mapping) else {"scheduler": schedulers}
    return Training(configured, dict(named))


class LearningRateMultiple(OptimizerChange):
    """Multiplies every learning rate, those that a scheduler has taken note of included."""

    def __init__(self, multiple: float) -> None:
        self.multiple = multiple

    def change(self, training: Training, trainer: lightning.Trainer) -> Training:
        """The same optimizer with other rates."""
        for group in training.optimizer.param_groups:
            for name in {"lr", "initial_lr", "max_lr", "min_lr"} & group.keys():
                group[name] *= self.multiple
        if training.scheduling is not None:
            self._rescale(training.scheduling["scheduler"])
        return training

    def _rescale(self, scheduler: Any) -> None:
        for nested in getattr(scheduler, "_schedulers", ()):  # SequentialLR, ChainedScheduler
            self._rescale(nested)
        for name in {"base_lrs", "_last_lr"} & vars(scheduler).keys():
            setattr(scheduler, name, [rate * self.multiple for rate in getattr(scheduler, name)])


class CosineSchedule(OptimizerChange):
    """Half a cosine from the learning rate to zero over the run, in place of any scheduler."""

    def change(self, training: Training, trainer: lightning.Trainer) -> Training:
        """The same optimizer with another schedule."""
        for group in training.optimizer.param_groups:
            group["lr"] = _full_rate(group)
        scheduler = CosineAnnealingLR(training.optimizer, int(trainer.estimated_stepping_batches))
        return Training(training.optimizer, {"scheduler": scheduler, "interval": "step"})


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

    def change(self, training: Training, trainer: lightning.Trainer) -> Training:
        """The optimizer inside a Lookahead."""
        check_installed("lookahead")  # also of a variant of another name
        package: Any = importlib.import_module(PACKAGES["lookahead"])
        self.optimizer = package.Lookahead(training.optimizer, k=self.k, alpha=self.alpha)
        if training.scheduling is not None:
            # Lightning wants the scheduler's optimizer among those that it steps
            training.scheduling["scheduler"].optimizer = self.optimizer
        return Training(self.optimizer, training.scheduling)

    def on_validation_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Puts the slow weights in place."""
        self.optimizer.backup_and_load_cache()

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Goes on from the fast weights."""
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

    def change(self, training: Training, trainer: lightning.Trainer) -> Training:
        """The optimizer of the package, with the rates and weight decays of the module's own."""
        check_installed("schedule_free")
        schedulefree: Any = importlib.import_module(PACKAGES["schedule_free"])
        replaced = training.optimizer
        if not isinstance(replaced, SGD | Adam | AdamW):
            raise UserError(
                f"schedule_free replaces SGD, Adam and AdamW, and the optimizer is "
                f"{type(replaced).__name__}: leave it out of compare.variants"
            )
        warmup_steps = int(self.warmup_share * trainer.estimated_stepping_batches)
        groups: list[dict[str, Any]] = [
            {"params": g["params"], "lr": _full_rate(g), "weight_decay": g["weight_decay"]}
            for g in replaced.param_groups
        ]
        first = replaced.param_groups[0]
        if isinstance(replaced, SGD):
            for group in groups:
                group["lr"] /= 1 - first["momentum"]
            momentum = first["momentum"] or 0.9  # must be positive: its default
            self.optimizer = schedulefree.SGDScheduleFree(
                groups, momentum=momentum, warmup_steps=warmup_steps
            )
        else:
            self.optimizer = schedulefree.AdamWScheduleFree(
                groups, betas=first["betas"], eps=first["eps"], warmup_steps=warmup_steps
            )
        return Training(self.optimizer, None)

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """The point at which gradients are taken."""
        self.optimizer.train()

    def on_validation_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """The average, which is what Schedule-Free has to show."""
        self.optimizer.eval()

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Back to the point at which gradients are taken."""
        self.optimizer.train()

    def on_train_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Leaves the average in the module."""
        self.optimizer.eval()


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

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Validates as often, counted in gradients, as the plain run does."""
        super().setup(trainer, pl_module, stage)
        if isinstance(trainer.val_check_interval, int):
            trainer.val_check_interval = max(1, trainer.val_check_interval // self.max_eval)

    def change(self, training: Training, trainer: lightning.Trainer) -> Training:
        """L-BFGS over all parameters."""
        parameters = [p for group in training.optimizer.param_groups for p in group["params"]]
        self.budget = int(trainer.estimated_stepping_batches) * trainer.accumulate_grad_batches
        optimizer = torch.optim.LBFGS(
            parameters,
            max_iter=self.max_iter,
            max_eval=self.max_eval,
            history_size=self.history_size,
            line_search_fn="strong_wolfe",
        )
        return Training(optimizer, None)

    def on_after_backward(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """One evaluation of the closure."""
        self.gradients += 1

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Stops where another step might exceed the budget."""
        trainer.should_stop = self.gradients + self.max_eval > self.budget


def _full_rate(group: dict[str, Any]) -> float:
    """The learning rate of a group before a scheduler lowered it."""
    return group.get("initial_lr", group["lr"])
