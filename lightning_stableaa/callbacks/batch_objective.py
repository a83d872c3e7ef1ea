"""The loss of a Lightning training batch as a function of the weights."""

from __future__ import annotations

import atexit
import functools
import os
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext, redirect_stdout
from pathlib import Path
from typing import IO, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_stableaa.callbacks.manual_optimization import (
    dry_run,
    replace_attribute,
    single_objective,
)
from lightning_stableaa.distributed.dtensor import is_sharded
from lightning_stableaa.model.kinds import is_own, is_small_collection
from lightning_stableaa.model.objective import Objective, scalar
from lightning_stableaa.model.parameters import trainable_parameters
from lightning_stableaa.model.rng import global_generators, is_generator
from lightning_stableaa.model.snapshot import StateSnapshot, UnsupportedStateError
from lightning_stableaa.model.step_monitor import maximizes, unwrap_optimizers


class BatchObjective(Objective):
    """``training_step``, or ``anderson_loss(batch)`` where the LightningModule defines it.

    A training step is a program with effects. Before each evaluation everything that it can reach
    is as it was when the training step began: the batch, buffers, parameters that are not trained,
    plain attributes, metrics, generators, the step counter of the Trainer. Afterwards everything
    is as the training step left it. Nothing is logged.

    Called on the bare module: the forward pass of DDP would wait for a backward pass.

    Args:
        trainer: the Trainer.
        module: its LightningModule.
        stochastic: the loss is that of a sample; ``"auto"`` where an epoch has several batches.

    Attributes:
        batch: the one that was just trained on.
        is_due: an evaluation follows the current batch.
    """

    def __init__(self, trainer: Any, module: Any, *, stochastic: bool | str) -> None:
        self._optimizers = unwrap_optimizers(trainer.optimizers)
        self._trained = trained = trainable_parameters(self._optimizers)
        several = trainer.world_size > 1
        super().__init__(
            self._loss_of_batch,  # pyright: ignore[reportArgumentType]  # may return a Mapping
            stochastic=stochastic is True
            or (stochastic == "auto" and trainer.num_training_batches > 1),
            maximize=maximizes(self._optimizers),
            device=trained[0].device if trained else None,
            collective=several
            and (
                is_sharded(trained)
                or any(isinstance(one, nn.SyncBatchNorm) for one in module.modules())
            ),
        )
        self._trainer = trainer
        self._module = module
        self.batch: Any = None
        self._arguments: Sequence[Any] = ()  # of the training step
        self._before: StateSnapshot | None = None  # the training step
        self._results: Any = None  # of the Trainer
        self._evaluated = False  # in this context
        self._unsupported: str | None = None
        self._failed: str | None = None  # what could not be put back, though it was supported
        self._unhook = ExitStack()
        self._leave = ExitStack()
        self.is_due = False

    def save_before_training_step(self) -> None:
        """Keep the state in which the current batch is going to be trained on.

        The hooks of all callbacks and of the module come before: what they change belongs to it.
        """
        self.forget()
        self.is_due = True
        strategy = self._trainer.strategy
        training_step = strategy.training_step

        def save_and_train(*arguments: Any) -> Any:
            self._unhook.close()
            self._arguments = arguments
            self._save(arguments[0])
            before = _states_of(self._optimizers)
            output = training_step(*arguments)
            if self._module.automatic_optimization and _states_of(self._optimizers) != before:
                self._unsupported = "state of the optimizer, changed by training_step"
            return output

        replace_attribute(self._unhook, strategy, "training_step", save_and_train)

    def forget(self) -> None:
        """Let go of the batch and its state."""
        self._unhook.close()
        self.batch = self._before = self._unsupported = None
        self._arguments = ()
        self.is_due = False

    @property
    def unavailable(self) -> str | None:
        """Why the training step cannot be evaluated again; ``None`` where it can."""
        if has_own_loss(self._module):
            return None
        if self._before is not None and self._before.lost():
            self._unsupported = "a tensor that changes and is too large to be copied"
        unsupported = self._failed or self._unsupported
        if unsupported is None:
            return None
        return (
            f"the LightningModule or its batch holds {unsupported}, which cannot be put "
            "back; define anderson_loss(batch) on the LightningModule"
        )

    def __enter__(self) -> BatchObjective:
        try:
            self._prepare()
        except BaseException:
            self._leave.close()
            raise
        return self

    def _prepare(self) -> None:
        """What is put back on leaving."""
        trainer, loop = self._trainer, self._trainer.fit_loop.epoch_loop
        self._evaluated = False
        if self._before is None:  # with a loss of its own, which has no such effects
            super().__enter__()
        else:
            self._leave.callback(self._before.again().restore)
        for parameter in self._trained:
            # toggle_optimizer would leave it changed, were there an error before untoggle_optimizer
            self._leave.callback(parameter.requires_grad_, parameter.requires_grad)
            self._leave.callback(setattr, parameter, "grad", parameter.grad)
        self._results = loop._results
        self._leave.callback(setattr, loop, "_results", self._results)
        self._silence(trainer)

    def __exit__(self, *_: object) -> None:
        try:
            self._leave.close()
        except UnsupportedStateError as failure:
            self._failed = str(failure)

    def _evaluate(self) -> Any:
        for parameter in self._trained:
            parameter.grad = None  # a backward pass in the training step adds to it
        loop = self._trainer.fit_loop.epoch_loop
        loop._results = _lazy_class(type(self._results))()
        loop._results.batch = self.batch
        if self._before is None:
            return super()._evaluate()
        moved = self._before.restore()
        self.stochastic = self.stochastic or (self._evaluated and moved)
        self._evaluated = True
        self._module._current_fx_name = "training_step"
        loss = self._loss_of_batch()
        return None if loss is None else scalar(loss)

    def _silence(self, trainer: Any) -> None:
        """Until the context is left, nothing is logged, printed or saved."""
        held = () if self._before is None else filter(_is_writer, self._before.objects)
        for one in dict.fromkeys([*trainer.loggers, trainer.profiler, *held]):
            self._silence_writer(one)
        for module in filter(None, map(sys.modules.get, ("wandb", "mlflow"))):
            for name in [one for one in vars(module) if one.startswith("log")]:
                replace_attribute(self._leave, module, name, _nothing)
        replace_attribute(self._leave, trainer, "save_checkpoint", _nothing)
        self._leave.enter_context(redirect_stdout(_nowhere()))
        if trainer.world_size > 1:
            # of what is logged with sync_dist, and thrown away
            replace_attribute(self._leave, trainer.strategy, "reduce", _unreduced)
            for name in ("all_gather", "barrier", "broadcast"):
                communicate = getattr(trainer.strategy, name)
                replace_attribute(self._leave, trainer.strategy, name, self._notices(communicate))

    def _silence_writer(self, one: Any) -> None:
        silent = _silent_class(type(one))
        if silent is None:
            for name in [name for name in dir(one) if _writes(type(one), name)]:
                replace_attribute(self._leave, one, name, _nothing)
            return
        self._leave.callback(setattr, one, "__class__", type(one))
        one.__class__ = silent
        if "experiment" in vars(one):
            experiment = vars(one)["experiment"]
            hidden = _SilentExperiment(lambda: experiment)
            replace_attribute(self._leave, one, "experiment", hidden)

    def _notices(self, communicate: Callable[..., Any]) -> Callable[..., Any]:
        """A collective call of the training step, within which other ranks would wait for it."""

        def noticed(*arguments: Any, **options: Any) -> Any:
            self.collective = True
            return communicate(*arguments, **options)

        return noticed

    def _save(self, batch: Any) -> None:
        self._trained = trainable_parameters(self._optimizers)
        try:
            self._before = self._snapshot(batch)
        except UnsupportedStateError as error:
            self._unsupported = str(error)
        except Exception as error:  # of an object that cannot be looked into
            self._unsupported = f"an object that raises {type(error).__name__}: {error}"

    def _snapshot(self, batch: Any) -> StateSnapshot:
        """Of everything that a training step reads or writes, but the trained weights."""
        trainer, loop = self._trainer, self._trainer.fit_loop.epoch_loop
        steps = (
            loop.automatic_optimization.optim_progress.optimizer.step
            if self._module.automatic_optimization
            else loop.manual_optimization.optim_step_progress
        )
        roots = [
            *(self._module, batch, vars(trainer._logger_connector)),
            *[one.param_groups for one in self._optimizers],
            *[vars(config.scheduler) for config in trainer.lr_scheduler_configs],
            *_small_state_of(trainer),
            *_small_state_of(trainer.datamodule),
            *global_generators(self._device),
        ]
        return StateSnapshot(
            roots,
            self._trained,
            attributes=[vars(steps.total), vars(steps.current), *_attributes_of_data(trainer)],
            optimizers=self._optimizers,
            settings=(trainer, trainer.fit_loop, loop),
        )

    def _loss_of_batch(self) -> Any:
        with self._trainer.precision_plugin.train_step_context():
            if has_own_loss(self._module):
                output = self._module.anderson_loss(self.batch)
            elif self._module.automatic_optimization:
                output = self._module.training_step(*self._arguments)
            else:
                with dry_run(self._trainer, self._optimizers) as (losses, stepped):
                    output = self._module.training_step(*self._arguments)
                if losses:
                    return single_objective(losses, stepped, len(self._optimizers))
                if output is None:
                    raise ValueError("training_step neither calls manual_backward nor returns one")
        return output.get("loss") if isinstance(output, Mapping) else output


def _attributes_of_data(trainer: Any) -> list[dict[str, Any]]:
    """Of the datamodule, the datasets and the samplers, which may be too large to be followed."""
    owners = [trainer.datamodule]
    for loader in getattr(trainer.fit_loop._combined_loader, "flattened", []):
        owners += [getattr(loader, name, None) for name in ("dataset", "sampler", "batch_sampler")]
    return [vars(one) for one in owners if isinstance(getattr(one, "__dict__", None), dict)]


def _small_state_of(owner: Any) -> list[Any]:
    """Generators of random numbers and small collections that an object holds."""
    held = getattr(owner, "__dict__", {}).values()
    return [one for one in held if is_generator(one) or is_small_collection(one)]


def _is_writer(one: Any) -> bool:
    """Whether it is an experiment of a logger, which a module may hold itself."""
    return type(one).__module__.startswith(("torch.utils.tensorboard", "tensorboardX", "wandb."))


def _states_of(optimizers: Sequence[Optimizer]) -> list[Any]:
    """What shows that somebody wrote to the state of an optimizer."""
    return [
        (name, value._version if isinstance(value, Tensor) else value)
        for optimizer in optimizers
        for state in optimizer.state.values()
        if isinstance(state, dict)
        for name, value in state.items()
        if isinstance(value, Tensor | int | float)
    ]


@functools.cache
def _nowhere() -> IO[str]:
    """Opened once: that takes as long as the forward pass of a small network."""
    file = Path(os.devnull).open("w")  # noqa: SIM115  # closed at the end
    atexit.register(file.close)
    return file


def _unreduced(tensor: Any, *_: Any, **__: Any) -> Any:
    return tensor


def _nothing(*_: Any, **__: Any) -> Any:
    return nullcontext()  # some are entered: with experiment.train():


def _writes(kind: type, name: str) -> bool:
    """Whether it is a method by which a logger, a profiler or an experiment writes."""
    method = getattr(kind, name, None)
    own = isinstance(method, types.FunctionType) and is_own(method.__module__)
    return callable(method) and (
        name in ("save", "after_save_checkpoint", "start", "stop", "flush")
        or name.startswith(("log", "add_"))
        or (own and not name.startswith(("_", "get", "is_")))
    )


@functools.cache
def _silent_class(kind: Any) -> type | None:
    """A class of ``kind`` that writes nothing; ``None`` where none can derive from it as it is."""
    silent: dict[str, Any] = {name: _nothing for name in dir(kind) if _writes(kind, name)}
    experiment = getattr(kind, "experiment", None)
    if isinstance(experiment, property):
        silent["experiment"] = property(
            lambda one: _SilentExperiment(functools.partial(experiment.__get__, one, type(one)))
        )
    try:
        return type(kind.__name__, (kind,), silent)
    except TypeError:  # it expects arguments of a class that derives from it
        return None


@functools.cache
def _lazy_class(kind: Any) -> Any:
    """Results that Lightning puts together only if the training step reads what it has logged.

    It makes a metric of each, which takes longer than a few layers of a small network.
    """

    class LazyResults(kind):
        def __init__(self) -> None:
            super().__init__(training=True)
            self.pending: list[Callable[[], None]] = []

        def log(self, fx: str, name: str, value: Any, **options: Any) -> None:
            value = value.detach().clone() if isinstance(value, Tensor) else value
            self.pending.append(functools.partial(super().log, fx, name, value, **options))

        def __bool__(self) -> bool:
            while self.pending:
                self.pending.pop(0)()
            return len(self) > 0

        def valid_items(self) -> Any:
            return super().valid_items() if self else iter(())

    return LazyResults


class _SilentExperiment:
    """Shows what the experiment of a logger holds and gets, and does nothing else.

    Args:
        read: returns the experiment.
    """

    def __init__(self, read: Callable[[], Any]) -> None:
        self._read = read

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._read(), name, _nothing)
        return _nothing if callable(found) and not name.startswith("get") else found

    def __getitem__(self, _: Any) -> _SilentExperiment:  # of several experiments
        return self

    def __setitem__(self, *_: Any) -> None:
        pass


def has_own_loss(module: nn.Module) -> bool:
    """Whether the module says itself by which loss candidates are compared."""
    return callable(getattr(module, "anderson_loss", None))
