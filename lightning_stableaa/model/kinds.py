"""What an object is: plain data, state of the user's own program, or the program around it."""

from __future__ import annotations

import dis
import functools
import os
import sys
import sysconfig
import types
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Set
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_stableaa.model.rng import is_generator

NUMBERS = frozenset([int, float, complex, str, bytes, bool, tuple, type(None)])

ATOM_TYPES = frozenset(
    [
        *(int, float, complex, str, bytes, bool, type(None), type, range, slice, type(Ellipsis)),
        *(torch.dtype, torch.device, torch.Size),
        *weakref.ProxyTypes,  # which pass for what they refer to
    ]
)

# What belongs to the program around a training step, and not to its state.
FOREIGN_PACKAGES = frozenset(
    [
        *("lightning", "pytorch_lightning", "lightning_fabric"),
        *("tensorboard", "wandb", "mlflow", "logging"),
        *("threading", "_thread", "multiprocessing", "concurrent", "asyncio", "importlib"),
        *("torch.distributed", "torch._dynamo", "torch.fx"),
    ]
)

# What training does not change.
PROGRAM = (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type)

COLLECTIONS = (dict, list, tuple, set, frozenset, deque)

_CHANGING = (dict, list, set, deque)

CONTAINERS = (*_CHANGING, Tensor)

# What another thread or process may take from, or that has its state outside of this one.
SHARED_PACKAGES = frozenset(
    [
        *("queue", "_queue", "multiprocessing.queues", "multiprocessing.sharedctypes"),
        *("multiprocessing.connection", "multiprocessing.managers"),
        *("socket", "_socket", "sqlite3"),
    ]
)

# of the byte code, on names of a module, and of what is found there
_GLOBAL_OPERATIONS = frozenset(["LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL", "DELETE_GLOBAL"])
_ATTRIBUTE_OPERATIONS = frozenset(["LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "IMPORT_FROM"])


class Names(NamedTuple):
    """What the code of a function names: globals, attributes of anything, modules it imports."""

    scope: frozenset[str]
    attributes: frozenset[str]
    imports: frozenset[str]


def program_of(function: types.FunctionType) -> list[Any]:
    """Functions, classes and modules of the user's own that its code names."""
    names, scope = names_of(function.__code__), function.__globals__
    pending = [*_named(names.scope, scope), *_imported(names.imports, scope)]
    found: dict[int, Any] = {}
    while pending:
        one = pending.pop()
        if id(one) not in found:
            found[id(one)] = one
            if isinstance(one, types.ModuleType):
                pending += _named(names.attributes, vars(one))
    return list(found.values())


def _named(names: Iterable[str], scope: dict[str, Any]) -> Iterator[Any]:
    for name in names:
        one = scope.get(name)
        if isinstance(one, types.ModuleType):
            module = one.__name__
        elif isinstance(one, types.FunctionType | type):
            module = getattr(one, "__module__", None)
        else:
            continue
        if isinstance(module, str) and is_own(module):
            yield one


def _imported(names: Iterable[str], scope: dict[str, Any]) -> Iterator[types.ModuleType]:
    """By whole names, or relative to the package of the function."""
    package = str(scope.get("__package__") or "").split(".")
    parents = [".".join(package[:count]) for count in range(len(package) + 1)]
    for name in names:
        for parent in parents:
            path = f"{parent}.{name}".strip(".")
            if path in sys.modules and is_own(path):
                yield sys.modules[path]


def is_state(value: Any) -> bool:
    """Data, generators of random numbers, and objects of the user's own or of networks."""
    return (
        isinstance(value, CONTAINERS)
        or type(value) in NUMBERS
        or isinstance(value, nn.Module)
        or is_array(value)
        or is_generator(value)
        or (is_own(type(value).__module__) and not is_foreign(value))
    )


def is_small_collection(value: Any) -> bool:
    """Whether it is one of at most a thousand numbers, strings and the like."""
    return (
        isinstance(value, _CHANGING)
        and len(value) <= 1000
        and not not_atoms([*value, *(value.values() if isinstance(value, dict) else ())])
    )


def not_atoms(values: Iterable[Any]) -> list[Any]:
    """Those that may hold something that changes."""
    return [one for one in values if type(one) not in ATOM_TYPES]


@functools.lru_cache(maxsize=1024)
def slots_of(kind: type) -> tuple[Any, ...]:
    """The members of a class and of its bases that are slots; of a cell, what it refers to."""
    if kind is types.CellType:
        return (kind.cell_contents,)
    return tuple(
        one
        for base in kind.__mro__
        if "__slots__" in vars(base)
        for one in vars(base).values()
        if isinstance(one, types.MemberDescriptorType)
    )


def functions_of(value: Any) -> Iterator[types.FunctionType]:
    """A function of a class, or those of a property or of a static or class method."""
    parts: list[Any] = [value]
    if isinstance(value, property):
        parts = [value.fget, value.fset]
    elif isinstance(value, staticmethod | classmethod):
        parts = [value.__func__]
    return (one for one in parts if isinstance(one, types.FunctionType))


@functools.cache
def names_of(code: types.CodeType) -> Names:
    """Of a function, and of those within it."""
    found: list[tuple[str, Any]] = [(one.opname, one.argval) for one in dis.get_instructions(code)]
    scope = {name for operation, name in found if operation in _GLOBAL_OPERATIONS}
    attributes = {name for operation, name in found if operation in _ATTRIBUTE_OPERATIONS}
    imports = {name for operation, name in found if operation == "IMPORT_NAME"}
    for one in code.co_consts:
        if isinstance(one, types.CodeType):
            inner = names_of(one)
            scope, attributes = scope | inner.scope, attributes | inner.attributes
            imports |= inner.imports
    return Names(frozenset(scope), frozenset(attributes), frozenset(imports))


@functools.cache
def is_own(module: str | None) -> bool:
    """Whether a module is of the user's project: neither installed nor of Python."""
    path = getattr(sys.modules.get(module or ""), "__file__", None)
    if module is None or path is None or module.split(".")[0] == __name__.split(".")[0]:
        return module == "__main__"
    if {"site-packages", "dist-packages"} & set(Path(path).parts):
        return False
    paths = sysconfig.get_paths()
    return not path.startswith((paths["stdlib"] + os.sep, paths["platstdlib"] + os.sep))


def is_counted(value: Any) -> bool:
    """Whether an iterator is the user's own in Python: its position is one of its attributes."""
    kind = type(value)
    is_plain = isinstance(kind.__next__, types.FunctionType) and is_own(kind.__module__)
    return is_plain and not isinstance(value, torch.utils.data.Dataset)


def is_array(value: Any) -> bool:
    """Whether it is one of NumPy, which may not be imported."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def is_frame(value: Any) -> bool:
    """Whether it is a table or a column of pandas, which may not be imported."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(value, pandas.DataFrame | pandas.Series)


def is_foreign(value: Any) -> bool:
    """Whether it belongs to the program around a training step."""
    if isinstance(value, types.ModuleType | Enum | torch.utils.data.Dataset):
        return True
    return any(
        is_of(kind, FOREIGN_PACKAGES)
        for kind in type(value).__mro__[:-1]
        if not kind.__name__.endswith("Mixin")  # a user's own may derive from those
    )


def is_of(kind: type, packages: Set[str]) -> bool:
    """Whether a class is defined in one of these packages."""
    names = kind.__module__.split(".")
    return names[0] in packages or ".".join(names[:2]) in packages
