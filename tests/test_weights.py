import pytest
import torch
from torch import nn

from lightning_stableaa.weights import (
    FlatTensors,
    momentum_tensors,
    reset_momentum,
    trainable_parameters,
)


def ramp(length: int) -> torch.Tensor:
    return torch.arange(length, dtype=torch.float32)


def read(flat: FlatTensors) -> torch.Tensor:
    out = torch.empty(flat.length, dtype=flat.dtype)
    flat.read(out)
    return out


def test_trainable_parameters_are_unique_non_empty_and_require_a_gradient() -> None:
    tied, frozen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False)
    other, empty = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(0))
    first = torch.optim.SGD([{"params": [tied, frozen]}, {"params": [empty]}], lr=1.0)
    second = torch.optim.SGD([other, tied], lr=1.0)
    found = trainable_parameters([first, second])
    assert [id(one) for one in found] == [id(tied), id(other)]


def test_read_and_write_keep_identity_strides_and_dtype() -> None:
    convolution = nn.Conv2d(3, 4, 2)
    convolution.weight.data = convolution.weight.data.contiguous(memory_format=torch.channels_last)
    transposed = nn.Parameter(torch.randn(5, 2).T)
    half = nn.Parameter(torch.randn(3).bfloat16())
    tensors = [*convolution.parameters(), transposed, half]
    before = [(one.data_ptr(), one.stride(), one.dtype) for one in tensors]
    flat = FlatTensors(tensors)
    assert (flat.length, flat.dtype) == (48 + 4 + 10 + 3, torch.float32)
    flat.write(ramp(flat.length))
    assert [(one.data_ptr(), one.stride(), one.dtype) for one in tensors] == before
    assert torch.equal(read(flat), ramp(flat.length))
    assert torch.equal(transposed.detach().T.reshape(-1), ramp(flat.length)[52:62])


@pytest.mark.parametrize("other", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_safe_change_never_makes_a_weight_infinite(other: torch.dtype) -> None:
    weights = [nn.Parameter(torch.full((3,), torch.finfo(d).max, dtype=d)) for d in (other,) * 2]
    weights.append(nn.Parameter(torch.zeros(2, dtype=torch.float32)))
    flat = FlatTensors(weights)
    change = flat.largest_safe_change
    assert change > 0
    for terms in (1, 7):  # at once, or as a sum
        vector = read(flat)
        for _ in range(terms):
            vector += change / terms
        assert not bool(flat.cannot_hold(vector))
    if other is torch.float16:
        assert bool(flat.cannot_hold(read(flat) + 8 * change))


def test_writing_is_seen_by_autograd_version_counters() -> None:
    weight = nn.Parameter(torch.zeros(3))
    version = weight._version
    FlatTensors([weight]).write(torch.ones(3))
    assert weight._version > version


@pytest.mark.parametrize(("start", "length"), [(0, 4), (2, 5), (6, 6), (9, 3), (12, 2)])
def test_a_slice_is_read_and_zeros_stand_beyond_the_end(start: int, length: int) -> None:
    tensors = [ramp(3), 3 + ramp(4), 7 + ramp(2)]
    out = torch.full((length,), -1.0)
    FlatTensors(tensors).read(out, start=start)
    padded = torch.cat([ramp(9), torch.zeros(10)])
    assert torch.equal(out, padded[start : start + length])


def test_a_longer_vector_is_written_up_to_the_length() -> None:
    tensors = [torch.zeros(3), torch.zeros(2)]
    FlatTensors(tensors).write(ramp(8))
    assert [one.tolist() for one in tensors] == [[0.0, 1.0, 2.0], [3.0, 4.0]]


def test_swap_exchanges_and_swaps_back() -> None:
    tensors, vector = [torch.zeros(2, 2), torch.ones(3)], ramp(7)
    flat = FlatTensors(tensors)
    flat.swap(vector, flat.work_space())
    assert torch.equal(read(flat), ramp(7))
    assert vector.tolist() == [0, 0, 0, 0, 1, 1, 1]
    flat.swap(vector, flat.work_space())
    assert torch.equal(vector, ramp(7))


def test_aliases_notices_new_memory() -> None:
    weight = nn.Parameter(torch.zeros(3))
    flat = FlatTensors([weight])
    assert flat.aliases([weight])
    weight.data = torch.zeros(3)
    assert not flat.aliases([weight])


def test_signatures_tell_shapes_and_memory_order() -> None:
    first = FlatTensors([torch.zeros(2, 3)])
    assert first.signature() == [[[2, 3], [3, 1]]]
    assert first.signature() != FlatTensors([torch.zeros(3, 2).T]).signature()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([], "the optimizer holds no trainable parameter"),
        ([torch.zeros(2, dtype=torch.complex64)], "must be real floating point, got torch.complex"),
        ([torch.zeros(4, 4)[:, :2]], r"must be dense in memory, got shape \(4, 2\) with strides"),
        (
            [torch.zeros(2), torch.zeros(2, device="meta")],
            "all parameters must be on one device, got cpu, meta",
        ),
    ],
)
def test_what_cannot_be_flattened_is_refused(tensors: list[torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlatTensors(tensors)


@pytest.mark.parametrize(
    ("optimizer_class", "options", "name"),
    [
        (torch.optim.SGD, {"momentum": 0.9}, "momentum_buffer"),
        (torch.optim.Adam, {}, "exp_avg"),
        (torch.optim.NAdam, {}, "exp_avg"),
    ],
)
def test_momentum_is_found_and_reset(optimizer_class: type, options: dict, name: str) -> None:
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    optimizer = optimizer_class(parameters, lr=0.1, **options)
    assert momentum_tensors([optimizer], parameters) == []
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    found = momentum_tensors([optimizer], parameters)
    assert [one.data_ptr() for one in found] == [
        optimizer.state[parameter][name].data_ptr() for parameter in parameters
    ]
    assert all(bool((one != 0).all()) for one in found)
    reset_momentum([optimizer], parameters)
    assert all(bool((one == 0).all()) for one in found)


def test_plain_sgd_has_no_momentum() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    weight.grad = torch.ones(2)
    optimizer.step()
    assert momentum_tensors([optimizer], [weight]) == []
    reset_momentum([optimizer], [weight])  # nothing to reset is no error
