"""Training steps as people write them: programs with effects, and acceleration beside them."""

import collections
import dataclasses
import functools
import os
import random
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch
import lightning.pytorch.loggers
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import logger as of_lightning
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader
from torchmetrics import MeanSquaredError
from transformers import BatchEncoding

from tests.helpers.problems import assert_bitwise_equal
from tests.helpers.regression import (
    Callback,
    Record,
    Regression,
    Reports,
    Steered,
    Validated,
    anderson,
    batches,
    counters,
    fit,
    network,
    outcomes,
    rows,
    trained,
    weights,
)

REJECTED = {"rejected_loss_increase": 4}


def losses(module: Any, loader: Any = None, **options: Any) -> list[tuple[Any, ...]]:
    """(step, status, before, after) of the attempts in 8 epochs of one batch."""
    callback = anderson(**options)
    reports = Reports(callback)
    fit(module, batches() if loader is None else loader, callback, reports, max_epochs=8)
    steps = enumerate(reports.all, start=1)
    return [(k, one.status, one.loss_before, one.loss_after) for k, one in steps if one.attempted]


# Effects of a training step: after rejected candidates they are those of the plain run.


class Effects(Steered):
    """``write`` runs in each training step, ``read`` looks at what it left; both of the kind."""

    shared: ClassVar[list[float]] = []

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.shared.clear()
        self.key = network(seed=3).requires_grad_(False)
        self.register_buffer("queue", torch.zeros(6))
        self.book = nn.Parameter(torch.zeros(4), requires_grad=False)
        self.plain = torch.zeros(4)
        self.items: Any = {"list": [], "set": set(), "deque": collections.deque(maxlen=3)}
        self.items |= {"counter": collections.Counter(), "nested": {"a": [{"b": [0]}]}}
        self.items["ordered"] = collections.OrderedDict(a=0.0)
        self.number = 0
        self.metric = {"mse": MeanSquaredError()}
        self.seen: list[float] = []
        if kind == "hooks":
            self.network[1].register_forward_hook(lambda *_: self.seen.append(1.0))
            self.network[1].register_forward_pre_hook(
                functools.partial(lambda out, *_: out.append(2.0), self.seen)
            )
        self.draws = {"torch": torch.Generator().manual_seed(0), "random": random.Random(0)}
        self.draws |= {"numpy": np.random.default_rng(0), "legacy": np.random.RandomState(0)}
        self.sobol = torch.quasirandom.SobolEngine(1, scramble=True, seed=0)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        WRITES[self.kind](self, loss.item(), batch)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([*self.network.parameters(), self.book], lr=0.01)


@torch.no_grad()
def momentum_data(module: Any, *_: Any) -> None:
    for q, k in zip(module.network.parameters(), module.key.parameters(), strict=True):
        k.data = 0.9 * k.data + 0.1 * q.data


@torch.no_grad()
def momentum_in_place(module: Any, *_: Any) -> None:
    for q, k in zip(module.network.parameters(), module.key.parameters(), strict=True):
        k.data.mul_(0.9).add_(q.data, alpha=0.1)


def containers(module: Any, loss: float, _: Any) -> None:
    module.items["list"].append(loss)
    module.items["set"].add(round(loss, 3))
    module.items["deque"].appendleft(loss)
    module.items["counter"][len(module.items["list"])] += 1
    module.items["nested"]["a"][0]["b"][0] += loss
    module.items["ordered"].move_to_end("a")
    module.items["ordered"][f"{loss}"] = loss
    module.items[loss] = module.items.pop("last", 0)


def modes(module: Any, *_: Any) -> None:
    module.key.train(not module.key.training)
    module.key.requires_grad_(not module.key[0].weight.requires_grad)
    module.network[1].eval()


WRITES: dict[str, Callable[[Any, float, Any], Any]] = {
    "momentum encoder, .data": momentum_data,
    "momentum encoder, in place": momentum_in_place,
    "buffer": lambda m, loss, _: m.queue.add_(loss),
    "buffer replaced": lambda m, loss, _: setattr(m, "queue", m.queue.roll(1) + loss),
    "codebook, frozen": lambda m, loss, _: m.book.data.copy_(0.9 * m.book + loss),
    "codebook, replaced": lambda m, loss, _: setattr(
        m, "book", nn.Parameter(0.9 * m.book + loss, requires_grad=False)
    ),
    "tensor attribute": lambda m, loss, _: m.plain.add_(loss),
    "containers": containers,
    "number": lambda m, *_: setattr(m, "number", m.number + 1),
    "metric": lambda m, _, batch: m.metric["mse"].update(m.network(batch[0]), batch[1]),
    "list of the class": lambda m, loss, _: m.shared.append(loss),
    "hooks": lambda *_: None,
    "modes": modes,
    "generators": lambda m, *_: m.items["list"].append(
        (
            float(torch.rand((), generator=m.draws["torch"])),
            m.draws["random"].random(),
            m.draws["numpy"].random(),
            m.draws["legacy"].rand(),
            float(m.sobol.draw(1)),
        )
    ),
}


def effects(module: Any) -> list[Any]:
    """Everything that a kind of effect can leave."""
    return [
        trained(module.network),
        [p.detach().clone() for p in module.key.parameters()],
        [p.requires_grad for p in module.key.parameters()],
        [one.training for one in module.modules()],
        [module.queue.clone(), module.book.detach().clone(), module.plain.clone()],
        repr({**module.items, "set": sorted(module.items["set"])}),
        [module.number],
        [module.metric["mse"].total.item(), module.metric["mse"].sum_squared_error.item()],
        [list(module.shared), list(module.seen)],
        [module.draws["torch"].get_state(), module.draws["random"].getstate()],
        [repr(module.draws["numpy"].bit_generator.state), repr(module.draws["legacy"].get_state())],
        [module.sobol.num_generated, module.sobol.quasi.clone()],
    ]


@pytest.mark.parametrize("kind", WRITES)
def test_effects_of_rejected_candidates_are_undone(kind: str) -> None:
    def run(*callbacks: Any) -> list[Any]:
        record = Record(lambda _, module: effects(module))
        fit(Effects(kind), batches(4), *callbacks, record, max_epochs=2)
        return record.values

    callback = anderson()
    plain, own = run(), run(callback)
    assert_bitwise_equal(own, plain)
    assert outcomes(callback)["rejected_loss_increase"] >= 1
    assert counters(callback)["attempted"] == 4


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
    module, callback = Coupled(kind), anderson(max_extrapolation=1e-9)
    reports = Reports(callback)
    (batch,) = batches()
    after = Record(lambda _, m: m.factors[-1] * mse_loss(m.network(batch[0]), batch[1]).item())
    fit(module, batches(), after, callback, reports, max_epochs=8)
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


@pytest.mark.parametrize(
    ("kind", "stochastic"),
    [
        ("decaying buffer", False),
        ("generator of the module", True),
        ("global generator", True),
        ("dropout", True),
    ],
)
def test_objective_that_draws_is_stochastic(kind: str, stochastic: bool) -> None:
    dropout = network(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1))
    module = Regression(dropout) if kind == "dropout" else Coupled(kind)
    callback = anderson(stochastic="auto")
    reports = Reports(callback)
    fit(module, batches(), callback, reports, max_epochs=8)
    assert [one.stochastic for one in reports.attempted] == [stochastic] * 4


# What an evaluation raises, returns, or does to the Trainer.


class Fails(Steered):
    def __init__(self, failure: Any) -> None:
        super().__init__()
        self.failure = failure

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return self.failure(self) if self.steering.at_candidate(self) else loss


def raises(error: Exception) -> Callable[[Any], Any]:
    def failure(module: Any) -> Any:
        module.trainer.should_stop = True
        raise error

    return failure


def stops(module: Any) -> Tensor:
    module.trainer.should_stop = True
    return torch.tensor(float("nan"))


FAILURES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "value": (raises(ValueError("viscosity must be positive")), "rejected_error"),
    "iterator": (raises(StopIteration()), "rejected_error"),
    "cholesky": (lambda _: torch.linalg.cholesky(-torch.eye(2)).sum(), "rejected_error"),
    "none": (lambda _: None, "rejected_non_finite_loss"),
    "stop": (stops, "rejected_non_finite_loss"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_failure_at_candidate_rejects_and_training_goes_on(failure: str) -> None:
    plain, own, callback = Regression(), Fails(FAILURES[failure][0]), anderson()
    steps = [
        fit(one, batches(), *more, max_epochs=8).global_step
        for one, more in ((plain, []), (own, [callback]))
    ]
    assert steps == [8, 8]
    assert outcomes(callback) == {FAILURES[failure][1]: 4}
    assert torch.equal(weights(plain), weights(own))


# Batches of every kind, with things taken out, replaced and written to.


@dataclasses.dataclass
class Dataclass:
    x: Tensor
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


def labelled(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    x = x.as_subclass(Labelled)
    x.names_of = ["a", "b", "c", "d"]
    return {"x": x, "y": y}


Pair = collections.namedtuple("Pair", "inputs weight")

BATCHES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "dict": lambda x, y: {"x": x, "y": y},
    "OrderedDict": lambda x, y: collections.OrderedDict(x=x, y=y),
    "UserDict": lambda x, y: collections.UserDict(x=x, y=y),
    "BatchEncoding": lambda x, y: BatchEncoding({"x": x, "y": y}),
    "dict in a namedtuple": lambda x, y: Pair({"x": x, "y": y}, 1),
    "dict in a list": lambda x, y: [{"x": x, "y": y}],
    "tensor subclass": labelled,
    "dataclass": Dataclass,
    "namespace": lambda x, y: types.SimpleNamespace(x=x, y=y),
}


class Consumes(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        one = batch[0] if isinstance(batch, list | tuple) else batch
        if isinstance(one, collections.UserDict | dict):
            x, y = one["x"], one.pop("y")
            one["x"] = 0.5 * x
            x = one["x"]
        else:
            one.x, y = 0.5 * one.x, one.y
            x = one.x
            del one.y
        y.mul_(0.5)
        return mse_loss(self.network(x.as_subclass(Tensor)), y)


class OfHalves(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return mse_loss(self.network(0.5 * batch[0]), 0.5 * batch[1])


@pytest.mark.parametrize("kind", BATCHES)
def test_batch_is_evaluated_as_it_was_before_the_step(kind: str) -> None:
    def collate(samples: list[tuple[Tensor, Tensor]]) -> Any:
        x, y = (torch.stack(one) for one in zip(*samples, strict=True))
        return BATCHES[kind](x, y)

    loader = DataLoader(rows(8), batch_size=8, collate_fn=collate)
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


@pytest.mark.parametrize("changes", [True, False])
def test_tensor_too_large_to_copy_disables_where_it_changes(changes: bool) -> None:
    class Large(Steered):
        def __init__(self) -> None:
            super().__init__()
            self.bank = torch.zeros(17 << 20)  # 68 MB, beyond the 64 MiB that are copied

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if changes:
                self.bank[batch_idx] += 1.0
            return super().training_step(batch, batch_idx)

    callback, module = anderson(), Large()
    fit(module, batches(8), callback, max_epochs=1)
    assert float(module.bank.sum()) == 8 * changes
    disabled = callback.state_dict()["disabled"]
    if changes:
        assert "a tensor that changes and is too large to be copied" in disabled
    else:
        assert disabled is None
        assert outcomes(callback) == REJECTED


class SecondLoader(Regression):
    """Domain adaptation: a second loader of the same length."""

    def on_train_epoch_start(self) -> None:
        self.other = iter(batches(8))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + super().training_step(
            next(self.other), batch_idx
        )


class BatchOfParts(Regression):
    """The batch is an iterator over its parts."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(next(batch), batch_idx)


@pytest.mark.parametrize("kind", [SecondLoader, BatchOfParts])
def test_iterator_disables_with_a_reason_and_keeps_epochs(
    kind: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def collate(samples: Any) -> Any:
        x, y = (torch.stack(one) for one in zip(*samples, strict=True))
        return iter([(x, y)]) if kind is BatchOfParts else (x, y)

    ends = []
    for callbacks in ([], [anderson()]):
        module = kind()
        loader = DataLoader(rows(64), batch_size=8, collate_fn=collate)
        trainer = fit(module, loader, *callbacks, max_epochs=3)
        ends.append((trainer.global_step, weights(module)))
    assert ends[0][0] == ends[1][0] == 24
    assert torch.equal(ends[0][1], ends[1][1])
    assert "holds an iterator" in callbacks[0].state_dict()["disabled"]
    assert caplog.text.count("Anderson acceleration is off for the rest of this run") == 1
    assert "define anderson_loss(batch) on the LightningModule" in caplog.text


# What reaches outside of the module: weights, optimizers, loggers, files, the terminal.


class Reaches(Regression):
    """Does one more thing in its training step.

    Args:
        kind: a key of ``REACHES``.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.own = torch.nn.Parameter(torch.ones(2))
        self.optimizer_of_own = torch.optim.Adam([self.own], lr=0.1)
        self.files: list[str] = []

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.network.parameters())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return REACHES[self.kind](self, loss)

    def step_own(self, loss: Tensor) -> Tensor:
        scale = self.own.square().mean()
        self.optimizer_of_own.zero_grad()
        scale.backward()
        self.optimizer_of_own.step()
        return loss * (1 + scale.detach())

    def decay_rate(self, loss: Tensor) -> Tensor:
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] *= 0.95
        return loss

    def shrink_weights(self, loss: Tensor) -> Tensor:
        """Through ``.data``, which no version tells of; the loss was computed before."""
        for one in self.network.parameters():
            one.data.mul_(0.99)
        return loss

    def name_file(self, loss: Tensor) -> Tensor:
        assert isinstance(self.logger, self.trainer.loggers[0].__class__)
        self.files.append(os.path.join(self.trainer.log_dir or "", f"{len(self.files)}"))
        return loss

    def save(self, loss: Tensor) -> Tensor:
        path = Path(self.trainer.default_root_dir) / f"{self.trainer.global_step}.ckpt"
        self.trainer.save_checkpoint(path, weights_only=True)
        return loss

    def say(self, loss: Tensor) -> Tensor:
        print("step", self.trainer.global_step)
        return loss

    def keep_rate(self, loss: Tensor) -> Tensor:
        self.trainer.datamodule.seen += 1
        return loss


REACHES: dict[str, Callable[[Any, Tensor], Any]] = {
    "an optimizer of its own": Reaches.step_own,
    "the learning rate": Reaches.decay_rate,
    "the trained weights": Reaches.shrink_weights,
    "the folder of the logger": Reaches.name_file,
    "a checkpoint": Reaches.save,
    "the terminal": Reaches.say,
    "the datamodule": Reaches.keep_rate,
}


class Counting(lightning.pytorch.LightningDataModule):
    seen = 0

    def train_dataloader(self) -> Any:
        return batches(12)


@pytest.mark.parametrize("kind", REACHES)
def test_reach_of_a_rejected_candidate_is_undone(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(name: str, *callbacks: Any) -> list[Any]:
        module, data, folder = Reaches(kind), Counting(), tmp_path / name
        folder.mkdir()
        logger = lightning.pytorch.loggers.CSVLogger(folder, flush_logs_every_n_steps=1)
        trainer = fit(
            module, data, *callbacks, max_epochs=1, logger=logger, default_root_dir=folder
        )
        saved = [torch.load(one) for one in sorted(folder.glob("*.ckpt"))]
        return [
            module.state_dict(),
            module.optimizer_of_own.state_dict()["state"],
            trainer.optimizers[0].state_dict(),
            [Path(one).name for one in module.files],
            [one["state_dict"] for one in saved],
            capsys.readouterr().out,
            data.seen,
        ]

    callback = anderson(max_extrapolation=1e-30)
    plain, own = run("plain"), run("own", callback)
    assert_bitwise_equal(own, plain)
    assert callback.state_dict()["disabled"] is None
    assert counters(callback)["attempted"] >= 4


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


def step_by_hand(self: Any, batch: Any, _: int) -> None:
    optimizer = self.optimizers()
    optimizer.zero_grad()
    Regression.training_step(self, batch, 0).backward()
    optimizer.step()


UNUSABLE: dict[str, tuple[Any, str]] = {
    "loss of every sample": (
        lambda self, batch, _: (self.network(batch[0]) - batch[1]).square(),
        "raised ValueError: the loss must be a single number, got shape (8, 1)",
    ),
    "manual, without a loss": (
        step_by_hand,
        "raised ValueError: training_step neither calls manual_backward nor returns one",
    ),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_training_step_without_a_loss_trains_on_without_acceleration(kind: str) -> None:
    step, reason = UNUSABLE[kind]

    class Unusual(Regression):
        training_step = step

        def backward(self, loss: Tensor, *_: Any, **__: Any) -> None:
            loss.mean().backward()

    ends = []
    for callbacks in ([], [anderson()]):
        module = Unusual()
        module.automatic_optimization = kind == "loss of every sample"
        fit(module, batches(8), *callbacks, max_epochs=1)
        ends.append(weights(module))
    assert torch.equal(*ends)
    assert reason in callbacks[0].state_dict()["disabled"]


def test_object_that_cannot_be_looked_into_disables_with_a_reason() -> None:
    class Odd:
        @property
        def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            raise LookupError("nothing here")

    module = Regression()
    module.odd = [Odd()]
    callback = anderson()
    fit(module, batches(8), callback, max_epochs=1)
    assert (
        "holds an object that raises LookupError: nothing here" in callback.state_dict()["disabled"]
    )


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


class Projected(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        clamp(self.param_groups[0]["params"])
        return loss


def hooked(parameters: Any) -> torch.optim.Optimizer:
    parameters = list(parameters)
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    optimizer.register_step_post_hook(lambda *_: clamp(parameters))
    return optimizer


class ClampsAfterStep(Regression):
    data = False

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        super().optimizer_step(*arguments, **options)
        clamp(one.data if self.data else one for one in self.parameters())


class ClampsData(ClampsAfterStep):
    data = True


@pytest.mark.parametrize("in_one_epoch", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        ClampsAfterStep,
        ClampsData,
        lambda: Regression(None, lambda p: Projected(p, lr=0.01)),
        lambda: Regression(None, hooked),
    ],
    ids=["no_grad", ".data", "projected optimizer", "hook"],
)
def test_constraint_on_weights_holds_after_every_step(make: Any, in_one_epoch: bool) -> None:
    callback, module = anderson(safeguard="none", store_every_n_steps=2), make()
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

    def on_fit_start(self) -> None:
        self.averages = [Averages(Tensor.copy_)]

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
@pytest.mark.parametrize("where", ["before", "after", "module"])
@pytest.mark.parametrize(
    "put", [Tensor.copy_, lambda one, value: one.data.copy_(value)], ids=["copy_", ".data"]
)
def test_averages_for_validation_leave_training_alone(
    put: Any, where: str, loader: Any, options: dict[str, Any]
) -> None:
    schedule = {"store_every_n_steps": 2, "accelerate_every_n_steps": 4}
    alone, callback, expected = anderson(**schedule), anderson(**schedule), Validated()
    fit(expected, loader, alone, val=batches(), **options)
    module = OwnAverages() if where == "module" else Validated()
    averages = [Averages(put)] if where != "module" else []
    callbacks = [callback, *averages] if where == "after" else [*averages, callback]
    fit(module, loader, *callbacks, val=batches(), **options)
    assert torch.equal(weights(module), weights(expected))
    assert outcomes(callback) == outcomes(alone) != {}
    assert counters(callback)["attempted"] == 3


# Logging by any way.


Logger: Any = of_lightning.Logger


class Rows(Logger):
    """Keeps what is logged; so does its ``experiment``."""

    name: Any = "rows"
    version: Any = "0"

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Any] = []

    @property
    def experiment(self) -> Any:
        return self.rows

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        own = {k: v for k, v in metrics.items() if not k.startswith("anderson/")}
        if own:
            self.rows.append((step, own))


class Terms(nn.Module):
    """Has got the module's ``log`` at its construction."""

    def __init__(self, log: Any) -> None:
        super().__init__()
        self.log_term = log


class Logs(Steered):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.terms = kind, Terms(self.log)
        if kind == "log is a list":
            self.log: Any = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = mse_loss(self.network(batch[0]), batch[1])
        if self.kind == "log handed on":
            self.terms.log_term("term", loss, on_step=False, on_epoch=True)
        elif self.kind == "super().log":
            super().log("term", loss, on_step=False, on_epoch=True)
        elif self.kind == "logger":
            self.logger.log_metrics({"term": loss.item()}, step=self.global_step)
        elif self.kind == "experiment":
            self.logger.experiment.append(("term", loss.item()))
        else:
            self.log.append(loss.item())
            self.trainer.logger.experiment.append(list(self.log))
        return loss + self.steering.offset if self.steering.at_candidate(self) else loss


@pytest.mark.parametrize(
    "kind", ["log handed on", "super().log", "logger", "experiment", "log is a list"]
)
def test_evaluations_log_nothing_by_any_way(kind: str) -> None:
    found, callback = [], anderson()
    for callbacks in ([], [callback]):
        logger = Rows()
        fit(Logs(kind), batches(4), *callbacks, logger=logger, max_epochs=2, log_every_n_steps=1)
        found.append(logger.rows)
    assert found[1] == found[0] != []
    assert outcomes(callback) == REJECTED


def test_evaluation_keeps_what_callbacks_log_beside_it() -> None:
    class Logs(Callback):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            pl_module.log(self.name, float(trainer.global_step), on_step=False, on_epoch=True)

    found = []
    for callbacks in ([], [anderson()]):
        logger = Rows()
        around = [Logs("before"), *callbacks, Logs("after")]
        fit(Steered(), batches(), *around, logger=logger, max_epochs=8, log_every_n_steps=1)
        found.append(logger.rows)
    assert found[1] == found[0]
