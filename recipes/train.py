"""``stableaa-train``: one training run, described by the configuration groups in ``conf/``."""

import logging
import math
import os
import pickle
import shutil
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import get_class, instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch.distributed import is_torchelastic_launched
from torch.distributed.rendezvous import rendezvous

from lightning_stableaa import AndersonCallback
from lightning_stableaa.recipes.base import RecipeModule
from lightning_stableaa.recipes.cli_errors import (
    USER_ERRORS,
    check_run,
    exit_on_user_error,
)
from lightning_stableaa.recipes.errors import UserError, attribute_to, check_type
from lightning_stableaa.recipes.files import disk_errors, write_atomically
from lightning_stableaa.recipes.launch import check_launch, check_sweep, join_submitit
from lightning_stableaa.recipes.plots import draw_run
from lightning_stableaa.recipes.preemption import checkpoint_to_resume
from lightning_stableaa.recipes.resuming import warn_config_diff


def train(config: DictConfig) -> dict[str, float]:
    """Trains as configured and leaves everything about the run in ``config.run_folder``.

    Returns:
        The last value of everything logged, and ``best/<metric>`` for the monitored metric.

    Raises:
        UserError, or an error of Hydra, OmegaConf or Lightning that means a wrong configuration;
        whatever the run had written by then is removed.
    """
    if not isinstance(config.run_folder, str) or not config.run_folder:
        raise UserError(f"run_folder={config.run_folder}: expected the path of a folder")
    with (
        _cleanup_on_error(Path(config.run_folder)) as folder,
        disk_errors("run_folder", folder),
    ):
        settings: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        check_run(settings)
        _check_trainer(settings["trainer"])
        _check_history_device(settings["callbacks"])
        check_launch(settings, os.environ)
        checkpoint = checkpoint_to_resume(config.resume_from, folder)
        if config.resume_from is None and any(folder.glob("checkpoints/*.ckpt")):
            raise UserError(
                f"run_folder={folder}: holds checkpoints of an earlier run, which this one would "
                "overwrite; add resume_from=auto to go on with it, or choose another run_name"
            )
        with attribute_to("seed"):
            lightning.seed_everything(config.seed, workers=True, verbose=False)
        if config.threads is not None:
            with attribute_to("threads", RuntimeError):
                torch.set_num_threads(config.threads)
        folder.mkdir(parents=True, exist_ok=True)
        data = _instantiate(config.data, "LightningDataModule", "data")
        module = _instantiate(config.module, "LightningModule", "module")
        callbacks = _instantiate_all(config.callbacks, "Callback", "callbacks")
        loggers = _instantiate_all(config.logger, "Logger", "logger")
        make_trainer = instantiate(config.trainer, _partial_=True, _convert_="all")
        with attribute_to("trainer", MisconfigurationException):
            trainer: lightning.Trainer = make_trainer(
                callbacks=[_SaveConfiguration(settings, folder), *callbacks], logger=loggers
            )
        check_type(trainer, "Trainer", "trainer")
        if isinstance(trainer.strategy, ModelParallelStrategy) and isinstance(module, RecipeModule):
            module.configure_model = module.shard_weights  # a module of the user's own has its own
        if checkpoint is not None and trainer.is_global_zero:
            warn_config_diff(checkpoint, settings)
        with _translate_fit_errors(config.resume_from):
            trainer.fit(module, data, ckpt_path=checkpoint)
    if config.pictures and isinstance(module, RecipeModule) and trainer.is_global_zero:
        with disk_errors("run_folder", folder):
            draw_run(folder, module.monitor)
            module.draw(folder / "pictures")
    return _results(trainer, callbacks)


class _SaveConfiguration(Callback):
    """Writes the resolved configuration once the loggers have claimed the run folder."""

    def __init__(self, settings: dict[str, Any], folder: Path) -> None:
        self.settings = settings
        self.folder = folder

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Writes ``config.yaml``."""
        if trainer.is_global_zero:
            resolved = OmegaConf.to_yaml(OmegaConf.create(self.settings))
            write_atomically(self.folder / "config.yaml", resolved)


def _instantiate(config: DictConfig | None, kind: str, option: str) -> Any:
    built = instantiate(config, _convert_="all")
    if built is not None:  # a module may bring its own data
        check_type(built, kind, option)
    return built


def _instantiate_all(group: DictConfig, kind: str, option: str) -> list[Any]:
    """Builds each entry of a group; an entry set to null is left out."""
    entries = {f"{option}.{name}": entry for name, entry in group.items() if entry is not None}
    return [_instantiate(entry, kind, name) for name, entry in entries.items()]


def _check_history_device(callbacks: dict[str, Any] | None) -> None:
    device = ((callbacks or {}).get("anderson") or {}).get("history_device")
    if device is not None:
        # "Torch not compiled with CUDA enabled" is an AssertionError
        with attribute_to("callbacks.anderson.history_device", RuntimeError, AssertionError):
            torch.empty(0, device=device)


def _check_trainer(trainer: dict[str, Any]) -> None:
    """Counts that Lightning divides by without looking at them."""
    for name in ("accumulate_grad_batches", "val_check_interval"):
        if trainer.get(name) == 0:
            raise UserError(f"trainer.{name}=0: expected at least 1")


@contextmanager
def _translate_fit_errors(resume_from: str | None) -> Iterator[None]:
    """Turns what callbacks, environments and checkpoints reject at the start into a UserError."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise UserError(
            f"resume_from={resume_from}: holds more than tensors and plain containers, "
            "which may run any code when read; give a checkpoint that this command has written"
        ) from error
    except (KeyError, RuntimeError) as error:
        if resume_from is None or not _while_loading(error):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(
            f"resume_from={resume_from}: was written by another model or optimizer than those "
            f"configured, or not by a Trainer ({reason}); resume with the same model, data and "
            "optimizer options"
        ) from error
    except ValueError as error:
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


def _results(trainer: lightning.Trainer, callbacks: list[Callback]) -> dict[str, float]:
    results = {name: value.item() for name, value in trainer.callback_metrics.items()}
    results["cost/gradients"] = trainer.fit_loop.total_batch_idx + 1
    for callback in callbacks:
        if isinstance(callback, AndersonCallback):
            counters = callback.state_dict().get("counters")
            if counters is not None:  # the processes of ddp_fork keep them to themselves
                results["cost/loss_evaluations"] = counters["loss_evaluations"]
        if isinstance(callback, ModelCheckpoint) and callback.best_model_score is not None:
            results[f"best/{callback.monitor}"] = callback.best_model_score.item()
    return results


@contextmanager
def _cleanup_on_error(folder: Path) -> Iterator[Path]:
    """Removes what a refused run wrote, unless the folder was in use or holds a checkpoint."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run_folder={folder}: is a file; choose another folder")
    in_use = folder.is_dir() and any(folder.iterdir())
    try:
        yield folder
    except USER_ERRORS:
        if not in_use and not any(folder.glob("checkpoints/*.ckpt")):
            shutil.rmtree(folder, ignore_errors=True)
            _remove_empty(folder.parent)
        raise


def _remove_empty(folder: Path) -> None:
    """Removes what Hydra made for a run that wrote nothing there, or has been removed."""
    with suppress(OSError):
        for one in (folder, *folder.parents):
            if not one.is_relative_to(Path.cwd() / "runs"):
                break
            if one.exists():
                one.rmdir()


def _name_or_time(name: str | int | None) -> str:
    """The run's name, or its start, the same on every process of a torchrun job."""
    if name is not None:
        path = Path(str(name))
        if path.is_absolute() or not path.parts or ".." in path.parts:
            raise UserError(f"run_name={name}: expected the name of a folder below runs/RECIPE")
        return str(name)
    now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    if not is_torchelastic_launched():
        return now
    store, rank, _ = next(iter(rendezvous("env://")))
    if rank == 0:
        store.set("stableaa/run_time", now)
    return store.get("stableaa/run_time").decode()


def _class_attribute(path: str, name: str) -> Any:
    kind = get_class(path)
    if not hasattr(kind, name):
        raise UserError(
            f"module._target_={path}: has no {name}; name a class derived from RecipeModule, "
            f"or use stableaa-compare compare.module={path}"
        )
    return getattr(kind, name)


def _register_resolvers() -> None:
    OmegaConf.register_new_resolver("name_or_time", _name_or_time, use_cache=True, replace=True)
    OmegaConf.register_new_resolver("product", lambda *factors: math.prod(factors), replace=True)
    OmegaConf.register_new_resolver("quotient", lambda a, b: int(a) // int(b), replace=True)
    OmegaConf.register_new_resolver("class_attribute", _class_attribute, replace=True)


_register_resolvers()


@hydra.main(version_base="1.3", config_path="pkg://lightning_stableaa.conf", config_name="train")
def _train_from_command_line(config: DictConfig) -> None:
    # inside Hydra too, or it announces the failed job with two lines of its own
    with exit_on_user_error("stableaa-train"):
        join_submitit()
        hydra_config = HydraConfig.get()
        if hydra_config.mode == RunMode.MULTIRUN:  # a sweep can change what was checked before
            check_sweep(config, hydra_config.launcher)
        try:
            _print_results(train(config), config.run_folder)
        finally:
            _remove_empty(Path(hydra_config.runtime.output_dir))


@rank_zero_only
def _print_results(results: dict[str, float], folder: str) -> None:
    print(", ".join(f"{name} {value:.4g}" for name, value in sorted(results.items())))
    print(f"everything about this run: {folder}")


def filter_warnings() -> None:
    """Hides what a user can do nothing about."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    # reports an import that fails in three lines, before the one sentence that is enough
    logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)
    for message in (
        "'set_vital' is deprecated",  # torchdata 0.11 with torch 2.13
        ".*LeafSpec.* is deprecated",  # lightning 2.6 with torch 2.13
        ".*does not have many workers",  # the small recipes' data are in memory
        "Detected an existing checkpoint",  # last.ckpt of model_parallel is meant to be overwritten
        "Checkpoint directory .* exists and is not empty",  # of a run that goes on in its folder
        "The dirpath has changed",  # a resumed run keeps its best checkpoint in its own folder
    ):
        warnings.filterwarnings("ignore", message=message)


@contextmanager
def config_only_mode(arguments: list[str]) -> Iterator[None]:
    """A configuration that is shown needs a recipe as well, and may be read to its first lines."""
    if not {"--help", "-h", "--cfg", "-c", "--info", "-i"} & set(arguments):
        yield
        return
    if not any(one.startswith("recipe=") for one in arguments):
        arguments.append("recipe=admissions_mlp")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # and what is left over has to go somewhere when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    """Entry point of ``stableaa-train``; a user error ends in one sentence and exit code 2."""
    # makes Hydra raise its errors instead of printing them itself and exiting with code 1
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    filter_warnings()
    with exit_on_user_error("stableaa-train"), config_only_mode(sys.argv):
        _train_from_command_line()


if __name__ == "__main__":
    main()
