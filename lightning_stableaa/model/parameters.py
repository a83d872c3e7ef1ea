"""Parameters <-> one flat vector, in place.

Weights are written through the storage of the parameters: identity, strides, dtype and device of
every parameter stay, so nothing recompiles and channels_last survives.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_stableaa.distributed.dtensor import (
    check_supported_parameters,
    is_sharded,
    reshard_fsdp_modules,
    to_local,
)

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
    check_supported_parameters(unique)
    return [
        one
        for one in unique
        if (one.requires_grad or one.grad is not None) and not is_lazy(one) and one.numel() > 0
    ]


def has_lazy_parameters(optimizers: Iterable[Optimizer]) -> bool:
    """Whether some are without a shape until their module has seen a batch."""
    return any(is_lazy(one) for one in _all_parameters(optimizers))


def holds_copy_of_weights(optimizers: Iterable[Optimizer]) -> bool:
    """Whether an optimizer keeps copies of the weights, such as float32 master weights.

    What is written to the weights is lost at its next step, which writes the copies over them.
    """
    copies: dict[tuple[int, object], bool] = {}  # whether all values of a name are copies
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            if not (isinstance(parameter, Tensor) and isinstance(state, dict)):
                continue
            for name, value in state.items():
                if (
                    isinstance(value, Tensor)
                    and value is not parameter
                    and value.shape == parameter.shape
                    and value.is_floating_point()
                    and bool(value.any())
                ):
                    key = id(optimizer), name
                    copies[key] = copies.get(key, True) and torch.equal(
                        to_local(value.detach()).to(parameter.device, parameter.dtype),
                        to_local(parameter.detach()),
                    )
    return any(copies.values())


def _all_parameters(optimizers: Iterable[Optimizer]) -> Iterator[Tensor]:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            yield from group["params"]


class FlatView:
    """A list of tensors seen as one flat vector, read and written in place.

    The order of elements is that of memory, so that channels_last weights are copied without
    being rearranged; a complex number is two elements. The view holds on to the storages seen at
    construction: ``aliases`` tells whether they are still those of the given tensors. Of a DTensor
    the vector has the local shard.

    Args:
        tensors: dense, non-overlapping tensors on one device; floating point or complex.

    Raises:
        ValueError: no tensors, several devices, integer dtype, or gaps in memory.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        if not tensors:
            raise ValueError(
                "the optimizer holds no trainable parameter: nothing to accelerate; "
                "check requires_grad of its parameters"
            )
        self._tensors = list(tensors)
        self._is_sharded = is_sharded(tensors)
        parts = [to_local(one) for one in tensors]
        devices = {one.device for one in parts}
        if len(devices) > 1:
            names = ", ".join(sorted(str(device) for device in devices))
            raise ValueError(
                f"all parameters must be on one device, got {names}; "
                "accelerate one optimizer per device"
            )
        self._segments = [_memory_order(one) for one in parts]
        self._sizes = [one.numel() for one in self._segments]
        self._layout = _layout(tensors)
        self.length = sum(self._sizes)
        self.device = parts[0].device
        dtypes = {one.dtype for one in self._segments}
        self.dtype = functools.reduce(torch.promote_types, dtypes)
        # on a CPU views of many tensors take longer than short copies of them
        self._in_one_call = self.device.type == "cpu" and len(dtypes) == 1

    def aliases(self, tensors: Sequence[Tensor]) -> bool:
        """Whether this is (still) the flat view of exactly these tensors."""
        return self._layout == _layout(tensors)

    def signature(self) -> list[list[list[int]]]:
        """Shape and strides of every tensor: vectors of equal signatures are interchangeable."""
        return [[list(one.shape), list(one.stride())] for one in self._tensors]

    def checksum(self) -> int:
        """Equal for weights that are equal bit for bit."""
        vector = torch.empty(self.length, dtype=self.dtype, device="cpu")
        self.read(vector)
        return zlib.crc32(vector.view(torch.uint8).numpy().data)

    def read(self, out: Tensor, *, start: int = 0) -> None:
        """Copy the elements [start, start + len(out)) to ``out``; beyond the end, zeros."""
        size = out.numel()
        covered = max(0, min(self.length - start, size))
        if covered:
            target = out if covered == size else out[:covered]
            pieces = self._segments_between(start, covered)
            if self._in_one_call and out.device == self.device and out.dtype == self.dtype:
                torch.cat(pieces, out=target)
            else:
                _copy_all(target.split([one.numel() for one in pieces]), pieces)
        if covered < size:
            out[covered:].zero_()

    @torch.no_grad()
    def write(self, vector: Tensor) -> None:
        """Copy ``vector``, (length,) or longer, into the tensors."""
        full = vector if vector.numel() == self.length else vector[: self.length]
        if self._in_one_call and vector.device == self.device and vector.dtype == self.dtype:
            torch.split_with_sizes_copy(full, self._sizes, out=self._segments)
        else:
            _copy_all(self._segments, full.split(self._sizes))
        if self._is_sharded:
            reshard_fsdp_modules()

    @torch.no_grad()
    def equals(self, vector: Tensor) -> bool:
        """Whether the tensors hold ``vector``, (length,) or longer; NaN equals NaN."""
        pieces = vector[: self.length].split(self._sizes)
        return all(map(_equal, self._segments, pieces))

    def overflows(self, vector: Tensor) -> Tensor:  # () bool
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

    @torch.no_grad()
    def swap(self, vector: Tensor, *, reverse: bool = False) -> None:
        """Exchange the contents of the tensors and of ``vector``, in pieces.

        Args:
            vector: (length,) or longer.
            reverse: undo an exchange, in the opposite order: tensors may share memory.
        """
        pieces = vector[: self.length].split(self._sizes)
        pairs = [
            pair
            for tensor, piece in zip(self._segments, pieces, strict=True)
            for pair in zip(tensor.split(_SWAP_CHUNK), piece.split(_SWAP_CHUNK), strict=True)
        ]
        for one, other in reversed(pairs) if reverse else pairs:
            kept = one.clone()
            one.copy_(other)
            other.copy_(kept)
        if self._is_sharded:
            reshard_fsdp_modules()

    def _segments_between(self, start: int, size: int) -> list[Tensor]:
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


def is_dense(tensor: Tensor) -> bool:
    """Whether its entries are plain numbers in memory: not sparse, nested or quantized."""
    return tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_quantized)


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.device != other.device or one.dtype != other.dtype:
        other = other.to(one.device, one.dtype)
    return torch.equal(one, other) or bool(
        torch.isclose(one, other, rtol=0, atol=0, equal_nan=True).all()
    )


def _not_finite(low: Tensor, high: Tensor, dtype: torch.dtype) -> Tensor:
    low, high = low.to(dtype), high.to(dtype)
    return low - low != high - high  # 0 where finite, else NaN, which equals nothing


def _copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    # one launch for many tensors; pyright: "_foreach_copy_" is not exported from module "torch"
    torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
        list(targets), list(sources)
    )


def _layout(tensors: Sequence[Tensor]) -> list[tuple[object, ...]]:
    parts = [to_local(one) for one in tensors]
    return [(one.data_ptr(), one.shape, one.stride(), one.dtype, one.device) for one in parts]


def _memory_order(tensor: Tensor) -> Tensor:
    """The storage of a dense tensor as a real vector, without copying."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_floating_point():
        raise ValueError(
            f"parameters must be floating point, got {tensor.dtype} of shape "
            f"{tuple(tensor.shape)}; accelerate the others with an optimizer of their own"
        )
    dimensions = sorted(range(tensor.ndim), key=lambda d: (-tensor.stride(d), d))
    ordered = tensor.permute(dimensions)
    if not ordered.is_contiguous():
        raise ValueError(
            f"parameters must be dense in memory, got shape {tuple(tensor.shape)} with strides "
            f"{tensor.stride()}; call .contiguous() on it before building the optimizer"
        )
    return ordered.view(-1)
