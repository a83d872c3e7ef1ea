"""What the callbacks can work with; everything else is refused before training."""

from __future__ import annotations

import inspect
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
    if trainer.strategy.root_device.type == "mps":
        raise ValueError(
            f"accelerator='mps' is not supported by {callback}, which computes in float64: use "
            "accelerator='cpu', or remove the callback"
        )
    for optimizer in trainer.strategy.optimizers:
        if isinstance(optimizer, LBFGS):
            raise ValueError(
                f"optimizer=LBFGS is not supported by {callback}: it iterates inside its step "
                "and extrapolates on its own; use SGD or Adam, or remove the callback"
            )


def check_other_averages(trainer: Any, apply_to: str, callback: str) -> None:
    """Two callbacks cannot both decide which weights validation and checkpoints see.

    Raises:
        ValueError: names both, and the ways out.
    """
    for other in trainer.callbacks:
        names = {kind.__name__ for kind in type(other).__mro__}
        if apply_to != "training" and names & {"WeightAveraging", "StochasticWeightAveraging"}:
            raise ValueError(
                f"apply_to={apply_to!r} of {callback} and {type(other).__name__} both decide which "
                "weights validation and checkpoints hold: choose apply_to='training', or remove "
                "one of the two"
            )


def check_manual_optimization(module: Any, *, judged: bool, callback: str) -> None:
    """A judge calls ``training_step`` again with a batch: it must not step, nor fetch others.

    Raises:
        ValueError: names the ways to opt in.
    """
    if judged:
        return
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise ValueError(
            f"training_step(dataloader_iter) is not supported by {callback} without opting in: "
            "define anderson_loss(batch) on the LightningModule, or set safeguard='none'"
        )
    if module.automatic_optimization:
        return
    raise ValueError(
        f"automatic_optimization=False is not supported by {callback} without opting in: define "
        "anderson_loss(batch) on the LightningModule, or set safeguard='none'"
    )
