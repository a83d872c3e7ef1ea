"""From names such as ``anderson`` and ``plain@cosine@3x`` to the settings of single runs."""

import inspect
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hydra import compose
from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from lightning_stableaa.recipes.cli_errors import check_run
from lightning_stableaa.recipes.comparison.provenance import contents_of, fingerprint_of
from lightning_stableaa.recipes.errors import UserError, attribute_to
from lightning_stableaa.recipes.signatures import class_attribute

Mode = Literal["min", "max"]
BASELINE = "plain"
OWN_MODULE = "recipe=_own"  # what stands for the recipe where there is compare.module
CHANGES = "lightning_stableaa.recipes.comparison.optimizers"
COST_RECORDER = "lightning_stableaa.recipes.comparison.recorder.CostRecorder"
CSV_LOGGER = "lightning.pytorch.loggers.CSVLogger"
RECORDER = "recorder"
RUN_FOLDER = "RUN_FOLDER"  # stands for the folder of a run, which its fingerprint names
QUIET_TRAINER = {
    "enable_checkpointing": False,  # an interrupted run is made again
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "log_every_n_steps": 50,  # writing is no part of the method; callbacks log all the same
}
MULTIPLE = "learning_rate_multiple"
CALLBACK = re.compile(r"[+~]*callbacks\.(\w+)")
EXPECTED: dict[str, tuple[Any, str]] = {  # types of options, and what is said of others
    "jobs": (int, "a whole number >= 0"),
    "module": (str | None, "an import path such as my_package.MyModule"),
    "datamodule": (str | None, "an import path such as my_package.MyData"),
    "module_args": (DictConfig, "a dict; write +compare.module_args.NAME=VALUE"),
    "datamodule_args": (DictConfig, "a dict; write +compare.datamodule_args.NAME=VALUE"),
    "metric": (str | None, "a name, as in compare.metric=val/loss"),
    "variants": (ListConfig, "a list such as [plain,anderson]"),
    "lr_sweep": (ListConfig, "a list such as [3x,10x,cosine]"),
    "lr_sweep_of": (ListConfig, "a list such as [plain,anderson]"),
}
REFUSED = {  # options of single runs, and what a comparison has in their place
    "run_name|run_folder|resume_from": "a comparison names its own runs and goes on with those "
    "that are there; choose where by compare.folder",
    "evaluate": "a comparison trains; evaluate a checkpoint by stableaa-train",
    "callbacks": "each variant brings its callbacks; see compare.variants",
    "seed": "a comparison has several, as in compare.seeds=[7,8,9]",
}
REFUSED_BESIDE_MODULE = {
    "optimizer|scheduler": "the module brings its own; compare.lr_sweep has rates and schedules",
    "module|model": "write compare.module_args.NAME=VALUE",
    "data": "write compare.datamodule_args.NAME=VALUE",
    "recipe": "compare.module takes its place; leave one of them out",
}
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
    folder: Path
    settings: dict[str, Any]  # resolved configuration for train(); RUN_FOLDER stands for its folder
    contents: dict[str, str]  # of the files that it depends on, see ``contents_of``
    # fingerprint: of everything that decides the outcome; configuration: the same for all seeds;
    # comparison: the same for all variants; about: what the variant is; callbacks: its own
    labels: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is compared."""

    title: str  # recipe or class
    folder: Path
    metric: str
    mode: Mode
    variants: list[str]  # the baseline first
    seeds: list[int]
    comparison: str  # fingerprint of all that variants and seeds share
    jobs: list[Job]  # all variants of one seed before the next, so that a part compares fairly
    workers: dict[str, Any]  # how many side by side, and threads in each
    command_line: list[str]


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
    for option, (kind, expected) in EXPECTED.items():
        if not isinstance(options[option], kind) or isinstance(options[option], bool):
            raise UserError(f"compare.{option}={options[option]}: expected {expected}")
    if options.jobs < 0:
        raise UserError(f"compare.jobs={options.jobs}: expected {EXPECTED['jobs'][1]}")
    for override in overrides:
        _refuse_conflict(override, own_module=options.module is not None)
    if options.module is None and OmegaConf.is_missing(config.module, "_target_"):
        raise UserError(
            "recipe=own: a comparison takes your module by compare.module, as in "
            "compare.module=my_package.MyModule"
        )
    if options.module is not None:
        title = options.module.rpartition(".")[2]
    if options.folder in (None, ""):
        # the whole path of a module: many a package has a class of the same name
        folder = Path("comparisons", options.module or title, options.subfolder or "")
    else:
        folder = Path(str(options.folder))  # which may be a number
    seeds = _seeds(options.seeds)
    of_callbacks = [one for one in overrides if CALLBACK.match(one)]  # that some variants have
    fixed = [one for one in overrides if one not in of_callbacks]
    names = list(dict.fromkeys([BASELINE, *_expand(config)]))
    runs: dict[str, DictConfig] = {}
    unused = set(of_callbacks)
    # composing takes most of the time here: once for a variant and all its modifications
    for base in dict.fromkeys(name.split("@")[0] for name in names):
        composed, applied = _compose_variant(base, fixed, of_callbacks)
        unused -= applied
        runs |= {name: _modify(composed, name) for name in names if name.split("@")[0] == base}
    for override in sorted(unused):
        raise UserError(f"{override}: no variant among {', '.join(names)} has that callback")
    metric, mode = _monitored(runs[BASELINE])
    loggers = any(re.match(r"[+~]*logger(\.|=|@|$)", override) for override in overrides)
    jobs: list[Job] = []
    comparison = ""
    for name in names:
        about = runs[name].compare.about
        _prepare(runs[name], metric, keep_loggers=loggers)
        canonical = _resolve(runs[name], 0)
        check_run(canonical)  # or every run of the variant would be refused
        configuration = fingerprint_of(canonical)
        comparison = comparison or configuration  # that of plain: variants differ in callbacks
        callbacks = {key: one for key, one in canonical["callbacks"].items() if key != RECORDER}
        of_variant = {"configuration": configuration, "comparison": comparison}
        of_variant |= {"about": about, "callbacks": callbacks}
        for seed in seeds:
            settings = _resolve(runs[name], seed)
            labels = {"fingerprint": fingerprint_of(settings), **of_variant}
            # a folder per configuration: results of other settings stay, and are found again
            own = folder / "runs" / name / f"seed{seed}-{labels['fingerprint']}"
            jobs.append(Job(name, seed, own, settings, contents_of(settings), labels))
    jobs.sort(key=lambda job: seeds.index(job.seed))
    workers = {"side_by_side": options.jobs, "threads": config.threads}
    return Plan(
        title, folder, metric, mode, names, seeds, comparison, jobs, workers, list(overrides)
    )


def _refuse_conflict(override: str, *, own_module: bool) -> None:
    for pattern, reason in REFUSED.items():
        if re.match(rf"[+~]*({pattern})(=|$)", override):
            raise UserError(f"{override}: {reason}")
    for pattern, reason in REFUSED_BESIDE_MODULE.items() if own_module else ():
        if re.match(rf"[+~]*({pattern})([.=@]|$)", override) and override != OWN_MODULE:
            raise UserError(f"{override}: has no effect beside compare.module; {reason}")


def _seeds(seeds: Any) -> list[int]:
    if isinstance(seeds, int) and not isinstance(seeds, bool) and seeds > 0:
        return list(range(seeds))
    if isinstance(seeds, ListConfig) and seeds and all(type(seed) is int for seed in seeds):
        return list(dict.fromkeys(seeds))
    raise UserError(f"compare.seeds={seeds}: expected a positive number, or a list such as [7,8]")


def _expand(config: DictConfig) -> list[str]:
    """The requested names, with the members of lr_sweep in place of its name."""
    sweep = [
        f"{base}@{change}"
        for base in config.compare.lr_sweep_of
        for change in config.compare.lr_sweep
        if "cosine" not in str(change) or config.scheduler is None
    ]
    names: list[str] = []
    for name in map(str, config.compare.variants):
        names += sweep if name == "lr_sweep" else [name]
    return names


def _compose_variant(
    base: str, fixed: list[str], of_callbacks: list[str]
) -> tuple[DictConfig, set[str]]:
    """The configuration of a variant, and the overrides of callbacks that concern it."""
    overrides = [*fixed, f"+compare/variant={base}"]
    run = compose("compare", overrides)
    named = {one: match[1] for one in of_callbacks if (match := CALLBACK.match(one))}
    applied = [one for one in of_callbacks if one[0] == "+" or named[one] in run.callbacks]
    if applied:
        run = compose("compare", [*overrides, *applied])
    _insert_own_module(run)
    return run, set(applied)


def _insert_own_module(run: DictConfig) -> None:
    for key, name in (("module", "module"), ("data", "datamodule")) if run.compare.module else ():
        path, arguments = run.compare[name], run.compare[f"{name}_args"]
        imported = None if path is None else _import(path, f"compare.{name}")
        with open_dict(run):
            run[key] = path and {"_target_": path, **arguments}
        if not inspect.isclass(imported):
            continue
        try:
            inspect.signature(imported).bind(**arguments)
        except TypeError as error:
            if str(error).startswith("missing"):  # an unknown one is refused with a suggestion
                raise UserError(
                    f"compare.{name}={path}: {error}; write +compare.{name}_args.NAME=VALUE"
                ) from error


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
    run = composed.copy()
    changes: dict[str, Any] = {}
    for modifier in name.split("@")[1:]:
        rate = re.fullmatch(r"(\d*\.?\d+)x", modifier)
        if modifier == "cosine" and "cosine" not in changes:
            changes["cosine"] = {"_target_": f"{CHANGES}.CosineSchedule"}
            run.compare.about += ", cosine schedule to zero"
        elif rate and float(rate[1]) > 0 and MULTIPLE not in changes:
            target = f"{CHANGES}.LearningRateMultiple"
            changes[MULTIPLE] = {"_target_": target, "multiple": float(rate[1])}
            run.compare.about += f", {rate[1]} times the learning rate"
        else:
            raise UserError(
                f"compare.variants or compare.lr_sweep: {name} has the modifier @{modifier}; write "
                "@3x for three times the learning rate, @cosine for a cosine schedule, each once"
            )
    kept = {key: one for key, one in run.callbacks.items() if key not in LEFT_OUT}
    with open_dict(run):
        run.callbacks = {**changes, **kept}
    return run


def _monitored(run: DictConfig) -> tuple[str, Mode]:
    """Name and direction of the metric by which runs are compared."""
    own = _module_attribute(run, "monitor", None)
    metric, mode = run.compare.metric or own, run.compare.mode
    if metric is None:
        raise UserError(
            "compare.metric is not given: name what validation logs, as in "
            "compare.metric=val/loss compare.mode=min"
        )
    if mode is None and metric == own:
        mode = _module_attribute(run, "monitor_mode", "min")
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


def _module_attribute(run: DictConfig, name: str, default: Any) -> Any:
    path = run.module._target_
    with attribute_to(f"module._target_={path}", ImportError), suppress(AttributeError):
        return class_attribute(path, name)
    return default


def _prepare(run: DictConfig, metric: str, *, keep_loggers: bool) -> None:
    """Adds what records the run, and leaves out what only a run on its own needs."""
    with open_dict(run):
        run.run_folder = RUN_FOLDER
        csv = {"_target_": CSV_LOGGER, "save_dir": RUN_FOLDER, "name": "", "version": ""}
        own = {k: v for k, v in (run.logger or {}).items() if k != "csv"} if keep_loggers else {}
        run.logger = {**own, "csv": csv}
        recorder = {"_target_": COST_RECORDER, "metric": metric, "folder": RUN_FOLDER}
        run.callbacks = {RECORDER: recorder, **run.callbacks}
        run.trainer.update(QUIET_TRAINER)
        run.pop("compare")
    if run.trainer.devices not in (1, "auto") or run.trainer.num_nodes != 1:
        raise UserError(
            f"trainer.devices={run.trainer.devices}: every run of a comparison has one device"
        )


def _resolve(run: DictConfig, seed: int) -> dict[str, Any]:
    run.seed = seed
    settings: Any = OmegaConf.to_container(run, resolve=True, throw_on_missing=True)
    return settings
