"""What the callbacks can work with; everything else is refused before training."""

from __future__ import annotations

from typing import Any

from torch.optim import LBFGS

# Strategies whose optimizer steps move weights that a rank does not hold as plain parameters.
_REFUSED_STRATEGIES = {
    "DeepSpeedStrategy": "use strategy='ddp', or ModelParallelStrategy with FSDP2",
    "FSDPStrategy": "use ModelParallelStrategy with FSDP2, or strategy='ddp'",
    "XLAStrategy": "use strategy='ddp' on GPUs or CPUs",
}


def check_supported(trainer: Any, module: Any, callback: str) -> None:
    """Stop with one sentence where the callback cannot do its job.

    Raises:
        ValueError: names the setting, its value and the way out.
    """
    for kind in type(trainer.strategy).__mro__:
        if kind.__name__ in _REFUSED_STRATEGIES:
            raise ValueError(
                f"strategy={kind.__name__} is not supported by {callback}: "
                f"{_REFUSED_STRATEGIES[kind.__name__]}"
            )
    for optimizer in trainer.strategy.optimizers:
        if isinstance(optimizer, LBFGS):
            raise ValueError(
                f"optimizer=LBFGS is not supported by {callback}: it iterates inside its step "
                "and extrapolates on its own; use SGD or Adam, or remove the callback"
            )


def check_manual_optimization(module: Any, *, judged: bool, callback: str) -> None:
    """Manual optimisation runs the optimizers inside ``training_step``: it cannot be a judge.

    Raises:
        ValueError: names the ways to opt in.
    """
    if module.automatic_optimization or judged:
        return
    raise ValueError(
        f"automatic_optimization=False is not supported by {callback} without opting in: define "
        "anderson_loss(batch) on the LightningModule, or set safeguard='none'"
    )
