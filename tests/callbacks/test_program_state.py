"""State in the corners of a program: after rejected candidates it is that of the plain run."""

import collections
import itertools
import multiprocessing
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch
import numpy as np
import pytest
import torch
from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.profilers import SimpleProfiler
from torch import Tensor, nn
from torch.nn.functional import softplus

from lightning_stableaa import AndersonCallback, SmoothingMonitor
from tests.helpers.problems import assert_bitwise_equal
from tests.helpers.regression import Regression, anderson, batches, counters, fit, weights

GENERATOR = np.random.default_rng(0)
CALLS = 0


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
    global GENERATOR, CALLS
    GENERATOR, CALLS = np.random.default_rng(0), 0
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
        layer.register_forward_hook(lambda one, *_: one.seen.append(1.0))
        self.loader = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(torch.arange(8)),
            shuffle=True,
            generator=torch.Generator().manual_seed(0),
        )
        self.vocabulary: Any = collections.defaultdict(lambda: len(self.vocabulary))
        self.nodes = {Meter(): 0.0}
        self.settings = Settings(0)
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


def of_class(module: Any, _: Any) -> float:
    return float(module.drawn.normal())


def on_layers(module: Any, _: Any) -> float:
    layer = module.network[0]
    layer.scale.mul_(0.9)
    return len(layer.seen) + float(layer.scale)


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
    return module.trainer.seen


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


@pytest.mark.parametrize(
    ("effect", "reason"),
    [
        (damped_momentum, "state of the optimizer, changed by training_step"),
        (cleared_state, "state of the optimizer, changed by training_step"),
        (count_shared, "a multiprocessing.sharedctypes.Synchronized, which others may"),
        (next_number, "an iterator (itertools.count)"),
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


def test_logger_of_a_module_that_is_not_registered_is_silent() -> None:
    loaded = type("Rows", (Rows,), {"__module__": "loaded_by_a_path"})

    class Logs(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.logger.log_metrics({"batch": 1.0}, step=self.global_step)  # pyright: ignore[reportOptionalMemberAccess]
            return super().training_step(batch, batch_idx)

    logger, callback = loaded(), rejecting()
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
