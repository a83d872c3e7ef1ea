"""Snapshots put back, bitwise and into the same objects, whatever a training step can change."""

from __future__ import annotations

import array
import functools
import io
import multiprocessing
import queue
import random
import types
import weakref
from collections import Counter, OrderedDict, UserDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import numpy as np
import pandas
import pytest
import torch
from torch import Tensor, nn
from torch.quasirandom import SobolEngine

from lightning_stableaa.model import snapshot as snapshot_module
from lightning_stableaa.model.rng import global_generators
from lightning_stableaa.model.snapshot import StateSnapshot, UnsupportedStateError

CPU = torch.device("cpu")


# Global generators of random numbers


@pytest.fixture(autouse=True)
def numpy_generator() -> Iterator[None]:
    """Each test finds it without a normal variate in store, and leaves it as it was."""
    state = np.random.get_state()
    np.random.seed(3)
    yield
    np.random.set_state(state)


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), torch.rand(1).item()


@pytest.mark.parametrize("draws", [0, 1, 2, 312, 625])  # half a block of the generator, and one
@pytest.mark.parametrize("function", [np.random.randn, np.random.rand])
@pytest.mark.parametrize("drawn_before", [0, 1])
def test_rng_snapshot_restores_numpy_state_exactly(
    draws: int, function: Callable[[], float], drawn_before: int
) -> None:
    """Also while it keeps a normal variate, which is when an odd number of them was drawn."""
    for _ in range(drawn_before):
        np.random.randn()
    snapshot = StateSnapshot(global_generators(CPU))
    before: Any = np.random.get_state()
    for _ in range(draws):
        function()
    snapshot.restore()
    after: Any = np.random.get_state()
    assert np.array_equal(after[1], before[1])
    assert after[2:] == before[2:]


def test_rng_snapshot_of_other_bit_generator_restores_and_sees_moves() -> None:
    numpy_random: Any = np.random  # its stubs lack both functions
    before = numpy_random.get_bit_generator()
    numpy_random.set_bit_generator(np.random.PCG64(3))
    try:
        snapshot = StateSnapshot(global_generators(CPU))
        for function in (random.random, np.random.rand, lambda: torch.rand(1).item()):
            assert not snapshot.restore()
            first = function()
            assert snapshot.restore()
            assert function() == first
            assert snapshot.restore()
    finally:
        numpy_random.set_bit_generator(before)


# Values that are changed in place


class Attributes:
    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


@dataclass
class Record:
    values: list[Any]
    other: Any = 0

    def change(self) -> None:
        self.other = self.values
        for one in self.values:
            one.change() if isinstance(one, Record) else one.sub_(1)
        self.values.append(self)


class Slots:
    __slots__ = ("__private", "unset", "value")

    def __init__(self) -> None:
        self.value, self.__private = [1], [0]

    def change(self) -> None:
        self.value, self.unset = None, 1
        self.__private.append(1)
        self.__private = [2]

    def content(self) -> Any:
        return [self.value, self.__private, hasattr(self, "unset")]


class Batch(dict[str, Any]):
    """With attributes, such as the outputs of transformers."""


class Labelled(Tensor):
    """With attributes, and operations that return plain tensors."""


class Plain(nn.Module):
    """With state of every kind; ``shared`` is that of the class."""

    shared: ClassVar[list[int]] = []

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("ema", torch.zeros(2))
        self.seen: list[Any] = []
        self.calls = 0


Pair = namedtuple("Pair", ["left", "right"])


def content(value: Any, seen: set[int]) -> Any:
    """Describes a value by its content, bit for bit, and by the identity of its parts."""
    if isinstance(value, int | float | str | type(None) | types.FunctionType):
        return value
    if id(value) in seen:
        return id(value)
    seen.add(id(value))
    parts: list[Any] = [id(value)]
    inside = [getattr(value, name, None) for name in ("__self__", "__dict__", "keywords")]
    if isinstance(value, Tensor) and value.is_nested:
        return [*parts, value.values().tolist()]
    if isinstance(value, Tensor):
        numbers = value.detach().as_subclass(Tensor)
        parts += [numbers.shape, numbers.data_ptr(), value.requires_grad]
        parts.append(numbers.clone().numpy(force=True).tobytes())
        inside.append(value.grad)
    elif isinstance(value, dict):
        parts += list(value)
        inside += value.values()
    elif isinstance(value, set):
        parts += sorted(value)
    elif isinstance(value, list | tuple | deque):
        inside += value
    elif isinstance(value, np.ndarray):
        parts.append(value.tobytes())
    elif isinstance(value, torch.Generator):
        parts.append(value.get_state().tolist())
    elif isinstance(value, np.random.Generator):
        parts.append(repr(value.bit_generator.state))
    elif isinstance(value, np.random.RandomState):
        parts.append(repr(value.get_state()))
    elif isinstance(value, random.Random):
        parts.append(value.getstate())
    elif isinstance(value, Slots):
        inside += value.content()
    return parts + [content(one, seen) for one in inside]


def check_restored(
    roots: list[Any],
    change: Callable[[], object],
    trained: Any = (),
    show: Callable[[], Any] | None = None,
) -> None:
    """Twice: a snapshot is put back before each of several evaluations, and one of later after."""
    show = show or (lambda: content(roots, set()))
    before = show()
    snapshot = StateSnapshot(roots, trained)
    for _ in range(2):
        change()
        changed = show()
        assert changed != before, "the change has to show"
        later = snapshot.again()
        snapshot.restore()
        assert show() == before
        whole = StateSnapshot(roots, trained)
        later.restore()
        assert show() != before
        whole.restore()
        assert show() == before
    assert not snapshot.lost()


def change_mapping(value: Any) -> None:
    value["x"].add_(1)
    value["y"].append(2)
    value["new"] = value.pop("x")


def items() -> dict[str, Any]:
    return {"x": torch.zeros(2), "y": [1]}


def with_attributes(value: Any) -> Any:
    value.owner = Attributes(name="me", inner=torch.zeros(1))
    return value


def change_attributes(value: Any) -> None:
    value.owner.inner.add_(1)
    value.owner = None
    value.data.add_(1) if isinstance(value, Tensor) else value.update(y=1)


CALLS = 0  # global, for a function of this module


class Counts:
    """Counts its calls in its class."""

    calls = 0

    def __call__(self) -> None:
        type(self).calls += 1


class Hides(dict[str, Any]):
    """Shows no private keys."""

    def __iter__(self) -> Any:
        return (one for one in super().__iter__() if not one.startswith("_"))

    def keys(self) -> Any:
        return list(self)

    def items(self) -> Any:
        return [(one, self[one]) for one in self]


def closure() -> Callable[[], int]:
    calls = 0

    def count() -> int:
        nonlocal calls
        calls += 1
        return calls

    return count


def count_globally() -> int:
    global CALLS  # what is tested
    CALLS += 1
    return CALLS


def cell_of(function: Any) -> Any:
    return function.__closure__[0].cell_contents


def with_defaults(first: list[int], second: list[int]) -> Callable[..., None]:
    def stored(one: list[int] = first, *, other: list[int] = second) -> None:
        one.append(1)
        other.append(1)

    return stored


TARGET = Attributes(seen=[])

# A value, how it is changed, and what shows it, if not its content.
CASES: dict[str, tuple[Any, ...]] = {
    "dict": (items, change_mapping),
    "OrderedDict": (lambda: OrderedDict(items()), change_mapping),
    "defaultdict": (lambda: defaultdict(list, items()), change_mapping),
    "UserDict": (lambda: UserDict(items()), change_mapping),
    "OrderedDict, reordered": (lambda: OrderedDict(a=1, b=1), lambda v: v.move_to_end("a")),
    "Counter": (lambda: Counter("aab"), lambda v: v.update("ccc")),
    "dict with attributes": (lambda: with_attributes(Batch(x=1)), change_attributes),
    "keys that a dict hides": (
        lambda: Hides(_private=1, shown=2),
        lambda v: v.__delitem__("shown"),
        lambda v: dict.__len__(v),
    ),
    "keys without a truth value": (
        lambda: {torch.ones(2): 1},
        lambda v: v.update(new=1),
        lambda v: len(v),
    ),
    "list": (lambda: [1, torch.zeros(1)], lambda v: v.insert(0, v[1].add_(1))),
    "tuple": (lambda: ([1], torch.zeros(2)), lambda v: v[1].add_(v[0][0])),
    "namedtuple": (lambda: Pair([1], torch.zeros(1)), lambda v: v.left.clear()),
    "set": (lambda: {1, 2}, lambda v: v.add(3)),
    "deque": (lambda: deque([1, 2, 3], maxlen=3), lambda v: v.append(4)),
    "deque of tensors": (lambda: deque([torch.zeros(1)]), lambda v: v[0].add_(1)),
    "bytearray": (lambda: bytearray(b"ab"), lambda v: v.append(1), bytes),
    "array of the standard library": (
        lambda: array.array("d", [1.0]),
        lambda v: v.append(2.0),
        lambda v: v.tolist(),
    ),
    "StringIO": (lambda: io.StringIO("ab"), lambda v: v.write("xyz"), lambda v: v.getvalue()),
    "BytesIO": (lambda: io.BytesIO(b"abc"), lambda v: v.read(1), lambda v: v.tell()),
    "dataclasses": (lambda: Record([Record([torch.zeros(1)])]), Record.change),
    "SimpleNamespace": (
        lambda: types.SimpleNamespace(a=[1], b=1),
        lambda v: (v.a.append(2), delattr(v, "b")),
    ),
    "slots": (Slots, Slots.change),
    "cycle of references": (lambda: Record(cycle := [], cycle), Record.change),
    "target of a weak reference": (
        lambda: weakref.ref(TARGET),
        lambda v: v().seen.append(1),
        lambda v: list(v().seen),
    ),
    "cell of a function": (closure, lambda v: v(), lambda v: v.__closure__[0].cell_contents),
    "attribute of a function": (
        closure,
        lambda v: setattr(v, "calls", 1),
        lambda v: hasattr(v, "calls"),
    ),
    "defaults of a function": (
        lambda: with_defaults([], []),
        lambda v: v(),
        lambda v: repr([v.__defaults__, v.__kwdefaults__]),
    ),
    "global": (lambda: count_globally, lambda v: v(), lambda _: CALLS),
    "number of a class": (Counts, lambda v: v(), lambda _: Counts.calls),
    "method": (
        lambda: types.MethodType(draw, Attributes(seen=[])),
        lambda v: v.__self__.seen.append(1),
    ),
    "bound method of a list": (lambda: [].append, lambda v: v(1), lambda v: list(v.__self__)),
    "partial": (lambda: functools.partial(dict, s=[1]), lambda v: v.keywords["s"].append(2)),
    "array": (lambda: np.zeros((2, 3)), lambda v: v.__setitem__((0, 1), np.nan)),
    "array of objects": (lambda: np.array([1, "a"], dtype=object), lambda v: v.fill(2)),
    "elements of an array": (
        lambda: np.array([[1], "a"], dtype=object),
        lambda v: v[0].append(2),
        lambda v: list(v[0]),
    ),
    "array, view": (lambda: np.arange(6)[::2], lambda v: v.__iadd__(1)),
    "data frame": (
        lambda: pandas.DataFrame({"a": [1, 2]}),
        lambda v: v.insert(0, "b", [3, 4]),
        lambda v: v.to_csv(),
    ),
    "series": (
        lambda: pandas.Series([1.0, 2.0]),
        lambda v: v.__setitem__(0, 5.0),
        lambda v: v.to_csv(),
    ),
    "torch.Generator": (torch.Generator, lambda v: torch.rand(1, generator=v)),
    "PCG64": (lambda: np.random.default_rng(0), lambda v: v.normal()),
    "MT19937": (lambda: np.random.Generator(np.random.MT19937(0)), lambda v: v.normal()),
    "bit generator": (lambda: np.random.PCG64(0), lambda v: v.random_raw(), lambda v: str(v.state)),
    "RandomState": (lambda: np.random.RandomState(0), lambda v: v.randn()),
    "random.Random": (lambda: random.Random(0), lambda v: v.gauss(0, 1)),
    "SobolEngine": (lambda: SobolEngine(2, scramble=True, seed=0), lambda v: v.draw(3)),
    "tensor subclass": (
        lambda: with_attributes(torch.zeros(3).as_subclass(Labelled)),
        change_attributes,
    ),
    "in place": (lambda: torch.zeros(2, 3), lambda v: v.add_(1)),
    ".data replaced": (lambda: torch.zeros(3), lambda v: setattr(v, "data", torch.ones(3))),
    ".data written": (lambda: torch.zeros(3), lambda v: v.data.add_(1)),
    "reshaped": (lambda: torch.zeros(3), lambda v: v.unsqueeze_(0)),
    "resized": (lambda: torch.zeros(3), lambda v: v.resize_(2).fill_(1)),
    "requires_grad": (lambda: torch.zeros(3), lambda v: v.requires_grad_()),
    "gradient": (
        lambda: torch.zeros(3, requires_grad=True),
        lambda v: v.square().sum().backward(),
    ),
    "expanded": (lambda: torch.zeros(1).expand(3), lambda v: v[:1].add_(1)),
    "strided": (lambda: torch.zeros(4, 4)[::2, 1::2], lambda v: v.add_(1)),
    "jagged": (
        lambda: torch.nested.nested_tensor([torch.zeros(2)], layout=torch.jagged),
        lambda v: v.values().add_(1),
    ),
    "sparse": (
        lambda: torch.eye(2).to_sparse(),
        lambda v: v.mul_(2),
        lambda v: v.to_dense().tolist(),
    ),
    "compressed": (
        lambda: torch.eye(2).to_sparse_csr(),
        lambda v: v.values().mul_(2),
        lambda v: v.values().tolist(),
    ),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8),
        lambda v: v.copy_(torch.zeros(2)),
        lambda v: v.dequantize().tolist(),
    ),
    "NaN": (lambda: torch.full((2,), torch.nan), lambda v: v.zero_()),
    "negative zero": (lambda: torch.zeros(2), lambda v: v.neg_()),
    "complex": (lambda: torch.zeros(2, dtype=torch.complex128), lambda v: v.add_(1j)),
    "conjugate": (lambda: torch.tensor([1j]).conj(), lambda v: v.mul_(2)),
    "bool": (lambda: torch.zeros(2, dtype=torch.bool), lambda v: v.fill_(True)),
    "half": (lambda: torch.zeros(2, dtype=torch.float16), lambda v: v.add_(1)),
    "views of one memory": (lambda: [m := torch.zeros(4), m[1:3]], lambda v: v[1].add_(1)),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:.*quantize")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("nested", [False, True])
def test_snapshot_restores_content_into_same_objects(name: str, nested: bool) -> None:
    make, change, *show = CASES[name]
    value = make()
    root: Any = value
    if nested:
        root = Plain()
        root.held = Attributes(values=[(value, {"k": value})])
    shown = (lambda: show[0](value)) if show else None
    check_restored([root], lambda: change(value), show=shown)


def test_snapshot_restores_optimizers_but_those_of_the_training_loop() -> None:
    own, trained = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizers = [torch.optim.Adam([own]), torch.optim.Adam([trained])]
    holder = Attributes(own=own, optimizers=optimizers)
    snapshot = StateSnapshot([holder], [trained], optimizers=optimizers[1:])
    for one in (own, trained):
        one.grad = torch.ones(2)
    for one in optimizers:
        one.step()
        one.param_groups[0]["lr"] = 0.5
    snapshot.restore()
    assert own.tolist() == [1.0, 1.0]
    assert trained[0].item() < 1
    assert [len(one.state) for one in optimizers] == [0, 1]
    assert [one.param_groups[0]["lr"] for one in optimizers] == [1e-3, 1e-3]


def test_snapshot_passes_over_sparse_gradient_of_untrained_parameter() -> None:
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    gradient = table.weight.grad
    snapshot = StateSnapshot([table])
    table.weight.grad = None
    snapshot.restore()
    assert table.weight.grad is gradient


def test_snapshot_leaves_untouched_set_in_order() -> None:
    value = {8, 0}
    value.discard(8)
    value.add(8)
    before = list(value)
    StateSnapshot([value]).restore()
    assert list(value) == before


def test_snapshot_reads_slots_without_getattr() -> None:
    class Guarded:
        __slots__ = ("empty",)

        def __getattr__(self, name: str) -> Any:
            raise KeyError(name)

    StateSnapshot([Guarded()]).restore()


def test_snapshot_of_attributes_does_not_look_inside() -> None:
    dataset: Any = Attributes(index=0, rows=[1])
    snapshot = StateSnapshot([], attributes=[vars(dataset)])
    dataset.index += 1
    dataset.rows.append(2)
    snapshot.restore()
    assert (dataset.index, dataset.rows) == (0, [1, 2])


# Modules


def test_snapshot_restores_module_attributes_buffers_and_modes() -> None:
    module: Any = Plain()
    module.norm, module.teacher = nn.BatchNorm1d(2), nn.Linear(2, 2)
    trained = [*module.layer.parameters(), *module.norm.parameters()]

    def change() -> None:
        module.ema.mul_(0.9).add_(1)
        module.norm(torch.randn(4, 2))
        module.norm.eval()
        module.layer.extra = 1
        module.seen.append(module.ema)
        module.calls += 1
        module.new = nn.Linear(1, 1)
        module.register_buffer("late", torch.zeros(1))
        module.norm.running_mean = torch.ones(2)
        module.teacher.weight = nn.Parameter(torch.ones(2, 2))
        module.teacher.bias.data = torch.ones(2)
        Plain.shared.append(1)
        del module.layer

    check_restored([module, Plain.shared], change, trained)
    snapshot = StateSnapshot([module])  # through the module alone
    Plain.shared.append(1)
    snapshot.restore()
    assert Plain.shared == []


def test_snapshot_restores_untrained_parameters_and_leaves_trained_alone() -> None:
    module: Any = Plain()
    module.teacher, module.codebook = nn.Linear(2, 2), nn.Parameter(torch.zeros(3))
    module.alias = module.layer.weight.detach()  # of the same memory
    before = {name: one.clone() for name, one in module.state_dict().items()}
    snapshot = StateSnapshot([module], module.layer.parameters())
    with torch.no_grad():
        for one in module.parameters():
            one += 1
    snapshot.restore()
    for name, one in module.state_dict().items():
        assert torch.equal(one, before[name] + name.startswith("layer")), name
    assert torch.equal(module.alias, module.layer.weight)


@pytest.mark.parametrize(
    "register",
    [
        *("register_forward_hook", "register_forward_pre_hook"),
        *("register_full_backward_hook", "register_full_backward_pre_hook"),
    ],
)
def test_snapshot_restores_what_hooks_collect(register: str) -> None:
    module, outputs = nn.Sequential(nn.Linear(2, 2)), []
    getattr(module[0], register)(lambda *_: outputs.append(1))
    snapshot = StateSnapshot([module])
    outputs.append(1)
    snapshot.restore()
    assert outputs == []


# Iterators, constants, large tensors, own generators


@pytest.mark.parametrize(
    ("iterator", "name"),
    [
        ((one for one in [1]), "builtins.generator"),
        (zip([1], [2], strict=True), "builtins.zip"),
        (iter(torch.utils.data.DataLoader([1])), "torch.utils.data.*_SingleProcessDataLoader"),  # type: ignore[arg-type]
    ],
)
def test_snapshot_iterator_raises(iterator: Any, name: str) -> None:
    with pytest.raises(UnsupportedStateError, match=rf"^an iterator \({name}"):
        StateSnapshot([Attributes(batches={"train": [iterator]})])


@pytest.mark.parametrize("kind", [queue.Queue, queue.SimpleQueue, multiprocessing.SimpleQueue])
def test_snapshot_of_what_others_read_raises(kind: Any) -> None:
    with pytest.raises(UnsupportedStateError, match=r"Queue, which others may read or write$"):
        StateSnapshot([Attributes(source=kind())])


def test_snapshot_of_too_many_objects_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot_module, "_MAX_OBJECTS", 1000)
    with pytest.raises(UnsupportedStateError, match=r"^more than 1,000 objects$"):
        StateSnapshot([[[] for _ in range(1000)]])
    StateSnapshot([list(range(100_000))])  # numbers are no objects


def test_snapshot_passes_over_what_a_step_does_not_change() -> None:
    dataset = torch.utils.data.TensorDataset(torch.zeros(2))
    loader = torch.utils.data.DataLoader(dataset)
    mode = Enum("Mode", ["TRAIN"])
    value = [mode, np.float32(1), torch, print, open, random.SystemRandom(), loader]
    snapshot = StateSnapshot([value, torch.float32, slice(3), ...])
    dataset.tensors[0].add_(1)
    snapshot.restore()
    assert dataset.tensors[0].tolist() == [1.0, 1.0]


def test_restore_writes_only_what_changed() -> None:
    with torch.inference_mode():
        inference = torch.zeros(2)
    readonly = np.zeros(2)
    readonly.flags.writeable = False
    tensors = [torch.zeros(3), torch.tensor([1.0, torch.nan]), torch.eye(2).to_sparse()]
    versions = [one._version for one in tensors]
    StateSnapshot([*tensors, inference, nn.LazyLinear(2), readonly]).restore()
    assert [one._version for one in tensors] == versions


@pytest.mark.parametrize(("trained", "large_is_lost"), [(0, True), (200, False)])
def test_snapshot_beyond_its_budget_reports_lost_changes(
    trained: int, large_is_lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice the size of what is trained may be copied, the smallest first; the rest is watched."""
    monkeypatch.setattr(snapshot_module, "_COPIED_BYTES", 100)
    large, small = torch.zeros(200), torch.zeros(10)
    snapshot = StateSnapshot([large, small], [nn.Parameter(torch.zeros(trained))])
    small += 1
    snapshot.restore()
    assert not snapshot.lost()
    assert small.tolist() == [0.0] * 10
    large += 1
    assert snapshot.lost() is large_is_lost
    snapshot.restore()
    assert large[0].item() == (1.0 if large_is_lost else 0.0)


@pytest.mark.parametrize(
    "name", ["torch.Generator", "PCG64", "MT19937", "RandomState", "random.Random"]
)
def test_snapshot_reports_draws_from_generators_within(name: str) -> None:
    make, use = CASES[name]
    generator = make()
    snapshot = StateSnapshot([Attributes(source=generator)])
    draw()  # from the global ones
    assert not snapshot.restore()
    use(generator)
    assert snapshot.restore()
    assert not snapshot.restore()
