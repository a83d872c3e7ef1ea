"""What ``stableaa-train`` does once its configuration has been checked; imports Lightning."""

import atexit
import difflib
import pickle
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from omegaconf import DictConfig, OmegaConf

from lightning_stableaa import AndersonCallback
from lightning_stableaa.callbacks.base import log_to_loggers
from lightning_stableaa.recipes.base import RecipeModule
from lightning_stableaa.recipes.errors import UserError, attribute_to, check_type
from lightning_stableaa.recipes.files import write_atomically
from lightning_stableaa.recipes.plots import draw_run
from lightning_stableaa.recipes.resuming import warn_config_diff


def fit(
    config: DictConfig, settings: dict[str, Any], folder: Path, checkpoint: Path | None
) -> dict[str, float]:
    """Trains a checked configuration.

    Args:
        config: composed from ``train.yaml``.
        settings: the same, resolved.
        folder: where everything about the run goes.
        checkpoint: the one to resume from.

    Raises:
        UserError: a constructor refuses an option, or the parts do not fit each other.
        KeyboardInterrupt: training was interrupted.
    """
    _seed(config)
    folder.mkdir(parents=True, exist_ok=True)
    data, module = _data_and_module(config)
    callbacks = _instantiate_all(config.callbacks, "Callback", "callbacks")
    loggers = _instantiate_all(config.logger, "Logger", "logger")
    of_run = [
        _SaveConfiguration(settings, folder),
        *callbacks,
        *(_Outcome(), _Interruption(), _MisspelledMetric()),
    ]
    trainer = _make_trainer(config, callbacks=of_run, logger=loggers)
    if isinstance(trainer.strategy, ModelParallelStrategy) and isinstance(module, RecipeModule):
        module.configure_model = module.shard_weights  # a module of the user's own has its own
    if checkpoint is not None and trainer.is_global_zero:
        warn_config_diff(checkpoint, settings)
    atexit.register(_destroy_process_group)
    option = None if checkpoint is None else f"resume_from={config.resume_from}"
    with _translate_fit_errors(option), _interruptible(), _finished_wandb():
        trainer.fit(module, data, ckpt_path=checkpoint)
    if config.pictures and isinstance(module, RecipeModule) and trainer.is_global_zero:
        try:
            draw_run(folder, module.monitor)
            module.draw(folder / "pictures")
        except Exception as error:  # the run is complete without them
            rank_zero_warn(f"the pictures of this run were not drawn: {error}")
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


def evaluate(config: DictConfig, checkpoint: Path) -> dict[str, float]:
    """Metrics of a checkpoint on the validation data, and on those for tests where there are any.

    Args:
        config: composed from ``train.yaml``, as for the run that wrote the checkpoint.
        checkpoint: the one to load.

    Raises:
        UserError: a constructor refuses an option, or the checkpoint is that of another model.
    """
    _seed(config)
    data, module = _data_and_module(config)
    names = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = _make_trainer(config, **dict.fromkeys(names, False))
    results: dict[str, float] = {}
    with (
        _translate_fit_errors(f"evaluate={checkpoint}"),
        _interruptible(),
        warnings.catch_warnings(),
    ):
        # an evaluation needs no callbacks of the run
        warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")
        for run, has_steps in (
            (trainer.validate, is_overridden("validation_step", module)),
            (trainer.test, is_overridden("test_step", module)),
        ):
            if has_steps:
                run(module, data, ckpt_path=checkpoint, verbose=False)
                results |= {name: one.item() for name, one in trainer.callback_metrics.items()}
    return results


def _destroy_process_group() -> None:
    """Stops the threads of Gloo, which may abort the process at its end; Lightning stops NCCL."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


class _SaveConfiguration(Callback):
    """Keeps the resolved configuration once the loggers have claimed the run folder."""

    def __init__(self, settings: dict[str, Any], folder: Path) -> None:
        self.settings = settings
        self.folder = folder

    def on_fit_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Tells loggers that are read elsewhere."""
        if trainer.is_global_zero:
            for one in trainer.loggers:
                if not isinstance(one, CSVLogger):
                    one.log_hyperparams(self.settings)

    def on_sanity_check_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Writes ``config.yaml``, when a checkpoint to resume from was accepted."""
        self._write(trainer)

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """The same, for a run without a sanity check."""
        self._write(trainer)

    def _write(self, trainer: lightning.Trainer) -> None:
        if trainer.is_global_zero:
            resolved = OmegaConf.to_yaml(OmegaConf.create(self.settings))
            write_atomically(self.folder / "config.yaml", resolved)


class _MisspelledMetric(Callback):
    """Refuses a monitored metric that is not logged and looks like one that is, at the start."""

    def on_sanity_check_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Compares what callbacks monitor with what a few batches of validation have logged."""
        logged = list(trainer.callback_metrics)
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        monitored = [getattr(one, "monitor", None) for one in callbacks]
        for monitor in {str(one) for one in monitored if one is not None} - set(logged):
            close = difflib.get_close_matches(monitor, logged, n=1, cutoff=0.8)
            if close:
                raise UserError(
                    f"metric={monitor}: validation logs no such metric; did you mean {close[0]}?"
                )


class _Interruption(Callback):
    """Lets Ctrl-C end a run between two batches; a second one ends it at once.

    Within a batch it may leave the lock of a logger's thread taken, for which the end of the run
    would wait. Several processes do not agree on a batch, and are interrupted at once.
    """

    def __init__(self) -> None:
        self.received = False
        self.handler: Any = None

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Takes the place of the handler, unless that ignores the signal."""
        handler = signal.getsignal(signal.SIGINT)
        if trainer.world_size == 1 and callable(handler):
            self.handler = handler
            signal.signal(signal.SIGINT, self._note)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Ends the run where Ctrl-C was pressed."""
        if self.received:
            raise KeyboardInterrupt

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        """Ends the run where Ctrl-C was pressed."""
        if self.received:
            raise KeyboardInterrupt

    def on_train_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Gives the handler back."""
        self._give_back()

    def on_exception(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        exception: BaseException,
    ) -> None:
        """Gives the handler back."""
        self._give_back()

    def _note(self, number: int, frame: Any) -> None:
        if self.received:
            self.handler(number, frame)
        self.received = True

    def _give_back(self) -> None:
        if signal.getsignal(signal.SIGINT) == self._note:
            signal.signal(signal.SIGINT, self.handler)


class _Outcome(Callback):
    """Logs what the run has cost, and adds that and the best metric to its results.

    Metrics of callbacks are what Lightning brings back from forked processes.
    """

    logged: dict[str, float] | None = None

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Logs the cost of what is validated, within a fit."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._log(trainer)

    def on_train_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Logs the cost of the run, unless the last step was validated."""
        self._log(trainer)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Adds the cost and the best metric to ``trainer.callback_metrics``."""
        results = _cost(trainer)
        for one in trainer.checkpoint_callbacks:
            if isinstance(one, ModelCheckpoint) and one.best_model_score is not None:
                results[f"best/{one.monitor}"] = one.best_model_score.item()
        for name, value in results.items():
            trainer.callback_metrics[name] = torch.tensor(value, dtype=torch.float64)

    def _log(self, trainer: lightning.Trainer) -> None:
        cost = _cost(trainer)
        if cost != self.logged:
            log_to_loggers(trainer, cost)
        self.logged = cost


def _cost(trainer: lightning.Trainer) -> dict[str, float]:
    """Gradients of batches, and losses that the safeguard evaluated, since the run began."""
    cost = {"cost/gradients": float(trainer.fit_loop.total_batch_idx + 1)}
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for one in callbacks:
        if isinstance(one, AndersonCallback):
            cost["cost/loss_evaluations"] = float(one.loss_evaluations)
    return cost


def _seed(config: DictConfig) -> None:
    with attribute_to("seed"):
        lightning.seed_everything(config.seed, workers=True, verbose=False)
    if config.threads is not None:
        with attribute_to("threads", RuntimeError):
            torch.set_num_threads(config.threads)


def _data_and_module(config: DictConfig) -> tuple[Any, Any]:
    has_data = OmegaConf.select(config, "data._target_") is not None  # else the module has it
    data = _instantiate(config.data, "LightningDataModule", "data") if has_data else None
    module = _instantiate(config.module, "LightningModule", "module")
    if not isinstance(module, lightning.LightningModule):
        raise UserError(
            f"module._target_={config.module._target_}: is a module of pytorch_lightning; derive "
            "it from lightning.LightningModule, or use AndersonCallback in a Trainer of "
            "pytorch_lightning"
        )
    return data, module


def _make_trainer(config: DictConfig, **options: Any) -> lightning.Trainer:
    make_trainer = instantiate(config.trainer, _partial_=True, _convert_="all")
    with attribute_to("trainer", MisconfigurationException):
        trainer = make_trainer(**options)
    check_type(trainer, "Trainer", "trainer")
    return trainer


def _instantiate(config: DictConfig, kind: str, option: str) -> Any:
    built = instantiate(config, _convert_="all")
    check_type(built, kind, option)
    return built


def _instantiate_all(group: DictConfig, kind: str, option: str) -> list[Any]:
    """Builds each entry of a group; an entry set to null is left out."""
    entries = {f"{option}.{name}": entry for name, entry in group.items() if entry is not None}
    return [_instantiate(entry, kind, name) for name, entry in entries.items()]


@contextmanager
def _finished_wandb() -> Iterator[None]:
    """Ends the run of Weights & Biases, which the next point of a sweep would go on with."""
    try:
        yield
    finally:
        if "wandb" in sys.modules:
            sys.modules["wandb"].finish()


@contextmanager
def _interruptible() -> Iterator[None]:
    """Raises KeyboardInterrupt again where Lightning has turned Ctrl-C into ``sys.exit(1)``."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, handler)  # which Lightning has left ignored
        raise KeyboardInterrupt from None


@contextmanager
def _translate_fit_errors(option: str | None) -> Iterator[None]:
    """Turns what callbacks, environments and checkpoints reject at the start into a UserError.

    ``option`` is the one that names the checkpoint.
    """
    try:
        yield
    except MisconfigurationException as error:
        way_out = ", or data._target_ given" if "_dataloader` must be imp" in str(error) else ""
        raise UserError(" ".join(str(error).split()) + way_out) from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{option}: holds more than tensors and plain containers, "
            "which may run any code when read; give a checkpoint that this command has written"
        ) from error
    except (KeyError, RuntimeError) as error:
        if option is None or not _while_loading(error):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(
            f"{option}: was written by another model or optimizer than those "
            f"configured, or not by a Trainer ({reason}); use the same model, data and "
            "optimizer options"
        ) from error
    except Exception as error:
        maker, _, part = type(error).__module__.partition(".")
        if maker in ("wandb", "mlflow") and part.startswith(("errors", "exceptions")):
            reason = " ".join(str(error).split())
            raise UserError(f"logger.{maker}: {reason}") from error
        if not isinstance(error, ValueError):
            raise
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        for origin, option in (
            ("lightning_stableaa.callbacks", "callbacks"),
            ("lightning_stableaa.options", "callbacks"),
            ("lightning.fabric.plugins.environments", "trainer"),
        ):
            if frame.f_globals["__name__"].startswith(origin):
                raise UserError(f"{option}: {error}") from error
        raise


def _while_loading(error: BaseException) -> bool:
    """Whether it was raised where a checkpoint is read, before training."""
    names = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
    loading = {"_restore_modules_and_callbacks", "restore_training_state", "resume_start"}
    return bool(names & loading)
