"""Candidates that are not accepted change nothing: not one bit of a whole run."""

import collections
import random
import sys
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torchmetrics import CatMetric, MeanMetric, MeanSquaredError, MetricCollection, SumMetric
from torchmetrics.wrappers import Running

from lightning_stableaa import SmoothingMonitor
from tests.helpers.problems import assert_bitwise_equal
from tests.helpers.regression import (
    INPUTS,
    Callback,
    Record,
    Regression,
    Steered,
    Steering,
    anderson,
    batches,
    counters,
    fit,
    network,
    outcomes,
    random_state,
)


class Busy(Steered):
    """A training step with every side effect that an evaluation could repeat."""

    def __init__(self, **options: Any) -> None:
        net = network(
            nn.Linear(INPUTS, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 1)
        )
        adam = lambda p: torch.optim.Adam(p, lr=1e-3)  # noqa: E731
        super().__init__(net, adam, **options)
        self.error = MeanSquaredError()
        self.recent = Running(SumMetric(), window=3)
        self.losses = CatMetric()
        self.together = MetricCollection({"mean": MeanMetric(), "again": MeanMetric()})
        self.register_buffer("average", torch.zeros(()))

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
        if self.steering.at_candidate(self):
            loss = loss + self.steering.offset
        return {"loss": loss, "prediction": prediction.detach()}


class Trace(Callback):
    """Everything that has to be equal after every batch, gradients included."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Any]] = []
        self.epochs: list[dict[str, float]] = []

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        state = trainer.optimizers[0].state.values()
        self.batches.append(
            {
                "weights": [p.detach().clone() for p in pl_module.parameters()],
                "buffers": [b.clone() for b in pl_module.buffers()],
                "gradients": [p.grad.clone() for p in pl_module.parameters()],
                "random": random_state(),
                "metrics": [
                    pl_module.error.compute().item(),
                    pl_module.recent.compute().item(),
                    pl_module.losses.compute().tolist(),
                    {k: v.item() for k, v in pl_module.together.compute().items()},
                ],
                "optimizer": [{k: torch.as_tensor(v).clone() for k, v in s.items()} for s in state],
                "modes": [one.training for one in pl_module.modules()],
                "step": [trainer.global_step, trainer.should_stop],
            }
        )

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        metrics = {**trainer.callback_metrics, **trainer.logged_metrics}
        own = ("anderson_accepted", "rsd")
        self.epochs.append({k: v.item() for k, v in metrics.items() if k not in own})


def traced(module: Any, *callbacks: Any, **options: Any) -> Trace:
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    trace = Trace()
    options = {"max_epochs": 3, "log_every_n_steps": 1} | options
    fit(module, batches(8), *callbacks, trace, **options)
    return trace


@pytest.mark.parametrize(
    ("offset", "reason"),
    [(1e3, "rejected_loss_increase"), (float("nan"), "rejected_non_finite_loss")],
)
def test_rejection_of_every_candidate_leaves_run_bitwise(offset: float, reason: str) -> None:
    callback = anderson()
    plain = traced(Busy())
    rejected = traced(Busy(steering=Steering(offset)), callback)
    assert_bitwise_equal(rejected.batches, plain.batches)
    assert rejected.epochs == plain.epochs
    assert counters(callback)["attempted"] == 12
    assert counters(callback)["accepted"] == 0
    # dropout makes the objective stochastic, where some candidates are skipped
    assert set(outcomes(callback)) <= {reason, "skipped_noise_dominated"}
    assert outcomes(callback)[reason] >= 2


def test_acceptance_changes_trained_weights_alone() -> None:
    callback = anderson()
    accepted = Record(lambda *_: counters(callback)["accepted"])
    plain = traced(Busy())
    accelerated = traced(Busy(steering=Steering(-1e3)), callback, accepted)
    first = accepted.values.index(1)
    assert first == 1  # the second batch
    assert_bitwise_equal(accelerated.batches[:first], plain.batches[:first])
    before, after = plain.batches[first], accelerated.batches[first]
    pairs = zip(before.pop("weights"), after.pop("weights"), strict=True)
    assert not any(torch.equal(*pair) for pair in pairs)
    assert_bitwise_equal(after, before)


@pytest.mark.parametrize(
    "make_callbacks",
    [
        lambda: [anderson(warmup_steps=10**9)],
        lambda: [anderson(warmup_steps=10**9, safeguard="none"), SmoothingMonitor()],
        lambda: [anderson(store_every_n_steps=100, accelerate_every_n_steps=100)],
        lambda: [SmoothingMonitor(average_window=4)],
    ],
    ids=["warmup", "warmup and smoothing", "long cycle", "monitor alone"],
)
def test_callback_that_never_fires_is_plain_run(make_callbacks: Any) -> None:
    if len(callbacks := make_callbacks()) == 2:  # the monitor's window is one cycle
        callbacks[0] = anderson(
            warmup_steps=10**9, store_every_n_steps=4, accelerate_every_n_steps=8
        )
    plain, watched = traced(Busy()), traced(Busy(), *callbacks)
    assert_bitwise_equal(watched.batches, plain.batches)
    assert watched.epochs == plain.epochs


def test_error_that_leaves_the_fit_leaves_weights_and_hooks() -> None:
    class Interrupted(Busy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.steering.at_candidate(self):
                raise KeyboardInterrupt
            return super().training_step(batch, batch_idx)

    module = Interrupted()
    with pytest.raises(SystemExit):
        traced(module, anderson())
    plain = traced(Busy()).batches[1]
    assert_bitwise_equal([p.detach() for p in module.parameters()], plain["weights"])
    assert_bitwise_equal(list(module.buffers()), plain["buffers"])
    assert_bitwise_equal([p.grad for p in module.parameters()], plain["gradients"])
    assert "training_step" not in vars(module.trainer.strategy)


def test_backward_pass_within_training_step_leaves_gradients() -> None:
    """As in adversarial training: the inputs' gradient by a backward pass through the network."""

    class Adversarial(Steered):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            x.requires_grad_()
            mse_loss(self.network(x), y).backward()
            self.seen.append(x.grad.clone())
            return super().training_step((x.detach() + 0.1 * x.grad, y), batch_idx)

    def gradients(*callbacks: Any) -> tuple[list[Any], list[Any]]:
        module = Adversarial()
        module.seen = []
        record = Record(lambda _, m: [p.grad.clone() for p in m.parameters()])
        fit(module, batches(6), *callbacks, record, max_epochs=1)
        return record.values, module.seen

    callback = anderson()
    assert_bitwise_equal(gradients(callback), gradients())
    assert counters(callback)["attempted"] == 3


def test_training_step_may_differentiate_the_network() -> None:
    """As the loss of a physics-informed network does; under ``no_grad`` this would raise."""

    class Informed(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x = batch[0].requires_grad_()
            u = self.network(x)
            (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
            return ((slope[:, :1] - u) ** 2).mean() + ((u - batch[1]) ** 2).mean()

    callback = anderson()
    fit(Informed(), batches(), callback, max_epochs=6)
    assert counters(callback) == {
        "optimizer_steps": 6,
        "attempted": 3,
        "accepted": counters(callback)["accepted"],
        "loss_evaluations": 3 + 3 + 2,
    }
    assert "rejected_error" not in outcomes(callback)


def test_step_without_attempt_enters_fewer_than_ten_functions() -> None:
    entered: list[list[str]] = []

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and "/lightning_stableaa/" in frame.f_code.co_filename:
            entered[-1].append(frame.f_code.co_name)

    class Profiles(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            entered.append([])
            sys.setprofile(profile)

    schedule = {"store_every_n_steps": 5, "accelerate_every_n_steps": 10, "stochastic": "auto"}
    try:
        fit(Regression(), batches(20), Profiles(), anderson(**schedule), max_epochs=1)
    finally:
        sys.setprofile(None)
    assert len(entered) == 20
    for step in (2, 3, 6, 7, 8, 11, 12, 16, 17, 18):  # neither a cycle's end nor the step before
        names = collections.Counter(entered[step - 1])
        assert len(names) < 10, names
        assert names.total() < 13, names
