"""Weights as one flat vector: which of them, read and written in place, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from lightning_stableaa.model import parameters as parameters_module
from lightning_stableaa.model.parameters import (
    FlatView,
    holds_copy_of_weights,
    trainable_parameters,
)


def ramp(length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.arange(length, dtype=dtype)


def read(view: FlatView) -> Tensor:
    out = torch.empty(view.length, dtype=view.dtype)
    view.read(out)
    return out


def test_trainable_parameters_are_unique_nonempty_and_movable() -> None:
    tied, frozen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False)
    other, empty = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(0))
    first = SGD([{"params": [tied, frozen]}, {"params": [empty]}], lr=1.0)
    second = SGD([other, tied], lr=1.0)
    expected = [id(tied), id(other)]
    assert [id(one) for one in trainable_parameters([first, second])] == expected
    frozen.grad = torch.ones(2)  # frozen for a moment: the next step moves it
    expected.insert(1, id(frozen))
    assert [id(one) for one in trainable_parameters([first, second])] == expected


def test_holds_copy_of_weights_recognizes_master_weights() -> None:
    weight, zero = nn.Parameter(torch.randn(3).bfloat16()), nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.Adam([weight, zero], amsgrad=True)
    for one in (weight, zero):
        one.grad = torch.ones_like(one)
    optimizer.step()
    assert not holds_copy_of_weights([optimizer])
    # every state that begins at zero equals weights of zero
    optimizer.state[zero] = {"other": zero.detach().clone().zero_()}
    assert not holds_copy_of_weights([optimizer])
    optimizer.state[weight] = {"step": torch.zeros(()), "master": weight.detach().float()}
    assert holds_copy_of_weights([optimizer])
    # the initial weights, of a layer that never moves among others
    other = nn.Parameter(torch.ones(3))
    pulled = SGD([weight, other], lr=1.0)
    pulled.state[weight]["initial"] = weight.detach().clone()
    pulled.state[other]["initial"] = torch.zeros(3) + 2
    assert not holds_copy_of_weights([pulled])


def mixed_tensors() -> list[Tensor]:
    convolution = nn.Conv2d(3, 4, 2)
    convolution.weight.data = convolution.weight.data.contiguous(memory_format=torch.channels_last)
    transposed = nn.Parameter(torch.randn(5, 2).T)
    half, scalar = nn.Parameter(torch.randn(3).bfloat16()), nn.Parameter(torch.randn(()))
    return [*convolution.parameters(), transposed, half, scalar]


def test_read_and_write_keep_identity_strides_and_dtype() -> None:
    tensors = mixed_tensors()
    before = [(one.data_ptr(), one.stride(), one.dtype) for one in tensors]
    view = FlatView(tensors)
    assert (view.length, view.dtype) == (48 + 4 + 10 + 3 + 1, torch.float32)
    view.write(ramp(view.length))
    assert [(one.data_ptr(), one.stride(), one.dtype) for one in tensors] == before
    assert torch.equal(read(view), ramp(view.length))
    assert torch.equal(tensors[2].detach().T.reshape(-1), ramp(view.length)[52:62])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameter_is_two_elements_each(dtype: torch.dtype) -> None:
    weight, real = nn.Parameter(torch.zeros(2, 2, dtype=dtype)), nn.Parameter(torch.zeros(1))
    view = FlatView([weight, real])
    assert (view.length, view.dtype) == (9, torch.zeros((), dtype=dtype).real.dtype)
    view.write(ramp(9, view.dtype))
    assert weight.detach().tolist() == [[0 + 1j, 2 + 3j], [4 + 5j, 6 + 7j]]
    assert torch.equal(read(view), ramp(9, view.dtype))


@pytest.mark.parametrize(("start", "length"), [(0, 9), (0, 4), (2, 5), (6, 6), (9, 3), (12, 2)])
@pytest.mark.parametrize("mixed", [False, True])
def test_read_slice_pads_with_zeros(start: int, length: int, mixed: bool) -> None:
    dtype = torch.float64 if mixed else torch.float32
    tensors = [ramp(3), 3 + ramp(4, dtype), 7 + ramp(2)]
    out = torch.full((length,), -1.0)
    FlatView(tensors).read(out, start=start)
    padded = torch.cat([ramp(9), torch.zeros(10)])
    assert torch.equal(out, padded[start : start + length])


@pytest.mark.parametrize("chunk", [2, 100])
def test_swap_exchanges_and_swaps_back(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameters_module, "_SWAP_CHUNK", chunk)
    tensors, vector = [torch.zeros(2, 2), torch.ones(3)], ramp(9)
    view = FlatView(tensors)
    view.swap(vector)
    assert torch.equal(read(view), ramp(7))
    assert vector.tolist() == [0, 0, 0, 0, 1, 1, 1, 7, 8]
    view.swap(vector, reverse=True)
    assert torch.equal(vector, ramp(9))
    assert [one.tolist() for one in tensors] == [[[0, 0], [0, 0]], [1, 1, 1]]


LARGEST = {one: torch.finfo(one).max for one in (torch.float16, torch.bfloat16, torch.float32)}


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("other", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
def test_overflows_beyond_precision_of_any_tensor(
    dtype: torch.dtype, other: torch.dtype, sign: int
) -> None:
    view = FlatView([torch.zeros(2, dtype=other), torch.zeros(3, dtype=dtype)])
    vector = torch.zeros(5, dtype=torch.float64)
    vector[3] = sign * LARGEST[dtype]
    assert not bool(view.overflows(vector))
    vector[3] *= 2
    assert bool(view.overflows(vector))
    for value in (torch.nan, torch.inf):
        assert bool(view.overflows(torch.tensor([0.0, 0.0, value, 0.0, 0.0])))
        assert not bool(view.overflows(torch.tensor([0.0] * 5 + [value])))  # padding


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([], "the optimizer holds no trainable parameter: nothing to accelerate; check requires_g"),
        ([torch.zeros(2, dtype=torch.int64)], r"must be floating point, got torch.int64 of shape"),
        ([torch.zeros(4, 4)[:, :2]], r"must be dense in memory, got shape \(4, 2\) with strides"),
        ([torch.zeros(1).expand(3)], r"must be dense in memory, got shape \(3,\) with strides"),
        (
            [torch.zeros(2), torch.zeros(2, device="meta")],
            "all parameters must be on one device, got cpu, meta; accelerate one optimizer per dev",
        ),
    ],
)
def test_flat_view_unsupported_tensors_raise(tensors: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlatView(tensors)
