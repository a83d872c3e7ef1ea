"""A small regression for both class trees of Lightning, with control over what is accepted."""

from __future__ import annotations

import functools
import importlib
import random
from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_stableaa import AndersonCallback, StepReport
from tests.helpers.problems import assert_bitwise_equal

Callback: Any = lightning.pytorch.Callback

TREES = ("lightning.pytorch", "pytorch_lightning")

INPUTS = 4

# Silent runs of one CPU process, unless a test asks for more.
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}

# Explicit, so that no count in these tests depends on the defaults.
SETTING: dict[str, Any] = {
    "history_depth": 5,
    "store_every_n_steps": 1,
    "accelerate_every_n_steps": 2,
    "stochastic": False,
}

OWN_METRICS = ("anderson_accepted", "rsd")  # of the progress bar

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]

# Small steps: residuals point the same way, so that no candidate is vetoed as noise.
sgd = functools.partial(torch.optim.SGD, lr=0.01)


def network(*layers: nn.Module, seed: int = 0) -> nn.Sequential:
    """``layers``, or a small tanh network, with seeded weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = layers or (nn.Linear(INPUTS, 8), nn.Tanh(), nn.Linear(8, 1))
        for layer in layers:
            if isinstance(layer, nn.Linear | nn.Conv2d | nn.BatchNorm1d):
                layer.reset_parameters()
        return nn.Sequential(*layers)


def rows(count: int, *, seed: int = 1, noise: float = 0.0) -> TensorDataset:
    """``count`` samples of a linear map of four inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, INPUTS, generator=generator)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]])
    return TensorDataset(x, y + noise * torch.randn(count, 1, generator=generator))


def batches(count: int = 1, *, size: int = 8, noise: float = 0.0) -> DataLoader:
    """``count`` batches of ``size`` samples, in order."""
    return DataLoader(rows(count * size, noise=noise), batch_size=size)


class _Regression:
    """What both trees share; the LightningModule comes in by ``regression_class``."""

    def __init__(self, net: nn.Module | None = None, make_optimizer: MakeOptimizer = sgd) -> None:
        super().__init__()
        self.network = net or network()
        self.make_optimizer = make_optimizer

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = mse_loss(self.network(x), y)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self: Any) -> Any:
        return self.make_optimizer(self.parameters())


@functools.cache
def regression_class(tree: str) -> Any:
    """The module as a LightningModule of ``tree``."""
    base = importlib.import_module(tree).LightningModule
    return type("Regression", (_Regression, base), {})


Regression: Any = regression_class("lightning.pytorch")


class Steering(Callback):
    """Decides which candidates a ``Steered`` module likes; stands before the AndersonCallback.

    Args:
        offset: added to the loss at a candidate: > 0 rejects, < 0 accepts it.
    """

    def __init__(self, offset: float = 1e3) -> None:
        self.offset = offset
        self._after_step: Tensor | None = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self._after_step = trained(pl_module.network)

    def at_candidate(self, module: Any) -> bool:
        """Whether the weights are others than those that the optimizer left."""
        return self._after_step is not None and not torch.equal(
            trained(module.network), self._after_step
        )


class Alternates(Steering):
    """Accepts the candidates of every so many steps, and rejects the others."""

    def __init__(self, every: int, *, at: int) -> None:
        super().__init__()
        self.every, self.at = every, at

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        super().on_train_batch_end(trainer, pl_module)
        self.offset = -1e3 if trainer.global_step % self.every == self.at else 1e3


class Steered(Regression):
    """Its training_step is evaluated, and the steering decides."""

    def __init__(self, *arguments: Any, steering: Steering | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.steering = steering or Steering()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss + self.steering.offset if self.steering.at_candidate(self) else loss


def fit(
    module: Any,
    loader: Any,
    *callbacks: Any,
    tree: str = "lightning.pytorch",
    ckpt_path: Any = None,
    val: Any = None,
    **options: Any,
) -> Any:
    """Train, with the steering of the module, and return the Trainer."""
    steering = [module.steering] if hasattr(module, "steering") else []
    trainer = importlib.import_module(tree).Trainer(
        **{**QUIET, "num_sanity_val_steps": 0, "callbacks": [*steering, *callbacks], **options}
    )
    trainer.fit(module, loader, val, ckpt_path=ckpt_path)
    return trainer


def anderson(**options: Any) -> AndersonCallback:
    """An iterate a step, an attempt every second step, unless ``options`` differ."""
    return AndersonCallback(**SETTING | options)


def capped(**options: Any) -> AndersonCallback:
    """Evaluates candidates that equal the weights, and rejects each of them."""
    return anderson(max_extrapolation=1e-30, **options)


def assert_plain_run(
    callback: Any,
    make_module: Callable[[], Any],
    loader: Any = None,
    *,
    beside: Iterable[Any] = (),
    **options: Any,
) -> Any:
    """A fit with the callback ends bitwise as the one without it; the Trainer of the former."""
    ends, trainer = [], None
    for callbacks in ([], [callback]):
        torch.manual_seed(7)
        module = make_module()
        data = batches() if loader is None else loader
        trainer = fit(module, data, *callbacks, *beside, **options)
        ends.append(end_of(trainer, module))
    assert_bitwise_equal(ends[1], ends[0])
    return trainer


def end_of(trainer: Any, module: Any) -> dict[str, Any]:
    """What a fit leaves; ``seen`` is what the module has recorded."""
    schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
    return {
        "seen": getattr(module, "seen", None),
        "step": [trainer.global_step, trainer.should_stop],
        "module": module.state_dict(),
        "gradients": [one.grad for one in module.parameters()],
        "optimizers": [one.state_dict() for one in trainer.optimizers],
        "schedules": [one.state_dict() for one in schedules],
        "modes": [one.training for one in module.modules()],
        "frozen": [one.requires_grad for one in module.parameters()],
        "random": random_state(),
        "logged": {k: v for k, v in trainer.callback_metrics.items() if k not in OWN_METRICS},
    }


def trained(module: Any) -> Tensor:
    """All trained parameters, one flat vector."""
    return torch.cat([p.detach().flatten() for p in module.parameters() if p.requires_grad])


def weights(module: nn.Module) -> Tensor:
    """All parameters and buffers, one flat vector."""
    return torch.cat([one.detach().flatten().double() for one in module.state_dict().values()])


def counters(callback: Any) -> dict[str, int]:
    """Counts of the engine, during or after a fit."""
    return callback.state_dict()["counters"]


def outcomes(callback: Any) -> dict[str, int]:
    """Outcomes of the engine, during or after a fit."""
    return dict(callback.state_dict()["outcomes"])


def num_iterates(callback: Any) -> int:
    """Iterates in the history, during or after a fit."""
    return callback.state_dict()["iterates"]["rows"].shape[0]


def random_state() -> tuple[Any, ...]:
    """The states of the global generators, comparable."""
    numpy_state: Any = np.random.get_state(legacy=False)
    key, position = numpy_state["state"]["key"].tobytes(), numpy_state["state"]["pos"]
    return torch.get_rng_state().numpy().tobytes(), repr(random.getstate()), key, position


class Record(Callback):
    """Appends ``read(trainer, module)`` after every batch."""

    def __init__(self, read: Callable[[Any, Any], Any]) -> None:
        self.read = read
        self.values: list[Any] = []

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.values.append(self.read(trainer, pl_module))


class Reports(Callback):
    """The reports of the engine; stands behind the callback that it watches."""

    def __init__(self, callback: Any) -> None:
        self.callback = callback
        self.all: list[StepReport] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        engine = self.callback.accelerator
        step = engine.step

        def recorded(*arguments: Any, **options: Any) -> StepReport:
            self.all.append(step(*arguments, **options))
            return self.all[-1]

        engine.step = recorded

    @property
    def attempted(self) -> list[StepReport]:
        """Those of attempts."""
        return [one for one in self.all if one.attempted]

    @property
    def accepted_steps(self) -> list[int]:
        """Batches, from 1, whose candidate was accepted."""
        return [step for step, one in enumerate(self.all, start=1) if one.accepted]


class SaveAt(Callback):
    """Writes a checkpoint after a step, once, as ModelCheckpoint(every_n_train_steps) does."""

    def __init__(self, step: int, path: Any) -> None:
        self.step, self.path = step, path
        self.saved = False

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step and not self.saved:
            trainer.save_checkpoint(self.path)
            self.saved = True


class Validated(Regression):
    """With a validation loss."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", mse_loss(self.network(batch[0]), batch[1]))
