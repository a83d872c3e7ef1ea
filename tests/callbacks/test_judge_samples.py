"""Candidates may be judged on a part of the batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_stableaa.callbacks.judge import first_samples, samples_in
from tests.callbacks.regression import Regression, anderson, batches, counters, fit


class Pair(NamedTuple):
    points: Tensor
    values: Tensor
    step: int


def test_the_first_samples_of_any_container() -> None:
    x, y, scale = torch.arange(12).reshape(6, 2), torch.arange(6), torch.tensor(2.0)
    found = first_samples({"x": x, "rest": [y, scale, "name"]}, 4)
    assert torch.equal(found["x"], x[:4])
    assert torch.equal(found["rest"][0], y[:4])
    assert found["rest"][1:] == [scale, "name"]
    assert samples_in(Pair(x, y, 3)) == 6
    assert first_samples(Pair(x, y, 3), 2).points.shape == (2, 2)
    assert len(first_samples(y, 100)) == 6


def test_batches_whose_tensors_differ_in_length_stay_whole() -> None:
    batch = Pair(torch.zeros(6, 2), torch.zeros(4), 3)
    assert samples_in(batch) is None
    assert first_samples(batch, 2) is batch
    assert samples_in("no tensor") is None


class Judged(Regression):
    judged_on: list[int]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.judged_on.append(len(batch[0]))
        return super().training_step(batch, batch_idx)


def test_candidates_are_judged_on_so_many_samples() -> None:
    module, callback = Judged(), anderson(judge_samples=3)
    module.judged_on = []
    fit(module, batches(4), callback, max_epochs=2)
    counts = counters(callback)
    assert counts["attempted"] == 2
    assert module.judged_on.count(3) == counts["loss_evaluations"] > 0
    assert module.judged_on.count(8) == counts["optimizer_steps"] == 8
    assert callback.judged_batches == counts["loss_evaluations"] * 3 / 8


def test_what_cannot_be_divided_is_judged_whole_with_a_warning() -> None:
    class Uneven(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch["all"], batch_idx)

    def collate(samples: list[Any]) -> dict[str, Any]:
        x, y = (torch.stack(column) for column in zip(*samples, strict=True))
        return {"all": (x, y), "others": torch.zeros(3)}

    loader = DataLoader(batches(4).dataset, batch_size=8, collate_fn=collate)
    callback = anderson(judge_samples=3)
    with pytest.warns(
        UserWarning, match=r"judge_samples=3: candidates are judged on whole batches"
    ):
        fit(Uneven(), loader, callback, max_epochs=2)
    counts = counters(callback)
    assert counts["attempted"] == 2
    assert callback.judged_batches == counts["loss_evaluations"]


@pytest.mark.parametrize("wrong", [0, -1, 2.5, "all"])
def test_a_wrong_number_is_refused(wrong: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="judge_samples must be"):
        anderson(judge_samples=wrong)
