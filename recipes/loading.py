"""Data loaders that replay exactly after a resume."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from lightning import Trainer
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader


def training_loader(
    dataset: Dataset, *, batch_size: int, seed: int, trainer: Trainer, **options: Any
) -> StatefulDataLoader:
    """Shuffled loader whose order depends on ``seed`` and the epoch alone.

    Under DDP every rank gets its share; ``options`` are those of ``StatefulDataLoader``.
    """
    sampler = EpochSampler(
        dataset, num_replicas=trainer.world_size, rank=trainer.global_rank, seed=seed
    )
    return StatefulDataLoader(dataset, batch_size=batch_size, sampler=sampler, **options)


class EpochSampler(DistributedSampler):
    """A ``DistributedSampler``, whose epoch Lightning sets, with resumable order."""

    def __iter__(self) -> Iterator[int]:
        return _EpochOrder(self)

    def order(self) -> Iterator[int]:
        """This rank's indices in the current epoch."""
        return super().__iter__()


class _EpochOrder(Iterator[int]):
    """Indices of one epoch; ``StatefulDataLoader`` saves and restores the position.

    The epoch is part of the position: Lightning sets the sampler's only after the restoration.
    """

    def __init__(self, sampler: EpochSampler) -> None:
        self.sampler = sampler
        self.load_state_dict({"epoch": sampler.epoch, "yielded": 0})

    def __next__(self) -> int:
        index = next(self.rest)
        self.yielded += 1
        return index

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "yielded": self.yielded}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.epoch, self.yielded = state_dict["epoch"], state_dict["yielded"]
        self.sampler.set_epoch(self.epoch)
        self.rest = islice(self.sampler.order(), self.yielded, None)
