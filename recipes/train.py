"""``stableaa-train``: one training run, described by the configuration groups in ``conf/``.

Torch and Lightning take seconds to import. This module does without them: it composes and checks
the configuration, and imports ``recipes.training`` when training begins.
"""

import json
import logging
import math
import os
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lightning_stableaa.recipes.cli_errors import (
    USER_ERRORS,
    check_flags,
    check_run,
    exit_on_user_error,
)
from lightning_stableaa.recipes.errors import UserError, attribute_to
from lightning_stableaa.recipes.files import disk_errors, write_atomically
from lightning_stableaa.recipes.launch import (
    check_launch,
    check_sweep,
    is_first_process,
    join_submitit,
)
from lightning_stableaa.recipes.resuming import checkpoint_to_resume, existing_checkpoint
from lightning_stableaa.recipes.signatures import class_attribute
from lightning_stableaa.recipes.sweep import RESULTS, point

COMMAND = "stableaa-train"


def train(config: DictConfig, *, header: str = "") -> dict[str, float]:
    """Trains as configured and leaves everything about the run in ``config.run_folder``.

    Args:
        config: composed from ``train.yaml``.
        header: printed by the first process when the checks have passed.

    Returns:
        The last value of everything logged, ``cost/gradients``, ``cost/loss_evaluations``, and
        ``best/<metric>`` for the monitored metric; with ``config.evaluate``, the metrics of that
        checkpoint, and nothing is written.

    Raises:
        UserError, or an error of Hydra or OmegaConf that means a wrong configuration; whatever the
        run had written by then is removed.
        KeyboardInterrupt: training was interrupted.
    """
    if not isinstance(config.run_folder, str) or not config.run_folder:
        raise UserError(f"run_folder={config.run_folder}: expected the path of a folder")
    if OmegaConf.select(config, "module._target_", default="") is None or OmegaConf.is_missing(
        config.module, "_target_"
    ):
        raise UserError(
            "module._target_ is not given; name a LightningModule, as in "
            "module._target_=my_package.MyModule"
        )
    with (
        _cleanup_on_error(Path(config.run_folder)) as folder,
        disk_errors("run_folder", folder),
    ):
        settings: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        check_run(settings)
        check_launch(settings, os.environ)
        if config.evaluate is not None:
            if config.resume_from is not None:
                raise UserError(
                    f"evaluate={config.evaluate} trains nothing, and resume_from="
                    f"{config.resume_from} goes on training: give one of them"
                )
            checkpoint = existing_checkpoint("evaluate", config.evaluate)
            from lightning_stableaa.recipes.training import evaluate

            return evaluate(config, checkpoint)
        checkpoint = checkpoint_to_resume(config.resume_from, folder)
        if config.resume_from is not None and checkpoint is None and is_first_process():
            print(f"resume_from=auto: no checkpoint in {folder}; a new run begins", file=sys.stderr)
        if config.resume_from is None and any(folder.glob("checkpoints/*.ckpt")):
            raise UserError(
                f"run_folder={folder}: holds checkpoints of an earlier run, which this one would "
                "overwrite; add resume_from=auto to go on with it, or choose another run_name"
            )
        _check_with_torch(config)
        if header and is_first_process():
            print(header, flush=True)
        from lightning_stableaa.recipes.training import fit

        return fit(config, settings, folder, checkpoint)


def _check_with_torch(config: DictConfig) -> None:
    """Builds what needs torch alone, before Lightning takes its seconds to import.

    Raises:
        UserError, or Hydra's InstantiationException: a constructor refuses a value.
    """
    target = str(OmegaConf.select(config, "model._target_"))
    if target.startswith("lightning_stableaa.recipes.networks."):
        hydra.utils.instantiate(config.model)
    target = str(OmegaConf.select(config, "optimizer._target_"))
    if target.startswith("torch.optim."):
        from torch import nn

        make = hydra.utils.instantiate(config.optimizer, _convert_="all", _partial_=True)
        with attribute_to("optimizer"):
            make([nn.Linear(1, 1, bias=False).weight])
    if OmegaConf.select(config, "trainer.accelerator") in ("gpu", "cuda"):
        import torch

        if not torch.cuda.is_available() and not torch.backends.mps.is_available():
            raise UserError(
                f"trainer.accelerator={config.trainer.accelerator}: torch {torch.__version__} "
                "sees no GPU here; choose trainer=cpu, or install a torch that has CUDA"
            )


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
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return now
    from torch.distributed.rendezvous import rendezvous

    store, rank, _ = next(iter(rendezvous("env://")))
    if rank == 0:
        store.set("stableaa/run_time", now)
    return store.get("stableaa/run_time").decode()


def _class_attribute(path: str, name: str, *default: Any) -> Any:
    try:
        return class_attribute(path, name)
    except (ImportError, AttributeError) as error:
        if default:
            return default[0]
        raise UserError(
            f"module._target_={path}: {error}; with recipe=own, name the metric, as in "
            "metric=val/loss; other recipes need a class derived from RecipeModule"
        ) from error


def _register_resolvers() -> None:
    OmegaConf.register_new_resolver("name_or_time", _name_or_time, use_cache=True, replace=True)
    OmegaConf.register_new_resolver("product", lambda *factors: math.prod(factors), replace=True)
    OmegaConf.register_new_resolver("quotient", lambda a, b: int(a) // int(b), replace=True)
    OmegaConf.register_new_resolver("class_attribute", _class_attribute, replace=True)


_register_resolvers()


@hydra.main(version_base="1.3", config_path="pkg://lightning_stableaa.conf", config_name="train")
def _train_from_command_line(config: DictConfig) -> None:
    # inside Hydra too, or it announces the failed job with two lines of its own
    with exit_on_user_error(COMMAND):
        join_submitit()
        hydra_config = HydraConfig.get()
        if hydra_config.mode == RunMode.MULTIRUN:  # a sweep can change what was checked before
            check_sweep(config, hydra_config.launcher)
        choices = hydra_config.runtime.choices
        header = (
            f"{point()}recipe {choices['recipe']}, callbacks {choices['callbacks']}, "
            f"seed {config.seed}, run folder {config.run_folder}"
        )
        try:
            _check_folder(OmegaConf.to_container(hydra_config.overrides.task, resolve=False))
            results = train(config, header=header)
            if is_first_process():
                _report(results, config, list(hydra_config.overrides.task))
        except KeyboardInterrupt:
            if config.evaluate is not None:
                raise
            _end_interrupted(config.run_folder, list(hydra_config.overrides.task))
        finally:
            _remove_empty(Path(hydra_config.runtime.output_dir))


def _check_folder(overrides: Any) -> None:
    given = [one for one in overrides if one.startswith(("run_name=", "run_folder="))]
    if len({one.partition("=")[0] for one in given}) > 1:
        raise UserError(
            f"{' and '.join(given)}: a folder says where the run goes by itself; give one of them"
        )


def _report(results: dict[str, float], config: DictConfig, overrides: list[str]) -> None:
    text = ", ".join(f"{name} {value:.4g}" for name, value in sorted(results.items()))
    print(f"{point()}{text}")
    if config.evaluate is not None:
        return
    path = Path(config.run_folder) / RESULTS
    if config.resume_from is not None:  # a finished run adds nothing to its results
        with suppress(OSError, ValueError, KeyError):
            results = json.loads(path.read_text())["results"] | results
    write_atomically(path, json.dumps({"overrides": overrides, "results": results}, indent=1))
    print(f"everything about this run: {config.run_folder}")


def _end_interrupted(folder: str, overrides: list[str]) -> None:
    """Says how to go on, and ends the program as a shell expects it after Ctrl-C."""
    if is_first_process():
        kept = [one for one in sys.argv[1:] if one.startswith("--config-")]
        kept += [one for one in overrides if not one.startswith(("run_", "resume_from="))]
        command = shlex.join([COMMAND, *kept, f"run_folder={folder}", "resume_from=auto"])
        found = checkpoint_to_resume("auto", Path(folder))
        begins = f"from its checkpoint {found.name}" if found else "from the beginning"
        print(
            f"{COMMAND}: interrupted; the run is in {folder}, and goes on {begins} with: {command}",
            file=sys.stderr,
        )
    sys.exit(130)


# of either tree: the one that was imported last logs for both
RANK_ZERO_LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "pytorch_lightning.utilities.rank_zero",
)


def is_worth_reading(record: logging.LogRecord) -> bool:
    """Whether a message of Lightning's is a warning, or the outcome of the acceleration."""
    return record.levelno >= logging.WARNING or record.msg.startswith("Anderson acceleration: ")


def filter_warnings() -> None:
    """Hides what a user can do nothing about."""
    for name in RANK_ZERO_LOGGERS:
        logging.getLogger(name).addFilter(is_worth_reading)
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


def run_command(command: str, run: Callable[[], None], interrupted: str) -> None:
    """Runs a function of Hydra's; a user error ends in one sentence and exit code 2."""
    # makes Hydra raise its errors instead of printing them itself and exiting with code 1
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    sys.path.insert(0, str(Path.cwd()))  # a module of the user's own, as python -m would find it
    filter_warnings()
    with exit_on_user_error(command), config_only_mode(sys.argv):
        check_flags(sys.argv[1:])
        try:
            run()
        except KeyboardInterrupt:
            print(f"{command}: interrupted; {interrupted}", file=sys.stderr)
            sys.exit(130)


def main() -> None:
    """Entry point of ``stableaa-train``."""
    run_command(COMMAND, _train_from_command_line, "nothing was written")


if __name__ == "__main__":  # as launchers start it: torchrun -m lightning_stableaa.recipes.train
    main()
