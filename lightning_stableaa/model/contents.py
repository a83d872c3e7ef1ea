"""Contents of containers and objects: how they are read, and written back where they changed.

``write_x(value, kept)`` puts back what ``read_x(value)`` has returned. Both call the methods of the
builtin classes: those of a subclass may do more.
"""

from __future__ import annotations

import operator
import sys
from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import Any

from lightning_stableaa.model.kinds import is_program, slots_of

_UNSET = object()  # a slot without a value


def read_dict(value: dict[Any, Any]) -> dict[Any, Any]:
    kind: Any = OrderedDict if isinstance(value, OrderedDict) else dict
    return {name: one for name, one in kind.items(value)}  # noqa: C416  # by its own method


def write_dict(value: dict[Any, Any], kept: dict[Any, Any]) -> None:
    kind: Any = OrderedDict if isinstance(value, OrderedDict) else dict
    if (
        kind.__len__(value) == len(kept)
        and all(map(operator.is_, kind.values(value), kept.values()))
        and all(map(operator.is_, kind.__iter__(value), kept))
    ):
        return
    kind.clear(value)  # a subclass may do more than that
    for name, one in kept.items():
        kind.__setitem__(value, name, one)


def read_list(value: list[Any]) -> list[Any]:
    return list(list.__iter__(value))


def write_list(value: list[Any], kept: list[Any]) -> None:
    same = list.__len__(value) == len(kept) and all(map(operator.is_, list.__iter__(value), kept))
    if not same:
        list.__setitem__(value, slice(None), kept)


def read_collection(value: set[Any] | deque[Any]) -> list[Any]:
    kind: Any = set if isinstance(value, set) else deque
    return list(kind.__iter__(value))


def write_collection(value: Any, kept: list[Any]) -> None:
    now = read_collection(value)
    if len(now) == len(kept) and all(map(operator.is_, now, kept)):
        return
    if isinstance(value, set):  # the others stay where they are, and so does the order
        before = set(kept)
        set.difference_update(value, [one for one in now if one not in before])
        set.update(value, kept)
    else:
        deque.clear(value)
        deque.extend(value, kept)


def read_slots(value: Any) -> dict[Any, Any]:
    """By member, without what ``getattr`` of the class may do beside."""
    found = {}
    for member in slots_of(type(value)):
        try:
            found[member] = member.__get__(value)
        except AttributeError:
            continue
    return found


def write_slots(value: Any, kept: dict[Any, Any]) -> None:
    now = read_slots(value)
    for member in slots_of(type(value)):
        if member not in kept:
            if member in now:
                member.__delete__(value)
        elif now.get(member, _UNSET) is not kept[member]:
            member.__set__(value, kept[member])


def read_cell(cell: Any) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # not assigned yet
        return ()


def write_cell(cell: Any, kept: tuple[Any, ...]) -> None:
    if kept and (now := read_cell(cell)) and now[0] is not kept[0]:
        cell.cell_contents = kept[0]


def read_attributes(value: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Contents of the dict of an object, which may be replaced as a whole."""
    attributes = object.__getattribute__(value, "__dict__")  # not by one of its own
    return read_dict(attributes), attributes


def write_attributes(value: Any, kept: tuple[dict[str, Any], dict[str, Any]]) -> None:
    content, attributes = kept
    if object.__getattribute__(value, "__dict__") is not attributes:
        object.__setattr__(value, "__dict__", attributes)
    write_dict(attributes, content)


def read_globals(names: Iterable[str], scope: dict[str, Any]) -> dict[str, Any]:
    found = {name: scope[name] for name in names if name in scope}
    return {name: one for name, one in found.items() if not is_program(one)}


def read_module(scope: dict[str, Any]) -> dict[str, Any]:
    return {name: one for name, one in scope.items() if name[:2] != "__" and not is_program(one)}


def write_globals(scope: dict[str, Any], kept: dict[str, Any]) -> None:
    for name, one in kept.items():
        if scope.get(name, _UNSET) is not one:
            scope[name] = one


def read_class(kind: type) -> dict[str, Any]:
    found = vars(kind).items()
    return {name: one for name, one in found if name[:2] != "__" and not is_program(one)}


def write_class(kind: type, kept: dict[str, Any]) -> None:
    for name, one in kept.items():
        if vars(kind).get(name, _UNSET) is not one:
            setattr(kind, name, one)


def write_sequence(value: Any, kept: Any) -> None:
    if value != kept:
        value[:] = kept


def write_file(value: Any, kept: tuple[Any, int]) -> None:
    if (value.getvalue(), value.tell()) != kept:
        value.seek(0)
        value.truncate()
        value.write(kept[0])
        value.seek(kept[1])


def write_array(array: Any, copy: Any) -> None:
    numbers = array.dtype.kind in "fc"  # NaN equals NaN; the others have no such values
    # objects may have no truth value when they are compared
    if array.dtype.hasobject or not sys.modules["numpy"].array_equal(
        array, copy, equal_nan=numbers
    ):
        array[...] = copy


def write_frame(frame: Any, kept: Any) -> None:
    if not frame.equals(kept):
        frame._update_inplace(kept.copy())
