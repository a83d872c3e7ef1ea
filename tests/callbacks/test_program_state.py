"""State in the corners of a program: after rejected candidates it is that of the plain run."""

import collections
import contextlib
import itertools
import multiprocessing
import random
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import lightning.pytorch
import numpy as np
import pytest
import torch
import wandb
from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.profilers import SimpleProfiler
from tensorboard.backend.event_processing import event_accumulator
from torch import Tensor, nn
from torch.nn.functional import mse_loss, softplus

from lightning_stableaa import AndersonCallback, SmoothingMonitor
from tests.helpers import own_counters, own_state
from tests.helpers.problems import assert_bitwise_equal
from tests.helpers.regression import Regression, anderson, batches, counters, fit, weights

GENERATOR = np.random.default_rng(0)
CALLS = 0
AVERAGE: Any = np.float64(0.0)


class Meter:
    count = 0


class Settings(HyperparametersMixin):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.count = count


class Namespace:
    step = 0


METER = Meter()


def helper() -> None:
    global CALLS
    CALLS += 1


def reset_globals() -> None:
    global GENERATOR, CALLS, AVERAGE
    GENERATOR, CALLS, AVERAGE = np.random.default_rng(0), 0, np.float64(0.0)
    own_state.SEEN = own_state.Meter.total = own_counters.CALLS = 0
    own_counters.COUNTS.clear()
    METER.count = Namespace.step = 0


class Program(Regression):
    """One more thing in its training step, with state somewhere.

    Args:
        kind: a key of ``PROGRAMS``.
    """

    drawn: ClassVar[Any] = np.random.default_rng(0)

    def __init__(self, kind: str) -> None:
        super().__init__()
        reset_globals()
        type(self).drawn = np.random.default_rng(0)
        self.kind, self.history = kind, []
        self.replay: Any = np.empty(4, dtype=object)
        layer: Any = self.network[0]
        layer.seen, layer.scale = [], torch.ones(())
        layer._inputs, layer.state = [], SimpleNamespace(count=0)
        layer.register_forward_hook(lambda one, *_: one.seen.append(1.0))
        self.loader = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(torch.arange(8)),
            shuffle=True,
            generator=torch.Generator().manual_seed(0),
        )
        self.vocabulary: Any = collections.defaultdict(lambda: len(self.vocabulary))
        self.nodes = {Meter(): 0.0}
        self.settings = Settings(0)
        self.meter: Any = Meter()
        with torch.inference_mode():
            self.bank = torch.zeros(4)
        with torch.random.fork_rng(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing is deprecated
            torch.manual_seed(0)
            body = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
            self.traced: Any = torch.jit.trace(body, torch.ones(4, 1), check_trace=False)
        self.traced.requires_grad_(False)
        self.own = torch.optim.SGD(self.network[2].parameters(), lr=1e-3, momentum=0.9)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.network.parameters(), lr=0.01, momentum=0.9)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        found = PROGRAMS[self.kind](self, batch)
        self.history.append(float(found or 0.0))
        return super().training_step(batch, batch_idx) * (1 + 1e-3 * self.history[-1])


def rows_as_objects(module: Any, batch: Any) -> None:
    module.replay[len(module.history) % 4] = batch[0].mean(0)


def globals_and_classes(*_: Any) -> float:
    helper()
    METER.count += 1
    Namespace.step += 1
    return CALLS + METER.count + Namespace.step + float(GENERATOR.normal())


def numbers_of_numpy_in_globals(*_: Any) -> float:
    global AVERAGE
    AVERAGE = 0.9 * AVERAGE + np.float64(1.0)
    return float(AVERAGE)


def modules_of_a_project(*_: Any) -> float:
    from tests.helpers import own_counters as counters

    own_state.bump()
    own_state.Meter.total += 1
    counters.CALLS += 1
    return counters.CALLS + own_state.SEEN + own_state.Meter.total + len(counters.COUNTS)


def objects_with_another_dict(module: Any, _: Any) -> float:
    meter = module.meter
    meter.__dict__ = {**vars(meter), "count": meter.count + 1}
    return float(meter.count)


def tensors_of_inference_mode(module: Any, _: Any) -> float:
    with torch.inference_mode():
        module.bank.add_(1.0)
    return float(module.bank.sum())


def of_class(module: Any, _: Any) -> float:
    return float(module.drawn.normal())


def on_layers(module: Any, _: Any) -> float:
    layer = module.network[0]
    layer.scale.mul_(0.9)
    layer._inputs.append(1)
    layer.state.count += 1
    return len(layer.seen) + float(layer.scale) + len(layer._inputs) + layer.state.count


def another_loader(module: Any, _: Any) -> float:
    return float(next(iter(module.loader))[0])


def online_vocabulary(module: Any, _: Any) -> float:
    return float(module.vocabulary[len(module.history)])


def of_mixin(module: Any, _: Any) -> float:
    module.settings.count += 1
    return float(module.settings.count)


def objects_as_keys(module: Any, _: Any) -> float:
    [node] = module.nodes
    node.count += 1
    return float(node.count)


def traced_statistics(module: Any, batch: Any) -> float:
    module.traced(batch[0][:, :1])
    return float(module.traced.state_dict()["1.running_mean"])


def of_trainer(module: Any, _: Any) -> float:
    module.trainer.seen = getattr(module.trainer, "seen", 0) + 1
    if module.global_step == 6 and module.trainer.accumulate_grad_batches < 2:
        module.trainer.accumulate_grad_batches *= 2
    module.trainer.rows = getattr(module.trainer, "rows", [])
    module.trainer.rows.append(1)
    if len(module.trainer.rows) == 6:
        module.trainer.fit_loop.max_epochs += 1
    return module.trainer.seen + len(module.trainer.rows)


def of_data(module: Any, batch_idx: Any) -> float:
    data = module.trainer.datamodule
    data.steps.append(1)
    return len(data.steps) + float(data.generator.normal())


def own_optimizer_of_trained_weights(module: Any, _: Any) -> None:
    module.own.zero_grad()
    module.network[2].weight.square().sum().backward()
    module.own.step()
    module.own.zero_grad()


PROGRAMS: dict[str, Callable[[Any, Any], float | None]] = {
    one.__name__: one
    for one in (
        *(
            rows_as_objects,
            globals_and_classes,
            of_class,
            on_layers,
            another_loader,
        ),
        *(numbers_of_numpy_in_globals, modules_of_a_project, tensors_of_inference_mode),
        objects_with_another_dict,
        *(of_mixin, online_vocabulary, objects_as_keys, traced_statistics, of_trainer, of_data),
        own_optimizer_of_trained_weights,
    )
}


class Data(lightning.pytorch.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []
        self.generator = np.random.default_rng(0)

    def train_dataloader(self) -> Any:
        return batches(12)


def rejecting() -> AndersonCallback:
    return anderson(max_extrapolation=1e-30)


@pytest.mark.parametrize("kind", PROGRAMS)
def test_state_after_rejected_candidates_is_that_of_the_plain_run(kind: str) -> None:
    ends, callback = [], rejecting()
    for callbacks in ([], [callback]):
        module, data = Program(kind), Data()
        trainer = fit(module, data, *callbacks, max_epochs=2)
        ends.append(
            [
                weights(module),
                module.history,
                [trainer.global_step, len(data.steps)],
                trainer.optimizers[0].state_dict(),
                module.own.state_dict()["state"],
            ]
        )
    assert_bitwise_equal(*ends)
    assert callback.state_dict()["disabled"] is None
    assert counters(callback)["attempted"] >= 4


def damped_momentum(module: Any) -> None:
    for state in module.optimizers().state.values():
        state["momentum_buffer"].mul_(0.9)


def cleared_state(module: Any) -> None:
    module.optimizers().state.clear()


def count_shared(module: Any) -> None:
    module.shared.value += 1


def next_number(module: Any) -> None:
    module.number = module.next_number()


def another_process(module: Any) -> None:
    module.pipe[0].send(1)


class Feeder(threading.Thread):
    """Prepares batches, as seen by its state."""

    ready = 0


def own_thread(module: Any) -> None:
    module.feeder.ready += 1


@pytest.mark.parametrize(
    ("effect", "reason"),
    [
        (damped_momentum, "state of the optimizer, changed by training_step"),
        (cleared_state, "state of the optimizer, changed by training_step"),
        (count_shared, "a multiprocessing.sharedctypes.Synchronized, which others may"),
        (next_number, "an iterator (itertools.count)"),
        (another_process, "a multiprocessing.connection.Connection, which others may"),
        (own_thread, "a thread (tests.callbacks.test_program_state.Feeder)"),
    ],
)
def test_state_that_cannot_be_put_back_disables_before_it_is_touched(
    effect: Callable[[Any], None], reason: str
) -> None:
    class Effect(Program):
        def __init__(self) -> None:
            super().__init__("rows_as_objects")
            if effect is count_shared:
                self.shared = multiprocessing.Value("i", 0)
            if effect is next_number:
                self.next_number = itertools.count().__next__
            if effect is another_process:
                self.pipe = multiprocessing.Pipe()
            if effect is own_thread:
                self.feeder = Feeder()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            effect(self)
            return super().training_step(batch, batch_idx)

    ends, callback = [], rejecting()
    for callbacks in ([], [callback]):
        module = Effect()
        trainer = fit(module, batches(12), *callbacks, max_epochs=2)
        count = module.shared.value if effect is count_shared else 0
        ends.append([weights(module), trainer.optimizers[0].state_dict(), count])
    assert_bitwise_equal(*ends)
    assert f"holds {reason}" in callback.state_dict()["disabled"]


class Taking(lightning.pytorch.LightningModule):
    """A generator that is trained at every fifth batch, its critic at the others."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.maker, self.critic = nn.Linear(1, 1), nn.Linear(1, 1)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(one.parameters(), lr=0.01) for one in (self.maker, self.critic)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        makes = batch_idx % 5 == 0
        optimizer: Any = self.optimizers()[0 if makes else 1]  # pyright: ignore[reportIndexIssue]
        self.toggle_optimizer(optimizer)
        made = self.critic(self.maker(batch[0][:, :1])).mean()
        loss = (
            softplus(-made) if makes else softplus(made) + softplus(-self.critic(batch[1]).mean())
        )
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.untoggle_optimizer(optimizer)


def test_optimizers_that_take_turns_are_left_alone() -> None:
    ends, callback = [], anderson()
    for callbacks in ([], [callback]):
        torch.manual_seed(0)
        module = Taking()
        fit(module, batches(12), *callbacks, max_epochs=2)
        ends.append(weights(module))
    assert torch.equal(*ends)
    assert "2 optimizers that take turns" in callback.state_dict()["disabled"]


class Shrinking(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        for one in self.network.parameters():
            one.data.mul_(0.999)
        return loss


def test_weights_after_rejected_averages_are_those_of_the_plain_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lightning_stableaa import Status, accelerator

    monkeypatch.setattr(accelerator, "decide", lambda _: Status.REJECTED_LOSS_INCREASE)
    ends, callback = [], anderson(store_every_n_steps=5, accelerate_every_n_steps=5)
    for callbacks in ([], [SmoothingMonitor(rsd_threshold=0), callback]):
        torch.manual_seed(0)
        module = Shrinking()
        fit(module, batches(12), *callbacks, max_epochs=6)
        ends.append(weights(module))
    assert torch.equal(*ends)
    assert counters(callback)["attempted"] >= 4


def test_optimizer_without_hooks_is_refused_in_a_sentence() -> None:
    class Lookahead(torch.optim.Optimizer):
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer
            self.param_groups, self.defaults = optimizer.param_groups, optimizer.defaults
            self.state = optimizer.state

        def step(self, closure: Any = None) -> Any:
            return self.optimizer.step(closure)

    class Wrapped(Regression):
        def configure_optimizers(self) -> Any:
            return Lookahead(super().configure_optimizers())

    with pytest.raises(TypeError, match="got Lookahead, which has no step hooks: call super"):
        fit(Wrapped(), batches(4), anderson(), max_epochs=1)


class Rows(Logger):
    name: Any = "rows"
    version: Any = "0"

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int | None] = []

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "batch" in metrics:
            self.rows.append(step)


class Registered(Rows):
    """Expects an argument of every class that derives from it."""

    def __init_subclass__(cls, *, tag: str) -> None:
        super().__init_subclass__()


@pytest.mark.parametrize(
    "kind",
    [type("Rows", (Rows,), {"__module__": "loaded_by_a_path"}), Registered],
    ids=["of a module that is not registered", "that registers what derives from it"],
)
def test_logger_of_unusual_class_is_silent(kind: Any) -> None:
    class Logs(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.logger.log_metrics({"batch": 1.0}, step=self.global_step)  # pyright: ignore[reportOptionalMemberAccess]
            return super().training_step(batch, batch_idx)

    logger, callback = kind(), rejecting()
    fit(Logs(), batches(12), callback, max_epochs=1, logger=logger)
    assert logger.rows == list(range(12))
    assert counters(callback)["attempted"] >= 2


def test_profiler_records_steps_of_training_alone() -> None:
    class Profiled(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            with self.trainer.profiler.profile("own"):  # type: ignore[attr-defined]
                return super().training_step(batch, batch_idx)

    callback, profiler = rejecting(), SimpleProfiler()
    fit(Profiled(), batches(12), callback, max_epochs=1, profiler=profiler)
    assert len(profiler.recorded_durations["own"]) == 12
    assert counters(callback)["loss_evaluations"] >= 4


def test_experiment_shows_its_values_and_takes_none(tmp_path: Path) -> None:
    class Looks(Regression):
        folders: ClassVar[list[str]] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            experiment: Any = self.logger.experiment  # pyright: ignore[reportOptionalMemberAccess]
            experiment.add_scalar("own", random.random(), self.global_step)
            self.folders.append(str(Path(experiment.log_dir, "images")))
            return super().training_step(batch, batch_idx)

    callback, logger = rejecting(), TensorBoardLogger(tmp_path)
    fit(Looks(), batches(12), callback, max_epochs=1, logger=logger)
    assert callback.state_dict()["disabled"] is None
    assert len(Looks.folders) == 12
    assert set(Looks.folders) == {str(Path(logger.log_dir, "images"))}


class Experiment:
    """Counts its rows, in a context of its own."""

    def __init__(self) -> None:
        self.rows = 0

    @contextlib.contextmanager
    def train(self) -> Any:
        yield

    def track(self, _: float) -> None:
        self.rows += 1


class OwnLogger(Rows):
    """With an attribute instead of a property, and a method that Lightning does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.experiment = Experiment()  # pyright: ignore[reportIncompatibleMethodOverride]
        self.written = 0

    def write_row(self, _: float) -> None:
        self.written += 1


def test_experiment_and_methods_of_an_own_logger_are_silent() -> None:
    class Logs(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logger: Any = self.logger
            with logger.experiment.train():
                logger.experiment.track(1.0)
            logger.write_row(1.0)
            return super().training_step(batch, batch_idx)

    callback, logger = rejecting(), OwnLogger()
    fit(Logs(), batches(12), callback, max_epochs=1, logger=logger)
    assert callback.state_dict()["disabled"] is None
    assert (logger.experiment.rows, logger.written) == (12, 12)


def test_experiments_reached_beside_the_logger_are_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Logs(Regression):
        def on_fit_start(self) -> None:
            self.writer: Any = self.logger.experiment  # pyright: ignore[reportOptionalMemberAccess]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.writer.add_scalar("own", 1.0, self.global_step)
            wandb.log({"own": 1.0})
            return super().training_step(batch, batch_idx)

    rows: list[Any] = []
    monkeypatch.setattr(wandb, "log", rows.append)
    callback, logger = rejecting(), TensorBoardLogger(tmp_path)
    fit(Logs(), batches(12), callback, max_epochs=1, logger=logger)
    events = event_accumulator.EventAccumulator(logger.log_dir).Reload()
    assert len(events.Scalars("own")) == 12
    assert len(rows) == 12
    assert callback.state_dict()["disabled"] is None


@pytest.mark.parametrize("log", [[], lambda *_: None], ids=["list", "other arguments"])
def test_progress_bar_needs_no_log_of_the_module(log: Any) -> None:
    class Own(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log = log
            return mse_loss(self.network(batch[0]), batch[1])

    callback = rejecting()
    fit(Own(), batches(12), callback, max_epochs=1, enable_progress_bar=True)
    assert counters(callback)["attempted"] >= 2


def test_exit_of_an_evaluation_does_not_end_the_program() -> None:
    class Exits(Regression):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.trained = self.network[0].weight.detach().clone()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if not torch.equal(self.network[0].weight, self.trained):
                sys.exit(1)
            return super().training_step(batch, batch_idx)

    callback = rejecting()
    trainer = fit(Exits(), batches(12), callback, max_epochs=1)
    assert trainer.global_step == 12
    assert "raised SystemExit: 1" in callback.state_dict()["disabled"]


def test_manual_step_may_look_at_its_gradients() -> None:
    class Manual(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization, self.norms = False, []

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(mse_loss(self.network(batch[0]), batch[1]))
            self.norms.append(self.network[0].weight.grad.norm().item())  # pyright: ignore[reportOptionalMemberAccess]
            optimizer.step()

    ends, callback = [], rejecting()
    for callbacks in ([], [callback]):
        module = Manual()
        fit(module, batches(12), *callbacks, max_epochs=1)
        ends.append([weights(module), module.norms])
    assert_bitwise_equal(*ends)
    assert callback.state_dict()["disabled"] is None
    assert counters(callback)["loss_evaluations"] >= 4
