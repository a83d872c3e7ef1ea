"""From names such as ``anderson`` and ``plain@cosine@3x`` to the settings of single runs."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf, open_dict

import lightning_stableaa
from lightning_stableaa.recipes.comparison.cost import Mode
from lightning_stableaa.recipes.errors import UserError
from lightning_stableaa.recipes.mistakes import check_options

BASELINE = "plain"
CHANGES = "lightning_stableaa.recipes.comparison.optimizers"
RECORDER = "lightning_stableaa.recipes.comparison.recorder.CostRecorder"
# what a run needs on its own, and a comparison pays for or sees nothing of
LEFT_OUT = ("best", "progress", "learning_rate")


@dataclass(frozen=True)
class Job:
    """One run to make: a variant with a seed, in its own folder."""

    variant: str
    seed: int
    fingerprint: str  # of everything that decides the outcome
    folder: Path
    settings: dict[str, Any]  # resolved configuration for train()


@dataclass(frozen=True)
class Plan:
    """What is compared."""

    title: str  # recipe or class
    folder: Path
    metric: str
    mode: Mode
    variants: list[str]  # the baseline first
    seeds: list[int]
    about: dict[str, str]  # what each variant is
    jobs: list[Job]  # all variants of one seed before the next, so that a part compares fairly


def make_plan(config: DictConfig, overrides: Sequence[str], title: str) -> Plan:
    """Composes the runs of a comparison.

    Args:
        config: composed from ``compare.yaml``.
        overrides: those of the command line that led to ``config``.
        title: names the comparison, and its folder where none is given.

    Raises:
        UserError, or an error of Hydra or OmegaConf that means a wrong configuration.
    """
    options = config.compare
    _refuse_conflicts(overrides)
    if options.module is not None:
        title = options.module.rpartition(".")[2]
    folder = Path(options.folder or Path("comparisons") / title)
    seeds = _seeds(options.seeds)
    fixed, of_callbacks = _split(overrides)
    used: set[str] = set()
    variants, about, jobs = [], {}, []
    for name in dict.fromkeys([BASELINE, *_expand(config)]):
        base, *modifiers = name.split("@")
        run, applied = _compose_variant(base, fixed, of_callbacks)
        used |= applied
        _insert_own_module(run)
        _insert_modifiers(run, name, modifiers)
        metric, mode = _decisive(run)
        about[name] = ", ".join([run.compare.about, *map(_describe, modifiers)])
        variants.append(name)
        jobs += [_job(run, name, seed, metric, folder) for seed in seeds]
    for override in set(of_callbacks) - used:
        raise UserError(f"{override}: none of the variants {', '.join(variants)} has that callback")
    jobs.sort(key=lambda job: seeds.index(job.seed))
    return Plan(title, folder, metric, mode, variants, seeds, about, jobs)


def _refuse_conflicts(overrides: Iterable[str]) -> None:
    for override in overrides:
        if re.match(r"[+~]*callbacks(=|$)", override):
            raise UserError(f"{override}: each variant brings its callbacks; see compare.variants")
        if re.match(r"[+~]*seed(=|$)", override):
            raise UserError(f"{override}: a comparison has several, as in compare.seeds=[7,8,9]")


def _seeds(seeds: Any) -> list[int]:
    if isinstance(seeds, int) and not isinstance(seeds, bool) and seeds > 0:
        return list(range(seeds))
    if OmegaConf.is_list(seeds) and len(seeds) and all(type(seed) is int for seed in seeds):
        return list(dict.fromkeys(seeds))
    raise UserError(f"compare.seeds={seeds}: expected a positive number, or a list such as [7,8]")


def _expand(config: DictConfig) -> list[str]:
    """The names asked for, with the members of the sweep in place of its name."""
    if not OmegaConf.is_list(config.compare.variants) or not config.compare.variants:
        raise UserError(
            f"compare.variants={config.compare.variants}: expected a list such as [plain,anderson]"
        )
    sweep = [
        name
        for name in config.compare.lr_sweep
        if "@cosine" not in name or config.scheduler is None
    ]
    names: list[str] = []
    for name in map(str, config.compare.variants):
        names += sweep if name == "lr_sweep" else [name]
    return names


def _split(overrides: Iterable[str]) -> tuple[list[str], list[str]]:
    """Overrides for every variant, and those of a callback that only some variants have."""
    fixed: list[str] = []
    of_callbacks: list[str] = []
    for override in overrides:
        (of_callbacks if _callback(override) else fixed).append(override)
    return fixed, of_callbacks


def _callback(override: str) -> str | None:
    match = re.match(r"[+~]*callbacks\.(\w+)", override)
    return match[1] if match else None


def _compose_variant(
    base: str, fixed: list[str], of_callbacks: list[str]
) -> tuple[DictConfig, set[str]]:
    """The configuration of a variant, and the overrides of callbacks that concern it."""
    overrides = [*fixed, f"+compare/variant={base}"]
    run = compose("compare", overrides)
    applied = [one for one in of_callbacks if one[0] == "+" or _callback(one) in run.callbacks]
    return (compose("compare", [*overrides, *applied]) if applied else run), set(applied)


def _insert_own_module(run: DictConfig) -> None:
    options = run.compare
    if options.module is None:
        return
    with open_dict(run):
        for key, option in (("module", "module"), ("data", "datamodule")):
            path = options[option]
            if path is not None:
                _import(path, f"compare.{option}")
            run[key] = path and {"_target_": path, **options[f"{option}_args"]}


def _import(path: str, option: str) -> Any:
    try:
        return get_object(path)
    except Exception as error:  # Hydra reports a failing import as it comes
        reason = error.__cause__ or error
        raise UserError(
            f"{option}={path}: {' '.join(str(reason).split())}; give an import path such as "
            f"my_package.MyModule, as seen from the current folder"
        ) from error


def _insert_modifiers(run: DictConfig, name: str, modifiers: Iterable[str]) -> None:
    """Adds the callbacks that stand for ``@cosine`` and ``@3x``, ahead of the variant's own."""
    added = {}
    for modifier in modifiers:
        if modifier == "cosine":
            added["cosine"] = {"_target_": f"{CHANGES}.CosineSchedule"}
        elif re.fullmatch(r"\d*\.?\d+x", modifier) and float(modifier[:-1]) > 0:
            added["learning_rate_multiple"] = {
                "_target_": f"{CHANGES}.LearningRateMultiple",
                "multiple": float(modifier[:-1]),
            }
        else:
            raise UserError(
                f"compare.variants: {name} has the unknown modifier @{modifier}; write @3x for "
                f"three times the learning rate, @cosine for a cosine schedule"
            )
    kept = {name: one for name, one in run.callbacks.items() if name not in LEFT_OUT}
    with open_dict(run):
        run.callbacks = {**added, **kept}


def _describe(modifier: str) -> str:
    if modifier == "cosine":
        return "cosine schedule to zero"
    return f"{modifier[:-1]} times the learning rate"


def _decisive(run: DictConfig) -> tuple[str, Mode]:
    """Name and direction of the metric that decides."""
    options = run.compare
    module = _import(run.module._target_, "module._target_")
    metric = options.metric or getattr(module, "decisive_metric", None)
    mode = options.mode or getattr(module, "decisive_mode", "min")
    if metric is None:
        raise UserError(
            "compare.metric is not given: name what validation logs, as in "
            "compare.metric=val/loss compare.mode=min"
        )
    if mode not in ("min", "max"):
        raise UserError(f"compare.mode={mode}: choose min or max")
    return metric, mode


def _job(run: DictConfig, variant: str, seed: int, metric: str, folder: Path) -> Job:
    run = run.copy()
    with open_dict(run):
        run.seed = seed
        run.run_folder = "RUN_FOLDER"
        run.logger = {"csv": {**CSV_LOGGER, "save_dir": "${run_folder}"}}
        run.callbacks = {
            "recorder": {"_target_": RECORDER, "metric": metric, "folder": "${run_folder}"},
            **run.callbacks,
        }
        run.trainer.update(QUIET_TRAINER)
        run.pop("compare")
    if run.trainer.devices not in (1, "auto") or run.trainer.num_nodes != 1:
        raise UserError(
            f"trainer.devices={run.trainer.devices}: every run of a comparison has one device"
        )
    settings: Any = OmegaConf.to_container(run, resolve=True, throw_on_missing=True)
    check_options(settings)
    fingerprint = _fingerprint(settings)
    # a folder per configuration: results of other settings stay, and are found again
    run.run_folder = str(folder / "runs" / variant / f"seed{seed}-{fingerprint}")
    settings = OmegaConf.to_container(run, resolve=True)
    return Job(variant, seed, fingerprint, Path(run.run_folder), settings)


CSV_LOGGER = {
    "_target_": "lightning.pytorch.loggers.CSVLogger",
    "name": "",
    "version": "",
}
QUIET_TRAINER = {
    "enable_checkpointing": False,  # an interrupted run is made again
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "log_every_n_steps": 50,  # writing is no part of the method; callbacks log all the same
}


def _fingerprint(settings: dict[str, Any]) -> str:
    decisive = {
        "settings": settings,
        "lightning_stableaa": lightning_stableaa.__version__,
        "torch": torch.__version__,
    }
    text = json.dumps(decisive, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
