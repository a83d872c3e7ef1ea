"""Snapshots of the state that a training step can change: modules, batches, generators."""

from __future__ import annotations

import array
import bisect
import copy
import functools
import gc
import io
import math
import pickle
import random
import sys
import threading
import types
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_stableaa.distributed.dtensor import to_local
from lightning_stableaa.model.contents import (
    read_attributes,
    read_cell,
    read_class,
    read_collection,
    read_dict,
    read_globals,
    read_list,
    read_module,
    read_slots,
    write_array,
    write_attributes,
    write_cell,
    write_class,
    write_collection,
    write_dict,
    write_file,
    write_frame,
    write_globals,
    write_list,
    write_sequence,
    write_slots,
)
from lightning_stableaa.model.kinds import (
    ATOM_TYPES,
    COLLECTIONS,
    CONTAINERS,
    FOREIGN_PACKAGES,
    SHARED_PACKAGES,
    functions_of,
    imported_by,
    is_array,
    is_counted,
    is_foreign,
    is_frame,
    is_of,
    is_own,
    is_program,
    is_state,
    names_of,
    not_atoms,
    program_in,
    slots_of,
)
from lightning_stableaa.model.parameters import is_dense
from lightning_stableaa.model.tensor_state import (
    TensorState,
    is_plain,
    memory_range,
    version,
    written_memory,
)

# Bytes of tensors and arrays that a snapshot copies at least, the smallest first; of tensors beyond
# it keeps the version alone.
_COPIED_BYTES = 64 << 20

# Objects that a snapshot follows at most: beyond it takes longer than many training steps.
_MAX_OBJECTS = 100_000

_Write = Callable[[Any, Any], object]

_Kind = tuple[Any, Callable[[Any], Any], _Write]  # an object, how to read its contents and to write

_NOT_FOLLOWED = FOREIGN_PACKAGES | {"torch"}  # of functions and classes

_METHODS = (types.MethodType, types.BuiltinMethodType, types.MethodWrapperType)

_TORCH_MODULES = ("torch.nn.", "torch._dynamo.", "torch.fx.")

_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))  # of every module

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class UnsupportedStateError(Exception):
    """The state holds what cannot be copied, such as an iterator."""


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
        self._trained = sorted(memory_range(to_local(one)) for one in trained)
        budget = max(_COPIED_BYTES, 2 * sum(to_local(one).nbytes for one in trained))
        self._kinds: list[_Kind] = []  # of what was reached, and the contents of each
        self._contents: list[Any] = []
        self._large: list[Any] = []  # tensors and arrays
        self._generators: list[int] = []  # positions among the kinds
        self._seen: set[int] = set()
        self.objects: list[Any] = []  # kept alive, so that no id is used again
        for one in attributes:
            self._keep(one, read_dict, write_dict)
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
                write = write_array if is_array(one) else write_frame
                self._keep(one, lambda value: value.copy(), write)
        self._states = [TensorState.of(one, copied=copied) for one, copied in self._tensors]
        self._versions = [version(one) for one, copied in self._tensors if not copied]

    def again(self) -> StateSnapshot:
        """Of the same objects, with the contents that they have now."""
        other = copy.copy(self)
        other._contents = [read(value) for value, read, _ in self._kinds]
        other._states = [
            TensorState.of(one, copied=copied, like=state)
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
        return [version(one) for one in uncopied] != self._versions

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
        if kind in ATOM_TYPES or id(value) in self._seen:
            return ()
        self._see(value)
        if isinstance(value, Tensor):
            self._capture_tensor(value)
            return self._inside_tensor(value)
        if issubclass(kind, COLLECTIONS):
            inside = self._capture_container(value)
            if isinstance(value, defaultdict):
                inside = [*inside, *not_atoms([value.default_factory])]
            if kind.__module__ in ("builtins", "collections"):
                return inside
            return [*inside, *self._capture_object(value)]  # attributes of a subclass
        if isinstance(value, functools.partial):
            return not_atoms([value.func, *value.args, *value.keywords.values()])
        if isinstance(value, nn.Module):
            return self._capture_module(value)
        if isinstance(value, types.FunctionType):
            return self._capture_function(value)
        if isinstance(value, _METHODS):
            return not_atoms([value.__self__, getattr(value, "__func__", None)])
        if isinstance(value, weakref.ReferenceType):
            return not_atoms([value()])
        if self._capture_generator(value) or self._capture_buffer(value):
            return ()
        if is_array(value):
            return self._capture_array(value)
        if is_frame(value):
            self._large.append(value)
            return ()
        if isinstance(value, Iterator) and not is_counted(value):
            raise UnsupportedStateError(f"an iterator ({kind.__module__}.{kind.__qualname__})")
        if is_of(kind, SHARED_PACKAGES):
            raise UnsupportedStateError(
                f"a {kind.__module__}.{kind.__qualname__}, which others may read or write"
            )
        if isinstance(value, threading.Thread) and is_own(kind.__module__):
            raise UnsupportedStateError(f"a thread ({kind.__module__}.{kind.__qualname__})")
        if isinstance(value, threading.local):
            return self._inside_attributes(value)
        if isinstance(value, Optimizer):
            return self._capture_optimizer(value)
        if isinstance(value, torch.utils.data.DataLoader):
            return not_atoms([value.generator, getattr(value.sampler, "generator", None)])
        if is_foreign(value):
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
            kept = self._keep(value, read_dict, write_dict)
            return not_atoms([*kept, *kept.values()])
        if isinstance(value, list):
            return not_atoms(self._keep(value, read_list, write_list))
        if isinstance(value, set | deque):
            return not_atoms(self._keep(value, read_collection, write_collection))
        kind: Any = tuple if isinstance(value, tuple) else frozenset
        return not_atoms(kind.__iter__(value))

    def _capture_module(self, module: nn.Module) -> Iterable[Any]:
        attributes = self._keep(vars(module), read_dict, write_dict)
        if type(module).__module__.startswith(_TORCH_MODULES):  # other attributes are settings
            inside = [attributes["_parameters"], attributes["_buffers"], attributes["_modules"]]
            inside += [
                one
                for name, one in attributes.items()
                if name not in _MODULE_ATTRIBUTES
                and type(one) not in ATOM_TYPES
                and not is_program(one)
            ]
        else:
            inside = [*not_atoms(attributes.values()), *self._inside_slots(module)]
        for name in _HOOKS:
            inside += attributes.get(name, {}).values()
        if isinstance(module, torch.jit.ScriptModule):  # of a traced one, they are out of sight
            inside += module.buffers()
        return [*inside, *self._inside_classes(type(module))]

    def _inside_classes(self, kind: type) -> Iterable[Any]:
        """What all objects of a class share: containers, and of the user's own classes numbers."""
        for base in kind.__mro__[:-1]:
            own = is_own(base.__module__)
            if id(base) in self._seen or is_of(base, _NOT_FOLLOWED):
                continue
            if not own and not issubclass(base, nn.Module):
                continue
            self._see(base)
            if own:
                self._keep(base, read_class, write_class)
            for name, value in vars(base).items():
                if name.startswith("__"):
                    continue
                shared = isinstance(value, CONTAINERS) or (own and is_state(value))
                if shared and type(value) not in ATOM_TYPES:
                    yield value
                for function in functions_of(value):
                    if is_own(function.__module__):
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
        content, _ = self._keep(value, read_attributes, write_attributes)
        return not_atoms(content.values())

    def _inside_slots(self, value: Any) -> Iterable[Any]:
        if not slots_of(type(value)):
            return ()
        return not_atoms(self._keep(value, read_slots, write_slots).values())

    def _capture_function(self, function: Any) -> Iterable[Any]:
        """What a function remembers: attributes, defaults, cells, and the user's own globals."""
        if (function.__module__ or "").split(".")[0] in _NOT_FOLLOWED:
            return ()
        inside = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        inside += self._keep(vars(function), read_dict, write_dict).values()
        for cell in function.__closure__ or ():
            if id(cell) not in self._seen:
                self._see(cell)
                inside += self._keep(cell, read_cell, write_cell)
        if is_own(function.__module__):
            names, scope = names_of(function.__code__), function.__globals__
            read = functools.partial(read_globals, names.scope)
            inside += filter(is_state, self._keep(scope, read, write_globals).values())
            pending: list[Any] = [*program_in(names.scope, scope)]
            pending += imported_by(names.imports, scope)
            visited: set[int] = set()
            while pending:
                one = pending.pop()
                inside += self._inside_program(one)
                if isinstance(one, types.ModuleType) and id(one) not in visited:
                    visited.add(id(one))
                    pending += program_in(names.attributes, vars(one))
        return not_atoms(inside)

    def _inside_program(self, one: Any) -> Iterable[Any]:
        """The state of a function, a class or a module that code names."""
        if isinstance(one, type):
            return self._inside_classes(one)
        if isinstance(one, types.FunctionType):
            return (one,)
        if id(one) in self._seen:
            return ()
        self._see(one)
        return filter(is_state, self._keep(vars(one), read_module, write_globals).values())

    def _capture_optimizer(self, optimizer: Optimizer) -> Iterable[Any]:
        """Settings; the state too, but of an optimizer that the training loop steps."""
        if any(optimizer is one for one in self._steppers):
            return (optimizer.param_groups,)  # its steps are those of the training loop
        return (optimizer.param_groups, optimizer.state)

    def _capture_array(self, value: Any) -> Iterable[Any]:
        if value.flags.writeable:
            self._large.append(value)
        inside = not_atoms(value.ravel()) if value.dtype == object else []
        return [*inside, *self._inside_attributes(value)]

    def _capture_buffer(self, value: Any) -> bool:
        """Whether it is a sequence of bytes or numbers, or a file in memory, that was kept."""
        if isinstance(value, bytearray | array.array):
            self._keep(value, lambda one: one[:], write_sequence)
        elif type(value) in (io.StringIO, io.BytesIO):
            self._keep(value, lambda one: (one.getvalue(), one.tell()), write_file)
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
            if self._is_trained(tensor):
                return
            is_whole = is_dense(tensor) or is_lazy(tensor) or is_traceable_wrapper_subclass(tensor)
            if is_plain(tensor) or not is_whole:
                self._large.append(tensor)

    def _is_trained(self, tensor: Tensor) -> bool:
        start, _ = memory_range(tensor)
        position = bisect.bisect_right(self._trained, (start, math.inf)) - 1
        return position >= 0 and start < self._trained[position][1]


def _written_bytes(one: Any) -> int:
    if not isinstance(one, Tensor):
        if is_array(one):
            return one.nbytes
        return int(sum(map(int, one.memory_usage())) if one.ndim > 1 else one.memory_usage())
    with torch._C.DisableTorchFunctionSubclass():
        one = one.detach()
        if is_dense(one):
            return written_memory(one).nbytes
        if one.is_sparse:
            return one._values().nbytes
        return one.values().nbytes if one.layout is not torch.strided else one.nbytes
