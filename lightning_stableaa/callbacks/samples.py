"""Batches of any structure: what is in them, and their first samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_stableaa.weights import is_dense

# Leaves of which a batch has one, whatever its size.
_SINGLE = (type(None), bool, int, float, complex, str, bytes)


def leaves(batch: Any) -> Iterator[Any]:
    """What a batch holds, in its order, without building anything.

    Mappings, sequences and dataclasses are entered. What moves itself between devices (it has a
    method ``to``, such as a PackedSequence) is a leaf, whose inside is its own.
    """
    for part in _parts(batch):
        if part is batch:
            yield part
        else:
            yield from leaves(part)


def tensors_in(batch: Any) -> list[Tensor]:
    """The tensors of a batch, in its order."""
    return [one for one in leaves(batch) if isinstance(one, Tensor)]


def samples_in(batch: Any) -> int | None:
    """How many samples a batch holds, where its first ones can be taken; else None.

    They can where every tensor is dense and has one entry a sample, or is a number, and nothing
    else comes once for each sample: no list of as many texts, no matrix of samples by samples.
    """
    found = list(leaves(batch))
    tensors = [one for one in found if isinstance(one, Tensor)]
    sizes = {len(one) for one in tensors if one.ndim}
    if len(sizes) != 1 or not all(is_dense(one) for one in tensors):
        return None
    (size,) = sizes
    if any(one.shape == (size, size) for one in tensors):
        return None
    others = [one for one in found if not isinstance(one, Tensor)]
    if not all(isinstance(one, _SINGLE) for one in others) or _has_list_of(size, batch):
        return None
    return size


def first_samples(batch: Any, count: int) -> Any:
    """The first samples of a batch in which they can be told; any other as it is."""
    if samples_in(batch) is None:
        return batch
    return apply_to_collection(batch, Tensor, lambda one: one[:count] if one.ndim else one)


def own_copy(batch: Any, *, of_tensors: bool = False) -> Any:
    """The batch in dicts, lists and tuples of its own, from which a training step may take things.

    Args:
        batch: what is in other containers stays as it is.
        of_tensors: those are copied as well, for a training step that writes to them.
    """
    if type(batch) is dict:
        return {name: own_copy(one, of_tensors=of_tensors) for name, one in batch.items()}
    if type(batch) is list or type(batch) is tuple:
        return type(batch)(own_copy(one, of_tensors=of_tensors) for one in batch)
    if of_tensors and isinstance(batch, Tensor):
        return batch.detach().clone().requires_grad_(batch.requires_grad)
    return batch


def with_additions(kept: Any, batch: Any) -> Any:
    """``kept``, and what hooks have put into the dicts of ``batch`` since it was copied.

    Not what was computed from weights, which the training step left there.
    """
    if type(kept) is dict and type(batch) is dict:
        found = {name: with_additions(one, batch.get(name)) for name, one in kept.items()}
        added = {name: one for name, one in batch.items() if name not in kept}
        # before the others: the last tensor of a batch says whether it ends in classes
        return {name: one for name, one in added.items() if not _is_computed(one)} | found
    if type(kept) is type(batch) and type(kept) in (list, tuple) and len(kept) == len(batch):
        return type(kept)(with_additions(*pair) for pair in zip(kept, batch, strict=True))
    return kept


def versions_of(batch: Any) -> list[int]:
    """How often each tensor of a batch was written to, where that is known."""
    return [one._version for one in tensors_in(batch) if not one.is_inference()]


def ends_in_classes(batch: Any) -> bool:
    """Whether the last tensor is one of integers, as classes and tokens are."""
    tensors = tensors_in(batch)
    return len(tensors) > 0 and tensors[-1].dtype is torch.int64


def _is_computed(value: Any) -> bool:
    return any(one.requires_grad for one in tensors_in(value))


def _parts(batch: Any) -> Sequence[Any]:
    """What is inside, one level down; of a leaf itself."""
    if isinstance(batch, Tensor | str | bytes):
        return [batch]
    if isinstance(batch, Mapping):
        return list(batch.values())
    if hasattr(batch, "to"):
        return [batch]
    if isinstance(batch, Sequence):
        return batch
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return [getattr(batch, field.name) for field in dataclasses.fields(batch)]
    return [batch]


def _has_list_of(size: int, batch: Any) -> bool:
    """Whether there is a sequence of so many, not all of which are tensors."""
    parts = _parts(batch)
    if len(parts) == 1 and parts[0] is batch:
        return False
    is_list = isinstance(batch, Sequence) and len(batch) == size
    if is_list and any(isinstance(one, _SINGLE) for one in batch):
        return True
    return any(_has_list_of(size, part) for part in parts)
