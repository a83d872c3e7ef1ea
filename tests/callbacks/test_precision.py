"""Weights keep their memory, precision and compiled graphs."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import mse_loss

from tests.helpers.regression import (
    Regression,
    Reports,
    Steered,
    Steering,
    anderson,
    batches,
    counters,
    fit,
    outcomes,
    weights,
)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("bf16-mixed", torch.float32),
        ("bf16-true", torch.bfloat16),
        ("64-true", torch.float64),
    ],
)
def test_precision_of_history_is_that_of_weights(
    precision: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # in the environment: what a step writes elsewhere is undone
    monkeypatch.setenv("STABLEAA_SEEN", "")

    class Watched(Steered):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            out = self.network(batch[0])
            os.environ["STABLEAA_SEEN"] = f"{os.environ.get('STABLEAA_SEEN', '')} {out.dtype}"
            loss = mse_loss(out.float(), batch[1].float())
            return loss + self.steering.offset if self.steering.at_candidate(self) else loss

    large = lambda p: torch.optim.SGD(p, lr=0.05)  # noqa: E731  # bfloat16 rounds small steps away
    module = Watched(None, large, steering=Steering(-1e3))
    callback = anderson(store_every_n_steps=2, accelerate_every_n_steps=4)
    fit(module, batches(), callback, precision=precision, max_epochs=12)
    assert callback.state_dict()["iterates"]["rows"].dtype == dtype
    assert next(module.parameters()).dtype == dtype
    assert outcomes(callback) == {"accepted": 3}
    # training and evaluation under the same precision
    seen = os.environ["STABLEAA_SEEN"].split()
    assert set(seen) == {"torch.bfloat16" if "bf16" in precision else "torch.float64"}
    assert len(seen) == 12 + 3 + 3 + 2


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # in inductor
def test_compiled_network_is_compiled_once() -> None:
    counter = CompileCounterWithBackend("eager")

    class Compiled(Steered):
        def __init__(self) -> None:
            super().__init__(steering=Steering(-1e3))
            self.fast = torch.compile(self.network, backend=counter)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = mse_loss(self.fast(batch[0]), batch[1])
            return loss + self.steering.offset if self.steering.at_candidate(self) else loss

    module, plain, callback = Compiled(), Steered(steering=Steering(-1e3)), anderson()
    fit(module, batches(), callback, max_epochs=12)
    fit(plain, batches(), anderson(), max_epochs=12)
    assert counters(callback)["accepted"] == 6
    assert counter.frame_count == 1
    assert torch.equal(weights(module.network), weights(plain))


def test_maximized_objective_accepts_only_candidates_that_raise_it() -> None:
    class Likelihood(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return -mse_loss(self.network(batch[0]), batch[1])

    callback = anderson()
    reports = Reports(callback)
    maximize = lambda p: torch.optim.SGD(p, lr=0.01, maximize=True)  # noqa: E731
    fit(Likelihood(None, maximize), batches(), callback, reports, max_epochs=40)
    assert counters(callback)["attempted"] == 20
    assert counters(callback)["accepted"] >= 10
    # what is minimised is the negative objective, that is the error
    pairs: Any = [(one.loss_before, one.loss_after) for one in reports.attempted]
    assert all(before > 0 for before, _ in pairs)
    assert [one.accepted for one in reports.attempted] == [
        after < before for before, after in pairs
    ]
