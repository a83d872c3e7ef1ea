"""``stableaa-train``: one training run, described by the configuration groups in ``conf/``."""

import logging
import math
import os
import shutil
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch.distributed import is_torchelastic_launched
from torch.distributed.rendezvous import rendezvous

from lightning_stableaa import AndersonCallback
from lightning_stableaa.recipes.errors import UserError, blamed_on
from lightning_stableaa.recipes.files import write_atomically
from lightning_stableaa.recipes.launch import check_launch, check_sweep, join_submitit
from lightning_stableaa.recipes.mistakes import (
    MISTAKES,
    check_options,
    mistakes_in_one_sentence,
)
from lightning_stableaa.recipes.pictures import draw_run
from lightning_stableaa.recipes.preemption import checkpoint_to_resume


def train(config: DictConfig) -> dict[str, float]:
    """Trains as configured and leaves everything about the run in ``config.run_folder``.

    Returns:
        The last value of everything logged, and ``best/<metric>`` for the decisive metric.

    Raises:
        UserError, or an error of Hydra, OmegaConf or Lightning that means a wrong configuration;
        whatever the run had written by then is removed.
    """
    with _nothing_left_behind(Path(config.run_folder)) as folder:
        settings: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        check_options(settings)
        check_launch(settings, os.environ)
        checkpoint = checkpoint_to_resume(config.resume_from, folder)
        with blamed_on("seed"):
            lightning.seed_everything(config.seed, workers=True, verbose=False)
        if config.threads is not None:
            with blamed_on("threads", RuntimeError):
                torch.set_num_threads(config.threads)
        data = instantiate(config.data, _convert_="all")
        module = instantiate(config.module, _convert_="all")
        callbacks = _instantiate_all(config.callbacks)
        loggers = _instantiate_all(config.logger)
        make_trainer = instantiate(config.trainer, _partial_=True, _convert_="all")
        with blamed_on("trainer", MisconfigurationException):
            trainer: lightning.Trainer = make_trainer(
                callbacks=[_SaveConfiguration(settings, folder), *callbacks], logger=loggers
            )
        with _late_refusals():
            trainer.fit(module, data, ckpt_path=checkpoint)
    if config.pictures and trainer.is_global_zero:
        draw_run(folder, module.decisive_metric)
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


def _instantiate_all(group: DictConfig) -> list[Any]:
    """Builds each entry of a group; an entry set to null is left out."""
    return [instantiate(entry, _convert_="all") for entry in group.values() if entry is not None]


@contextmanager
def _late_refusals() -> Iterator[None]:
    """Callbacks and cluster environments refuse a setting with a ValueError once they see it."""
    try:
        yield
    except ValueError as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        for origin, option in (
            ("lightning_stableaa.callbacks", "callbacks"),
            ("lightning.fabric.plugins.environments", "trainer"),
        ):
            if frame.f_globals["__name__"].startswith(origin):
                raise UserError(f"{option}: {error}") from error
        raise


def _results(trainer: lightning.Trainer, callbacks: list[Callback]) -> dict[str, float]:
    results = {name: value.item() for name, value in trainer.callback_metrics.items()}
    results["cost/gradients"] = trainer.global_step
    for callback in callbacks:
        if isinstance(callback, AndersonCallback):
            counters = callback.state_dict().get("counters")
            if counters is not None:  # the processes of ddp_fork keep them to themselves
                results["cost/losses"] = counters["loss_evaluations"]
        if isinstance(callback, ModelCheckpoint) and callback.best_model_score is not None:
            results[f"best/{callback.monitor}"] = callback.best_model_score.item()
    return results


@contextmanager
def _nothing_left_behind(folder: Path) -> Iterator[Path]:
    """Removes what a mistaken run wrote, unless the folder was in use or holds a checkpoint."""
    in_use = folder.exists() and any(folder.iterdir())
    try:
        yield folder
    except MISTAKES:
        if not in_use and not any(folder.glob("checkpoints/*.ckpt")):
            shutil.rmtree(folder, ignore_errors=True)
            for parent in folder.parents:
                if not parent.is_relative_to(Path.cwd() / "runs") or any(parent.iterdir()):
                    break
                parent.rmdir()
        raise


def _name_or_time(name: str | None) -> str:
    """The run's name, or its start, the same on every process of a torchrun job."""
    if name is not None:
        return name
    now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    if not is_torchelastic_launched():
        return now
    store, rank, _ = next(iter(rendezvous("env://")))
    if rank == 0:
        store.set("stableaa/run_time", now)
    return store.get("stableaa/run_time").decode()


def _register_resolvers() -> None:
    OmegaConf.register_new_resolver("name_or_time", _name_or_time, use_cache=True, replace=True)
    OmegaConf.register_new_resolver("product", lambda *factors: math.prod(factors), replace=True)
    OmegaConf.register_new_resolver("quotient", lambda a, b: int(a) // int(b), replace=True)
    OmegaConf.register_new_resolver(
        "class_attribute", lambda path, name: getattr(get_class(path), name), replace=True
    )


_register_resolvers()


@hydra.main(version_base="1.3", config_path="pkg://lightning_stableaa.conf", config_name="train")
def _train_from_command_line(config: DictConfig) -> None:
    # inside Hydra too, or it announces the failed job with two lines of its own
    with mistakes_in_one_sentence("stableaa-train"):
        join_submitit()
        hydra_config = HydraConfig.get()
        if hydra_config.mode == RunMode.MULTIRUN:  # a sweep can change what was checked before
            check_sweep(config, hydra_config.launcher)
        _print_results(train(config), config.run_folder)


@rank_zero_only
def _print_results(results: dict[str, float], folder: str) -> None:
    print(", ".join(f"{name} {value:.4g}" for name, value in sorted(results.items())))
    print(f"everything about this run: {folder}")


def quieten() -> None:
    """Hides what a user can do nothing about."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    for message in (
        "'set_vital' is deprecated",  # torchdata 0.11 with torch 2.13
        ".*LeafSpec.* is deprecated",  # lightning 2.6 with torch 2.13
        ".*does not have many workers",  # the small recipes' data are in memory
        "Detected an existing checkpoint",  # last.ckpt of model_parallel is meant to be overwritten
        "The dirpath has changed",  # a resumed run keeps its best checkpoint in its own folder
    ):
        warnings.filterwarnings("ignore", message=message)


def main() -> None:
    """Entry point of ``stableaa-train``; a mistake ends in one sentence and exit code 2."""
    # makes Hydra raise its errors instead of printing them itself and exiting with code 1
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    quieten()
    with mistakes_in_one_sentence("stableaa-train"):
        _train_from_command_line()


if __name__ == "__main__":
    main()
