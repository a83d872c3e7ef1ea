"""Data loaders that replay exactly after a resume."""

from typing import Any

from lightning import Trainer
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader


def training_loader(
    dataset: Dataset, *, batch_size: int, seed: int, trainer: Trainer, **options: Any
) -> StatefulDataLoader:
    """Shuffled loader whose order depends on ``seed`` and the epoch alone.

    Lightning tells a ``DistributedSampler`` the epoch, so nothing random has to be saved, and
    leaves it alone under DDP; on one device it is a plain shuffle.
    """
    sampler = DistributedSampler(
        dataset, num_replicas=trainer.world_size, rank=trainer.global_rank, seed=seed
    )
    return StatefulDataLoader(dataset, batch_size=batch_size, sampler=sampler, **options)
