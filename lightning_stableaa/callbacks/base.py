"""One callback class for two class trees: ``lightning.pytorch`` and ``pytorch_lightning``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

_TREES = ("lightning.pytorch", "pytorch_lightning")


def _callback_bases() -> tuple[type, ...]:
    """``Callback`` of every tree in use, or of the one that is installed.

    Importing a tree costs seconds, so a second one is never imported on a suspicion. A Trainer
    calls its callbacks by name; only LightningCLI looks at the class, and it has imported its
    own tree before it reads a callback from a configuration.
    """
    trees = [name for name in _TREES if name in sys.modules]
    if not trees:
        trees = [name for name in _TREES if importlib.util.find_spec(name.split(".")[0])][:1]
    if not trees:
        raise ImportError(
            "the callbacks need Lightning, which is not installed: pip install lightning; "
            "AndersonAccelerator works without it"
        )
    return tuple(importlib.import_module(f"{name}.callbacks").Callback for name in trees)


if TYPE_CHECKING:
    from lightning.pytorch import Callback as LightningCallback
else:
    LightningCallback = type("LightningCallback", _callback_bases(), {})


def log_to_loggers(trainer: Any, values: dict[str, float]) -> None:
    """Write to every logger at once, at the step at which Lightning logs this batch.

    ``LightningModule.log`` would keep only the values of every ``log_every_n_steps``-th batch,
    and with them lose most extrapolations.
    """
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    for logger in trainer.loggers:
        logger.log_metrics(values, step=step)
