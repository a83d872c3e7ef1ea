"""What is in a batch, and whether its first samples can be taken."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from lightning_stableaa.callbacks.samples import (
    ends_in_classes,
    first_samples,
    samples_in,
    tensors_in,
)

X, CLASSES = torch.arange(12).reshape(6, 2), torch.arange(6)


class Pair(NamedTuple):
    points: Tensor
    values: Tensor
    step: int


@dataclasses.dataclass(frozen=True)
class Moves:
    x: Tensor

    def to(self, device: Any) -> Moves:
        return Moves(self.x.to(device))


@dataclasses.dataclass
class Plain:
    x: Tensor
    y: Tensor


def test_the_first_samples_of_any_container() -> None:
    scale = torch.tensor(2.0)
    found = first_samples({"x": X, "rest": [CLASSES, scale, "name"]}, 4)
    assert torch.equal(found["x"], X[:4])
    assert torch.equal(found["rest"][0], CLASSES[:4])
    assert found["rest"][1:] == [scale, "name"]
    assert first_samples(Pair(X, CLASSES, 3), 2).points.shape == (2, 2)
    assert first_samples(Plain(X, CLASSES), 2).y.shape == (2,)
    assert len(first_samples(CLASSES, 100)) == 6


@pytest.mark.parametrize(
    "batch", [Pair(X, CLASSES, 3), {"x": X, "name": "six"}, [X, None, torch.tensor(1.0)], X]
)
def test_one_entry_a_sample_is_divisible(batch: Any) -> None:
    assert samples_in(batch) == 6


@pytest.mark.parametrize(
    "batch",
    [
        Pair(torch.zeros(6, 2), torch.zeros(4), 3),
        "no tensor",
        [],
        (list("abcdef"), CLASSES),
        {"images": [np.zeros((2, 2))] * 6, "y": CLASSES},
        (np.zeros((6, 2)), CLASSES),
        (X, torch.eye(6), CLASSES),
        (X, torch.eye(6).to_sparse(), CLASSES),
        (pack_sequence([torch.zeros(3), torch.zeros(2)]), torch.zeros(3)),
        pack_sequence([torch.zeros(3), torch.zeros(2)]),
        Moves(X),
        (Moves(X), CLASSES),
    ],
    ids=str,
)
def test_what_is_not_one_entry_a_sample_stays_whole(batch: Any) -> None:
    assert samples_in(batch) is None
    assert first_samples(batch, 2) is batch


def test_batches_are_walked_without_being_built_anew() -> None:
    class Refuses(tuple):
        built = 0

        def __new__(cls, *parts: Any) -> Any:
            cls.built += 1
            return super().__new__(cls, parts)

    batch = {"a": Refuses(X, [CLASSES]), "b": Moves(X), "c": Plain(X, CLASSES)}
    assert [id(one) for one in tensors_in(batch)] == [id(one) for one in (X, CLASSES, X, CLASSES)]
    assert Refuses.built == 1


def test_classes_come_last() -> None:
    assert ends_in_classes((X.float(), CLASSES))
    assert not ends_in_classes((CLASSES, X.float()))
    assert not ends_in_classes("no tensor")
