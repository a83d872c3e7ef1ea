"""Candidates may be judged on a part of the batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_stableaa.callbacks.judge import BatchLoss, Experience, samples_that_judge
from tests.callbacks.regression import Regression, anderson, batches, counters, fit


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
    assert callback.extra_losses == counts["loss_evaluations"] * 3 / 8


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
    assert callback.extra_losses == counts["loss_evaluations"]


class Classified(Judged):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, classes = batch
        return super().training_step((x, classes[:, None].float()), batch_idx)


def test_auto_takes_few_samples_of_classes_and_all_of_anything_else() -> None:
    x, y = torch.randn(128, 4), torch.randint(2, (128,))
    module, callback = Classified(), anderson()
    module.judged_on = []
    fit(module, DataLoader(TensorDataset(x, y), batch_size=32), callback, max_epochs=2)
    counts = counters(callback)
    few = module.judged_on.count(16)
    whole = module.judged_on.count(32) - counts["optimizer_steps"]
    assert few == 2 * (1 + 5)
    assert few + whole == counts["loss_evaluations"]
    assert callback.extra_losses == few / 2 + whole

    module, callback = Judged(), anderson()
    module.judged_on = []
    fit(module, batches(4), callback, max_epochs=2)
    assert set(module.judged_on) == {8}
    assert callback.extra_losses == counters(callback)["loss_evaluations"] > 0


class Ranks(NamedTuple):
    world_size: int


@pytest.mark.parametrize(("ranks", "samples"), [(1, 16), (2, 8), (3, 6), (4, 4), (1536, 4)])
def test_auto_divides_the_samples_over_the_processes(ranks: int, samples: int) -> None:
    images, classes = torch.zeros(32, 3, dtype=torch.uint8), torch.zeros(32, dtype=torch.int64)
    of = {"classes": (images, classes), "tokens": {"input": classes, "labels": classes}}
    for batch in of.values():
        assert samples_that_judge("auto", Ranks(ranks), Judged(), batch) == samples
    for batch in ((images, images.float()), (classes, images.float()), "no tensor"):
        assert samples_that_judge("auto", Ranks(ranks), Judged(), batch) is None


def test_auto_leaves_a_loss_of_the_module_alone() -> None:
    class OwnLoss(Judged):
        def anderson_loss(self, batch: Any) -> Tensor:
            return batch[0].sum()

    batch = torch.zeros(32, 3), torch.zeros(32, dtype=torch.int64)
    assert samples_that_judge("auto", Ranks(1), OwnLoss(), batch) is None
    assert samples_that_judge(5, Ranks(1), OwnLoss(), batch) == 5


def test_a_whole_batch_that_judged_need_not_confirm_itself() -> None:
    few, many = ((torch.zeros(n, 4), torch.zeros(n, dtype=torch.int64)) for n in (4, 32))
    trainer = SimpleNamespace(world_size=4, train_dataloader=None, is_global_zero=True)
    for batch, confirms in ((few, False), (many, True)):
        with BatchLoss(trainer, Judged(), batch, 0, samples="auto") as loss:
            assert (loss.confirming() is not None) is confirms


def test_other_processes_wait_in_a_forward_pass_with_sync_batch_norm() -> None:
    batch = torch.zeros(4, 4), torch.zeros(4, 1)
    alone, several = (SimpleNamespace(world_size=n) for n in (1, 2))
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(4)))
    for module, trainer, expected in (
        (synchronised, several, True),
        (synchronised, alone, False),
        (Judged(), several, False),
    ):
        assert BatchLoss(trainer, module, batch, 0).communicates is expected


def test_where_memory_runs_out_before_a_loss_the_next_one_leaves_no_trace() -> None:
    class Counts(Judged):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.count += 1
            return super().training_step(batch, batch_idx)

    class Tight(torch.Tensor):
        """Whose first copy does not fit into memory."""

        tried = 0

        def clone(self, **options: Any) -> Tensor:
            Tight.tried += 1
            if Tight.tried == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return super().clone(**options)

    module, callback = Counts(), anderson()
    module.judged_on = []
    module.count = torch.zeros(()).as_subclass(Tight)
    fit(module, batches(4), callback, max_epochs=2)
    counts = counters(callback)
    assert Tight.tried > 1
    assert counts["loss_evaluations"] > 0
    assert module.count == counts["optimizer_steps"] == 8


class Divided(Classified):
    """The first samples gain where the candidate is, and the whole batch may lose."""

    sign: float

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        judging = not torch.equal(self.network[0].weight, self.trained)
        if len(batch[0]) == 16 or not judging:
            return loss - 10.0 * judging
        return loss + self.sign * 10.0

    def on_train_batch_start(self, *_: Any) -> None:
        self.trained = self.network[0].weight.detach().clone()

    def optimizer_step(self, *arguments: Any, **named: Any) -> None:
        super().optimizer_step(*arguments, **named)
        self.trained = self.network[0].weight.detach().clone()


@pytest.mark.parametrize(("sign", "accepted"), [(-1.0, 2), (1.0, 0)])
def test_auto_asks_the_whole_batch_before_a_candidate_enters_training(
    sign: float, accepted: int
) -> None:
    x, y = torch.randn(128, 4), torch.randint(2, (128,))
    module, callback = Divided(), anderson(regularization=1.0)
    module.judged_on, module.sign = [], sign
    fit(module, DataLoader(TensorDataset(x, y), batch_size=32), callback, max_epochs=2)
    counts = counters(callback)
    assert (counts["attempted"], counts["accepted"]) == (2, accepted)
    assert module.judged_on.count(16) == 2 * 2
    assert module.judged_on.count(32) == counts["optimizer_steps"] + 2 * 2
    assert counts["loss_evaluations"] == 8
    assert callback.extra_losses == 2 * 2 * 0.5 + 2 * 2


def of_a_sample(loader: Any, *, samples: Any = "auto", **options: Any) -> bool:
    """What the engine is told of the loss, from the second extrapolation on."""
    told: list[bool] = []
    earlier = Experience()

    class Asks(Callback):
        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            judge = BatchLoss(
                trainer, pl_module, batch, batch_idx, samples=samples, earlier=earlier
            )
            with judge as loss:
                loss()
                told.append(bool(loss.of_sample))

    fit(Regression(), loader, Asks(), max_epochs=3, **options)
    first, *later = told
    assert first, "of which nothing is known"
    assert len(set(later)) == 1
    return later[0]


def test_the_loss_of_a_mini_batch_is_known_for_that_of_a_sample() -> None:
    ready_made = [tuple(batch) for batch in batches(4)]
    same = [ready_made[0]] * 4
    assert of_a_sample(batches(4))
    assert not of_a_sample(batches(1))
    assert of_a_sample(batches(1), samples=3)
    assert not of_a_sample(batches(4), limit_train_batches=1)
    assert of_a_sample(DataLoader(ready_made, batch_size=None))  # pyright: ignore[reportArgumentType]  # a list is a dataset
    assert not of_a_sample(DataLoader(same, batch_size=None))  # pyright: ignore[reportArgumentType]  # a list is a dataset


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("in_a_dict", [False, True])
def test_the_loss_of_training_is_that_of_the_step_and_nobody_is_asked(
    accumulated: int, *, in_a_dict: bool
) -> None:
    told: list[tuple[Tensor | None, Tensor]] = []

    class Returns(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.returned = super().training_step(batch, batch_idx)
            return {"loss": self.returned, "other": 1.0} if in_a_dict else self.returned

    class Asks(Callback):
        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            judge = BatchLoss(trainer, pl_module, batch, batch_idx, outputs=outputs)
            told.append((judge.training_loss, pl_module.returned))
            assert judge.judged == 0

    fit(Returns(), batches(4), Asks(), max_epochs=1, accumulate_grad_batches=accumulated)
    assert len(told) == 4
    for known, returned in told:
        assert known is not None
        assert not known.requires_grad
        assert torch.equal(known, returned)


@pytest.mark.parametrize("outputs", [None, {}, {"loss": None}, {"loss": torch.zeros(2)}])
def test_manual_optimization_need_not_tell_the_loss_of_training(outputs: Any) -> None:
    assert BatchLoss(None, Regression(), None, 0, outputs=outputs).training_loss is None


def test_memory_that_runs_out_over_a_batch_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(self: Any, samples: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(BatchLoss, "_take_part", no_memory)
    judge = BatchLoss(None, Regression(), next(iter(batches(1))), 0, samples=3)
    assert judge.of_sample is True


class CountsRows(Classified):
    """Its training step works on whole batches only."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + 0.0 * batch[0][31].sum()


@pytest.mark.parametrize("samples", ["auto", 16])
def test_a_module_that_cannot_work_on_a_part_is_judged_on_whole_batches(
    samples: Any, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(128, 4), torch.randint(2, (128,))
    module, callback = CountsRows(), anderson(judge_samples=samples)
    module.judged_on = []
    loader = DataLoader(TensorDataset(x, y), batch_size=32)
    fit(module, loader, callback, max_epochs=4)
    counts, state = counters(callback), callback.state_dict()
    assert counts["attempted"] == 4
    assert state["outcomes"]["rejected_non_finite_loss"] == 1
    assert module.judged_on.count(32) > counts["optimizer_steps"]
    assert module.judged_on.count(16) == 1
    (record,) = [one for one in caplog.records if "whole batches judge" in one.message]
    assert "first 16 samples" in record.message
    assert "index 31 is out of bounds" in record.message

    resumed, module = anderson(judge_samples=samples), CountsRows()
    module.judged_on = []
    resumed.load_state_dict(state)
    fit(module, loader, resumed, max_epochs=1)
    assert 16 not in module.judged_on


@pytest.mark.parametrize("wrong", [0, -1, 2.5, "all"])
def test_a_wrong_number_is_refused(wrong: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="judge_samples must be"):
        anderson(judge_samples=wrong)
