"""What a Trainer's loaders tell of the batches that are trained on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader


def trains_on_mini_batches(trainer: Any) -> bool:
    """Whether a DataLoader puts several batches an epoch together out of samples.

    One without automatic batching is not known to: its dataset may give all points of a PINN at
    every step.
    """
    collates = [one.batch_sampler is not None for one in _loaders(trainer.train_dataloader)]
    return any(collates) and trainer.num_training_batches > 1


def _loaders(given: Any) -> Iterator[DataLoader[Any]]:
    """The DataLoaders among them; a loader of another kind may be a sequence of batches."""
    if isinstance(given, DataLoader):
        yield given
    elif isinstance(given, dict | list | tuple):
        for one in given.values() if isinstance(given, dict) else given:
            yield from _loaders(one)
