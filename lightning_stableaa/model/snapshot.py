"""Snapshots of the state that a training step can change: modules, batches, generators."""

from __future__ import annotations

import array
import bisect
import copy
import functools
import gc
import io
import math
import random
import threading
import types
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_stableaa.distributed.dtensor import reshard_fsdp_modules, to_local
from lightning_stableaa.model.contents import (
    ARRAY,
    ATTRIBUTES,
    BUFFER,
    DICT,
    ELEMENTS,
    FILE,
    FRAME,
    GENERATOR,
    SETTINGS,
    SLOTS,
    STATE,
    Access,
    attributes_of,
    read_elements,
    state_named,
)
from lightning_stableaa.model.kinds import (
    COLLECTIONS,
    CONTAINERS,
    FOREIGN_PACKAGES,
    PROGRAM,
    SHARED_PACKAGES,
    functions_of,
    is_array,
    is_counted,
    is_foreign,
    is_frame,
    is_of,
    is_own,
    is_state,
    names_of,
    not_atoms,
    program_of,
    slots_of,
)
from lightning_stableaa.model.parameters import is_dense
from lightning_stableaa.model.rng import is_generator
from lightning_stableaa.model.tensor_state import (
    TensorState,
    is_plain,
    memory_range,
    written_memory,
)

# Bytes of tensors and arrays that a snapshot copies at least, the smallest first; of tensors beyond
# it keeps the version alone.
_COPIED_BYTES = 64 << 20

# Objects that a snapshot follows at most: beyond it takes longer than many training steps.
_MAX_OBJECTS = 100_000

_NOT_FOLLOWED = FOREIGN_PACKAGES | {"torch"}  # of functions and classes

_METHODS = (types.MethodType, types.BuiltinMethodType, types.MethodWrapperType)

_TORCH_MODULES = ("torch.nn.", "torch._dynamo.", "torch.fx.")

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_SETTINGS_OF_MODULES = frozenset(vars(nn.Module())) - {"_parameters", "_buffers", "_modules"}


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
        settings: objects of which only numbers, strings and the like are kept.

    Raises:
        UnsupportedStateError: something cannot be copied: an iterator, or a generator function.
    """

    def __init__(
        self,
        roots: Iterable[Any],
        trained: Iterable[Tensor] = (),
        attributes: Iterable[dict[str, Any]] = (),
        optimizers: Iterable[Optimizer] = (),
        settings: Iterable[Any] = (),
    ) -> None:
        trained = list(trained)
        self._steppers = list(optimizers)
        self._trained = sorted(memory_range(to_local(one)) for one in trained)
        budget = max(_COPIED_BYTES, 2 * sum(to_local(one).nbytes for one in trained))
        self._kept: list[tuple[Any, Access, Any]] = []  # objects, and what they held
        self._tensors: list[TensorState] = []
        self._large: list[Any] = []  # tensors, arrays and frames, to be copied in the end
        self._reached: dict[int, Any] = {}  # by id; kept alive, so that none is used again
        reshard_fsdp_modules()  # they hold their shards, not what they have gathered
        for one in attributes:
            self._keep(one, DICT)
        for one in settings:
            self._keep(one, SETTINGS)
        collects = gc.isenabled()
        gc.disable()  # it would look through all that is kept again and again
        try:
            self._follow(roots)
        finally:
            if collects:
                gc.enable()
        for one in sorted(self._large, key=_written_bytes):
            budget -= _written_bytes(one)
            if isinstance(one, Tensor):
                self._tensors.append(TensorState.of(one, copied=budget >= 0))
                if one.is_leaf and one.grad is not None and is_dense(one.grad):
                    self._tensors.append(TensorState.of(one.grad, copied=budget >= 0))
            elif budget >= 0:
                self._keep(one, ARRAY if is_array(one) else FRAME)

    @property
    def objects(self) -> Iterable[Any]:
        """Everything that was reached."""
        return self._reached.values()

    def again(self) -> StateSnapshot:
        """Of the same objects, with the contents that they have now."""
        reshard_fsdp_modules()
        other = copy.copy(self)
        other._kept = [(value, how, how.read(value)) for value, how, _ in self._kept]
        other._tensors = [one.again() for one in self._tensors]
        return other

    @torch.no_grad()
    def restore(self) -> bool:
        """Put all contents back; whether a generator of random numbers had moved since.

        Raises:
            UnsupportedStateError: an object refused them; all others were put back.
        """
        reshard_fsdp_modules()
        moved, failure = False, None
        for value, how, content in self._kept:
            try:
                moved = how.write(value, content) or moved
            except Exception as error:  # of an object with methods of its own
                failure = failure or error
        for one in self._tensors:
            one.restore()
        if failure is not None:
            raise UnsupportedStateError(f"an object that raises {failure!r}") from failure
        return moved

    def lost(self) -> bool:
        """Whether a tensor too large to be copied was written since, through itself."""
        return any(one.lost() for one in self._tensors)

    def _keep(self, value: Any, access: Access) -> Any:
        """The contents of an object, which ``restore`` is going to put back."""
        content = access.read(value)
        self._kept.append((value, access, content))
        return content

    def _is_new(self, value: Any) -> bool:
        """Whether an object is reached for the first time."""
        if id(value) in self._reached:
            return False
        self._reached[id(value)] = value
        if len(self._reached) > _MAX_OBJECTS:
            raise UnsupportedStateError(f"more than {_MAX_OBJECTS:,} objects")
        return True

    def _follow(self, roots: Iterable[Any]) -> None:
        pending = not_atoms(roots)
        while pending:
            value = pending.pop()
            if self._is_new(value):
                pending += not_atoms(self._inside(value))

    def _inside(self, value: Any) -> Iterable[Any]:
        """Keep the contents of one object, and return the objects inside."""
        kind = type(value)
        if isinstance(value, Tensor):
            return self._inside_tensor(value)
        if isinstance(value, COLLECTIONS):
            return self._inside_collection(value)
        if isinstance(value, nn.Module):
            return self._inside_module(value)
        if isinstance(value, types.FunctionType):
            return self._inside_function(value)
        if isinstance(value, _METHODS):
            return value.__self__, getattr(value, "__func__", None)
        if isinstance(value, functools.partial):
            return value.func, *value.args, *value.keywords.values()
        if isinstance(value, weakref.ReferenceType):
            return (value(),)
        if is_generator(value):
            if not isinstance(value, random.SystemRandom):  # of the operating system
                self._keep(value, GENERATOR)
            return ()
        if isinstance(value, bytearray | array.array):
            self._keep(value, BUFFER)
            return ()
        if kind in (io.StringIO, io.BytesIO):
            self._keep(value, FILE)
            return ()
        if is_array(value):
            if value.flags.writeable:
                self._large.append(value)
            elements = value.ravel() if value.dtype == object else ()
            return [*elements, *self._inside_object(value)]
        if is_frame(value):
            self._large.append(value)
            return ()
        if isinstance(value, Iterator) and not is_counted(value):
            raise UnsupportedStateError(f"an iterator ({_name_of(kind)})")
        if is_of(kind, SHARED_PACKAGES):
            raise UnsupportedStateError(f"a {_name_of(kind)}, which others may read or write")
        if isinstance(value, threading.Thread) and is_own(kind.__module__):
            raise UnsupportedStateError(f"a thread ({_name_of(kind)})")
        if isinstance(value, Optimizer):
            if any(value is one for one in self._steppers):
                return (value.param_groups,)  # its steps are those of the training loop
            return value.param_groups, value.state
        if isinstance(value, torch.utils.data.DataLoader):
            return value.generator, getattr(value.sampler, "generator", None)
        if is_foreign(value) and not isinstance(value, threading.local):
            return ()
        return [*self._inside_object(value), *self._inside_classes(kind)]

    def _inside_object(self, value: Any) -> list[Any]:
        """What its attributes and slots refer to."""
        inside: list[Any] = []
        if attributes_of(value) is not None:
            content, _ = self._keep(value, ATTRIBUTES)
            inside += content.values()
        if slots_of(type(value)):
            inside += self._keep(value, SLOTS).values()
        return inside

    def _inside_tensor(self, tensor: Tensor) -> list[Any]:
        is_wrapper = is_traceable_wrapper_subclass(tensor)  # DTensors, jagged and quantized ones
        with torch._C.DisableTorchFunctionSubclass():
            is_whole = is_dense(tensor) or is_lazy(tensor) or is_wrapper
            if not self._is_trained(tensor) and (is_plain(tensor) or not is_whole):
                self._large.append(tensor)
        inside = self._inside_object(tensor)
        if is_wrapper:
            names, _ = tensor.__tensor_flatten__()
            inside += [getattr(tensor, name) for name in names]
        return inside

    def _is_trained(self, tensor: Tensor) -> bool:
        start, _ = memory_range(tensor)
        position = bisect.bisect_right(self._trained, (start, math.inf)) - 1
        return position >= 0 and start < self._trained[position][1]

    def _inside_collection(self, value: Any) -> list[Any]:
        """By the methods of the builtin: a subclass may show something else."""
        if isinstance(value, dict):
            kept = self._keep(value, DICT)
            inside = [*kept, *kept.values()]
            if isinstance(value, defaultdict):
                inside.append(value.default_factory)
        elif isinstance(value, tuple | frozenset):
            inside = read_elements(value)
        else:
            inside = self._keep(value, ELEMENTS)
        if type(value).__module__ in ("builtins", "collections"):
            return inside
        return [*inside, *self._inside_object(value)]  # attributes of a subclass

    def _inside_module(self, module: nn.Module) -> Iterable[Any]:
        inside = self._inside_object(module)
        if type(module).__module__.startswith(_TORCH_MODULES):  # other attributes are settings
            attributes = vars(module)
            inside = [
                one
                for name, one in attributes.items()
                if name not in _SETTINGS_OF_MODULES and not isinstance(one, PROGRAM)
            ]
            for name in _HOOKS:
                inside += attributes.get(name, {}).values()
        if isinstance(module, torch.jit.ScriptModule):  # of a traced one, they are out of sight
            inside += module.buffers()
        return [*inside, *self._inside_classes(type(module))]

    def _inside_function(self, function: types.FunctionType) -> Iterable[Any]:
        """What a function remembers: attributes, defaults, cells, and the user's own globals."""
        if (function.__module__ or "").split(".")[0] in _NOT_FOLLOWED:
            return
        yield from function.__defaults__ or ()
        yield from (function.__kwdefaults__ or {}).values()
        yield from function.__closure__ or ()
        yield from self._inside_object(function)
        if not is_own(function.__module__):
            return
        names, scope = names_of(function.__code__), function.__globals__
        yield from filter(is_state, self._keep(scope, state_named(names.scope)).values())
        for one in program_of(function):
            if isinstance(one, types.FunctionType):
                yield one
            elif isinstance(one, type):
                yield from self._inside_classes(one)
            elif self._is_new(one):
                yield from filter(is_state, self._keep(vars(one), STATE).values())

    def _inside_classes(self, kind: type) -> Iterable[Any]:
        """What all objects of a class share: containers, and of the user's own classes numbers."""
        for base in kind.__mro__[:-1]:
            own = is_own(base.__module__)
            followed = (own or issubclass(base, nn.Module)) and not is_of(base, _NOT_FOLLOWED)
            if not followed or not self._is_new(base):
                continue
            if own:
                self._keep(base, STATE)
            for name, value in vars(base).items():
                if name.startswith("__"):
                    continue
                if isinstance(value, CONTAINERS) or (own and is_state(value)):
                    yield value
                for function in functions_of(value):
                    if is_own(function.__module__):
                        yield function


def _name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


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
