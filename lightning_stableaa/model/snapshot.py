"""Snapshots of the state that a training step can change: modules, batches, generators."""

from __future__ import annotations

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
from typing import Any

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
        self._budget = max(_COPIED_BYTES, 2 * sum(one.nbytes for one in trained))
        self._restorers: list[Callable[[], object]] = []
        self._contents: list[tuple[int, Callable[[bool], object]]] = []  # bytes, how to keep them
        self._uncopied: list[tuple[Tensor, int]] = []  # with their versions
        self._generators: list[tuple[Callable[[], Any], bytes]] = []  # with their states
        self._seen: set[int] = set()
        self.objects: list[Any] = []  # kept alive, so that no id is used again
        pending = list(roots)
        while pending:
            pending.extend(self._capture(pending.pop()))
        for size, keep in sorted(self._contents, key=lambda one: one[0]):
            self._budget -= size
            keep(self._budget >= 0)
        self._contents.clear()  # a cycle, which would keep everything alive for a while

    @torch.no_grad()
    def restore(self) -> None:
        """Put all contents back."""
        for restorer in self._restorers:
            restorer()

    def lost(self) -> bool:
        """Whether a tensor too large to be copied was written since, through itself."""
        return any(tensor._version != version for tensor, version in self._uncopied)

    def drew_random_numbers(self) -> bool:
        """Whether a generator within the state has moved since."""
        return any(pickle.dumps(read()) != state for read, state in self._generators)

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
        if isinstance(value, Optimizer):  # its state changes in its step alone
            return (value.param_groups,)
        if isinstance(value, types.MethodType):
            return (value.__self__,)
        if isinstance(value, Iterator) and not isinstance(value, io.IOBase):
            raise UnsupportedStateError(f"an iterator ({kind.__module__}.{kind.__qualname__})")
        return self._capture_object(value)

    def _capture_container(self, value: Any) -> Iterable[Any]:
        if isinstance(value, dict):
            return self._capture_dict(value)
        if isinstance(value, list):
            return self._capture_list(value)
        if isinstance(value, set | deque):
            return self._capture_collection(value)
        return _not_atoms(value)

    def _capture_dict(self, value: dict[Any, Any]) -> Iterable[Any]:
        kept = dict(value)

        def restore() -> None:
            same = len(value) == len(kept) and all(
                one is two for one, two in zip(value.values(), kept.values(), strict=True)
            )
            if same and list(value) == list(kept):
                return
            kind: Any = OrderedDict if isinstance(value, OrderedDict) else dict
            kind.clear(value)  # a subclass may do more than that
            for name, one in kept.items():
                kind.__setitem__(value, name, one)

        self._restorers.append(restore)
        return _not_atoms(kept.values())

    def _capture_list(self, value: list[Any]) -> Iterable[Any]:
        kept = list(value)

        def restore() -> None:
            if len(value) != len(kept) or any(
                one is not two for one, two in zip(value, kept, strict=True)
            ):
                list.__setitem__(value, slice(None), kept)

        self._restorers.append(restore)
        return _not_atoms(kept)

    def _capture_collection(self, value: set[Any] | deque[Any]) -> Iterable[Any]:
        kept = list(value)

        def restore() -> None:
            value.clear()
            value.update(kept) if isinstance(value, set) else value.extend(kept)

        self._restorers.append(restore)
        return _not_atoms(kept)

    def _capture_module(self, module: nn.Module) -> Iterable[Any]:
        attributes = vars(module)
        inside = list(self._capture_dict(attributes))
        if type(module).__module__.startswith(_TORCH_MODULES):  # other attributes are settings
            inside = [attributes["_parameters"], attributes["_buffers"], attributes["_modules"]]
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
            inside += self._capture_dict(vars(value))
        slots = [
            (name, getattr(value, name, _UNSET))
            for kind in type(value).__mro__
            for name in _slots_of(kind)
        ]
        if slots:

            def restore() -> None:
                for name, one in slots:
                    if getattr(value, name, _UNSET) is one:
                        continue
                    if one is _UNSET:
                        object.__delattr__(value, name)
                    else:
                        object.__setattr__(value, name, one)

            self._restorers.append(restore)
            inside += [one for _, one in slots if one is not _UNSET]
        return inside

    def _capture_generator(self, value: Any) -> bool:
        """Whether it is one of random numbers, or an array, whose state was kept."""
        numpy = sys.modules.get("numpy")
        if isinstance(value, torch.Generator):
            self._keep_generator(
                lambda: value.get_state().numpy(),  # a tensor never pickles to the same bytes
                lambda state: value.set_state(torch.from_numpy(state)),
            )
        elif isinstance(value, random.Random):
            self._keep_generator(value.getstate, value.setstate)
        elif numpy is not None and isinstance(value, numpy.random.Generator):
            bits = value.bit_generator
            self._keep_generator(lambda: bits.state, lambda state: setattr(bits, "state", state))
        elif numpy is not None and isinstance(value, numpy.random.RandomState):
            read = functools.partial(value.get_state, legacy=False)
            self._keep_generator(read, value.set_state)
        elif numpy is not None and isinstance(value, numpy.ndarray):
            if value.flags.writeable:
                self._contents.append((value.nbytes, functools.partial(self._keep_array, value)))
        else:
            return False
        return True

    def _keep_generator(self, read: Callable[[], Any], write: Callable[[Any], object]) -> None:
        state = read()
        self._restorers.append(lambda: write(state))
        self._generators.append((read, pickle.dumps(state)))

    def _keep_array(self, array: Any, copied: bool) -> None:
        if copied:
            copy = array.copy()
            self._restorers.append(lambda: array.__setitem__(Ellipsis, copy))

    def _inside_tensor(self, tensor: Tensor) -> Iterable[Any]:
        inside: list[Any] = []
        if isinstance(getattr(tensor, "__dict__", None), dict):
            inside += self._capture_dict(vars(tensor))
        if is_traceable_wrapper_subclass(tensor):  # DTensors, jagged and quantized ones
            names, _ = tensor.__tensor_flatten__()
            inside += [getattr(tensor, name) for name in names]
        return inside

    def _capture_tensor(self, tensor: Tensor) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            if not _is_plain(tensor) or tensor.is_inference() or _address(tensor) in self._trained:
                return
            size = _written_memory(tensor.detach()).nbytes
            self._contents.append((size, functools.partial(self._keep_tensor, tensor)))

    def _keep_tensor(self, tensor: Tensor, copied: bool) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            kept = tensor.detach()
            memory = _written_memory(kept)
            copy = memory.clone() if copied else None
            requires_grad = tensor.requires_grad
            grad = tensor.grad if tensor.is_leaf else None
        if copy is None:
            self._uncopied.append((tensor, tensor._version))

        def restore() -> None:
            with torch._C.DisableTorchFunctionSubclass():
                if _geometry(tensor) != _geometry(kept):
                    tensor.data = kept
                if tensor.is_leaf:
                    if tensor.requires_grad != requires_grad:
                        tensor.requires_grad_(requires_grad)
                    if tensor.grad is not grad:
                        tensor.grad = grad
                if copy is not None and not _same_content(memory, copy):
                    memory.copy_(copy)

        self._restorers.append(restore)
        if grad is not None:
            self._keep_tensor(grad, copied)


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


def _slots_of(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    private = f"_{kind.__name__.lstrip('_')}"
    return tuple(
        f"{private}{one}" if one.startswith("__") and not one.endswith("__") else one
        for one in names
        if one not in ("__dict__", "__weakref__")
    )


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
