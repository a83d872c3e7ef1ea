"""From names such as ``anderson`` and ``plain@cosine@3x`` to the settings of single runs."""

import inspect
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from lightning_stableaa.recipes.cli_errors import check_options
from lightning_stableaa.recipes.comparison.cost import Mode
from lightning_stableaa.recipes.comparison.fingerprint import contents_of, fingerprint_of
from lightning_stableaa.recipes.comparison.optimizers import check_installed
from lightning_stableaa.recipes.errors import UserError

BASELINE = "plain"
OWN_MODULE = "recipe=_own"  # what stands for the recipe where there is compare.module
CHANGES = "lightning_stableaa.recipes.comparison.optimizers"
RECORDER = "lightning_stableaa.recipes.comparison.recorder.CostRecorder"
TRAINING = "training"
# what a run needs on its own, and a comparison pays for or sees nothing of
LEFT_OUT = ("best", "last", "progress", "learning_rate")
# Names of metrics of which less is better; not those of scikit-learn's negated scores.
LESS_IS_BETTER = (
    r"^(?!(.*[^a-z])?neg(ative)?[^a-z])"
    r".*(loss|error|perplexity|(?<![a-z])((r|n|nr)?mse|r?mae|mape|nll|l2)(?![a-z0-9]))"
)


@dataclass(frozen=True)
class Job:
    """One run to make: a variant with a seed, in its own folder."""

    variant: str
    seed: int
    fingerprint: str  # of everything that decides the outcome
    folder: Path
    settings: dict[str, Any]  # resolved configuration for train(), whose folder is inside folder
    contents: dict[str, dict[str, str]]  # of the files that it depends on, see ``contents_of``


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
    _check_own_options(options)
    _refuse_conflicts(overrides, own_module=options.module is not None)
    if options.module is not None:
        title = options.module.rpartition(".")[2]
    # the whole path of a module: many a package has a class of the same name
    standard = Path("comparisons") / (options.module or title)
    # a name may be a number
    folder = standard if options.folder in (None, "") else Path(str(options.folder))
    folder /= options.subfolder if folder == standard and options.subfolder else ""
    seeds = _seeds(options.seeds)
    fixed, of_callbacks = _split(overrides)
    names = list(dict.fromkeys([BASELINE, *_expand(config)]))
    runs: dict[str, DictConfig] = {}
    used: set[str] = set()
    # composing takes most of the time here: once for a variant and all its modifications
    for base in dict.fromkeys(name.split("@")[0] for name in names):
        check_installed(base)
        composed, applied = _compose_variant(base, fixed, of_callbacks)
        used |= applied
        of_base = [name for name in names if name.split("@")[0] == base]
        runs |= {name: _modify(composed, name) for name in of_base}
    for override in of_callbacks:
        if override not in used:
            raise UserError(f"{override}: no variant among {', '.join(names)} has that callback")
    metric, mode = _monitored(runs[BASELINE])
    about = {name: _describe(name, runs[name]) for name in names}
    jobs: list[Job] = []
    loggers = any(re.match(r"[+~]*logger(\.|=|@|$)", override) for override in overrides)
    for name in names:
        _prepare(runs[name], metric, keep_loggers=loggers)
        jobs += _jobs(runs[name], name, seeds, folder)
    jobs.sort(key=lambda job: seeds.index(job.seed))
    return Plan(title, folder, metric, mode, names, seeds, about, jobs)


# Which options of a recipe have no meaning for a module of the user's own, and what has.
OF_RECIPES = {
    r"optimizer|scheduler": "the module brings its own; compare.lr_sweep has rates and schedules",
    r"module|model|architecture": "write compare.module_args.NAME=VALUE",
    r"data": "write compare.datamodule_args.NAME=VALUE",
    r"recipe": "compare.module takes its place; leave one of them out",
}
OF_SINGLE_RUNS = r"run_name|run_folder|resume_from"


def _check_own_options(options: DictConfig) -> None:
    for option in ("module", "datamodule"):
        path, arguments = options[option], options[f"{option}_args"]
        if not isinstance(path, str | None):
            raise UserError(
                f"compare.{option}={path}: expected an import path such as my_package.MyModule"
            )
        if not isinstance(arguments, DictConfig):
            raise UserError(
                f"compare.{option}_args={arguments}: expected a dict; write "
                f"+compare.{option}_args.NAME=VALUE"
            )


def _refuse_conflicts(overrides: Iterable[str], *, own_module: bool) -> None:
    for override in overrides:
        if re.match(rf"[+~]*({OF_SINGLE_RUNS})(=|$)", override):
            raise UserError(
                f"{override}: a comparison names its own runs and goes on with those that are "
                "there; choose where by compare.folder"
            )
        for names, instead in OF_RECIPES.items() if own_module else ():
            named = re.match(rf"[+~]*({names})([.=@]|$)", override)
            if named and override != OWN_MODULE:
                raise UserError(f"{override}: has no effect beside compare.module; {instead}")
        if re.match(r"[+~]*callbacks(=|$)", override):
            raise UserError(f"{override}: each variant brings its callbacks; see compare.variants")
        if re.match(r"[+~]*seed(=|$)", override):
            raise UserError(f"{override}: a comparison has several, as in compare.seeds=[7,8,9]")


def _seeds(seeds: Any) -> list[int]:
    if isinstance(seeds, int) and not isinstance(seeds, bool) and seeds > 0:
        return list(range(seeds))
    if isinstance(seeds, ListConfig) and seeds and all(type(seed) is int for seed in seeds):
        return list(dict.fromkeys(seeds))
    raise UserError(f"compare.seeds={seeds}: expected a positive number, or a list such as [7,8]")


def _expand(config: DictConfig) -> list[str]:
    """The requested names, with the members of lr_sweep in place of its name."""
    if not isinstance(config.compare.variants, ListConfig) or not config.compare.variants:
        raise UserError(
            f"compare.variants={config.compare.variants}: expected a list such as [plain,anderson]"
        )
    for option in ("lr_sweep", "lr_sweep_of"):
        if not isinstance(config.compare[option], ListConfig):
            value = config.compare[option]
            raise UserError(f"compare.{option}={value}: expected a list such as [{value}]")
    for change in config.compare.lr_sweep:
        if not isinstance(change, str):
            raise UserError(
                f"compare.lr_sweep: {change} is no change of the learning rate; write factors with "
                "an x, and cosine, as in compare.lr_sweep=[3x,10x,cosine]"
            )
    sweep = [
        f"{base}@{change}"
        for base in config.compare.lr_sweep_of
        for change in config.compare.lr_sweep
        if "cosine" not in change or config.scheduler is None
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
    if applied:
        run = compose("compare", [*overrides, *applied])
    _insert_own_module(run)
    return run, set(applied)


def _insert_own_module(run: DictConfig) -> None:
    options = run.compare
    if options.module is None:
        return
    with open_dict(run):
        for key, option in (("module", "module"), ("data", "datamodule")):
            path = options[option]
            imported = None if path is None else _import(path, f"compare.{option}")
            if key == "module" and inspect.isclass(imported):
                _follow_tree(run, imported)
            if inspect.isclass(imported):
                _refuse_missing_arguments(imported, option, options)
            run[key] = path and {"_target_": path, **options[f"{option}_args"]}


def _refuse_missing_arguments(imported: type[Any], option: str, options: DictConfig) -> None:
    given = options[f"{option}_args"]
    try:
        parameters = inspect.signature(imported).parameters.values()
    except (TypeError, ValueError):  # it has none that can be read
        return
    missing = [
        one.name
        for one in parameters
        if one.default is one.empty
        and one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
        and one.name not in given
    ]
    if missing and "_args_" not in given:
        write = " ".join(f"+compare.{option}_args.{name}=..." for name in missing)
        raise UserError(
            f"compare.{option}={options[option]}: its __init__ needs {', '.join(missing)}; "
            f"write {write}"
        )


def _follow_tree(run: DictConfig, module: Any) -> None:
    """Gives a module of pytorch_lightning the Trainer and the callbacks of its own tree."""
    if any(one.__module__.startswith("pytorch_lightning.") for one in inspect.getmro(module)):
        for settings in (run.trainer, *run.callbacks.values()):
            settings._target_ = re.sub(
                r"^lightning\.(pytorch\.)?", "pytorch_lightning.", settings._target_
            )


def _import(path: str, option: str) -> Any:
    try:
        return get_object(path)
    except Exception as error:  # Hydra reports a failing import as it comes
        reason: object = error.__cause__ or error
        module, _, name = path.rpartition(".")
        if module in sys.modules:  # Hydra took it for a package, which it may not be
            reason = f"{module} has no {name}"
        raise UserError(
            f"{option}={path}: {' '.join(str(reason).split())}; give an import path such as "
            f"my_package.MyModule, as seen from the current folder"
        ) from error


def _modify(composed: DictConfig, name: str) -> DictConfig:
    """A copy with the callbacks that stand for ``@cosine`` and ``@3x``, ahead of its own."""
    _, *modifiers = name.split("@")
    rates = [one for one in modifiers if one != "cosine"]
    if len(rates) > 1 or modifiers.count("cosine") > 1:
        raise UserError(
            f"compare.variants: {name} has two modifiers of a kind; write one factor of the "
            "learning rate, and cosine once"
        )
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
    run = composed.copy()
    kept = {name: one for name, one in run.callbacks.items() if name not in LEFT_OUT}
    with open_dict(run):
        run.callbacks = {**added, **kept}
    return run


def _describe(name: str, run: DictConfig) -> str:
    _, *modifiers = name.split("@")
    texts = [
        "cosine schedule to zero" if one == "cosine" else f"{one[:-1]} times the learning rate"
        for one in modifiers
    ]
    return ", ".join([run.compare.about, *texts])


def _monitored(run: DictConfig) -> tuple[str, Mode]:
    """Name and direction of the metric by which runs are compared."""
    options = run.compare
    module = _import(run.module._target_, "module._target_")
    own = getattr(module, "monitor", None)
    metric = options.metric or own
    if not isinstance(metric, str | None):
        raise UserError(f"compare.metric={metric}: expected a name, as in compare.metric=val/loss")
    if metric is None:
        raise UserError(
            "compare.metric is not given: name what validation logs, as in "
            "compare.metric=val/loss compare.mode=min"
        )
    mode = options.mode
    if mode is None and metric == own:
        mode = getattr(module, "monitor_mode", "min")
    if mode is None and re.search(LESS_IS_BETTER, metric.lower()):
        mode = "min"
    if mode is None:
        raise UserError(
            f"compare.mode is not given: say whether less of {metric} is better "
            "(compare.mode=min) or more (compare.mode=max)"
        )
    if mode not in ("min", "max"):
        raise UserError(f"compare.mode={mode}: choose min or max")
    return metric, mode


def _prepare(run: DictConfig, metric: str, *, keep_loggers: bool) -> None:
    """Adds what records the run, and leaves out what only a run on its own needs."""
    with open_dict(run):
        run.run_folder = RUN_FOLDER
        own = {k: v for k, v in (run.logger or {}).items() if k != "csv"} if keep_loggers else {}
        run.logger = {**own, "csv": {**CSV_LOGGER, "save_dir": RUN_FOLDER}}
        recorder = {"_target_": RECORDER, "metric": metric, "folder": RUN_FOLDER}
        run.callbacks = {"recorder": recorder, **run.callbacks}
        run.trainer.update(QUIET_TRAINER)
        run.pop("compare")
    if run.trainer.devices not in (1, "auto") or run.trainer.num_nodes != 1:
        raise UserError(
            f"trainer.devices={run.trainer.devices}: every run of a comparison has one device"
        )


def _jobs(run: DictConfig, variant: str, seeds: Sequence[int], folder: Path) -> list[Job]:
    jobs = []
    for seed in seeds:
        run.seed = seed
        settings: Any = OmegaConf.to_container(run, resolve=True, throw_on_missing=True)
        if seed == seeds[0]:
            check_options(settings)
            _build_callbacks(run)
        fingerprint = fingerprint_of(settings)
        # a folder per configuration: results of other settings stay, and are found again
        own = folder / "runs" / variant / f"seed{seed}-{fingerprint}"
        placed = _place(settings, str(own / TRAINING))
        jobs.append(Job(variant, seed, fingerprint, own, placed, contents_of(settings)))
    return jobs


def _build_callbacks(run: DictConfig) -> None:
    """Refuses values out of range, which would be refused in every run of the variant."""
    for entry in run.callbacks.values():
        if entry and entry["_target_"].endswith((".AndersonCallback", ".SmoothingMonitor")):
            instantiate(entry, _convert_="all")


def _place(settings: Any, run_folder: str) -> Any:
    """The settings with a folder, which is known only after they have been."""
    if isinstance(settings, dict):
        return {name: _place(value, run_folder) for name, value in settings.items()}
    if isinstance(settings, list):
        return [_place(value, run_folder) for value in settings]
    return run_folder if settings == RUN_FOLDER else settings


RUN_FOLDER = "RUN_FOLDER"
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
