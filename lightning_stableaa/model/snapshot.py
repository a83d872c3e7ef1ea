"""Snapshots of the state that a training step can change: modules, batches, generators."""

from __future__ import annotations

import copy
import functools
import io
import operator
import pickle
import random
import sys
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Set
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_stableaa.distributed.dtensor import to_local
from lightning_stableaa.model.parameters import is_dense

# Bytes of tensors and arrays that a snapshot copies at least, the smallest first; of tensors beyond
# it keeps the version alone.
_COPIED_BYTES = 64 << 20

_ATOMS = (int, float, complex, str, bytes, bool, type(None), type, range, slice)
_ATOM_TYPES = (
    frozenset(_ATOMS)
    | {torch.dtype, torch.device, torch.Size, type(Ellipsis)}
    | set(weakref.ProxyTypes)  # which pass for what they refer to
)

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

_CONTAINERS = (dict, list, set, deque, Tensor)

_UNSET = object()  # a slot without a value

_Write = Callable[[Any, Any], object]
_Kind = tuple[Any, Callable[[Any], Any], _Write]  # an object, how to read its contents and to write

_TORCH_MODULES = ("torch.nn.", "torch._dynamo.", "torch.fx.")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


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
    collect in; dicts, lists, sets, deques, arrays and objects within each other; tensors, of any
    subclass, with the attributes they carry; generators of torch, NumPy and Python. ``restore``
    puts the contents back into the same objects, whoever else refers to them.

    Args:
        roots: such as a module and its batch.
        trained: parameters whose contents are somebody else's to restore. Copies take at most
            twice their memory, or 64 MiB; larger tensors are watched instead, see ``lost``, and
            larger arrays are taken for constants.

    Attributes:
        objects: everything that was reached.

    Raises:
        UnsupportedStateError: something cannot be copied: an iterator, or a generator function.
    """

    def __init__(self, roots: Iterable[Any], trained: Iterable[Tensor] = ()) -> None:
        trained = list(trained)
        self._trained = {_address(to_local(one)) for one in trained} - {0}
        budget = max(_COPIED_BYTES, 2 * sum(one.nbytes for one in trained))
        self._kinds: list[_Kind] = []  # of what was reached, and the contents of each
        self._contents: list[Any] = []
        self._large: list[Any] = []  # tensors and arrays
        self._generators: list[int] = []  # positions among the kinds
        self._seen: set[int] = set()
        self.objects: list[Any] = []  # kept alive, so that no id is used again
        pending = list(roots)
        while pending:
            pending.extend(self._capture(pending.pop()))
        self._tensors: list[tuple[Tensor, bool]] = []  # and whether they are copied
        for one in sorted(self._large, key=_written_bytes):
            budget -= _written_bytes(one)
            if isinstance(one, Tensor):
                self._tensors.append((one, budget >= 0))
                if one.is_leaf and one.grad is not None:
                    self._tensors.append((one.grad, budget >= 0))
            elif budget >= 0:
                self._keep(one, _copy_array, _write_array)
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
        """Put all contents back."""
        for (value, _, write), content in zip(self._kinds, self._contents, strict=True):
            write(value, content)
        for (tensor, _), state in zip(self._tensors, self._states, strict=True):
            state.restore(tensor)

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
        self._seen.add(id(value))
        self.objects.append(value)
        if isinstance(value, Tensor):
            self._capture_tensor(value)
            return self._inside_tensor(value)
        if isinstance(value, dict | list | tuple | set | frozenset | deque):
            inside = self._capture_container(value)
            if kind.__module__ in ("builtins", "collections"):
                return inside
            return [*inside, *self._capture_object(value)]  # attributes of a subclass
        if isinstance(value, functools.partial):
            return _not_atoms([value.func, *value.args, *value.keywords.values()])
        if isinstance(value, nn.Module):
            return self._capture_module(value)
        if self._capture_generator(value) or _is_foreign(value):
            return ()
        if isinstance(value, types.MethodType):
            return (value.__self__,)
        if isinstance(value, Iterator) and not isinstance(value, io.IOBase):
            raise UnsupportedStateError(f"an iterator ({kind.__module__}.{kind.__qualname__})")
        return self._capture_object(value)

    def _capture_container(self, value: Any) -> Iterable[Any]:
        if isinstance(value, dict):
            return _not_atoms(self._keep(value, dict, _write_dict).values())
        if isinstance(value, list):
            return _not_atoms(self._keep(value, list, _write_list))
        if isinstance(value, set | deque):
            return _not_atoms(self._keep(value, list, _write_collection))
        return _not_atoms(value)

    def _capture_module(self, module: nn.Module) -> Iterable[Any]:
        attributes = self._keep(vars(module), dict, _write_dict)
        if type(module).__module__.startswith(_TORCH_MODULES):  # other attributes are settings
            inside = [attributes["_parameters"], attributes["_buffers"], attributes["_modules"]]
        else:
            inside = _not_atoms(attributes.values())
        for name in _HOOKS:
            for hook in attributes[name].values():
                inside += _collected_by(hook)
        return [*inside, *self._inside_classes(type(module))]

    def _inside_classes(self, kind: type) -> Iterable[Any]:
        """Containers that all modules of a class share."""
        for base in kind.__mro__[:-1]:
            if id(base) in self._seen or _is_of(base, _FOREIGN_PACKAGES | {"torch"}):
                continue
            self._seen.add(id(base))
            self.objects.append(base)
            for name, value in vars(base).items():
                if isinstance(value, _CONTAINERS) and not name.startswith("__"):
                    yield value

    def _capture_object(self, value: Any) -> Iterable[Any]:
        inside: list[Any] = []
        if isinstance(getattr(value, "__dict__", None), dict):
            inside += _not_atoms(self._keep(vars(value), dict, _write_dict).values())
        if _slots_of(type(value)):
            inside += self._keep(value, _read_slots, _write_slots).values()
        return inside

    def _capture_generator(self, value: Any) -> bool:
        """Whether it is one of random numbers, or an array, whose state was kept."""
        numpy = sys.modules.get("numpy")
        if isinstance(value, torch.Generator):
            self._keep_generator(
                value,
                lambda one: one.get_state().numpy(),  # a tensor never pickles to the same bytes
                lambda one, state: one.set_state(torch.from_numpy(state)),
            )
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
        elif numpy is not None and isinstance(value, numpy.ndarray):
            if value.flags.writeable:
                self._large.append(value)
        else:
            return False
        return True

    def _keep_generator(self, value: Any, read: Callable[[Any], Any], write: _Write) -> None:
        self._generators.append(len(self._kinds))
        self._keep(value, read, write)

    def _inside_tensor(self, tensor: Tensor) -> Iterable[Any]:
        inside: list[Any] = []
        if isinstance(getattr(tensor, "__dict__", None), dict):
            inside += _not_atoms(self._keep(vars(tensor), dict, _write_dict).values())
        if is_traceable_wrapper_subclass(tensor):  # DTensors, jagged and quantized ones
            names, _ = tensor.__tensor_flatten__()
            inside += [getattr(tensor, name) for name in names]
        return inside

    def _capture_tensor(self, tensor: Tensor) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            is_state = _is_plain(tensor) and not tensor.is_inference()
            if is_state and _address(tensor) not in self._trained:
                self._large.append(tensor)


class _TensorState(NamedTuple):
    """What a tensor refers to, and a copy of its elements where they are few enough."""

    alias: Tensor
    memory: Tensor
    copy: Tensor | None
    requires_grad: bool
    grad: Tensor | None

    @classmethod
    def of(cls, tensor: Tensor, *, copied: bool, like: _TensorState | None = None) -> _TensorState:
        """The state of now; shares the copy of an earlier one where the elements are the same."""
        with torch._C.DisableTorchFunctionSubclass():
            alias = tensor.detach()
            memory = _written_memory(alias)
            copy = None
            if copied and like is not None and like.copy is not None:
                copy = like.copy if _same_content(memory, like.copy) else None
            if copied and copy is None:
                copy = memory.clone()
            grad = tensor.grad if tensor.is_leaf else None
            return cls(alias, memory, copy, tensor.requires_grad, grad)

    def restore(self, tensor: Tensor) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            if _geometry(tensor) != _geometry(self.alias):
                tensor.data = self.alias
            if tensor.is_leaf:
                if tensor.requires_grad != self.requires_grad:
                    tensor.requires_grad_(self.requires_grad)
                if tensor.grad is not self.grad:
                    tensor.grad = self.grad
            if self.copy is not None and not _same_content(self.memory, self.copy):
                self.memory.copy_(self.copy)


def _write_dict(value: dict[Any, Any], kept: dict[Any, Any]) -> None:
    same = len(value) == len(kept) and all(map(operator.is_, value.values(), kept.values()))
    if same and list(value) == list(kept):
        return
    kind: Any = OrderedDict if isinstance(value, OrderedDict) else dict
    kind.clear(value)  # a subclass may do more than that
    for name, one in kept.items():
        kind.__setitem__(value, name, one)


def _write_list(value: list[Any], kept: list[Any]) -> None:
    if len(value) != len(kept) or not all(map(operator.is_, value, kept)):
        list.__setitem__(value, slice(None), kept)


def _write_collection(value: set[Any] | deque[Any], kept: list[Any]) -> None:
    value.clear()
    value.update(kept) if isinstance(value, set) else value.extend(kept)


def _read_slots(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in _slots_of(type(value)) if hasattr(value, name)}


def _write_slots(value: Any, kept: dict[str, Any]) -> None:
    for name in _slots_of(type(value)):
        if name not in kept:
            if hasattr(value, name):
                object.__delattr__(value, name)
        elif getattr(value, name, _UNSET) is not kept[name]:
            object.__setattr__(value, name, kept[name])


def _copy_array(array: Any) -> Any:
    return array.copy()


def _write_array(array: Any, copy: Any) -> None:
    array[...] = copy


def _written_bytes(one: Any) -> int:
    if not isinstance(one, Tensor):
        return one.nbytes
    with torch._C.DisableTorchFunctionSubclass():
        return _written_memory(one.detach()).nbytes


def _not_atoms(values: Iterable[Any]) -> list[Any]:
    return [one for one in values if type(one) not in _ATOM_TYPES]


def _collected_by(hook: Any) -> list[Any]:
    """What a hook can collect in: its arguments, its cells, or the object that it belongs to."""
    if isinstance(hook, functools.partial):
        return [*hook.args, *hook.keywords.values(), *_collected_by(hook.func)]
    if not isinstance(hook, types.FunctionType):
        return [getattr(hook, "__self__", hook)]
    inside = [*(hook.__defaults__ or ()), *(hook.__kwdefaults__ or {}).values()]
    for cell in hook.__closure__ or ():
        try:
            inside.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            continue
    return inside


@functools.lru_cache(maxsize=1024)
def _slots_of(kind: type) -> tuple[str, ...]:
    """Names of the slots of a class and of its bases."""
    return tuple(name for base in kind.__mro__ for name in _own_slots(base))


def _own_slots(kind: type) -> Iterator[str]:
    slots = vars(kind).get("__slots__", ())
    private = f"_{kind.__name__.lstrip('_')}"
    for one in (slots,) if isinstance(slots, str) else tuple(slots):
        if one not in ("__dict__", "__weakref__"):
            yield f"{private}{one}" if one.startswith("__") and not one.endswith("__") else one


def _is_foreign(value: Any) -> bool:
    if isinstance(
        value,
        types.FunctionType
        | types.BuiltinFunctionType
        | types.ModuleType
        | Enum
        | weakref.ReferenceType
        | torch.optim.Optimizer
        | torch.utils.data.Dataset
        | torch.utils.data.DataLoader,
    ):
        return True
    return any(_is_of(kind, _FOREIGN_PACKAGES) for kind in type(value).__mro__[:-1])


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


def _address(tensor: Tensor) -> int:
    """Where the memory of a tensor begins; 0 where there is none."""
    return tensor.untyped_storage().data_ptr() if _is_plain(tensor) else 0


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
