"""One sentence for each way in which a configuration can be wrong."""

import difflib
import inspect
import math
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, Literal

import yaml
from hydra.errors import (
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from lightning_stableaa.options import Options, Smoothing
from lightning_stableaa.recipes.errors import UserError, attribute_to
from lightning_stableaa.recipes.files import FULL, REFUSED
from lightning_stableaa.recipes.signatures import parameters

USER_ERRORS = (
    UserError,
    HydraException,
    OmegaConfBaseException,
    yaml.YAMLError,
)

RECIPES = "lightning_stableaa.recipes."  # in front of the classes that are ours

# Options of a run that no constructor takes.
PLAIN: dict[str, Any] = {
    "seed": int,
    "stochastic": bool | Literal["auto"],
    "threads": int | None,
    "oversubscribe": bool,
    "resume_from": str | None,
    "evaluate": str | None,
    "metric": str | None,
    "mode": Literal["min", "max"] | None,
    "pictures": bool,
    "run_name": str | int | None,
    "run_folder": str,
}

# Groups of which every run needs one.
BUILT = ("module", "trainer", "model", "data", "optimizer")


@contextmanager
def exit_on_user_error(command: str) -> Iterator[None]:
    """Ends ``command`` with one sentence and exit code 2 on a wrong configuration."""
    try:
        yield
    except (*USER_ERRORS, ValueError, OSError) as error:
        sentence = format_error(error)
        if not isinstance(error, USER_ERRORS):
            if not _raised_by_hydra(error):
                raise
            if isinstance(error, OSError):
                if error.errno not in FULL | REFUSED:
                    raise
                # where Hydra makes the folder of a run
                folder = f"current folder {os.getcwd()}: {error.strerror}"
                sentence = f"{folder}; change to one that can be written to"
        print(f"{command}: {sentence}", file=sys.stderr)
        sys.exit(2)


def _raised_by_hydra(error: BaseException) -> bool:
    """Whether this package was not called by Hydra, but Hydra did something on its own.

    Such as a ValueError, "Config group override must be a string or a list".
    """
    frames = traceback.walk_tb(error.__traceback__)
    packages = [frame.f_globals["__name__"].partition(".")[0] for frame, _ in frames]
    callers = [one for one in packages if one in ("hydra", "lightning_stableaa")]
    return callers[-1:] == ["hydra"]


def format_error(error: Exception) -> str:
    """The sentence that a user reads: the option, its value, the way out."""
    cause = error.__cause__
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        if group == "hydra/launcher" and choice.startswith("submitit"):
            return f"{group}={choice}: pip install 'lightning-stableaa[recipes,slurm]' brings it"
        if not group:
            return f"--config-name={choice}: there is no such configuration"
        return f"{group}={choice}: there is no such choice; {_suggest(choice, error.options or ())}"
    if group := re.match(r"You must specify '(.+?)'", str(error)):
        options = re.findall(r"\t([^_].*)", str(error))
        return f"{group[1]} is not given; {_suggest('', options)}, as in {group[1]}={options[0]}"
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        known = cause.parent_node if isinstance(cause.parent_node, DictConfig) else {}
        return f"{cause.full_key}: there is no such option; {_suggest(str(cause.key), known)}"
    if resolving := re.search(r"^UserError raised while resolving interpolation: (.*)", str(error)):
        return resolving[1]
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{error.full_key}: {_one_line(error.msg)}"
    if isinstance(error, yaml.YAMLError):
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f"{mark.name}, line {mark.line + 1}" if mark else "a configuration file"
        return f"{where}: {_one_line(problem or error)}"
    if ambiguous := re.match(r"Ambiguous value for argument '([^']*)'", str(error)):
        return (
            f"{ambiguous[1]}: several values are a sweep, which needs -m; a list is written in "
            "brackets, as in name=[1,2]"
        )
    if isinstance(error, OverrideParseException):
        return _misspelled(error.override or "")
    if isinstance(error, InstantiationException):
        option = re.search(r"full_key: (\S+)", str(error))
        name = option[1] if option else "configuration"
        return f"{name}: {_raised_elsewhere(cause)}{_one_line(cause or error)}"
    return _one_line(error)


# Options of Hydra with dashes; all others are written as name=value.
_FLAGS = (
    r"--(help|hydra-help|version|cfg|resolve|package|run|multirun|shell-completion|config-path"
    r"|config-name|config-dir|experimental-rerun|info)|-(h|c|p|r|m|sc|cp|cn|cd|i)"
)


def check_flags(arguments: Iterable[str]) -> None:
    """Refuses options with dashes that are none of Hydra's.

    Raises:
        UserError: such an option.
    """
    for argument in arguments:
        name = argument.split("=")[0]
        if re.fullmatch(r"--?[a-zA-Z][\w.-]*", name) and not re.fullmatch(_FLAGS, name):
            raise UserError(
                f"{argument}: options are written without dashes, as in recipe=burgers2d or "
                "trainer.max_epochs=5"
            )


def _misspelled(override: str) -> str:
    """An override that Hydra's grammar does not have."""
    name, equals, value = override.partition("=")
    if equals and re.fullmatch(r"[+~]*[\w./@:]+", name) and not re.match(r"[\[{'\"]", value):
        return (
            f"{override}: a value with blanks, brackets or letters beyond ASCII has quotes of its "
            f"own inside of those of the shell, as in \"{name}='{value}'\""
        )
    return f"{override}: options are written as name=value, lists as name=[1,2]"


def _raised_elsewhere(error: BaseException | None) -> str:
    """Kind and place of an error that is none of a constructor's refusals; else nothing."""
    if error is None or isinstance(error, (TypeError, ValueError, *USER_ERRORS)):
        return ""
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    place = PurePath(frame.f_code.co_filename).name
    return f"{type(error).__name__} in {place}, line {line}: "


def check_run(settings: Mapping[str, Any]) -> None:
    """Checks a whole run: its plain options, its groups, and every constructor's options.

    Raises:
        UserError: an option that is missing, unknown or of another type.
    """
    for name, annotation in PLAIN.items():
        if not _fits(settings.get(name), annotation):
            raise UserError(f"{name}={settings.get(name)}: expected {_describe(annotation)}")
    for name, value in settings.items():
        # others may be a user's own, for interpolations
        known = [one for one in (*PLAIN, *BUILT, "callbacks", "logger") if one != name]
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
        if close and name not in PLAIN and not isinstance(value, Mapping):
            raise UserError(f"{name}: there is no such option; did you mean {close[0]}?")
    for name in BUILT:
        if settings.get(name) is not None:
            _check_target(settings[name], name)
    data = settings.get("data") or {}
    if isinstance(data, Mapping) and data.get("_target_") is None and len(data) > 1:
        name = next(one for one in data if one != "_target_")
        raise UserError(f"data.{name}: data._target_ is not given; name a LightningDataModule")
    for group in ("callbacks", "logger"):
        entries = settings.get(group) or {}
        if not isinstance(entries, Mapping):
            raise UserError(f"{group}={entries}: expected a dict of named entries")
        for name, value in entries.items():
            if value is not None:
                _check_target(value, f"{group}.{name}")
    check_options(settings)
    _check_ranges(settings)
    _check_acceleration(settings.get("callbacks") or {})
    _check_paths(settings.get("data") or {})


_ABOVE_0 = math.nextafter(0, 1)
_BELOW_1 = math.nextafter(1, 0)
# Least and greatest value: of counts that the Trainer divides by, or trains nothing with, and of
# what constructors would refuse after Lightning has taken its seconds to import.
_RANGES: dict[str, tuple[float, float, str]] = {
    "seed": (0, 2**32 - 1, "an integer from 0 to 4294967295, as NumPy takes it"),
    "threads": (1, math.inf, "at least 1"),
    "trainer.accumulate_grad_batches": (1, math.inf, "at least 1"),
    "trainer.limit_train_batches": (_ABOVE_0, math.inf, "more than 0"),
    "trainer.max_epochs": (1, math.inf, "at least 1, or -1 for no limit"),
    "trainer.max_steps": (1, math.inf, "at least 1, or -1 for no limit"),
    "trainer.num_nodes": (1, math.inf, "at least 1"),
    "trainer.devices": (1, math.inf, "at least 1, or -1 for all"),
    "trainer.val_check_interval": (_ABOVE_0, math.inf, "more than 0"),
    "optimizer.lr": (0, sys.float_info.max, "a finite number >= 0"),
    "optimizer.momentum": (0, sys.float_info.max, "a finite number >= 0"),
    "optimizer.weight_decay": (0, sys.float_info.max, "a finite number >= 0"),
    "data.batch_size": (1, math.inf, "at least 1"),
    "data.validation_share": (_ABOVE_0, _BELOW_1, "a number between 0 and 1"),
    "data.flip_probability": (0, 1, "a number from 0 to 1"),
    "data.size": (1, math.inf, "at least 1"),
    "data.workers": (0, math.inf, "at least 0"),
    "data.interior_points": (1, math.inf, "at least 1"),
    "data.border_points": (2, math.inf, "at least 2"),
    "data.data_points": (1, math.inf, "at least 1"),
    "data.validation_points": (1, math.inf, "at least 1"),
    "data.redraw_every": (1, math.inf, "at least 1"),
}


def _check_ranges(settings: Mapping[str, Any]) -> None:
    for option, (least, greatest, expected) in _RANGES.items():
        group, _, name = option.rpartition(".")
        entries = (settings.get(group) or {}) if group else settings
        if group == "data" and not str(entries.get("_target_")).startswith(RECIPES):
            continue  # a user's own may mean something else by -1
        value = entries.get(name)
        unlimited = value == -1 and "-1" in expected
        if isinstance(value, int | float) and not (least <= value <= greatest or unlimited):
            raise UserError(f"{option}={value}: expected {expected}")


def _check_acceleration(callbacks: Mapping[str, Any]) -> None:
    """Values of our own callbacks, whose constructors would have to import Lightning."""
    for name, entry in callbacks.items():
        target = (entry or {}).get("_target_")
        values = {key: value for key, value in (entry or {}).items() if key[0] != "_"}
        with attribute_to(f"callbacks.{name}"):
            if target == "lightning_stableaa.SmoothingMonitor":
                Smoothing(**values)
            elif target == "lightning_stableaa.AndersonCallback":
                values.pop("stochastic", None)
                if isinstance(values.get("warmup_steps"), str):  # epochs
                    values.pop("warmup_steps")
                Options(**values)


def _check_paths(data: Mapping[str, Any]) -> None:
    """Files of the recipes, whose readers would have to import Lightning."""
    if not str(data.get("_target_")).startswith(RECIPES):
        return
    for name in ("csv", "folder"):
        path = data.get(name)
        if isinstance(path, str) and not Path(path).exists():
            raise UserError(f"data.{name}={path}: No such file or folder; give the path of one")


def _check_target(value: Any, option: str) -> None:
    if not isinstance(value, Mapping) or "_target_" not in value:
        raise UserError(f"{option}={value}: expected a dict with a _target_, the class to build")


def check_options(config: Mapping[str, Any], path: str = "") -> None:
    """Compares every plain value with the constructor that it is meant for.

    Constructors refuse values out of range with a clear sentence, but meet a wrong type or an
    unknown name with whatever fails first.

    Raises:
        UserError: an option the constructor does not have, or a value of another type.
    """
    known: dict[str, Any] = {}
    if config.get("_target_") is not None:
        with attribute_to(f"{path}._target_={config['_target_']}", ImportError, AttributeError):
            known = parameters(config["_target_"]) or {}
    for name, value in config.items():
        option = f"{path}.{name}" if path else name
        if known and name not in known and not name.startswith("_"):
            raise UserError(f"{option}: there is no such option; {_suggest(name, known)}")
        if isinstance(value, Mapping):
            check_options(value, option)
        elif isinstance(value, float) and math.isnan(value):
            raise UserError(f"{option}=nan: expected a number")
        elif name in known and not _fits(value, known[name]):
            raise UserError(f"{option}={value}: expected {_describe(known[name])}")


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value from YAML can be meant for the annotation; yes where that is not plain."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, member) for member in typing.get_args(annotation))
    if origin is typing.Literal:
        return value in typing.get_args(annotation)
    expected = origin or annotation
    if expected is Any or not inspect.isclass(expected):
        return True
    if isinstance(value, bool) or value is None:
        return expected in (type(value), object)
    if isinstance(value, list):  # YAML has no tuples
        members = typing.get_args(annotation)
        if expected is tuple and members and Ellipsis not in members:
            return len(value) == len(members)
        return expected is not str and issubclass(expected, Iterable)
    return isinstance(value, (int, float) if expected is float else expected)


def _describe(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType, typing.Literal):
        return " or ".join(dict.fromkeys(map(_describe, typing.get_args(annotation))))
    if annotation is type(None):
        return "null"
    kind = origin or annotation
    if origin is tuple or not inspect.isclass(kind):
        return re.sub(r"\b\w+\.", "", repr(annotation))
    return kind.__name__


def _suggest(wrong: str, options: Iterable[Any]) -> str:
    names = sorted(str(name) for name in options if name != "hydra" and str(name)[0] != "_")
    if not names:
        return "a new one is written with a plus sign, as in +option=value"
    close = difflib.get_close_matches(wrong, names, n=1)
    return f"did you mean {close[0]}?" if close else f"choose one of {', '.join(names)}"


def _one_line(message: object) -> str:
    return " ".join(str(message).split())
