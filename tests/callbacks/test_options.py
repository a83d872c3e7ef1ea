"""The callbacks' options: one definition, every wrong value refused, every configuration alike."""

import dataclasses
import importlib
import inspect
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_stableaa import (
    AndersonAccelerator,
    AndersonCallback,
    Smoothing,
    SmoothingMonitor,
)
from lightning_stableaa.callbacks.support import check_supported
from lightning_stableaa.options import Options
from tests.callbacks.regression import QUIET, SETTING, Regression, anderson, batches, fit


def defaults(cls: type, *left_out: str) -> dict[str, tuple[Any, Any]]:
    parameters = inspect.signature(cls).parameters.values()
    assert all(
        one.kind is one.KEYWORD_ONLY or one.name in left_out or one.name == "optimizer"
        for one in parameters
    )
    return {
        one.name: (one.default, one.annotation) for one in parameters if one.name not in left_out
    }


def test_the_callback_takes_the_options_of_the_accelerator() -> None:
    options = defaults(Options)
    assert defaults(AndersonAccelerator, "optimizer", "process_group") == options
    own = ("process_group", "recalibrate_batch_norm", "judge_samples", "monitor", "monitor_mode")
    assert defaults(AndersonCallback, *own) == options
    assert set(options) == {one.name for one in dataclasses.fields(Options)}


def test_the_monitor_takes_the_options_of_smoothing() -> None:
    assert defaults(SmoothingMonitor) == defaults(Smoothing)


def accelerator(**options: Any) -> AndersonAccelerator:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    return AndersonAccelerator(optimizer, **SETTING | options)


WRONG = [
    ("history_depth", 1, "history_depth must be >= 2, got 1"),
    ("history_depth", 2.0, "history_depth must be an integer, got 2.0"),
    ("history_depth", True, "history_depth must be an integer, got True"),
    ("store_every_n_steps", 0, "store_every_n_steps must be >= 1, got 0"),
    ("store_every_n_steps", "8", "store_every_n_steps must be an integer, got '8'"),
    (
        "accelerate_every_n_steps",
        5,
        "accelerate_every_n_steps must be a multiple of store_every_n_steps (2), got 5",
    ),
    ("accelerate_every_n_steps", 0, "accelerate_every_n_steps must be >= 1, got 0"),
    ("warmup_steps", -1, "warmup_steps must be >= 0, got -1"),
    ("warmup_steps", None, "warmup_steps must be an integer, got None"),
    ("relaxation", 0, "relaxation must be in (0, 1], got 0.0"),
    ("relaxation", 1.5, "relaxation must be in (0, 1], got 1.5"),
    ("relaxation", math.nan, "relaxation must be in (0, 1], got nan"),
    ("relaxation", "half", "relaxation must be a number, got 'half'"),
    ("lag_compensation", -1, "lag_compensation must be finite and >= 0 (0 for none), got -1.0"),
    (
        "look_ahead_cycles",
        math.inf,
        "look_ahead_cycles must be finite and >= 0 (0 for none), got inf",
    ),
    ("regularization", -1e-3, "regularization must be finite and >= 0, got -0.001"),
    ("regularization", math.inf, "regularization must be finite and >= 0, got inf"),
    ("regularization", [1e-3, math.nan], "regularization must be finite and >= 0, got nan"),
    ("regularization", [], "regularization must hold at least one value, got an empty list"),
    ("regularization", "auto", "regularization must be a number, got 'auto'"),
    ("max_extrapolation", 0, "max_extrapolation must be > 0 (inf for no cap), got 0.0"),
    ("max_extrapolation", math.nan, "max_extrapolation must be > 0 (inf for no cap), got nan"),
    ("max_extrapolation", None, "max_extrapolation must be a number, got None"),
    ("safeguard", "closure", "safeguard must be one of 'loss', 'none', got 'closure'"),
    ("safeguard", None, "safeguard must be one of 'loss', 'none', got None"),
    (
        "optimizer_state",
        "drop",
        "optimizer_state must be one of 'keep', 'mix', 'reset', got 'drop'",
    ),
    ("smoothing", True, "smoothing must be None or a Smoothing, got True"),
    (
        "smoothing",
        Smoothing(average_window=3),
        "average_window must be <= store_every_n_steps (2), got 3",
    ),
    ("apply_to", "test", "apply_to must be one of 'training', 'evaluation', 'both', got 'test'"),
    (
        "history",
        "split",
        "history must be one of 'auto', 'replicated', 'sharded', got 'split'",
    ),
    (
        "history_device",
        "gpu7",
        "history_device must be None or the name of a device, such as 'cpu', got 'gpu7'",
    ),
    (
        "history_device",
        7.5,
        "history_device must be None or the name of a device, such as 'cpu', got 7.5",
    ),
]


@pytest.mark.parametrize(("option", "value", "message"), WRONG)
@pytest.mark.parametrize("make", [anderson, accelerator])
def test_a_wrong_value_is_refused_in_one_sentence(
    make: Any, option: str, value: Any, message: str
) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        make(**{option: value})
    assert str(error.value) == message


def test_a_grid_needs_the_safeguard_to_choose() -> None:
    with pytest.raises(ValueError, match=r"^regularization must be a single value") as error:
        AndersonCallback(regularization=[1e-8, 1e-2], safeguard="none")
    assert str(error.value) == (
        "regularization must be a single value when safeguard is 'none', got [1e-08, 0.01]: only "
        "the safeguard can choose from a grid"
    )


WRONG_SMOOTHING = [
    ("average_window", 1, "average_window must be >= 2, got 1"),
    ("average_window", 2.5, "average_window must be an integer, got 2.5"),
    ("rsd_threshold", -0.1, "rsd_threshold must be >= 0, got -0.1"),
    ("rsd_threshold", math.nan, "rsd_threshold must be >= 0, got nan"),
    ("rsd_threshold", "low", "rsd_threshold must be a number, got 'low'"),
    ("rsd", "mean", "rsd must be one of 'norm', 'max', got 'mean'"),
    ("of", "weights", "of must be one of 'iterates', 'updates', got 'weights'"),
    ("apply_to", "training", "apply_to must be one of 'history', 'weights', got 'training'"),
]


@pytest.mark.parametrize(("option", "value", "message"), WRONG_SMOOTHING)
@pytest.mark.parametrize("cls", [SmoothingMonitor, Smoothing])
def test_a_wrong_value_of_smoothing_is_refused(
    cls: Any, option: str, value: Any, message: str
) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        cls(**{option: value})
    assert str(error.value) == message


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'history_dept'"):
        AndersonCallback(history_dept=3)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match="takes 1 positional argument but 2 were given"):
        AndersonCallback(8)  # pyright: ignore[reportCallIssue]


def refused(module: Any, *callbacks: Any, **options: Any) -> str:
    with pytest.raises((TypeError, ValueError)) as error:
        fit(module, batches(1), *callbacks, max_epochs=1, **options)
    return str(error.value)


class Lbfgs(Regression):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


@pytest.mark.parametrize("callback", [AndersonCallback, SmoothingMonitor])
def test_lbfgs_is_refused(callback: Any) -> None:
    assert refused(Lbfgs(), callback()) == (
        f"optimizer=LBFGS is not supported by {callback.__name__}: it iterates inside its step and "
        "extrapolates on its own; use SGD or Adam, or remove the callback"
    )


class Manual(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def test_manual_optimization_needs_a_judge() -> None:
    assert refused(Manual(), AndersonCallback()) == (
        "automatic_optimization=False is not supported by AndersonCallback without opting in: "
        "define anderson_loss(batch) on the LightningModule, or set safeguard='none'"
    )


def test_apple_gpus_are_refused() -> None:
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("mps")))
    with pytest.raises(ValueError, match=r"^accelerator='mps' is not supported by AndersonCallba"):
        check_supported(trainer, Regression(), "AndersonCallback")


def test_smoothing_given_twice_is_refused() -> None:
    given, monitored = Smoothing(rsd_threshold=0.2), SmoothingMonitor(rsd_threshold=0.3)
    assert refused(Regression(), AndersonCallback(smoothing=given), monitored) == (
        f"smoothing is given twice, as {given} to AndersonCallback and as {monitored.smoothing} by "
        "SmoothingMonitor: remove one of them"
    )


def test_a_window_longer_than_the_cycle_is_refused_with_a_monitor_as_well() -> None:
    assert refused(
        Regression(), anderson(store_every_n_steps=4), SmoothingMonitor(average_window=9)
    ) == ("average_window must be <= store_every_n_steps (4), got 9")


STRATEGIES = {
    "DeepSpeedStrategy": "use strategy='ddp', or ModelParallelStrategy with FSDP2",
    "FSDPStrategy": "use ModelParallelStrategy with FSDP2, or strategy='ddp'",
    "XLAStrategy": "use strategy='ddp' on GPUs or CPUs",
}


@pytest.mark.parametrize("tree", ["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.parametrize("callback", [AndersonCallback, SmoothingMonitor])
@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_that_hide_weights_are_refused(name: str, callback: Any, tree: str) -> None:
    """Most need hardware or packages to be built: an instance without them does."""
    strategies = importlib.import_module(f"{tree}.strategies")
    trainer_class = importlib.import_module(tree).Trainer
    trainer = trainer_class(**QUIET)
    strategy = object.__new__(getattr(strategies, name))
    strategy._optimizers = []
    trainer._accelerator_connector.strategy = strategy
    with pytest.raises(ValueError, match=r"^strategy=") as error:
        callback().setup(trainer, Regression(), "fit")
    assert str(error.value) == (
        f"strategy={name} is not supported by {callback.__name__}: {STRATEGIES[name]}"
    )
