"""Candidates that are not accepted change nothing: not one bit of what a program holds."""

import collections
import contextlib
import copy
import functools
import os
import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, ClassVar

import lightning.pytorch
import numpy as np
import pytest
import torch
import wandb
from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.profilers import SimpleProfiler
from tensorboard.backend.event_processing import event_accumulator
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import CatMetric, MeanMetric, MeanSquaredError, MetricCollection, SumMetric
from torchmetrics.wrappers import Running

from lightning_stableaa import SmoothingMonitor
from tests.helpers import own_counters, own_state
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
    capped,
    counters,
    end_of,
    fit,
    network,
    outcomes,
)

GENERATOR = np.random.default_rng(0)
CALLS = 0
AVERAGE: Any = np.float64(0.0)


class Meter:
    count = 0


METER = Meter()


class Namespace:
    step = 0


class Settings(HyperparametersMixin):
    count = 0


def count_globally() -> None:
    global CALLS
    CALLS += 1


def reset_globals() -> None:
    global GENERATOR, CALLS, AVERAGE
    GENERATOR, CALLS, AVERAGE = np.random.default_rng(0), 0, np.float64(0.0)
    own_state.SEEN = own_state.Meter.total = own_counters.CALLS = 0
    own_counters.COUNTS.clear()
    METER.count = Namespace.step = 0
    Program.shared.clear()
    Program.drawn = np.random.default_rng(0)
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(7)


class Program(Regression):
    """Its training step has effects, what they return belongs to the loss.

    Args:
        effects: by name; called with the module and the batch.
    """

    shared: ClassVar[list[float]] = []
    drawn: ClassVar[Any] = None

    def __init__(self, effects: dict[str, Any], *, steering: Steering | None = None) -> None:
        layers = [nn.Linear(INPUTS, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.0)]
        adam = functools.partial(torch.optim.Adam, lr=1e-3)
        super().__init__(network(*layers, nn.Linear(8, 1)), adam)
        self.steering = steering or Steering()
        self.effects, self.seen = effects, []
        self.key = network(seed=3).requires_grad_(False)
        self.book, self.codes = (nn.Parameter(torch.zeros(4), False) for _ in range(2))
        self.register_buffer("queue", torch.zeros(6))
        self.register_buffer("average", torch.zeros(()))
        self.plain = torch.zeros(4)
        with torch.inference_mode():
            self.bank = torch.zeros(4)
        self.number, self.settings, self.meter, self.nodes = 0, Settings(), Meter(), {Meter(): 0.0}
        self.items: Any = {"list": [], "set": set(), "deque": collections.deque(maxlen=3)}
        self.items |= {"counter": collections.Counter(), "nested": {"a": [{"b": [0]}]}}
        self.items["ordered"] = collections.OrderedDict(a=0.0)
        self.vocabulary: Any = collections.defaultdict(lambda: len(self.vocabulary))
        self.replay: Any = np.empty(4, dtype=object)
        layer: Any = self.network[0]
        layer.seen, layer.scale = [], torch.ones(())
        layer._inputs, layer.state = [], SimpleNamespace(count=0)
        layer.register_forward_hook(lambda one, *_: one.seen.append(1.0))
        self.heard: list[float] = []
        self.network[2].register_forward_pre_hook(functools.partial(hear, self.heard))
        self.metric = {"mse": MeanSquaredError()}  # no submodule
        self.error, self.recent, self.losses = (
            MeanSquaredError(),
            Running(SumMetric(), 3),
            CatMetric(),
        )
        self.together = MetricCollection({"mean": MeanMetric(), "again": MeanMetric()})
        with torch.random.fork_rng(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing is deprecated
            torch.manual_seed(0)
            body = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
            self.traced: Any = torch.jit.trace(body, torch.ones(4, 1), check_trace=False)
        self.traced.requires_grad_(False)
        self.own = nn.Parameter(torch.ones(2))
        self.optimizer_of_own = torch.optim.Adam([self.own], lr=0.1)
        self.second_optimizer = torch.optim.SGD(self.network[4].parameters(), 1e-3, momentum=0.9)
        self.draws = {"torch": torch.Generator().manual_seed(0), "random": random.Random(0)}
        self.draws |= {"numpy": np.random.default_rng(0), "legacy": np.random.RandomState(0)}
        self.sobol = torch.quasirandom.SobolEngine(1, scramble=True, seed=0)
        generator = torch.Generator().manual_seed(0)
        self.loader = DataLoader(TensorDataset(torch.arange(8)), shuffle=True, generator=generator)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer([*self.network.parameters(), self.book])
        if "step_of_schedule" not in self.effects:  # by which the optimizer would be reached too
            return optimizer
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        offset = self.steering.offset if self.steering.at_candidate(self) else 0.0
        if offset == np.inf:
            raise KeyboardInterrupt
        seen = {name: effect(self, batch) for name, effect in self.effects.items()}
        self.seen.append(seen)
        numbers = [one for one in seen.values() if isinstance(one, int | float)]
        loss = super().training_step(batch, batch_idx)
        return loss * (1 + 1e-3 * sum(numbers)) + offset


def hear(heard: list[float], *_: Any) -> None:
    heard.append(2.0)


@torch.no_grad()
def momentum_encoder(module: Any, _: Any) -> float:
    queries, keys = module.network[0].parameters(), module.key[0].parameters()
    for q, k in zip(queries, keys, strict=True):
        k.data = 0.9 * k.data + 0.1 * q.data  # replaces the memory
    queries, keys = module.network[4].parameters(), module.key[2].parameters()
    for q, k in zip(queries, keys, strict=True):
        k.data.mul_(0.9).add_(q.data, alpha=0.1)  # in place
    return sum(one.sum().item() for one in module.key.parameters())


def containers(module: Any, batch: Any) -> str:
    items, value = module.items, batch[1].mean().item()
    items["list"].append(value)
    items["set"].add(round(value, 3))
    items["deque"].appendleft(value)
    items["counter"][len(items["list"])] += 1
    items["nested"]["a"][0]["b"][0] += value
    items["ordered"].move_to_end("a")
    items["ordered"][f"{value}"] = value
    items[value] = items.pop("last", 0)
    return repr(items | {"set": sorted(items["set"])})


def modes(module: Any, _: Any) -> str:
    module.key.train(not module.key.training)
    module.key.requires_grad_(not module.key[0].weight.requires_grad)
    module.network[2].eval()
    return repr([module.key.training, module.key[0].weight.requires_grad])


def metrics(module: Any, batch: Any) -> float:
    prediction, loss = module.key(batch[0]).detach(), batch[1].mean()
    module.metric["mse"].update(prediction, batch[1])
    module.error(prediction, batch[1])
    for one in (module.recent, module.losses, module.together):
        one(loss)
    module.log("error", module.error, on_step=True, on_epoch=True)
    module.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
    module.log_dict({"recent": module.recent.compute()}, on_epoch=True)
    found = [module.metric["mse"], module.error, module.recent, module.together["again"]]
    return sum(one.compute().item() for one in found) + module.losses.compute().sum().item()


def globals_and_classes(module: Any, _: Any) -> float:
    count_globally()
    METER.count += 1
    Namespace.step += 1
    module.shared.append(1.0)
    return CALLS + METER.count + Namespace.step + len(module.shared)


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


def objects(module: Any, batch: Any) -> str:
    meter, [node] = module.meter, module.nodes
    meter.__dict__ = {**vars(meter), "count": meter.count + 1}
    node.count += 1  # a key
    module.settings.count += 1
    module.number += 1
    word = module.vocabulary[module.number]
    module.replay[module.number % 4] = batch[0].mean(0)
    return f"{meter.count} {node.count} {module.settings.count} {module.number} {word}" + repr(
        module.replay
    )


def attributes_of_layers(module: Any, _: Any) -> float:
    layer = module.network[0]
    layer.scale.mul_(0.9)
    layer._inputs.append(1)
    layer.state.count += 1
    found = len(layer.seen) + len(module.heard) + len(layer._inputs) + layer.state.count
    return found + float(layer.scale)


def tensor_of_inference_mode(module: Any, _: Any) -> float:
    with torch.inference_mode():
        module.bank.add_(1.0)
    return float(module.bank.sum())


def traced_statistics(module: Any, batch: Any) -> float:
    module.traced(batch[0][:, :1])
    return float(module.traced.state_dict()["1.running_mean"])


def replaced_codes(module: Any, batch: Any) -> float:
    module.codes = nn.Parameter(0.9 * module.codes + batch[1].mean(), requires_grad=False)
    module.average = 0.9 * module.average + module.codes.sum()
    return float(module.average)


def step_of_own(module: Any, _: Any) -> float:
    scale = module.own.square().mean()
    module.optimizer_of_own.zero_grad()
    scale.backward()
    module.optimizer_of_own.step()
    return scale.item()


def step_of_schedule(module: Any, _: Any) -> str:
    schedule = module.lr_schedulers()
    schedule.step()
    return f"{schedule.last_epoch} {schedule.get_last_lr()}"


def of_trainer(module: Any, _: Any) -> float:
    trainer = module.trainer
    trainer.seen = getattr(trainer, "seen", 0) + 1
    trainer.rows = getattr(trainer, "rows", [])
    trainer.rows.append(1)
    trainer.datamodule.seen += 1
    trainer.datamodule.steps.append(1)
    if module.global_step == 6 and trainer.accumulate_grad_batches < 2:
        trainer.accumulate_grad_batches *= 2
    if len(trainer.rows) == 6:
        trainer.fit_loop.max_epochs += 1
    data = trainer.datamodule.seen + len(trainer.datamodule.steps)
    return data + trainer.seen + len(trainer.rows) + trainer.fit_loop.max_epochs


def files(module: Any, _: Any) -> str:
    """A name of the logger, a checkpoint, and the terminal."""
    trainer = module.trainer
    assert isinstance(module.logger, CSVLogger)
    path = Path(trainer.default_root_dir) / f"{trainer.global_step}.ckpt"
    trainer.save_checkpoint(path, weights_only=True)
    print("step", trainer.global_step)
    return os.path.relpath(trainer.log_dir, trainer.default_root_dir)


def gradient_of_the_inputs(module: Any, batch: Any) -> float:
    """As in adversarial training: by a backward pass through the network."""
    x = batch[0].requires_grad_()
    mse_loss(module.network(x), batch[1]).backward()
    return float(x.grad.norm())


def slope_of_the_network(module: Any, batch: Any) -> float:
    """As in the loss of a physics-informed network; under ``no_grad`` this would raise."""
    x = batch[0].requires_grad_()
    (slope,) = torch.autograd.grad(module.network(x).sum(), x, create_graph=True)
    return slope.norm().item()


EFFECTS: dict[str, Callable[[Any, Any], Any]] = {
    "buffer": lambda m, batch: float(m.queue.add_(batch[1].mean()).sum()),
    "frozen parameter of the optimizer": lambda m, batch: float(
        m.book.data.copy_(0.9 * m.book + batch[1].mean()).sum()
    ),
    "tensor": lambda m, batch: float(m.plain.add_(batch[1].mean()).sum()),
} | {
    one.__name__: one
    for one in (
        *(momentum_encoder, containers, modes, metrics, globals_and_classes),
        *(numbers_of_numpy_in_globals, modules_of_a_project, objects, attributes_of_layers),
        *(tensor_of_inference_mode, traced_statistics, replaced_codes, step_of_own),
        *(step_of_schedule, of_trainer, files, gradient_of_the_inputs, slope_of_the_network),
    )
}

DRAWS: dict[str, Callable[[Any, Any], Any]] = {
    "class": lambda m, _: float(m.drawn.normal()),
    "global": lambda *_: float(GENERATOR.normal()),
    "torch.Generator": lambda m, _: float(torch.rand((), generator=m.draws["torch"])),
    "random.Random": lambda m, _: m.draws["random"].random(),
    "numpy.random.Generator": lambda m, _: m.draws["numpy"].random(),
    "RandomState": lambda m, _: m.draws["legacy"].rand(),
    "SobolEngine": lambda m, _: float(m.sobol.draw(1)),
    "another loader": lambda m, _: float(next(iter(m.loader))[0]),
    "the datamodule": lambda m, _: float(m.trainer.datamodule.generator.normal()),
    "Python": lambda *_: random.random(),
    "NumPy": lambda *_: float(np.random.rand()),
    "dropout": lambda m, batch: nn.functional.dropout(batch[0]).sum().item(),
}


def decay_rate(module: Any, _: Any) -> None:
    for group in module.trainer.optimizers[0].param_groups:
        group["lr"] *= 0.95


def shrink_weights(module: Any, _: Any) -> None:
    """Through ``.data``, which no version tells of."""
    for one in module.network.parameters():
        one.data.mul_(0.99)


def step_of_trained_weights(module: Any, _: Any) -> None:
    module.second_optimizer.zero_grad()
    module.network[4].weight.square().sum().backward()
    module.second_optimizer.step()
    module.second_optimizer.zero_grad()


class Data(lightning.pytorch.LightningDataModule):
    seen = 0

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []
        self.generator = np.random.default_rng(0)

    def train_dataloader(self) -> Any:
        return batches(8)


def trace(folder: Path, module: Any, *callbacks: Any) -> list[Any]:
    """What the module and the Trainer hold after every batch, and at the end."""
    folder.mkdir()
    reset_globals()
    record = Record(lambda *of: copy.deepcopy(end_of(*of)))
    options = {"default_root_dir": folder, "logger": CSVLogger(folder, flush_logs_every_n_steps=1)}
    trainer = fit(module, Data(), *callbacks, record, max_epochs=2, log_every_n_steps=1, **options)
    saved = [torch.load(one, weights_only=True) for one in sorted(folder.glob("*.ckpt"))]
    own = [one.state_dict() for one in (module.optimizer_of_own, module.second_optimizer)]
    return [*record.values, end_of(trainer, module), own, [one["state_dict"] for one in saved]]


@pytest.mark.parametrize(
    ("effects", "offset", "reason"),
    [
        (EFFECTS, 0.0, "rejected_loss_increase"),
        (EFFECTS | DRAWS, 1e3, "rejected_loss_increase"),
        (EFFECTS | DRAWS, float("nan"), "rejected_non_finite_loss"),
        ({"rate": decay_rate}, 0.0, "rejected_loss_increase"),
        ({"weights": shrink_weights}, 0.0, "rejected_loss_increase"),
        ({"weights by an optimizer": step_of_trained_weights}, 0.0, "rejected_loss_increase"),
    ],
    ids=["capped", "drawn", "nan", "rate", "weights", "weights by an optimizer"],
)
def test_effects_of_rejected_candidates_are_undone(
    effects: Any, offset: float, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = anderson() if offset else capped()
    plain, printed = trace(tmp_path / "plain", Program(effects)), capsys.readouterr().out
    module = Program(effects, steering=Steering(offset))
    assert_bitwise_equal(trace(tmp_path / "own", module, callback), plain)
    assert capsys.readouterr().out == printed
    assert callback.state_dict()["disabled"] is None
    assert counters(callback)["accepted"] == 0
    # random numbers make the objective stochastic, where some candidates are skipped
    assert set(outcomes(callback)) <= {reason, "skipped_noise_dominated"}
    assert outcomes(callback)[reason] >= 4


def test_acceptance_changes_trained_weights_alone(tmp_path: Path) -> None:
    callback, module = anderson(), Program(EFFECTS | DRAWS, steering=Steering(-1e3))
    plain = trace(tmp_path / "plain", Program(EFFECTS | DRAWS))
    accelerated = trace(tmp_path / "own", module, Record(lambda *_: None), callback)
    assert counters(callback)["accepted"] >= 2
    assert_bitwise_equal(accelerated[0], plain[0])
    names = [name for name, _ in module.network.named_parameters(prefix="network")]
    before, after = plain[1]["module"], accelerated[1]["module"]
    assert not any(torch.equal(before.pop(name), after.pop(name)) for name in names)
    assert_bitwise_equal(accelerated[1], plain[1])


def test_callback_that_never_fires_is_plain_run(tmp_path: Path) -> None:
    late: dict[str, Any] = {"warmup_steps": 10**9}
    averaged = late | {"store_every_n_steps": 4, "accelerate_every_n_steps": 8}
    plain = trace(tmp_path / "plain", Program(EFFECTS | DRAWS))
    for number, callbacks in enumerate(
        [
            [anderson(**late)],
            [anderson(**averaged, safeguard="none"), SmoothingMonitor()],
            [anderson(store_every_n_steps=100, accelerate_every_n_steps=100)],
            [SmoothingMonitor(average_window=4)],
        ]
    ):
        watched = trace(tmp_path / f"{number}", Program(EFFECTS | DRAWS), *callbacks)
        assert_bitwise_equal(watched, plain, f"callbacks {number}")


def test_error_that_leaves_the_fit_leaves_weights_and_hooks(tmp_path: Path) -> None:
    module = Program(EFFECTS | DRAWS, steering=Steering(float("inf")))
    with pytest.raises(SystemExit):
        trace(tmp_path / "own", module, anderson())
    interrupted = end_of(module.trainer, module)
    plain = trace(tmp_path / "plain", Program(EFFECTS | DRAWS))[1]
    for name in ("module", "gradients", "optimizers", "modes", "seen", "random"):
        assert_bitwise_equal(interrupted[name], plain[name], name)
    assert "training_step" not in vars(module.trainer.strategy)


def test_weights_after_rejected_averages_are_those_of_the_plain_run(tmp_path: Path) -> None:
    callback = anderson(store_every_n_steps=2, accelerate_every_n_steps=2)
    module = Program({"weights": shrink_weights}, steering=Steering(1e3))
    callbacks = [SmoothingMonitor(rsd_threshold=0.0), callback]
    plain = trace(tmp_path / "plain", Program({"weights": shrink_weights}))
    assert_bitwise_equal(trace(tmp_path / "own", module, *callbacks), plain)
    assert outcomes(callback) == {"rejected_loss_increase": 7}


# Logging, by any way.


class Rows(Logger):
    """Keeps what is logged; so does its ``experiment``, a property as those of Lightning."""

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
        own = {name: one for name, one in metrics.items() if not name.startswith("anderson/")}
        if own:
            self.rows.append((step, own))


Unregistered: Any = type("Rows", (Rows,), {"__module__": "loaded_by_a_path"})


class Registered(Rows):
    """Expects an argument of every class that derives from it."""

    def __init_subclass__(cls, *, tag: str) -> None:
        super().__init_subclass__()


class Experiment:
    """Counts its rows, in a context of its own."""

    def __init__(self) -> None:
        self.rows = 0

    @contextlib.contextmanager
    def train(self) -> Any:
        yield

    def track(self, _: float) -> None:
        self.rows += 1


class OwnLogger(Logger):
    """With an attribute instead of a property, and a method that Lightning does not know."""

    name: Any = "own"
    version: Any = "0"

    def __init__(self) -> None:
        super().__init__()
        self.experiment = Experiment()
        self.written = 0

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    def log_metrics(self, *_: Any, **__: Any) -> None: ...

    def write_row(self, _: float) -> None:
        self.written += 1


class Term(nn.Module):
    """Has got the module's ``log`` at its construction."""

    def __init__(self, log: Any) -> None:
        super().__init__()
        self.log_term = log


class Logs(Steered):
    def __init__(self) -> None:
        super().__init__()
        self.term, self.seen = Term(self.log), []

    def on_fit_start(self) -> None:
        self.writer: Any = self.loggers[4].experiment

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss, step = super().training_step(batch, batch_idx), self.global_step
        self.term.log_term("term", loss, on_step=False, on_epoch=True)
        super().log("super", loss, on_step=False, on_epoch=True)
        *rows, own, board = self.loggers
        for one in rows:
            one.log_metrics({"own": loss.item()}, step=step)
        rows[0].experiment.append(("experiment", loss.item()))
        with own.experiment.train():
            own.experiment.track(loss.item())
        own.write_row(loss.item())
        board.experiment.add_scalar("own", loss.item(), step)
        self.writer.add_scalar("held", loss.item(), step)
        wandb.log({"own": loss.item()})
        self.seen.append(Path(board.experiment.log_dir).name)
        with self.trainer.profiler.profile("own"):
            return loss


class LogsBeside(Callback):
    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        pl_module.log(self.name, float(trainer.global_step), on_step=False, on_epoch=True)


def test_evaluations_log_nothing_by_any_way_and_keep_what_callbacks_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*callbacks: Any) -> dict[str, Any]:
        log: dict[str, Any] = {"wandb": [], "module": Logs(), "profiler": SimpleProfiler()}
        monkeypatch.setattr(wandb, "log", log["wandb"].append)
        rows, own = [Rows(), Unregistered(), Registered()], OwnLogger()
        board = TensorBoardLogger(tmp_path / f"{len(callbacks)}", version="same")
        around = [LogsBeside("before"), *callbacks, LogsBeside("after")]
        options = {"max_epochs": 8, "log_every_n_steps": 1, "profiler": log["profiler"]}
        fit(log["module"], batches(), *around, logger=[*rows, own, board], **options)
        events = event_accumulator.EventAccumulator(board.log_dir).Reload()
        return {
            "rows": [one.rows for one in rows],
            "own": [own.experiment.rows, own.written],
            "board": [[one.value for one in events.Scalars(tag)] for tag in ("own", "held")],
            "wandb": log["wandb"],
            "folders": log["module"].seen,
            "profiled": len(log["profiler"].recorded_durations["own"]),
        }

    callback = anderson()
    plain, own = run(), run(callback)
    assert_bitwise_equal(own, plain)
    assert plain["own"] == [8, 8]
    assert [len(one) for one in plain["board"]] == [8, 8]
    assert plain["folders"] == ["same"] * 8
    assert outcomes(callback) == {"rejected_loss_increase": 4}


@pytest.mark.parametrize("log", [[], lambda *_: None], ids=["list", "other arguments"])
def test_progress_bar_needs_no_log_of_the_module(log: Any) -> None:
    class Own(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log = log
            return mse_loss(self.network(batch[0]), batch[1])

    callback = capped()
    fit(Own(), batches(12), callback, max_epochs=1, enable_progress_bar=True)
    assert counters(callback)["attempted"] >= 2


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
