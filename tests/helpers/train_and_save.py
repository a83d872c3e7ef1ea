"""``stableaa-train``, whose processes write their final weights to the working directory.

With DIE_AT=RANK:STEP in the environment, the machine of one rank dies in the middle of the update
after that step: while the candidate is in place.
"""

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import lightning
import torch
from torch.nn.utils import parameters_to_vector

from lightning_stableaa import AndersonCallback
from lightning_stableaa.recipes import train


def call_in_update(module: Any, step: Callable[[], int], act: Callable[[int], None]) -> None:
    """Calls ``act`` where the loss of a candidate is evaluated, with the number of steps made.

    Args:
        module: has an ``anderson_loss``, which its training step does not call.
        step: that of the batch; during an evaluation, as when it was trained on.
        act: called for each candidate.
    """
    loss_of = module.anderson_loss
    memory: Any = threading.local()  # what other objects remember of an evaluation is undone
    memory.trained = {}  # weights at the first evaluation after a step

    def watched(batch: Any) -> torch.Tensor:
        weights = parameters_to_vector(module.parameters()).detach().clone()
        if not torch.equal(memory.trained.setdefault(step(), weights), weights):
            act(step() + 1)
        return loss_of(batch)

    module.anderson_loss = watched


class Trainer(lightning.Trainer):
    """Saves what a test compares."""

    callbacks: list[lightning.Callback]

    def fit(self, model: Any, *rest: Any, **options: Any) -> None:
        """Trains, unless this rank has to die."""
        rank, _, step = os.environ.get("DIE_AT", "").partition(":")
        if rank == str(self.global_rank):
            call_in_update(model, lambda: self.global_step, lambda now: die(now == int(step)))
        super().fit(model, *rest, **options)
        (anderson,) = (c for c in self.callbacks if isinstance(c, AndersonCallback))
        result = {
            "rank": self.global_rank,
            "world": self.world_size,
            "weights": parameters_to_vector(model.parameters()).detach(),
            "attempted": anderson.state_dict()["counters"]["attempted"],
        }
        torch.save(result, f"rank{self.global_rank}.pt")


def die(now: bool) -> None:
    """As a machine does."""
    if now:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a process may ask for from there
        os.kill(os.getppid(), signal.SIGKILL)  # torchrun, which would stop the others
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    train.main()
