"""``stableaa-train``, whose processes write their final weights to the working directory.

With DIE_AT=RANK:STEP in the environment, the machine of one rank dies in the middle of the update
after that step: when the loss of the candidate is asked for.
"""

import os
import signal
from pathlib import Path
from typing import Any

import lightning
import torch

from lightning_stableaa import AndersonCallback
from lightning_stableaa.recipes import train

FOLDER = Path.cwd()


class Trainer(lightning.Trainer):
    callbacks: list[lightning.Callback]

    def fit(self, model: Any, *rest: Any, **options: Any) -> None:
        rank, _, step = os.environ.get("DIE_AT", "").partition(":")
        if rank == str(self.global_rank):
            model.anderson_loss = self.dying(model.anderson_loss, int(step))
        super().fit(model, *rest, **options)
        (anderson,) = (c for c in self.callbacks if isinstance(c, AndersonCallback))
        told = {
            "rank": self.global_rank,
            "world": self.world_size,
            "weights": torch.cat([p.detach().flatten() for p in model.parameters()]),
            "attempted": anderson.state_dict()["counters"]["attempted"],
        }
        torch.save(told, FOLDER / f"rank{self.global_rank}.pt")

    def dying(self, judge: Any, step: int) -> Any:
        calls = 0

        def judge_or_die(batch: Any) -> torch.Tensor:
            nonlocal calls
            calls += self.global_step == step
            if calls == 2:  # the loss before was the first
                os.kill(os.getppid(), signal.SIGKILL)  # torchrun, which would tell the others
                os.kill(os.getpid(), signal.SIGKILL)
            return judge(batch)

        return judge_or_die


if __name__ == "__main__":
    train.main()
