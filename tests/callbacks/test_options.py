"""Options of the callbacks: one definition, documented, refused where wrong, from any config."""

import dataclasses
import inspect
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch
import pytest
import torch
import yaml
from lightning.pytorch import strategies
from lightning.pytorch.cli import LightningCLI
from torch import Tensor

from lightning_stableaa import AndersonAccelerator, AndersonCallback, Smoothing, SmoothingMonitor
from lightning_stableaa.callbacks.base import check_supported
from lightning_stableaa.options import Options
from lightning_stableaa.report import Status
from tests.helpers.regression import (
    QUIET,
    TREES,
    Regression,
    Reports,
    anderson,
    batches,
    counters,
    fit,
    regression_class,
    trained,
)

CONF = Path(__file__).parents[2] / "conf" / "callbacks"


def signature(cls: type, *without: str) -> dict[str, tuple[Any, Any]]:
    """Defaults and annotations of all keyword-only parameters, in order."""
    parameters = inspect.signature(cls).parameters.values()
    assert all(one.kind is one.KEYWORD_ONLY for one in parameters if one.name != "optimizer")
    return {
        one.name: (one.default, one.annotation) for one in parameters if one.name not in without
    }


def documented(cls: type) -> list[str]:
    """Names of the section ``Args``, in order."""
    section = re.split(r"\n    [A-Z]", str(inspect.getdoc(cls)).split("Args:\n")[1])[0]
    section = section.split("\n\n")[0]
    return re.findall(r"^    (\w+):", section, flags=re.MULTILINE)


def test_callback_takes_options_of_accelerator_in_order() -> None:
    own = signature(AndersonCallback)
    assert own.pop("stochastic") == ("auto", "bool | Literal['auto']")
    assert own["warmup_steps"] == (0, "int | str")  # a Trainer has epochs
    own["warmup_steps"] = (0, "int")
    engine = signature(AndersonAccelerator, "optimizer", "process_group")
    assert list(own.items()) == list(engine.items()) == list(signature(Options).items())
    assert list(own) == [one.name for one in dataclasses.fields(Options)]


def test_monitor_takes_options_of_smoothing_in_order() -> None:
    assert list(signature(SmoothingMonitor).items()) == list(signature(Smoothing).items())


@pytest.mark.parametrize(
    "cls", [AndersonCallback, AndersonAccelerator, SmoothingMonitor, Smoothing]
)
def test_docstring_documents_every_option_in_order(cls: Any) -> None:
    assert documented(cls) == list(inspect.signature(cls).parameters)


def test_configuration_has_every_option_in_order_with_its_default() -> None:
    names = {
        "_anderson": ("anderson", AndersonCallback),
        "_smoothing": ("smoothing", SmoothingMonitor),
    }
    for file, (key, cls) in names.items():
        (found,) = yaml.safe_load((CONF / f"{file}.yaml").read_text()).values()
        assert found.pop("_target_") == f"lightning_stableaa.{cls.__name__}", key
        defaults = {name: default for name, (default, _) in signature(cls).items()}
        defaults.pop("smoothing", None)  # a SmoothingMonitor beside it
        assert list(found) == list(defaults)
        found = {k: v for k, v in found.items() if not str(v).startswith("${")}
        assert found == {name: defaults[name] for name in found}


def test_repr_names_options_that_differ_from_defaults() -> None:
    assert repr(AndersonCallback()) == "AndersonCallback()"
    callback = AndersonCallback(safeguard="none", history_depth=4, stochastic=False)
    text = "AndersonCallback(history_depth=4, safeguard='none', stochastic=False)"
    assert repr(callback) == text
    assert eval(text).options == callback.options
    monitor = SmoothingMonitor(rsd_threshold=0.3, of="iterates")
    assert repr(SmoothingMonitor()) == "SmoothingMonitor()"
    assert repr(monitor) == "SmoothingMonitor(rsd_threshold=0.3, of='iterates')"


def test_counts_are_those_of_the_run_after_the_fit() -> None:
    callback = anderson(safeguard="none")
    fit(Regression(), batches(), callback, max_epochs=20)
    assert callback.accelerator is None
    assert (callback.attempted, callback.accepted) == (10, 10)


@pytest.mark.parametrize(
    ("epochs", "accumulate", "first"),
    [("2 epochs", 1, 6), ("2 epochs", 2, 4), ("1.5 epochs", 1, 5)],
)
def test_warmup_in_epochs_counts_the_optimizer_steps_of_the_trainer(
    epochs: str, accumulate: int, first: int
) -> None:
    callback = anderson(warmup_steps=epochs, accelerate_every_n_steps=1)
    reports = Reports(callback)
    fit(
        Regression(),
        batches(3),
        callback,
        reports,
        max_epochs=4,
        accumulate_grad_batches=accumulate,
    )
    stepped = [one for one in reports.all if one.status is not Status.NO_OPTIMIZER_STEP]
    attempts = [step for step, one in enumerate(stepped, start=1) if one.attempted]
    assert attempts[0] == first
    assert eval(repr(callback)).warmup_epochs == float(epochs.split()[0])


def test_warmup_in_epochs_is_refused_where_it_has_no_meaning() -> None:
    with pytest.raises(ValueError, match=r"^warmup_steps must be an integer, or epochs .* 'soon'$"):
        AndersonCallback(warmup_steps="soon")

    class Endless(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(batches(3).dataset)

    loader = torch.utils.data.DataLoader(Endless(), batch_size=8)
    with pytest.raises(ValueError, match=r"^warmup_steps is given in epochs, and .* no length: "):
        fit(Regression(), loader, anderson(warmup_steps="2 epochs"), max_epochs=1)


class Lbfgs(Regression):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


class Hookless(torch.optim.Optimizer):
    """Around another optimizer, without what the base class sets up."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.param_groups, self.defaults = optimizer.param_groups, optimizer.defaults
        self.state = optimizer.state

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


class Lookahead(Regression):
    def configure_optimizers(self) -> Any:
        return Hookless(super().configure_optimizers())


class Fetches(Regression):
    def training_step(self, dataloader_iter: Any) -> Tensor:
        raise AssertionError("not reached")


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
@pytest.mark.parametrize(
    ("kind", "make_callbacks", "message"),
    [
        (
            Lbfgs,
            lambda: [anderson()],
            "optimizer=LBFGS is not supported by AndersonCallback: it iterates inside its step and "
            "extrapolates on its own; use SGD or Adam, or remove the callback",
        ),
        (
            Lookahead,
            lambda: [anderson()],
            "optimizer must be set up as a torch.optim.Optimizer, got Hookless, which has no step "
            "hooks: call super().__init__(params, defaults) in its __init__",
        ),
        (
            Fetches,
            lambda: [anderson()],
            "training_step(dataloader_iter) fetches batches, and cannot be evaluated again by "
            "AndersonCallback: define anderson_loss(batch) on the LightningModule, or set "
            "safeguard='none'",
        ),
        (
            Regression,
            lambda: [
                anderson(store_every_n_steps=2, smoothing=Smoothing(rsd_threshold=0.2)),
                SmoothingMonitor(),
            ],
            f"smoothing is given twice, as {Smoothing(rsd_threshold=0.2)} to AndersonCallback and "
            f"as {Smoothing()} by SmoothingMonitor: remove one of them",
        ),
        (
            Regression,
            lambda: [anderson(store_every_n_steps=2), SmoothingMonitor(average_window=9)],
            "average_window must be <= store_every_n_steps (2), got 9",
        ),
    ],
)
def test_unsupported_setting_stops_before_training(
    kind: Any, make_callbacks: Any, message: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}$"):
        fit(kind(), batches(), *make_callbacks(), max_epochs=1)


def test_apple_gpu_is_refused() -> None:
    strategy = SimpleNamespace(root_device=torch.device("mps"))
    trainer: Any = SimpleNamespace(strategy=strategy)
    with pytest.raises(
        ValueError, match=r"^accelerator='mps' is not supported by AndersonCallback"
    ):
        check_supported(trainer, "AndersonCallback")


@pytest.mark.parametrize(
    ("name", "way_out"),
    [
        ("DeepSpeedStrategy", "use strategy='ddp', or ModelParallelStrategy with FSDP2"),
        ("FSDPStrategy", "use ModelParallelStrategy with FSDP2, or strategy='ddp'"),
        ("XLAStrategy", "use strategy='ddp' on GPUs or CPUs"),
    ],
)
def test_strategy_that_hides_weights_is_refused(name: str, way_out: str) -> None:
    """They need hardware or packages to be built: an instance without them does."""
    strategy = object.__new__(getattr(strategies, name))
    strategy._optimizers = []
    trainer = lightning.pytorch.Trainer(**QUIET)
    trainer._accelerator_connector.strategy = strategy
    for callback in (AndersonCallback(), SmoothingMonitor()):
        kind = type(callback).__name__
        sentence = f"^strategy={name} is not supported by {kind}: {re.escape(way_out)}$"
        with pytest.raises(ValueError, match=sentence):
            callback.setup(trainer, Regression(), "fit")


# The two class trees of Lightning.


def run(tree: str, *callbacks: Any) -> Tensor:
    module = regression_class(tree)()
    fit(module, batches(), *callbacks, tree=tree, max_epochs=24)
    return trained(module)


def fours(**options: Any) -> AndersonCallback:
    return anderson(store_every_n_steps=4, accelerate_every_n_steps=8, **options)


def test_both_trees_train_the_same_weights_in_any_order_of_callbacks() -> None:
    # the average is on in the first cycle: averages of cycles 2, 3, ... enter the history
    smoothing = Smoothing(rsd_threshold=0.0)
    ends = []
    for tree in TREES:
        for order in (1, -1):
            callbacks = [fours(), SmoothingMonitor(rsd_threshold=0.0)][::order]
            ends.append(run(tree, *callbacks))
            counts = [counters(one) for one in callbacks if isinstance(one, AndersonCallback)]
            assert counts[0]["attempted"] == 2
            monitors = [one.state_dict() for one in callbacks if isinstance(one, SmoothingMonitor)]
            assert monitors == [{}]
        ends.append(run(tree, fours(smoothing=smoothing)))
    assert all(torch.equal(one, ends[0]) for one in ends)
    assert not torch.equal(ends[0], run(TREES[0], fours()))


@pytest.mark.parametrize("tree", TREES)
def test_monitor_alone_only_watches_unless_applied_to_weights(tree: str) -> None:
    plain = run(tree)
    options: dict[str, Any] = {"average_window": 4, "rsd_threshold": 0.0}
    assert torch.equal(run(tree, SmoothingMonitor(**options)), plain)
    assert not torch.equal(run(tree, SmoothingMonitor(**options, apply_to="weights")), plain)


# Configuration files.

CLI_CONFIG = """
trainer:
  accelerator: cpu
  logger: false
  callbacks:
    - class_path: lightning_stableaa.AndersonCallback
      init_args:
        history_depth: 5
        accelerate_every_n_steps: 40
        regularization: 0.01
        stochastic: false
        smoothing:
          class_path: lightning_stableaa.Smoothing
          init_args: {average_window: 3, of: iterates}
    - class_path: lightning_stableaa.SmoothingMonitor
      init_args: {average_window: 3, of: iterates}
"""


class CliModule(lightning.pytorch.LightningModule):
    """For LightningCLI, which wants a class that it can import."""


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Any:
    """LightningCLI warns of the arguments of pytest, jsonargparse of LightningCLI."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    return lambda *arguments: LightningCLI(
        CliModule, run=False, args=[*arguments], seed_everything_default=False
    )


def test_lightning_cli_round_trip_keeps_options(cli: Any, tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(CLI_CONFIG)
    made = cli("--config", str(first))
    made.parser.save(made.config, second, skip_check=False)
    for one in (made, cli("--config", str(second))):
        callback, monitor = one.trainer.callbacks[:2]
        assert callback.options == Options(
            history_depth=5,
            accelerate_every_n_steps=40,
            regularization=0.01,
            smoothing=Smoothing(average_window=3, of="iterates"),
        )
        assert callback.stochastic is False
        assert monitor.smoothing == Smoothing(average_window=3, of="iterates")
