"""Parameters (and their momentum buffers) <-> flat vectors, in place.

Weights are written through the storage of the parameters: identity, strides, dtype and device of
every parameter stay, so nothing recompiles and channels_last survives.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_stableaa.dtensors import (
    drop_gathered,
    is_split,
    local_part,
    refuse_hidden_weights,
    with_local_part,
)

# Running means of gradients, by the names that torch.optim gives them.
_MOMENTUM_NAMES = ("momentum_buffer", "exp_avg")

# Elements exchanged at a time: the work space of a swap.
_SWAP_CHUNK = 1 << 20


def trainable_parameters(optimizers: Iterable[Optimizer]) -> list[Tensor]:
    """The parameters that the optimizers can move: unique, non-empty, that have a gradient or will.

    One that is frozen while it keeps its gradient, as a discriminator while its generator is
    trained, moves with the next step. Those of lazy modules are there after their first batch.

    Raises:
        ValueError: parameters of FSDP1 or of DeepSpeed, which are not what they seem to be.
    """
    unique = dict.fromkeys(_all_parameters(optimizers))
    refuse_hidden_weights(unique)
    return [
        one
        for one in unique
        if (one.requires_grad or one.grad is not None) and not is_lazy(one) and one.numel() > 0
    ]


def has_lazy_parameters(optimizers: Iterable[Optimizer]) -> bool:
    """Whether some are without a shape until their module has seen a batch."""
    return any(is_lazy(one) for one in _all_parameters(optimizers))


def _all_parameters(optimizers: Iterable[Optimizer]) -> Iterator[Tensor]:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            yield from group["params"]


class FlatTensors:
    """A list of tensors seen as one flat vector, read and written in place.

    The order of elements is that of memory, so that channels_last weights are copied without
    being rearranged. The aliases hold on to the storages seen at construction: ``aliases`` tells
    whether they are still those of the given tensors. Of a DTensor the vector has the part that
    this process holds.

    Args:
        tensors: dense, non-overlapping tensors on one device; floating point.

    Raises:
        ValueError: no tensors, several devices, complex or integer dtype, or gaps in memory.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        if not tensors:
            raise ValueError(
                "the optimizer holds no trainable parameter: nothing to accelerate; "
                "check requires_grad of its parameters"
            )
        self._tensors = list(tensors)
        self._is_split = is_split(tensors)
        parts = [local_part(one) for one in tensors]
        devices = {one.device for one in parts}
        if len(devices) > 1:
            names = ", ".join(sorted(str(device) for device in devices))
            raise ValueError(
                f"all parameters must be on one device, got {names}; "
                "accelerate one optimizer per device"
            )
        self._segments = [_memory_order(one) for one in parts]
        self._sizes = [one.numel() for one in parts]
        self._layout = _layout(tensors)
        self.length = sum(self._sizes)
        self.device = parts[0].device
        self.dtype = parts[0].dtype
        for one in parts:
            self.dtype = torch.promote_types(self.dtype, one.dtype)

        # on a CPU views of many tensors take longer than short copies of them
        self._in_one_call = self.device.type == "cpu" and {one.dtype for one in parts} == {
            self.dtype
        }

        # added to the largest number of a dtype, less than a quarter of its last place is rounded
        # away: no finite weight becomes infinite by it
        self.largest_safe_change = min(
            torch.finfo(one.dtype).max * torch.finfo(one.dtype).eps / 16 for one in parts
        )

    def aliases(self, tensors: Sequence[Tensor]) -> bool:
        """Whether this is (still) the flat view of exactly these tensors."""
        return self._layout == _layout(tensors)

    def signature(self) -> list[list[list[int]]]:
        """That of the tensors: vectors of equal signatures are interchangeable."""
        return signature_of(self._tensors)

    def checksum(self) -> int:
        """Tells whether these are, bit for bit, the weights that they were elsewhere."""
        vector = torch.empty(self.length, dtype=self.dtype, device="cpu")
        self.read(vector)
        return zlib.crc32(vector.view(torch.uint8).numpy().data)

    def read(self, out: Tensor, *, start: int = 0) -> None:
        """Copy the elements [start, start + len(out)) to ``out``; beyond the end, zeros."""
        size = out.numel()
        covered = max(0, min(self.length - start, size))
        if covered:
            target = out if covered == size else out[:covered]
            pieces = self._part(start, covered)
            if self._in_one_call and out.device == self.device and out.dtype == self.dtype:
                torch.cat(pieces, out=target)
            else:
                _copy_all(target.split([one.numel() for one in pieces]), pieces)
        if covered < size:
            out[covered:].zero_()

    @torch.no_grad()
    def write(self, vector: Tensor) -> None:
        """Copy ``vector``, (length,) or longer, into the tensors."""
        whole = vector if vector.numel() == self.length else vector[: self.length]
        if self._in_one_call and vector.device == self.device and vector.dtype == self.dtype:
            torch.split_with_sizes_copy(whole, self._sizes, out=self._segments)
        else:
            _copy_all(self._segments, whole.split(self._sizes))
        if self._is_split:
            drop_gathered()

    def cannot_hold(self, vector: Tensor) -> Tensor:  # () bool
        """Whether ``vector`` is not finite in the dtype of any tensor.

        What float32 holds may be beyond float16, or beyond bfloat16.
        """
        vector, dtypes = vector[: self.length], [one.dtype for one in self._segments]
        one_pass = set(dtypes) == {self.dtype}
        pieces = [vector] if one_pass else vector.split(self._sizes)
        beyond = [
            _not_finite(*torch.aminmax(one), dtype)
            for one, dtype in zip(pieces, dtypes, strict=not one_pass)
            if one.numel()
        ]
        if not beyond:
            return torch.zeros((), dtype=torch.bool)
        return beyond[0] if one_pass else torch.stack(beyond).any()

    def unpack(self, vector: Tensor) -> list[Tensor]:
        """The tensors that would hold ``vector``, of the same shapes and strides."""
        copies = [torch.empty_like(local_part(one)) for one in self._tensors]
        FlatTensors(copies).write(vector)
        return [
            with_local_part(copy.detach(), like=one)
            for copy, one in zip(copies, self._tensors, strict=True)
        ]

    def work_space(self) -> Tensor:
        """What ``swap`` needs beside the vectors; bounded."""
        size = min(max(self._sizes), _SWAP_CHUNK)
        return torch.empty(size, dtype=self.dtype, device=self.device)

    @torch.no_grad()
    def swap(self, vector: Tensor, work_space: Tensor, *, back: bool = False) -> None:
        """Exchange the contents of the tensors and of ``vector``; allocates nothing.

        Args:
            vector: (length,) or longer.
            work_space: what ``work_space`` returns.
            back: undo an exchange, in the opposite order: tensors may share memory.
        """
        theirs = vector[: self.length].split(self._sizes)
        pairs = [
            pair
            for tensor, piece in zip(self._segments, theirs, strict=True)
            for pair in zip(tensor.split(_SWAP_CHUNK), piece.split(_SWAP_CHUNK), strict=True)
        ]
        for one, other in reversed(pairs) if back else pairs:
            kept = work_space[: one.numel()]
            kept.copy_(one)
            one.copy_(other)
            other.copy_(kept)
        if self._is_split:
            drop_gathered()

    def _part(self, start: int, size: int) -> list[Tensor]:
        """The elements [start, start + size), by segments."""
        if size == self.length:
            return self._segments
        parts: list[Tensor] = []
        low, end = 0, start + size
        for segment, length in zip(self._segments, self._sizes, strict=True):
            first, last = max(low, start), min(low + length, end)
            if first < last:
                parts.append(segment[first - low : last - low])
            low += length
        return parts


def signature_of(tensors: Iterable[Tensor]) -> list[list[list[int]]]:
    """Shape and strides of every tensor, in plain lists."""
    return [[list(one.shape), list(one.stride())] for one in tensors]


def momentum_tensors(optimizers: Iterable[Optimizer], parameters: Sequence[Tensor]) -> list[Tensor]:
    """The first moments of the parameters, in their order.

    ``momentum_buffer`` (SGD) or ``exp_avg`` (the Adam family). Second moments are step sizes, and
    no mixture of them is known to stay positive. Empty where some parameter has none yet, or a
    sparse one.
    """
    states = [optimizer.state for optimizer in optimizers]
    found = [_momentum(parameter, states) for parameter in parameters]
    momenta = [one for one in found if one is not None and one.layout is torch.strided]
    return momenta if len(momenta) == len(parameters) else []


@torch.no_grad()
def reset_momentum(optimizers: Iterable[Optimizer], parameters: Sequence[Tensor]) -> None:
    """Set the first moments to zero."""
    states = [optimizer.state for optimizer in optimizers]
    for parameter in parameters:
        momentum = _momentum(parameter, states)
        if momentum is not None:
            momentum.zero_()


def _momentum(parameter: Tensor, states: Iterable[Mapping[Tensor, Any]]) -> Tensor | None:
    for state in states:
        for name in _MOMENTUM_NAMES:
            buffer = state.get(parameter, {}).get(name)
            if isinstance(buffer, Tensor):
                return buffer
    return None


def is_dense(tensor: Tensor) -> bool:
    """Whether its entries are plain numbers in memory: not sparse, nested or quantized."""
    return tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_quantized)


def _not_finite(low: Tensor, high: Tensor, dtype: torch.dtype) -> Tensor:
    low, high = low.to(dtype), high.to(dtype)
    return low - low != high - high  # 0 where finite, else NaN, which equals nothing


def _copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    # one launch for many tensors; pyright: "_foreach_copy_" is not exported from module "torch"
    torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
        list(targets), list(sources)
    )


def _layout(tensors: Sequence[Tensor]) -> list[tuple[object, ...]]:
    parts = [local_part(one) for one in tensors]
    return [(one.data_ptr(), one.shape, one.stride(), one.dtype, one.device) for one in parts]


def _memory_order(tensor: Tensor) -> Tensor:
    """The storage of a dense tensor as a vector, without copying."""
    if not tensor.is_floating_point():
        raise ValueError(
            f"parameters must be real floating point, got {tensor.dtype} of shape "
            f"{tuple(tensor.shape)}; accelerate the others with an optimizer of their own"
        )
    dimensions = sorted(range(tensor.ndim), key=lambda d: (-tensor.stride(d), d))
    ordered = tensor.detach().permute(dimensions)
    if not ordered.is_contiguous():
        raise ValueError(
            f"parameters must be dense in memory, got shape {tuple(tensor.shape)} with strides "
            f"{tensor.stride()}; call .contiguous() on it before building the optimizer"
        )
    return ordered.view(-1)
