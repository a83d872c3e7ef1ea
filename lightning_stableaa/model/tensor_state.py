"""What a tensor refers to and holds, to be put back without touching what did not change."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_stableaa.model.parameters import is_dense

# Integers of as many bytes as a number has, to compare bits: NaN is NaN, and 0.0 is not -0.0.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class TensorState(NamedTuple):
    """What a tensor refers to, and a copy of its elements where they are few enough."""

    tensor: Tensor
    alias: Tensor
    memory: Tensor
    copy: Tensor | None
    version: int
    requires_grad: bool
    grad: Tensor | None

    @classmethod
    def of(cls, tensor: Tensor, *, copied: bool, like: TensorState | None = None) -> TensorState:
        """The state of now; shares the copy of an earlier one where the elements are the same."""
        with torch._C.DisableTorchFunctionSubclass():
            alias = tensor.detach()
            memory = written_memory(alias) if is_dense(alias) else alias
            copy = None
            if copied:
                copy = like.copy if like is not None and like.holds(memory) else memory.clone()
            grad = tensor.grad if tensor.is_leaf else None
            return cls(tensor, alias, memory, copy, version(tensor), tensor.requires_grad, grad)

    def again(self) -> TensorState:
        """The state of now."""
        return TensorState.of(self.tensor, copied=self.copy is not None, like=self)

    def holds(self, memory: Tensor) -> bool:
        """Whether the elements in memory are those of the copy."""
        if not is_dense(self.tensor):  # sparse, nested or quantized
            return version(self.tensor) == self.version
        # on a CPU a look is as cheap as a copy, and memory that was not written to may be read-only
        if self.copy is None or memory.device.type != "cpu":
            return False
        return torch.equal(_bits(memory), _bits(self.copy))

    def lost(self) -> bool:
        """Whether it was written to since, through the tensor itself, without a copy of before."""
        return self.copy is None and version(self.tensor) != self.version

    def restore(self) -> None:
        tensor = self.tensor
        with torch._C.DisableTorchFunctionSubclass(), torch.inference_mode(tensor.is_inference()):
            if is_dense(tensor) and _geometry(tensor) != _geometry(self.alias):
                tensor.data = self.alias
            if tensor.is_leaf:
                if tensor.requires_grad != self.requires_grad:
                    tensor.requires_grad_(self.requires_grad)
                if tensor.grad is not self.grad:
                    tensor.grad = self.grad
            if self.copy is not None and not self.holds(self.memory):
                (self.memory if is_dense(tensor) else tensor).copy_(self.copy)


def version(tensor: Tensor) -> int:
    """How often it was written to; tensors of inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version


def written_memory(tensor: Tensor) -> Tensor:
    """The tensor; of one whose elements share memory (expanded, unfolded) all of that as a vector.

    Torch refuses to write to elements that share memory.
    """
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    span = 1 + sum((size - 1) * step for size, step in steps)
    return tensor.as_strided((span,), (1,)) if 0 < span < tensor.numel() else tensor


def _bits(tensor: Tensor) -> Tensor:
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return real.resolve_neg().view(_INTEGERS[real.element_size()])


def _geometry(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor itself has the memory of its entries."""
    if not is_dense(tensor) or is_lazy(tensor) or is_traceable_wrapper_subclass(tensor):
        return False
    return tensor.numel() == 0 or tensor.untyped_storage().nbytes() > 0  # not freed, as FSDP2 does


def memory_range(tensor: Tensor) -> tuple[int, int]:
    """Where the memory of a tensor begins and ends; (0, 0) where there is none."""
    if not is_plain(tensor) or tensor.device.type == "meta":
        return 0, 0
    return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
