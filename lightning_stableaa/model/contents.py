"""Contents of objects: how they are read, and written back where they changed.

What ``read`` of an ``Access`` has returned, its ``write`` puts back. Both call the methods of the
builtin classes: those of a subclass may do more.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from lightning_stableaa.model.kinds import NUMBERS, PROGRAM, slots_of
from lightning_stableaa.model.rng import read_generator, write_generator

_UNSET = object()  # a slot without a value


class Access(NamedTuple):
    """How contents of one kind are read and written.

    To write those of a generator of random numbers returns whether it had moved.
    """

    read: Callable[[Any], Any]
    write: Callable[[Any, Any], bool | None]


@functools.lru_cache(maxsize=1024)
def _builtin_of(kind: type) -> Any:
    """The class of Python from which that of a collection derives."""
    builtins = (list, OrderedDict, dict, tuple, set, frozenset, deque)
    return next(one for one in builtins if issubclass(kind, one))


def read_elements(value: Any) -> list[Any]:
    return list(_builtin_of(type(value)).__iter__(value))


def _write_elements(value: Any, kept: list[Any]) -> None:
    kind = _builtin_of(type(value))
    if kind.__len__(value) == len(kept) and all(map(operator.is_, kind.__iter__(value), kept)):
        return
    if kind is list:
        list.__setitem__(value, slice(None), kept)
    elif kind is deque:
        deque.clear(value)
        deque.extend(value, kept)
    else:  # of a set, the others stay where they are, and so does the order
        before = set(kept)
        set.difference_update(value, [one for one in set.__iter__(value) if one not in before])
        set.update(value, kept)


def _read_dict(value: dict[Any, Any]) -> dict[Any, Any]:
    return dict(_builtin_of(type(value)).items(value))  # not of its own methods


def _write_dict(value: dict[Any, Any], kept: dict[Any, Any]) -> None:
    kind = _builtin_of(type(value))
    if (
        kind.__len__(value) == len(kept)
        and all(map(operator.is_, kind.values(value), kept.values()))
        and all(map(operator.is_, kind.__iter__(value), kept))
    ):
        return
    kind.clear(value)
    for name, one in kept.items():
        kind.__setitem__(value, name, one)


def attributes_of(value: Any) -> dict[str, Any] | None:
    """The dict of an object, not by a method of its own; ``None`` where it has none."""
    try:
        attributes = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return attributes if isinstance(attributes, dict) else None  # that of a class is none


def _read_attributes(value: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of the dict, and the dict, which may be replaced as a whole."""
    attributes = object.__getattribute__(value, "__dict__")
    return _read_dict(attributes), attributes


def _write_attributes(value: Any, kept: tuple[dict[str, Any], dict[str, Any]]) -> None:
    content, attributes = kept
    if object.__getattribute__(value, "__dict__") is not attributes:
        object.__setattr__(value, "__dict__", attributes)
    _write_dict(attributes, content)


def _read_slots(value: Any) -> dict[Any, Any]:
    """By member, without what ``getattr`` of the class may do beside."""
    found = {}
    for member in slots_of(type(value)):
        try:
            found[member] = member.__get__(value)
        except (AttributeError, ValueError):  # ValueError: of a cell
            continue
    return found


def _write_slots(value: Any, kept: dict[Any, Any]) -> None:
    now = _read_slots(value)
    for member in slots_of(type(value)):
        if member not in kept:
            if member in now:
                member.__delete__(value)
        elif now.get(member, _UNSET) is not kept[member]:
            member.__set__(value, kept[member])


def _read_state(owner: Any, names: Iterable[str] | None = None) -> dict[str, Any]:
    """What some names, or all public ones, of a class or of a dict of globals refer to."""
    scope = vars(owner) if isinstance(owner, type) else owner
    if names is None:
        names = [name for name in scope if name[:2] != "__"]
    found = {name: scope[name] for name in names if name in scope}
    return {name: one for name, one in found.items() if not isinstance(one, PROGRAM)}


def _write_state(owner: Any, kept: dict[str, Any]) -> None:
    scope: Any = vars(owner) if isinstance(owner, type) else owner
    for name, one in kept.items():
        if scope.get(name, _UNSET) is one:
            continue
        if isinstance(owner, type):
            setattr(owner, name, one)
        else:
            scope[name] = one


def _read_numbers(owner: Any) -> dict[str, Any]:
    """Plain settings of a Trainer or loop, such as ``should_stop`` and what a user added."""
    return {name: one for name, one in vars(owner).items() if type(one) in NUMBERS}


def _write_numbers(owner: Any, kept: dict[str, Any]) -> None:
    for name in _read_numbers(owner).keys() - kept.keys():
        delattr(owner, name)
    vars(owner).update(kept)


def _write_buffer(value: Any, kept: Any) -> None:
    if value != kept:
        value[:] = kept


def _write_file(value: Any, kept: tuple[Any, int]) -> None:
    if (value.getvalue(), value.tell()) != kept:
        value.seek(0)
        value.truncate()
        value.write(kept[0])
        value.seek(kept[1])


def _write_array(array: Any, copy: Any) -> None:
    numbers = array.dtype.kind in "fc"  # NaN equals NaN; the others have no such values
    # objects may have no truth value when they are compared
    if array.dtype.hasobject or not sys.modules["numpy"].array_equal(
        array, copy, equal_nan=numbers
    ):
        array[...] = copy


def _write_frame(frame: Any, kept: Any) -> None:
    if not frame.equals(kept):
        frame._update_inplace(kept.copy())


ELEMENTS = Access(read_elements, _write_elements)  # of a list, a set or a deque
DICT = Access(_read_dict, _write_dict)
ATTRIBUTES = Access(_read_attributes, _write_attributes)
SLOTS = Access(_read_slots, _write_slots)
STATE = Access(_read_state, _write_state)
SETTINGS = Access(_read_numbers, _write_numbers)
GENERATOR = Access(read_generator, write_generator)
BUFFER = Access(lambda value: value[:], _write_buffer)  # bytes or numbers of one kind
FILE = Access(lambda value: (value.getvalue(), value.tell()), _write_file)  # in memory
ARRAY = Access(lambda value: value.copy(), _write_array)
FRAME = Access(lambda value: value.copy(), _write_frame)


def state_named(names: Iterable[str]) -> Access:
    """Of a dict of globals, under these names alone."""
    return STATE._replace(read=functools.partial(_read_state, names=names))
