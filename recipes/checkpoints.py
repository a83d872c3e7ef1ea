"""The checkpoint from which a run goes on."""

from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Checkpoint


class LastCheckpoint(Checkpoint):
    """Keeps one checkpoint, of the newest weights: after every validation and at the last step.

    Without validation it is saved at the end of every epoch. It is saved after a batch, never at
    the end of the training epoch: a loader that goes on from there would begin with the order of
    the epoch before.

    Args:
        path: of the file, which is overwritten; a folder where weights are split.
    """

    def __init__(self, path: str) -> None:
        # a Checkpoint runs after all other callbacks, so it saves what they have made of the step
        self.path = Path(path)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves after the last step, and after an epoch without any validation."""
        is_last_step = trainer.global_step == trainer.max_steps
        ends_epoch = trainer.is_last_batch and not trainer.enable_validation
        if (is_last_step or ends_epoch) and not _validation_follows(trainer):
            trainer.save_checkpoint(self.path, weights_only=False)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Saves what was validated, within a fit."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            trainer.save_checkpoint(self.path, weights_only=False)


def _validation_follows(trainer: lightning.Trainer) -> bool:
    """Whether this step is followed by one; Lightning has no public name for it."""
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None  # in a fit
    return trainer.enable_validation and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
