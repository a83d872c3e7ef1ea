"""What both callbacks share: one engine for one fit, and the two class trees of Lightning."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim import LBFGS

from lightning_stableaa import checkpoint
from lightning_stableaa.accelerator import AndersonAccelerator

_TREES = ("lightning.pytorch", "pytorch_lightning")

# Strategies whose optimizer steps move weights that a rank does not hold as plain parameters.
_REFUSED_STRATEGIES = {
    "DeepSpeedStrategy": "use strategy='ddp', or ModelParallelStrategy with FSDP2",
    "FSDPStrategy": "use ModelParallelStrategy with FSDP2, or strategy='ddp'",
    "XLAStrategy": "use strategy='ddp' on GPUs or CPUs",
}


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


class EngineCallback(LightningCallback):
    """Creates, follows, saves and releases the ``AndersonAccelerator`` of a fit."""

    def __init__(self) -> None:
        self._engine: AndersonAccelerator | None = None
        self._optimizers: list[Any] = []
        self._saved: dict[str, Any] = {}  # of a checkpoint, or of the fit that ended
        self._from_checkpoint = False
        self._paused = ""  # why there is no engine in mid-run

    def make_engine(self, trainer: Any, pl_module: Any) -> AndersonAccelerator | None:
        """The engine of the Trainer's optimizers; ``None`` where another callback has it.

        Raises:
            TypeError, ValueError: the optimizers cannot be accelerated.
        """
        raise NotImplementedError

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what cannot work before anything is trained."""
        if stage == "fit":
            self._release()  # where an exception ended the fit before
            if not self._from_checkpoint:
                self._saved = {}
            check_supported(trainer, type(self).__name__)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Take up the optimizers, and the state of a checkpoint."""
        check_supported(trainer, type(self).__name__)
        self._create(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Follow optimizers that were replaced; pause where the new ones cannot be accelerated."""
        if trainer.optimizers == self._optimizers:
            return
        self._release()
        try:
            self._create(trainer, pl_module)
        except (TypeError, ValueError) as error:  # the fit goes on without
            if str(error) != self._paused:
                rank_zero_warn(
                    f"{type(self).__name__} pauses until the optimizer is changed again: {error}"
                )
            self._paused = str(error)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """What a checkpoint held is of no use to another fit, also where nothing was trained."""
        self._from_checkpoint = False

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let go of the optimizers, keeping the state for a checkpoint."""
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """Everything a bitwise continuation needs, of all ranks; the first one's is complete.

        Collective during a fit where the history is sharded, as Lightning's saving of a checkpoint
        is. After a fit each rank has its shard, and none of them is saved.
        """
        if self._engine is not None:
            return self._engine.full_state_dict()
        complete = self._saved.get("shard") in (None, checkpoint.FULL, [0, 1])
        return self._saved if complete else self._saved | checkpoint.EMPTY

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state, on the CPU, until the optimizers exist."""
        self._saved = state_dict
        self._from_checkpoint = True

    def _create(self, trainer: Any, pl_module: Any) -> None:
        self._optimizers = list(trainer.optimizers)
        self._engine = self.make_engine(trainer, pl_module)
        if self._engine is not None and self._saved:
            self._engine.load_state_dict(self._saved)
            self._saved = {}
        self._from_checkpoint = False

    def _release(self) -> None:
        if self._engine is None:
            return
        # not gathered: an exception may have stopped this rank alone
        self._saved = self._engine.state_dict()
        self._from_checkpoint = False
        self._engine.detach()
        self._engine = None


def check_supported(trainer: Any, callback: str) -> None:
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
    if any(isinstance(one, LBFGS) for one in trainer.strategy.optimizers):
        raise ValueError(
            f"optimizer=LBFGS is not supported by {callback}: it iterates inside its step and "
            "extrapolates on its own; use SGD or Adam, or remove the callback"
        )


def log_to_loggers(trainer: Any, values: dict[str, float]) -> None:
    """Write to every logger at once, at the step at which Lightning logs this batch.

    ``LightningModule.log`` would keep only the values of every ``log_every_n_steps``-th batch,
    and with them lose most extrapolations.
    """
    step = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step)
    for logger in trainer.loggers:
        logger.log_metrics(values, step=step)


def log_to_progress_bar(trainer: Any, pl_module: Any, name: str, value: float) -> None:
    """Show a value in the progress bar, and nowhere else."""
    if trainer.progress_bar_callback is not None:  # takes longer than a step of a small model
        kinds = type(pl_module).__mro__
        # its own log may be something else
        kind: Any = next(one for one in kinds if one.__name__ == "LightningModule")
        kind.log(pl_module, name, value, prog_bar=True, logger=False, on_step=True, on_epoch=False)
