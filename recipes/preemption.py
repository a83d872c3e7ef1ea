"""Jobs whose machines are taken away: the last checkpoint they write."""

import os
import signal
from collections.abc import Callable
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Checkpoint

# How notice is given: by SLURM to Lightning, by SLURM to submitit, by everybody else. In this order
# where several came, since only the first two put the job back into the queue.
NOTICES = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)


class Preemption(Checkpoint):
    """Saves a checkpoint between two steps when the job is given notice to end.

    Lightning and submitit act on a signal at once, wherever each rank happens to be: in the middle
    of an optimizer step, of an extrapolation, or of a collective that another rank then waits for.
    Here a signal is recorded; after the step, when all ranks have agreed that one of them has been
    given notice, the checkpoint is saved and the signal handed to those for whom it was meant.

    Args:
        path: where the checkpoint is saved. Lightning's handler, on SLURM, saves its own.
    """

    def __init__(self, path: str) -> None:
        # a Checkpoint runs after all other callbacks, so it saves what they have made of the step
        self.path = path
        self.received: set[int] = set()
        self.handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Takes the place of the handlers that Lightning and submitit have installed by now."""
        self.received.clear()
        self.handlers = {number: signal.getsignal(number) for number in NOTICES}
        for number in NOTICES:
            signal.signal(number, lambda number, _: self.received.add(number))

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Acts on notices, on all ranks after the same step."""
        notices = torch.tensor(
            [number in self.received for number in NOTICES],
            dtype=torch.int32,
            device=trainer.strategy.root_device,
        )
        notices = trainer.strategy.reduce(notices, reduce_op="max")
        for number, received in zip(NOTICES, notices.tolist(), strict=True):
            if received:
                self.received.discard(number)
                self._act(trainer, number)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: Any, exception: BaseException
    ) -> None:
        """Gives the handlers back; after a run that ended well, Lightning does so."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _act(self, trainer: lightning.Trainer, number: int) -> None:
        handler = self.handlers[number]
        requeues = number == signal.SIGUSR1 and _is_lightnings(handler)
        if not requeues:
            trainer.save_checkpoint(self.path, weights_only=False)
        # SLURM sends SIGTERM to a job that it will start again, and expects no other answer
        if callable(handler) and not (number == signal.SIGTERM and "SLURM_JOB_ID" in os.environ):
            handler(number, None)


def _is_lightnings(handler: Callable[..., Any] | int | None) -> bool:
    return type(handler).__module__.startswith(("lightning.", "pytorch_lightning."))
