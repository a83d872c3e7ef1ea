"""Candidates that are not taken leave no trace: not in one bit, not in a whole run."""

import random
from typing import Any

import lightning.pytorch
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torchmetrics import CatMetric, MeanMetric, MeanSquaredError, MetricCollection, SumMetric
from torchmetrics.wrappers import Running

from lightning_stableaa import SmoothingMonitor
from tests.callbacks.regression import (
    INPUTS,
    QUIET,
    Regression,
    anderson,
    batches,
    counters,
    fit,
    network,
    weights,
)


def random_bits() -> tuple[Any, ...]:
    """The state of every random number generator, as things that compare equal or not."""
    numpy_state: Any = np.random.get_state(legacy=False)
    return torch.get_rng_state().tolist(), random.getstate(), numpy_state["state"]["key"].tolist()


class Busy(Regression):
    """A training step with every side effect that a candidate's evaluation could repeat."""

    def __init__(self, *, make_optimizer: Any = None) -> None:
        net = network(
            nn.Linear(INPUTS, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 1)
        )
        super().__init__(net, make_optimizer or (lambda p: torch.optim.Adam(p, lr=0.01)))
        self.error = MeanSquaredError()
        self.recent = Running(SumMetric(), window=3)
        self.losses = CatMetric()
        self.together = MetricCollection({"mean": MeanMetric(), "again": MeanMetric()})
        self.register_buffer("average", torch.zeros(()))
        self.trace: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        x, y = batch
        x = x + 0.01 * random.random() + 0.01 * float(np.random.rand())
        prediction = self.network(x)
        loss = mse_loss(prediction, y)
        self.average = 0.9 * self.average + 0.1 * loss.detach()  # replaced, not written to
        self.error(prediction, y)
        self.recent(loss.detach())
        self.losses.update(loss.detach())
        self.together(loss.detach())
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("train/error", self.error, on_step=True, on_epoch=True)
        self.log_dict({"train/recent": self.recent.compute()}, on_epoch=True)
        return {"loss": loss, "prediction": prediction.detach()}


class TraceAll(lightning.pytorch.Callback):
    """Everything that must be equal after every batch, gradients included."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.epochs: list[Any] = []

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append(
            {
                "weights and buffers": weights(pl_module).tolist(),
                "gradients": [p.grad.tolist() for p in pl_module.parameters()],
                "random": random_bits(),
                "metrics": [
                    pl_module.error.compute().item(),
                    pl_module.recent.compute().item(),
                    pl_module.losses.compute().tolist(),
                    {k: v.item() for k, v in pl_module.together.compute().items()},
                ],
                "optimizer": [
                    {k: torch.as_tensor(v).tolist() for k, v in state.items()}
                    for state in trainer.optimizers[0].state.values()
                ],
                "modes": [one.training for one in pl_module.modules()],
            }
        )

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.epochs.append(logged(trainer))


def logged(trainer: Any) -> dict[str, float]:
    """What the module logged, without what the callbacks show in the progress bar."""
    metrics = {**trainer.callback_metrics, **trainer.logged_metrics}
    return {k: v.item() for k, v in metrics.items() if k not in ("anderson_accepted", "rsd")}


def traced(module: Any, *callbacks: Any) -> TraceAll:
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    trace = TraceAll()
    fit(module, batches(8), *callbacks, trace, max_epochs=3, log_every_n_steps=1)
    return trace


class LosesToItself(Busy):
    """Judged by the distance from the optimizer's own weights: no candidate can be nearer."""

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.distances = 0

    def anderson_loss(self, batch: Any) -> Tensor:
        self.training_step(batch, 0)  # with all its side effects
        self.distances += 1
        return torch.tensor(0.0 if self.distances == 1 else 1.0)


class NaNJudge(Busy):
    def anderson_loss(self, batch: Any) -> Tensor:
        self.training_step(batch, 0)
        return torch.tensor(float("nan"))


REJECTING: dict[str, Any] = {"store_every_n_steps": 1, "accelerate_every_n_steps": 2}


@pytest.mark.parametrize("judge", [LosesToItself, NaNJudge])
def test_rejected_candidates_leave_a_run_bitwise_alone(judge: Any) -> None:
    callback = anderson(**REJECTING)
    plain = traced(Busy())
    rejecting = traced(judge(), callback)

    assert counters(callback)["attempted"] == 12
    assert counters(callback)["accepted"] == 0
    for step, (one, other) in enumerate(zip(plain.batches, rejecting.batches, strict=True)):
        for what, value in one.items():
            assert repr(value) == repr(other[what]), f"{what} after batch {step}"
    assert rejecting.epochs == plain.epochs


def test_training_step_as_judge_leaves_everything_but_the_weights() -> None:
    """Learning rates of zero: weights stay, but batch norm, metrics and randomness go on."""
    still = lambda p: torch.optim.SGD(p, lr=0.0)  # noqa: E731
    callback = anderson(**REJECTING)
    plain = traced(Busy(make_optimizer=still))
    judged = traced(Busy(make_optimizer=still), callback)

    assert counters(callback)["attempted"] == 12
    assert callback.state_dict()["outcomes"] == {"rejected_stagnation": 12}
    assert repr(judged.batches) == repr(plain.batches)
    assert judged.epochs == plain.epochs


def test_accepted_candidates_change_the_weights_alone() -> None:
    """In the batch of the first acceptance, all but the weights is as without the callback."""
    callback = anderson()
    plain, accelerated = traced(Busy()), traced(Busy(), callback)
    accepted = next(
        step
        for step, (one, other) in enumerate(zip(plain.batches, accelerated.batches, strict=True))
        if one["weights and buffers"] != other["weights and buffers"]
    )

    assert (accepted + 1) % 4 == 0
    before, after = plain.batches[accepted], accelerated.batches[accepted]
    for what in ("gradients", "random", "metrics", "optimizer", "modes"):
        assert repr(before[what]) == repr(after[what]), what
    trained = sum(p.numel() for p in Busy().network.parameters())
    names = dict(Busy().state_dict())
    changed = {
        name
        for (name, value), one, other in zip(
            names.items(),
            torch.tensor(before["weights and buffers"]).split([v.numel() for v in names.values()]),
            torch.tensor(after["weights and buffers"]).split([v.numel() for v in names.values()]),
            strict=True,
        )
        if not torch.equal(one, other)
    }
    assert changed == {name for name, _ in Busy().named_parameters()}
    assert trained > 0


@pytest.mark.parametrize(
    "callbacks",
    [
        [anderson(**REJECTING, warmup_steps=1000)],
        [anderson(**REJECTING, warmup_steps=1000), SmoothingMonitor(average_window=None)],
        [anderson(store_every_n_steps=100, accelerate_every_n_steps=100)],
        [SmoothingMonitor(average_window=4)],
    ],
    ids=["warmup", "warmup and smoothing", "long cycle", "monitor"],
)
def test_callbacks_that_never_fire_leave_a_run_bitwise_alone(callbacks: list[Any]) -> None:
    plain, watched = traced(Busy()), traced(Busy(), *callbacks)

    assert repr(watched.batches) == repr(plain.batches)
    assert watched.epochs == plain.epochs


def test_an_error_of_the_judge_leaves_weights_and_buffers() -> None:
    class Raises(Busy):
        calls = 0

        def anderson_loss(self, batch: Any) -> Tensor:
            self.calls += 1
            if self.calls == 3:
                raise RuntimeError("the judge broke")
            return self.training_step(batch, 0)["loss"]

    module, plain = Raises(), Busy()
    reference = traced(plain)
    with pytest.raises(RuntimeError, match=r"^the judge broke$"):
        traced(module, anderson(**REJECTING))

    assert weights(module).tolist() == reference.batches[1]["weights and buffers"]
    assert "log" not in vars(module)


def test_the_judge_sees_lightning_s_arguments_by_position() -> None:
    class Renamed(Regression):
        def training_step(self, batch: Any, number: int) -> Tensor:
            self.last = number
            return super().training_step(batch, number)

    class Anything(Regression):
        def training_step(self, *args: Any) -> Tensor:
            batch, number = args
            self.last = number
            return super().training_step(batch, number)

    class BatchOnly(Regression):
        def training_step(self, batch: Any) -> Tensor:
            return super().training_step(batch, 0)

    for kind in (Renamed, Anything, BatchOnly):
        callback = anderson(**REJECTING)
        module = kind()
        fit(module, batches(4), callback, max_epochs=1)
        assert counters(callback)["attempted"] == 2
        assert getattr(module, "last", 3) == 3


def test_a_judge_may_differentiate_the_network() -> None:
    """As the loss of a physics-informed network does; under ``no_grad`` this would raise."""

    class Informed(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x = batch[0].requires_grad_()
            u = self.network(x)
            (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
            return ((slope[:, :1] - u) ** 2).mean() + ((u - batch[1]) ** 2).mean()

    callback = anderson(**REJECTING)
    fit(Informed(), batches(1), callback, max_epochs=6)
    assert counters(callback)["attempted"] == 3


def test_results_of_an_earlier_test_are_no_obstacle() -> None:
    """``Trainer.test`` works in inference mode: no other code may write to what it left."""

    class Tested(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.error = MeanSquaredError()

        def test_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            self.error.update(self.network(x), y)

        def on_test_epoch_end(self) -> None:
            self.left = self.error.compute()

    callback, module = anderson(), Tested()
    trainer = lightning.pytorch.Trainer(**QUIET, callbacks=[callback], max_epochs=8)
    trainer.test(module, batches(2), verbose=False)
    assert module.left.is_inference()
    trainer.fit(module, batches(1))

    assert counters(callback)["attempted"] == 2
    assert module.error.compute() is module.left
