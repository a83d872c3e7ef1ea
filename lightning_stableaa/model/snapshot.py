"""Snapshots of the state that a training step can change: modules, batches, generators."""

from __future__ import annotations

import array
import bisect
import copy
import dis
import functools
import gc
import io
import math
import operator
import os
import pickle
import random
import sys
import sysconfig
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Set
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_stableaa.distributed.dtensor import to_local
from lightning_stableaa.model.parameters import is_dense

# Bytes of tensors and arrays that a snapshot copies at least, the smallest first; of tensors beyond
# it keeps the version alone.
_COPIED_BYTES = 64 << 20

NUMBERS = frozenset([int, float, complex, str, bytes, bool, tuple, type(None)])

_ATOMS = (int, float, complex, str, bytes, bool, type(None), type, range, slice)
_ATOM_TYPES = (
    frozenset(_ATOMS)
    | {torch.dtype, torch.device, torch.Size, type(Ellipsis)}
    | set(weakref.ProxyTypes)  # which pass for what they refer to
)

# Objects that a snapshot follows at most: beyond it takes longer than many training steps.
_MAX_OBJECTS = 100_000

# What belongs to the program around a training step, and not to its state.
_FOREIGN_PACKAGES = frozenset(
    [
        "lightning",
        "pytorch_lightning",
        "lightning_fabric",
        "logging",
        "threading",
        "_thread",
        "multiprocessing",
        "concurrent",
        "asyncio",
        "tensorboard",
        "wandb",
        "mlflow",
        "importlib",
        "torch.distributed",
        "torch._dynamo",
    ]
)

# Integers of as many bytes as a number has, to compare bits: NaN is NaN, and 0.0 is not -0.0.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_COLLECTIONS = (dict, list, tuple, set, frozenset, deque)
_CONTAINERS = (dict, list, set, deque, Tensor)

# What another thread or process may take from, or that has its state outside of this one.
_SHARED_PACKAGES = frozenset(
    [
        *("queue", "_queue", "multiprocessing.queues", "multiprocessing.sharedctypes"),
        *("socket", "_socket", "sqlite3"),
    ]
)

# of the byte code, on names of a module
_GLOBAL_OPERATIONS = frozenset(["LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL", "DELETE_GLOBAL"])

_UNSET = object()  # a slot without a value

_Write = Callable[[Any, Any], object]
_Kind = tuple[Any, Callable[[Any], Any], _Write]  # an object, how to read its contents and to write

_TORCH_MODULES = ("torch.nn.", "torch._dynamo.", "torch.fx.")
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class UnsupportedStateError(Exception):
    """The state holds what cannot be copied, such as an iterator."""


class RNGSnapshot:
    """The state of the global generators that a training step may draw from.

    Args:
        device: whose generator of torch counts beside that of the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._python = random.getstate()
        self._numpy = _numpy_state()
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> bool:
        """Put every generator back, and return whether any had moved since the snapshot."""
        moved = [
            _put_back(torch.get_rng_state(), self._torch, torch.equal, torch.set_rng_state),
            _put_back(random.getstate(), self._python, operator.eq, random.setstate),
        ]
        if self._numpy is not None:  # setting it takes as long as a few layers of a small network
            write = sys.modules["numpy"].random.set_state
            moved.append(_put_back(_numpy_state(), self._numpy, _same, write))
        if self._cuda is not None:
            read, write = torch.cuda.get_rng_state, torch.cuda.set_rng_state
            of_device = functools.partial(write, device=self._device)
            moved.append(_put_back(read(self._device), self._cuda, torch.equal, of_device))
        return any(moved)


class StateSnapshot:
    """Contents of everything mutable that is reachable from some objects.

    Modules with their buffers, untrained parameters, plain attributes and what their forward hooks
    collect in; dicts, lists, sets, deques, arrays, frames and objects within each other; tensors
    of any layout and subclass, with the attributes they carry; cells and globals of functions, and
    attributes of classes, of the user's own modules; generators of torch, NumPy and Python.
    ``restore`` puts the contents back into the same objects, whoever else refers to them.

    Args:
        roots: such as a module and its batch.
        attributes: dicts of which only the references are kept, not the objects inside.
        trained: parameters whose contents are somebody else's to restore. Copies take at most
            twice their memory, or 64 MiB; larger tensors are watched instead, see ``lost``, and
            larger arrays are taken for constants.
        optimizers: whose state is somebody else's to restore.

    Attributes:
        objects: everything that was reached.

    Raises:
        UnsupportedStateError: something cannot be copied: an iterator, or a generator function.
    """

    def __init__(
        self,
        roots: Iterable[Any],
        trained: Iterable[Tensor] = (),
        attributes: Iterable[dict[str, Any]] = (),
        optimizers: Iterable[Optimizer] = (),
    ) -> None:
        trained = list(trained)
        self._steppers = list(optimizers)
        self._trained = sorted(_range(to_local(one)) for one in trained)
        budget = max(_COPIED_BYTES, 2 * sum(to_local(one).nbytes for one in trained))
        self._kinds: list[_Kind] = []  # of what was reached, and the contents of each
        self._contents: list[Any] = []
        self._large: list[Any] = []  # tensors and arrays
        self._generators: list[int] = []  # positions among the kinds
        self._seen: set[int] = set()
        self.objects: list[Any] = []  # kept alive, so that no id is used again
        for one in attributes:
            self._keep(one, _read_dict, _write_dict)
        collects = gc.isenabled()
        gc.disable()  # it would look through all that is kept again and again
        try:
            pending = list(roots)
            while pending:
                pending.extend(self._capture(pending.pop()))
        finally:
            if collects:
                gc.enable()
        self._tensors: list[tuple[Tensor, bool]] = []  # and whether they are copied
        for one in sorted(self._large, key=_written_bytes):
            budget -= _written_bytes(one)
            if isinstance(one, Tensor):
                self._tensors.append((one, budget >= 0))
                if one.is_leaf and one.grad is not None and is_dense(one.grad):
                    self._tensors.append((one.grad, budget >= 0))
            elif budget >= 0:
                write = _write_array if _is_array(one) else _write_frame
                self._keep(one, lambda value: value.copy(), write)
        self._states = [_TensorState.of(one, copied=copied) for one, copied in self._tensors]
        self._versions = [one._version for one, copied in self._tensors if not copied]

    def again(self) -> StateSnapshot:
        """Of the same objects, with the contents that they have now."""
        other = copy.copy(self)
        other._contents = [read(value) for value, read, _ in self._kinds]
        other._states = [
            _TensorState.of(one, copied=copied, like=state)
            for (one, copied), state in zip(self._tensors, self._states, strict=True)
        ]
        return other

    @torch.no_grad()
    def restore(self) -> None:
        """Put all contents back.

        Raises:
            UnsupportedStateError: an object refused them; all others were put back.
        """
        failure: Exception | None = None
        for (value, _, write), content in zip(self._kinds, self._contents, strict=True):
            try:
                write(value, content)
            except Exception as error:  # of an object with methods of its own
                failure = failure or error
        for (tensor, _), state in zip(self._tensors, self._states, strict=True):
            state.restore(tensor)
        if failure is not None:
            raise UnsupportedStateError(f"an object that raises {failure!r}") from failure

    def lost(self) -> bool:
        """Whether a tensor too large to be copied was written since, through itself."""
        uncopied = [one for one, copied in self._tensors if not copied]
        return [one._version for one in uncopied] != self._versions

    def drew_random_numbers(self) -> bool:
        """Whether a generator within the state has moved since."""
        for position in self._generators:
            value, read, _ = self._kinds[position]
            if pickle.dumps(read(value)) != pickle.dumps(self._contents[position]):
                return True
        return False

    def _keep(self, value: Any, read: Callable[[Any], Any], write: _Write) -> Any:
        """The contents of an object, which ``restore`` is going to put back."""
        content = read(value)
        self._kinds.append((value, read, write))
        self._contents.append(content)
        return content

    def _capture(self, value: Any) -> Iterable[Any]:
        """Keep the contents of one object, and return the objects inside."""
        kind = type(value)
        if kind in _ATOM_TYPES or id(value) in self._seen:
            return ()
        self._see(value)
        if isinstance(value, Tensor):
            self._capture_tensor(value)
            return self._inside_tensor(value)
        if issubclass(kind, _COLLECTIONS):
            inside = self._capture_container(value)
            if isinstance(value, defaultdict):
                inside = [*inside, *_not_atoms([value.default_factory])]
            if kind.__module__ in ("builtins", "collections"):
                return inside
            return [*inside, *self._capture_object(value)]  # attributes of a subclass
        if isinstance(value, functools.partial):
            return _not_atoms([value.func, *value.args, *value.keywords.values()])
        if isinstance(value, nn.Module):
            return self._capture_module(value)
        if isinstance(value, types.FunctionType):
            return self._capture_function(value)
        if isinstance(value, types.MethodType | types.BuiltinMethodType | types.MethodWrapperType):
            return _not_atoms([value.__self__, getattr(value, "__func__", None)])
        if isinstance(value, weakref.ReferenceType):
            return _not_atoms([value()])
        if self._capture_generator(value) or self._capture_buffer(value):
            return ()
        if _is_array(value):
            return self._capture_array(value)
        if _is_frame(value):
            self._large.append(value)
            return ()
        if isinstance(value, Iterator) and not _is_counted(value):
            raise UnsupportedStateError(f"an iterator ({kind.__module__}.{kind.__qualname__})")
        if _is_of(kind, _SHARED_PACKAGES):
            raise UnsupportedStateError(
                f"a {kind.__module__}.{kind.__qualname__}, which others may read or write"
            )
        if isinstance(value, Optimizer):
            return self._capture_optimizer(value)
        if isinstance(value, torch.utils.data.DataLoader):
            return _not_atoms([value.generator, getattr(value.sampler, "generator", None)])
        if _is_foreign(value):
            return ()
        return [*self._capture_object(value), *self._inside_classes(kind)]

    def _see(self, value: Any) -> None:
        self._seen.add(id(value))
        self.objects.append(value)
        if len(self.objects) > _MAX_OBJECTS:
            raise UnsupportedStateError(f"more than {_MAX_OBJECTS:,} objects")

    def _capture_container(self, value: Any) -> Iterable[Any]:
        """By the methods of the builtin: a subclass may show something else."""
        if isinstance(value, dict):
            kept = self._keep(value, _read_dict, _write_dict)
            return _not_atoms([*kept, *kept.values()])
        if isinstance(value, list):
            return _not_atoms(self._keep(value, _read_list, _write_list))
        if isinstance(value, set | deque):
            return _not_atoms(self._keep(value, _read_collection, _write_collection))
        kind: Any = tuple if isinstance(value, tuple) else frozenset
        return _not_atoms(kind.__iter__(value))

    def _capture_module(self, module: nn.Module) -> Iterable[Any]:
        attributes = self._keep(vars(module), _read_dict, _write_dict)
        if type(module).__module__.startswith(_TORCH_MODULES):  # other attributes are settings
            inside = [attributes["_parameters"], attributes["_buffers"], attributes["_modules"]]
            inside += [
                one
                for name, one in attributes.items()
                if type(one) not in _ATOM_TYPES and name[0] != "_" and _is_state(one)
            ]
        else:
            inside = [*_not_atoms(attributes.values()), *self._inside_slots(module)]
        for name in _HOOKS:
            inside += attributes.get(name, {}).values()
        if isinstance(module, torch.jit.ScriptModule):  # of a traced one, they are out of sight
            inside += module.buffers()
        return [*inside, *self._inside_classes(type(module))]

    def _inside_classes(self, kind: type) -> Iterable[Any]:
        """What all objects of a class share: containers, and of the user's own classes numbers."""
        for base in kind.__mro__[:-1]:
            is_own = _is_own(base.__module__)
            if id(base) in self._seen or _is_of(base, _FOREIGN_PACKAGES | {"torch"}):
                continue
            if not is_own and not issubclass(base, nn.Module):
                continue
            self._see(base)
            if is_own:
                self._keep(base, _read_class, _write_class)
            for name, value in vars(base).items():
                if name.startswith("__"):
                    continue
                is_state = isinstance(value, _CONTAINERS) or (is_own and _is_state(value))
                if is_state and type(value) not in _ATOM_TYPES:
                    yield value
                for function in _functions_of(value):
                    if _is_own(function.__module__):
                        yield function

    def _capture_object(self, value: Any) -> Iterable[Any]:
        return [*self._inside_attributes(value), *self._inside_slots(value)]

    def _inside_attributes(self, value: Any) -> Iterable[Any]:
        try:
            attributes = object.__getattribute__(value, "__dict__")  # not by one of its own
        except AttributeError:
            return ()
        if not isinstance(attributes, dict):  # of a class
            return ()
        return _not_atoms(self._keep(attributes, _read_dict, _write_dict).values())

    def _inside_slots(self, value: Any) -> Iterable[Any]:
        if not _slots_of(type(value)):
            return ()
        return _not_atoms(self._keep(value, _read_slots, _write_slots).values())

    def _capture_function(self, function: Any) -> Iterable[Any]:
        """What a function remembers: attributes, defaults, cells, and the user's own globals."""
        if (function.__module__ or "").split(".")[0] in _FOREIGN_PACKAGES | {"torch"}:
            return ()
        inside = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        inside += self._keep(vars(function), _read_dict, _write_dict).values()
        for cell in function.__closure__ or ():
            if id(cell) not in self._seen:
                self._see(cell)
                inside += self._keep(cell, _read_cell, _write_cell)
        if _is_own(function.__module__):
            names, scope = _names_of(function.__code__), function.__globals__
            read = functools.partial(_read_globals, names)
            inside += self._keep(scope, read, _write_globals).values()
            for one in _program_in(names, scope):
                inside += self._inside_program(one)
        return _not_atoms(inside)

    def _inside_program(self, one: Any) -> Iterable[Any]:
        """The state of a function, a class or a module that code names."""
        if isinstance(one, type):
            return self._inside_classes(one)
        if isinstance(one, types.FunctionType) or id(one) in self._seen:
            return (one,)
        self._see(one)
        return self._keep(vars(one), _read_module, _write_globals).values()

    def _capture_optimizer(self, optimizer: Optimizer) -> Iterable[Any]:
        """Settings; the state too, but of an optimizer that the training loop steps."""
        if any(optimizer is one for one in self._steppers):
            return (optimizer.param_groups,)  # its steps are those of the training loop
        return (optimizer.param_groups, optimizer.state)

    def _capture_array(self, value: Any) -> Iterable[Any]:
        if value.flags.writeable:
            self._large.append(value)
        inside = _not_atoms(value.ravel()) if value.dtype == object else []
        return [*inside, *self._inside_attributes(value)]

    def _capture_buffer(self, value: Any) -> bool:
        """Whether it is a sequence of bytes or numbers, or a file in memory, that was kept."""
        if isinstance(value, bytearray | array.array):
            self._keep(value, lambda one: one[:], _write_sequence)
        elif type(value) in (io.StringIO, io.BytesIO):
            self._keep(value, lambda one: (one.getvalue(), one.tell()), _write_file)
        else:
            return False
        return True

    def _capture_generator(self, value: Any) -> bool:
        """Whether it is one of random numbers, whose state was kept."""
        numpy = sys.modules.get("numpy")
        if isinstance(value, torch.Generator):
            self._keep_generator(
                value,
                lambda one: one.get_state().numpy(),  # a tensor never pickles to the same bytes
                lambda one, state: one.set_state(torch.from_numpy(state)),
            )
        elif isinstance(value, random.SystemRandom):
            pass  # of the operating system
        elif isinstance(value, random.Random):
            self._keep_generator(value, type(value).getstate, type(value).setstate)
        elif numpy is not None and isinstance(value, numpy.random.Generator):
            self._keep_generator(
                value,
                lambda one: one.bit_generator.state,
                lambda one, state: setattr(one.bit_generator, "state", state),
            )
        elif numpy is not None and isinstance(value, numpy.random.RandomState):
            read = functools.partial(type(value).get_state, legacy=False)
            self._keep_generator(value, read, type(value).set_state)
        elif numpy is not None and isinstance(value, numpy.random.BitGenerator):
            self._keep_generator(
                value, lambda one: one.state, lambda one, state: setattr(one, "state", state)
            )
        else:
            return False
        return True

    def _keep_generator(self, value: Any, read: Callable[[Any], Any], write: _Write) -> None:
        self._generators.append(len(self._kinds))
        self._keep(value, read, write)

    def _inside_tensor(self, tensor: Tensor) -> Iterable[Any]:
        inside = self._inside_attributes(tensor)
        if is_traceable_wrapper_subclass(tensor):  # DTensors, jagged and quantized ones
            names, _ = tensor.__tensor_flatten__()
            inside = [*inside, *(getattr(tensor, name) for name in names)]
        return inside

    def _capture_tensor(self, tensor: Tensor) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            if tensor.is_inference() or self._is_trained(tensor):
                return
            is_whole = is_dense(tensor) or is_lazy(tensor) or is_traceable_wrapper_subclass(tensor)
            if _is_plain(tensor) or not is_whole:
                self._large.append(tensor)

    def _is_trained(self, tensor: Tensor) -> bool:
        start, _ = _range(tensor)
        position = bisect.bisect_right(self._trained, (start, math.inf)) - 1
        return position >= 0 and start < self._trained[position][1]


class _TensorState(NamedTuple):
    """What a tensor refers to, and a copy of its elements where they are few enough."""

    alias: Tensor
    memory: Tensor
    copy: Tensor | None
    version: int
    requires_grad: bool
    grad: Tensor | None

    @classmethod
    def of(cls, tensor: Tensor, *, copied: bool, like: _TensorState | None = None) -> _TensorState:
        """The state of now; shares the copy of an earlier one where the elements are the same."""
        with torch._C.DisableTorchFunctionSubclass():
            alias = tensor.detach()
            memory = _written_memory(alias) if is_dense(alias) else alias
            copy = None
            if copied and like is not None and like.copy is not None:
                copy = like.copy if like.holds(tensor, memory) else None
            if copied and copy is None:
                copy = memory.clone()
            grad = tensor.grad if tensor.is_leaf else None
            return cls(alias, memory, copy, tensor._version, tensor.requires_grad, grad)

    def holds(self, tensor: Tensor, memory: Tensor) -> bool:
        """Whether the elements in memory are those of the copy."""
        assert self.copy is not None
        if not is_dense(tensor):  # sparse, nested or quantized
            return tensor._version == self.version
        return _same_content(memory, self.copy)

    def restore(self, tensor: Tensor) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            if is_dense(tensor) and _geometry(tensor) != _geometry(self.alias):
                tensor.data = self.alias
            if tensor.is_leaf:
                if tensor.requires_grad != self.requires_grad:
                    tensor.requires_grad_(self.requires_grad)
                if tensor.grad is not self.grad:
                    tensor.grad = self.grad
            if self.copy is not None and not self.holds(tensor, self.memory):
                (self.memory if is_dense(tensor) else tensor).copy_(self.copy)


def _read_dict(value: dict[Any, Any]) -> dict[Any, Any]:
    kind: Any = OrderedDict if isinstance(value, OrderedDict) else dict
    return {name: one for name, one in kind.items(value)}  # noqa: C416  # by its own method


def _write_dict(value: dict[Any, Any], kept: dict[Any, Any]) -> None:
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


def _read_list(value: list[Any]) -> list[Any]:
    return list(list.__iter__(value))


def _write_list(value: list[Any], kept: list[Any]) -> None:
    same = list.__len__(value) == len(kept) and all(map(operator.is_, list.__iter__(value), kept))
    if not same:
        list.__setitem__(value, slice(None), kept)


def _read_collection(value: set[Any] | deque[Any]) -> list[Any]:
    kind: Any = set if isinstance(value, set) else deque
    return list(kind.__iter__(value))


def _write_collection(value: Any, kept: list[Any]) -> None:
    now = _read_collection(value)
    if len(now) == len(kept) and all(map(operator.is_, now, kept)):
        return
    if isinstance(value, set):  # the others stay where they are, and so does the order
        before = set(kept)
        set.difference_update(value, [one for one in now if one not in before])
        set.update(value, kept)
    else:
        deque.clear(value)
        deque.extend(value, kept)


def _read_slots(value: Any) -> dict[Any, Any]:
    """By member, without what ``getattr`` of the class may do beside."""
    found = {}
    for member in _slots_of(type(value)):
        try:
            found[member] = member.__get__(value)
        except AttributeError:
            continue
    return found


def _write_slots(value: Any, kept: dict[Any, Any]) -> None:
    now = _read_slots(value)
    for member in _slots_of(type(value)):
        if member not in kept:
            if member in now:
                member.__delete__(value)
        elif now.get(member, _UNSET) is not kept[member]:
            member.__set__(value, kept[member])


def _read_cell(cell: Any) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # not assigned yet
        return ()


def _write_cell(cell: Any, kept: tuple[Any, ...]) -> None:
    if kept and (now := _read_cell(cell)) and now[0] is not kept[0]:
        cell.cell_contents = kept[0]


def _read_globals(names: tuple[str, ...], scope: dict[str, Any]) -> dict[str, Any]:
    """Data and objects of the user's own; functions, classes and modules are the program."""
    found = {name: scope[name] for name in names if name in scope}
    return {name: one for name, one in found.items() if _is_state(one)}


def _program_in(names: tuple[str, ...], scope: dict[str, Any]) -> Iterator[Any]:
    """Functions, classes and modules of the user's own that code names."""
    for name in names:
        one = scope.get(name)
        module = one.__name__ if isinstance(one, types.ModuleType) else _module_of(one)
        if isinstance(one, types.ModuleType | types.FunctionType | type) and _is_own(module):
            yield one


def _module_of(one: Any) -> str | None:
    found = getattr(one, "__module__", None) if isinstance(one, types.FunctionType | type) else None
    return found if isinstance(found, str) else None


def _read_module(scope: dict[str, Any]) -> dict[str, Any]:
    return {name: one for name, one in scope.items() if name[:2] != "__" and _is_state(one)}


def _write_globals(scope: dict[str, Any], kept: dict[str, Any]) -> None:
    for name, one in kept.items():
        if scope.get(name, _UNSET) is not one:
            scope[name] = one


def _read_class(kind: type) -> dict[str, Any]:
    return {name: one for name, one in vars(kind).items() if name[:2] != "__" and _is_state(one)}


def _write_class(kind: type, kept: dict[str, Any]) -> None:
    for name, one in kept.items():
        if vars(kind).get(name, _UNSET) is not one:
            setattr(kind, name, one)


def _is_state(value: Any) -> bool:
    """Data, generators of random numbers, and objects of the user's own or of networks."""
    return (
        isinstance(value, _CONTAINERS)
        or type(value) in NUMBERS
        or isinstance(value, nn.Module)
        or _is_array(value)
        or is_generator(value)
        or (_is_own(type(value).__module__) and not _is_foreign(value))
    )


def is_small_collection(value: Any) -> bool:
    """Whether it is one of at most a thousand numbers, strings and the like."""
    return (
        isinstance(value, dict | list | set | deque)
        and len(value) <= 1000
        and not _not_atoms([*value, *(value.values() if isinstance(value, dict) else ())])
    )


def is_generator(value: Any) -> bool:
    """Whether it is one of random numbers: of torch, NumPy or Python."""
    if isinstance(value, random.Random | torch.Generator):
        return True
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(
        value, numpy.random.Generator | numpy.random.RandomState | numpy.random.BitGenerator
    )


def _write_sequence(value: Any, kept: Any) -> None:
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


def _written_bytes(one: Any) -> int:
    if not isinstance(one, Tensor):
        if _is_array(one):
            return one.nbytes
        return int(sum(map(int, one.memory_usage())) if one.ndim > 1 else one.memory_usage())
    with torch._C.DisableTorchFunctionSubclass():
        one = one.detach()
        if is_dense(one):
            return _written_memory(one).nbytes
        if one.is_sparse:
            return one._values().nbytes
        return one.values().nbytes if one.layout is not torch.strided else one.nbytes


def _not_atoms(values: Iterable[Any]) -> list[Any]:
    return [one for one in values if type(one) not in _ATOM_TYPES]


@functools.lru_cache(maxsize=1024)
def _slots_of(kind: type) -> tuple[Any, ...]:
    """The members of a class and of its bases that are slots."""
    return tuple(
        one
        for base in kind.__mro__
        if "__slots__" in vars(base)
        for one in vars(base).values()
        if isinstance(one, types.MemberDescriptorType)
    )


def _functions_of(value: Any) -> Iterator[types.FunctionType]:
    """A function of a class, or those of a property or of a static or class method."""
    parts: list[Any] = [value]
    if isinstance(value, property):
        parts = [value.fget, value.fset]
    elif isinstance(value, staticmethod | classmethod):
        parts = [value.__func__]
    return (one for one in parts if isinstance(one, types.FunctionType))


@functools.cache
def _names_of(code: types.CodeType) -> tuple[str, ...]:
    """Names of globals that the code of a function, or of one within it, reads or writes."""
    names = {one.argval for one in dis.get_instructions(code) if one.opname in _GLOBAL_OPERATIONS}
    for one in code.co_consts:
        if isinstance(one, types.CodeType):
            names.update(_names_of(one))
    return tuple(names)


@functools.cache
def _is_own(module: str | None) -> bool:
    """Whether a module is of the user's project: neither installed nor of Python."""
    path = getattr(sys.modules.get(module or ""), "__file__", None)
    if module is None or path is None or module.split(".")[0] == __name__.split(".")[0]:
        return module == "__main__"
    if {"site-packages", "dist-packages"} & set(Path(path).parts):
        return False
    paths = sysconfig.get_paths()
    return not path.startswith((paths["stdlib"] + os.sep, paths["platstdlib"] + os.sep))


def _is_counted(value: Any) -> bool:
    """Whether an iterator is the user's own in Python: its position is one of its attributes."""
    kind = type(value)
    is_plain = isinstance(kind.__next__, types.FunctionType) and _is_own(kind.__module__)
    return is_plain and not isinstance(value, torch.utils.data.Dataset)


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def _is_frame(value: Any) -> bool:
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(value, pandas.DataFrame | pandas.Series)


def _is_foreign(value: Any) -> bool:
    if isinstance(
        value,
        types.ModuleType | Enum | torch.utils.data.Dataset,
    ):
        return True
    return any(
        _is_of(kind, _FOREIGN_PACKAGES)
        for kind in type(value).__mro__[:-1]
        if not kind.__name__.endswith("Mixin")  # a user's own may derive from those
    )


def _is_of(kind: type, packages: Set[str]) -> bool:
    names = kind.__module__.split(".")
    return names[0] in packages or ".".join(names[:2]) in packages


def _written_memory(tensor: Tensor) -> Tensor:
    """The tensor; of one whose elements share memory (expanded, unfolded) all of that as a vector.

    Torch refuses to write to elements that share memory.
    """
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    span = 1 + sum((size - 1) * step for size, step in steps)
    return tensor.as_strided((span,), (1,)) if 0 < span < tensor.numel() else tensor


def _same_content(one: Tensor, other: Tensor) -> bool:
    # on a CPU a look is as cheap as a copy, and memory that was not written to may be read-only
    if one.device.type != "cpu":
        return False
    return torch.equal(_bits(one), _bits(other))


def _bits(tensor: Tensor) -> Tensor:
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return real.resolve_neg().view(_INTEGERS[real.element_size()])


def _geometry(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _is_plain(tensor: Tensor) -> bool:
    """Whether the tensor itself has the memory of its entries."""
    if not is_dense(tensor) or is_lazy(tensor) or is_traceable_wrapper_subclass(tensor):
        return False
    return tensor.numel() == 0 or tensor.untyped_storage().nbytes() > 0  # not freed, as FSDP2 does


def _range(tensor: Tensor) -> tuple[int, int]:
    """Where the memory of a tensor begins and ends; (0, 0) where there is none."""
    if not _is_plain(tensor) or tensor.device.type == "meta":
        return 0, 0
    return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()


def _put_back(
    state: Any, before: Any, same: Callable[[Any, Any], bool], write: Callable[[Any], object]
) -> bool:
    """Write the state of before where it is another one now; whether it is."""
    if same(state, before):
        return False
    write(before)
    return True


def _numpy_state() -> Any:
    numpy = sys.modules.get("numpy")
    return None if numpy is None else numpy.random.get_state(legacy=False)


def _same(one: Any, other: Any) -> bool:
    """Of two states of NumPy's generator: nested dicts of numbers and arrays."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    equal = one == other
    return equal if isinstance(equal, bool) else bool(equal.all())
