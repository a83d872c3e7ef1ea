"""``stableaa-train``, whose processes write their final weights to the working directory."""

from pathlib import Path
from typing import Any

import lightning
import torch

from lightning_stableaa import AndersonCallback
from lightning_stableaa.recipes import train

FOLDER = Path.cwd()


class Trainer(lightning.Trainer):
    def fit(self, model: Any, *rest: Any, **options: Any) -> None:
        super().fit(model, *rest, **options)
        (anderson,) = (c for c in self.callbacks if isinstance(c, AndersonCallback))
        told = {
            "rank": self.global_rank,
            "world": self.world_size,
            "weights": torch.cat([p.detach().flatten() for p in model.parameters()]),
            "attempted": anderson.state_dict()["counters"]["attempted"],
        }
        torch.save(told, FOLDER / f"rank{self.global_rank}.pt")


if __name__ == "__main__":
    train.main()
