"""Weights stay what they are: their memory format, precision, identity and compiled graphs."""

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from lightning_stableaa import SmoothingMonitor
from tests.callbacks.regression import (
    Record,
    Regression,
    anderson,
    batches,
    counters,
    fit,
    network,
    weights,
)

NEEDS_A_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")


class Pictures(Regression):
    def __init__(self, memory_format: Any) -> None:
        net = network(
            nn.Conv2d(3, 6, 3),
            nn.ReLU(),
            nn.Conv2d(6, 4, 3, groups=2),
            nn.Flatten(),
            nn.Linear(64, 2),
        )
        super().__init__(net, lambda p: torch.optim.SGD(p, lr=0.05))
        self.to(memory_format=memory_format)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return cross_entropy(self.network(x), y)


def pictures() -> DataLoader:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(16, 3, 8, 8, generator=generator)
    return DataLoader(TensorDataset(x, (x.mean(dim=(1, 2, 3)) > 0).long()), batch_size=16)


def test_channels_last_weights_stay_so_and_get_the_same_candidates() -> None:
    ends = {}
    for memory_format in (torch.contiguous_format, torch.channels_last):
        callback, module = anderson(safeguard="none"), Pictures(memory_format)
        before = [(id(p), p.data_ptr(), p.stride()) for p in module.parameters()]
        fit(module, pictures(), callback, max_epochs=8)
        assert [(id(p), p.data_ptr(), p.stride()) for p in module.parameters()] == before
        assert counters(callback)["accepted"] == 2
        ends[memory_format] = weights(module)
    assert not Pictures(torch.channels_last).network[0].weight.is_contiguous()
    # the order of summation differs; 8 steps of float32 keep five digits
    torch.testing.assert_close(*ends.values(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(precision: str) -> None:
    callback, module = anderson(), Regression(make_optimizer=lambda p: torch.optim.SGD(p, lr=0.02))
    fit(module, batches(1), callback, SmoothingMonitor(), precision=precision, max_epochs=24)

    stored = callback.state_dict()["points"]["history"]["rows"].dtype
    expected = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}
    assert stored == next(module.parameters()).dtype == expected[precision]
    assert counters(callback)["optimizer_steps"] == 24
    assert counters(callback)["attempted"] == 6
    assert bool(weights(module).isfinite().all())


def test_the_judge_runs_under_the_precision_of_training() -> None:
    seen: list[torch.dtype] = []

    class Judged(Regression):
        def anderson_loss(self, batch: Any) -> Tensor:
            out = self.network(batch[0])
            seen.append(out.dtype)
            return out.float().square().mean()

    fit(Judged(), batches(1), anderson(), precision="bf16-mixed", max_epochs=4)
    assert seen == [torch.bfloat16] * 6  # the loss as it is, five lambdas


def test_gradients_are_not_built_up_by_the_judge() -> None:
    plain = Record(lambda _, m: [p.grad.clone() for p in m.parameters()])
    judged = Record(lambda _, m: [p.grad.clone() for p in m.parameters()])
    callback = anderson()
    fit(Regression(), batches(1), plain, max_epochs=4)
    fit(Regression(), batches(1), callback, judged, max_epochs=4)

    assert counters(callback)["attempted"] == 1
    for one, other in zip(plain.values, judged.values, strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # in inductor
@pytest.mark.parametrize(
    "backend", ["eager", pytest.param("inductor", marks=[pytest.mark.slow, NEEDS_A_COMPILER])]
)
def test_a_compiled_network_is_compiled_once(backend: str) -> None:
    counter = CompileCounterWithBackend(backend)

    class Compiled(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.fast = torch.compile(self.network, backend=counter)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return mse_loss(self.fast(x), y)

    module, plain = Compiled(), Regression()
    callback, of_plain = anderson(), anderson()
    fit(module, batches(1), callback, max_epochs=12)
    fit(plain, batches(1), of_plain, max_epochs=12)

    assert counters(callback) == counters(of_plain)
    assert counters(callback)["attempted"] == 3
    assert counters(callback)["accepted"] >= 1
    assert counter.frame_count == 1
    # the same kernels in another order of sums
    torch.testing.assert_close(weights(module.network), weights(plain), rtol=1e-3, atol=1e-4)
