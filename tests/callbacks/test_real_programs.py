"""Training steps as people write them: what is compared, and what cannot be compared."""

import collections
import dataclasses
import itertools
import multiprocessing
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader
from transformers import BatchEncoding

from tests.helpers.regression import (
    Callback,
    Record,
    Regression,
    Reports,
    Steered,
    Validated,
    anderson,
    assert_plain_run,
    batches,
    counters,
    fit,
    network,
    outcomes,
    rows,
    trained,
    weights,
)


def losses(module: Any, loader: Any = None) -> list[tuple[Any, ...]]:
    """(step, status, before, after) of the attempts in 8 epochs of one batch."""
    callback = anderson()
    reports = Reports(callback)
    fit(module, batches() if loader is None else loader, callback, reports, max_epochs=8)
    steps = enumerate(reports.all, start=1)
    return [(k, one.status, one.loss_before, one.loss_after) for k, one in steps if one.attempted]


# Losses that are compared: both sides are the function of the same state.


COUPLINGS: dict[str, Callable[[Any], Any]] = {
    "decaying buffer": lambda m: m.scale.clone(),
    "growing attribute": lambda m: 1.0 + m.calls,
    "quasi-random points": lambda m: m.sobol.draw(1).sum(),
    "generator of the module": lambda m: torch.rand((), generator=m.generator),
    "global generator": lambda _: torch.rand(()),
    "global_step": lambda m: 0.9**m.global_step,
    "trainer.global_step": lambda m: 1.0 / (1 + m.trainer.global_step),
    "metric of the trainer": lambda m: m.trainer.callback_metrics.get("calls", 0.0) + 1.0,
    "metric logged before": lambda m: (
        m.log("own", 1.0 + m.calls) or m.trainer.callback_metrics["own"]
    ),
}

DRAWN = ("generator of the module", "global generator")


class Coupled(Regression):
    """The loss is scaled by what the step changes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.coupling = COUPLINGS[kind]
        self.register_buffer("scale", torch.ones(()))
        self.calls, self.factors = 0, []
        self.generator = torch.Generator().manual_seed(0)
        self.sobol = torch.quasirandom.SobolEngine(1, scramble=True, seed=0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.calls += 1
        self.scale *= 0.9
        factor = torch.as_tensor(self.coupling(self))
        self.log("calls", float(self.calls))
        self.factors.append(float(factor))
        return factor * mse_loss(self.network(batch[0]), batch[1])


@pytest.mark.parametrize("kind", COUPLINGS)
def test_losses_of_equal_weights_are_equal_and_of_the_trained_batch(kind: str) -> None:
    torch.manual_seed(0)
    module, callback = Coupled(kind), anderson(max_extrapolation=1e-9, stochastic="auto")
    reports = Reports(callback)
    (batch,) = batches()
    after = Record(lambda _, m: m.factors[-1] * mse_loss(m.network(batch[0]), batch[1]).item())
    fit(module, batches(), after, callback, reports, max_epochs=8)
    assert {one.stochastic for one in reports.attempted} == {kind in DRAWN}
    evaluated = [
        (one.loss_before, one.loss_after, loss)
        for one, loss in zip(reports.all, after.values, strict=True)
        if one.loss_before is not None
    ]
    assert evaluated
    for loss_before, loss_after, expected in evaluated:
        # a step of 1e-9 residuals is below the rounding of most weights; single precision
        assert loss_before == pytest.approx(expected, rel=1e-6)
        assert loss_after == pytest.approx(loss_before, rel=1e-6)
    assert len(module.factors) == 8


# What an evaluation raises, returns, or does to the Trainer.


class Fails(Steered):
    def __init__(self, failure: Any) -> None:
        super().__init__()
        self.failure = failure

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if not self.steering.at_candidate(self):
            return loss
        self.trainer.should_stop = True
        return self.failure()


def raises(error: Exception) -> Tensor:
    raise error


FAILURES: dict[str, tuple[Callable[[], Any], str]] = {
    "value": (lambda: raises(ValueError("must be positive")), "rejected_error"),
    "iterator": (lambda: raises(StopIteration()), "rejected_error"),
    "cholesky": (lambda: torch.linalg.cholesky(-torch.eye(2)).sum(), "rejected_error"),
    "none": (lambda: None, "rejected_non_finite_loss"),
    "nan": (lambda: torch.tensor(float("nan")), "rejected_non_finite_loss"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_failure_at_candidate_rejects_and_training_goes_on(kind: str) -> None:
    failure, outcome = FAILURES[kind]
    callback = anderson()
    trainer = assert_plain_run(callback, lambda: Fails(failure), max_epochs=8)
    assert trainer.global_step == 8
    assert outcomes(callback) == {outcome: 4}


# What cannot be put back, or compared: training goes on without acceleration.


class Holds(Regression):
    """``effect(held)`` in every step; what it returns is seen."""

    def __init__(self, held: Any, effect: Callable[[Any], Any] = lambda held: None) -> None:
        super().__init__(None, lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9))
        self.held, self.effect, self.seen = held, effect, []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(self.effect(self.held))
        return super().training_step(batch, batch_idx)


class HoldsState(Holds):
    """That of the optimizer."""

    def __init__(self, effect: Callable[[Any], Any]) -> None:
        super().__init__(None, lambda _: effect(self.trainer.optimizers[0].state))


class Odd:
    @property
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise LookupError("nothing here")


class Feeder(threading.Thread):
    """Prepares batches, as seen by its state."""

    ready = 0

    def feed(self) -> int:
        self.ready += 1
        return self.ready


class OfParts(Regression):
    """The batch is an iterator over its parts."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(next(batch), batch_idx)


class OfSamples(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.network(batch[0]) - batch[1]).square()

    def backward(self, loss: Tensor, *_: Any, **__: Any) -> None:
        loss.mean().backward()


class Exits(Regression):
    """Where it is evaluated after its step."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.trained = self.network[0].weight.detach().clone()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if not torch.equal(self.network[0].weight, self.trained):
            sys.exit(1)
        return super().training_step(batch, batch_idx)


@torch.no_grad()
def damp(state: Any) -> None:
    for one in state.values():
        one["momentum_buffer"].mul_(0.9)


def count(shared: Any) -> int:
    shared.value += 1
    return shared.value


def add_to_first(bank: Tensor) -> float:
    bank[0] += 1.0
    return bank[0].item()


OF_OPTIMIZER = "holds state of the optimizer, changed by training_step"
LARGE = 17 << 20  # of single precision, 68 MB: beyond the 64 MiB that are copied

UNUSABLE: dict[str, tuple[Callable[[], Any], str]] = {
    "momentum": (lambda: HoldsState(damp), OF_OPTIMIZER),
    "state": (lambda: HoldsState(lambda state: state.clear()), OF_OPTIMIZER),
    "shared number": (
        lambda: Holds(multiprocessing.Value("i", 0), count),
        "holds a multiprocessing.sharedctypes.Synchronized, which others may",
    ),
    "another process": (
        lambda: Holds(multiprocessing.Pipe(), lambda pipe: pipe[0].send(1)),
        "holds a multiprocessing.connection.Connection, which others may",
    ),
    "thread": (
        lambda: Holds(Feeder(), Feeder.feed),
        "holds a thread (tests.callbacks.test_real_programs.Feeder)",
    ),
    "iterator": (
        lambda: Holds(itertools.count().__next__, lambda number: number()),
        "holds an iterator (itertools.count)",
    ),
    "second loader": (
        lambda: Holds(iter(batches(24)), lambda other: next(other)[0].sum().item()),
        "holds an iterator (torch.utils.data.dataloader._SingleProcessDataLoaderIter)",
    ),
    "batch of parts": (OfParts, "holds an iterator (builtins.list_iterator)"),
    "large tensor": (
        lambda: Holds(torch.zeros(LARGE), add_to_first),
        "holds a tensor that changes and is too large to be copied",
    ),
    "odd object": (lambda: Holds([Odd()]), "holds an object that raises LookupError: nothing here"),
    "loss of every sample": (
        OfSamples,
        "raised ValueError: the loss must be a single number, got shape (8, 1)",
    ),
    "exit": (Exits, "raised SystemExit: 1"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_training_step_that_cannot_be_evaluated_trains_on_without_acceleration(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    def collate(samples: Any) -> Any:
        batch = [torch.stack(one) for one in zip(*samples, strict=True)]
        return iter([batch]) if kind == "batch of parts" else batch

    make_module, reason = UNUSABLE[kind]
    loader, callback = DataLoader(rows(64), batch_size=8, collate_fn=collate), anderson()
    trainer = assert_plain_run(callback, make_module, loader, max_epochs=3)
    assert trainer.global_step == 24
    assert reason in callback.state_dict()["disabled"]
    assert caplog.text.count("Anderson acceleration is off for the rest of this run") == 1
    assert "define anderson_loss(batch) on the LightningModule" in caplog.text


def test_large_tensor_that_does_not_change_is_no_hindrance() -> None:
    callback = anderson()
    fit(Holds(torch.zeros(LARGE)), batches(8), callback, max_epochs=1)
    assert callback.state_dict()["disabled"] is None
    assert counters(callback)["attempted"] == 4


# Batches of every kind, with things taken out, replaced and written to.


@dataclasses.dataclass
class Dataclass:
    y: Tensor


class Labelled(torch.Tensor):
    """Remembers names of its columns, which its own operations need."""

    names_of: list[str]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(out, Labelled) and func is torch.Tensor.clone:
            out.names_of = args[0].names_of  # an AttributeError without them
        return out


Pair = collections.namedtuple("Pair", "inputs weight")


def batch_of_all_kinds(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """The same targets in parts of every kind."""
    x, y = (torch.stack(one) for one in zip(*samples, strict=True))
    labelled = x.as_subclass(Labelled)
    labelled.names_of = ["a", "b", "c", "d"]
    parts = [
        *({"y": y.clone()}, collections.OrderedDict(y=y.clone())),
        *(collections.UserDict(y=y.clone()), BatchEncoding({"y": y.clone()})),
        *(Dataclass(y.clone()), types.SimpleNamespace(y=y.clone())),
    ]
    return {"x": labelled, "parts": parts, "pair": Pair({"y": y.clone()}, 1)}


class Consumes(Regression):
    """Takes everything out of the batch, and writes to it."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch["x"] = 0.5 * batch["x"]
        targets = []
        while batch["parts"]:
            part = batch["parts"].pop()
            if isinstance(part, collections.UserDict | dict):
                targets.append(part.pop("y"))
            else:
                targets.append(part.y)
                del part.y
        targets.append(batch.pop("pair").inputs.pop("y"))
        for one in targets:
            one.mul_(0.5)
        assert all(torch.equal(one, targets[0]) for one in targets)
        return mse_loss(self.network(batch["x"].as_subclass(Tensor)), targets[0])


class OfHalves(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return mse_loss(self.network(0.5 * batch[0]), 0.5 * batch[1])


def test_batch_is_evaluated_as_it_was_before_the_step() -> None:
    loader = DataLoader(rows(8), batch_size=8, collate_fn=batch_of_all_kinds)
    found = losses(Consumes(), loader)
    assert found == losses(OfHalves())
    assert len(found) == 4


def test_batch_with_additions_of_hooks_is_evaluated_with_them() -> None:
    class Noisy(Steered):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            batch.append(torch.full((), 0.5))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y, factor = batch
            return super().training_step((factor * x, factor * y), batch_idx)

    class Halved(Steered):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step((0.5 * batch[0], 0.5 * batch[1]), batch_idx)

    assert losses(Noisy()) == losses(Halved())


@pytest.mark.parametrize("once", [True, False], ids=["once", "in every step"])
def test_write_to_weights_within_training_step(once: bool) -> None:
    """Prototypes normalised where every step begins are part of the step; a reset is none."""

    class Normalises(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            with torch.no_grad():
                if batch_idx == 4 or not once:
                    weight = self.network[0].weight
                    weight.copy_(torch.nn.functional.normalize(weight, dim=1))
            return super().training_step(batch, batch_idx)

    callback = anderson()
    fit(Normalises(), batches(12), callback, max_epochs=1)
    assert counters(callback)["attempted"] >= 4
    assert outcomes(callback).get("external_update", 0) == (1 if once else 0)


def test_frozen_parameters_in_optimizer_with_schedule_are_accelerated() -> None:
    """The schedule leads to the optimizer, whose state is that of the training loop."""

    class FineTuned(Regression):
        def __init__(self) -> None:
            super().__init__(network(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)))
            self.network[0].requires_grad_(False)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 5)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_stableaa.model.snapshot._COPIED_BYTES", 0)
        callback = anderson()
        fit(FineTuned(), batches(12), callback, max_epochs=1)
    assert callback.state_dict()["disabled"] is None
    assert counters(callback)["attempted"] >= 4


# Signatures of training_step.

step = Regression.training_step
SIGNATURES: dict[str, Any] = {
    "batch only": lambda self, batch: step(self, batch, 0),
    "keywords": lambda self, batch, **options: step(self, batch, 0),
    "keyword only": lambda self, batch, *, factor=1.0: factor * step(self, batch, 0),
    "other names": lambda self, data, number: step(self, data, number),
    "positional": lambda self, *arguments: step(self, *arguments),
    "dict": lambda self, batch, batch_idx: {"loss": step(self, batch, batch_idx), "size": 8},
}


@pytest.mark.parametrize("kind", SIGNATURES)
def test_training_step_gets_what_lightning_gives_it(kind: str) -> None:
    found = losses(type("Module", (Regression,), {"training_step": SIGNATURES[kind]})())
    assert found == losses(Regression())
    assert len(found) == 4


# Constraints on the weights: sequences restart, and no candidate breaks them.

CAP = 0.2


@torch.no_grad()
def clamp(parameters: Any) -> None:
    for one in parameters:
        one.clamp_(-CAP, CAP)


class ClampsAfterStep(Regression):
    data = False

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        super().optimizer_step(*arguments, **options)
        clamp(one.data if self.data else one for one in self.parameters())


class ClampsData(ClampsAfterStep):
    data = True


@pytest.mark.parametrize("in_one_epoch", [True, False])
@pytest.mark.parametrize("kind", [ClampsAfterStep, ClampsData])
def test_constraint_on_weights_holds_after_every_step(kind: Any, in_one_epoch: bool) -> None:
    callback, module = anderson(safeguard="none", store_every_n_steps=2), kind()
    clamp(module.parameters())
    largest = Record(lambda _, m: float(trained(m).abs().max()))
    loader, epochs = (batches(20), 1) if in_one_epoch else (batches(), 20)
    fit(module, loader, callback, largest, max_epochs=epochs)
    assert max(largest.values) == pytest.approx(CAP, abs=1e-8)
    assert counters(callback)["accepted"] == 0
    assert outcomes(callback)["external_update"] >= 9


# Averages swapped in for a validation.


class Averages(Callback):
    """Swaps an exponential average in at the start of a validation, and out at its end."""

    def __init__(self, put: Callable[[Tensor, Tensor], Any]) -> None:
        self.put = put
        self.average: list[Tensor] = []
        self.kept: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        now = [p.detach().clone() for p in pl_module.parameters()]
        pairs = zip(self.average or now, now, strict=True)
        self.average = [0.9 * one + 0.1 * other for one, other in pairs]

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.kept = [p.detach().clone() for p in pl_module.parameters()]
        self._write(pl_module, self.average)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._write(pl_module, self.kept)

    @torch.no_grad()
    def _write(self, module: nn.Module, values: list[Tensor]) -> None:
        for one, value in zip(module.parameters(), values, strict=True):
            self.put(one, value)


class OwnAverages(Validated):
    """The same by hooks of the module, which run after those of all callbacks."""

    def __init__(self, put: Any) -> None:
        super().__init__()
        self.averages = [Averages(put)]

    def on_train_batch_end(self, *_: Any) -> None:
        self.averages[0].on_train_batch_end(None, self)

    def on_validation_start(self) -> None:
        self.averages[0].on_validation_start(None, self)

    def on_validation_end(self) -> None:
        self.averages[0].on_validation_end(None, self)


@pytest.mark.parametrize(
    ("loader", "options"),
    [(batches(), {"max_epochs": 12}), (batches(12), {"val_check_interval": 5, "max_epochs": 1})],
    ids=["every epoch", "within an epoch"],
)
def test_averages_for_validation_leave_training_alone(loader: Any, options: dict[str, Any]) -> None:
    schedule = {"store_every_n_steps": 2, "accelerate_every_n_steps": 4}
    alone, expected = anderson(**schedule), Validated()
    fit(expected, loader, alone, val=batches(), **options)
    puts = (Tensor.copy_, lambda one, value: one.data.copy_(value))
    for put, where in itertools.product(puts, ["before", "after", "module"]):
        callback, module = (
            anderson(**schedule),
            OwnAverages(put) if where == "module" else Validated(),
        )
        averages = [Averages(put)] if where != "module" else []
        callbacks = [callback, *averages] if where == "after" else [*averages, callback]
        fit(module, loader, *callbacks, val=batches(), **options)
        assert torch.equal(weights(module), weights(expected)), where
        assert outcomes(callback) == outcomes(alone) != {}
        assert counters(callback)["attempted"] == 3
