"""What only a CUDA device can show: synchronisations, CUDA graphs, skipped steps of a scaler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from lightning_stableaa import AndersonAccelerator, Status

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Training:
    """A small regression on the device, stepped by hand."""

    def __init__(self, wrap: Any = lambda network: network, **options: Any) -> None:
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1)).cuda()
        self.called = wrap(self.network)
        self.x = torch.randn(64, 8, device="cuda")
        self.y = self.x.sum(dim=1, keepdim=True)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.02, momentum=0.9)
        self.accelerator = AndersonAccelerator(self.optimizer, **options)

    def loss(self) -> Tensor:
        return mse_loss(self.called(self.x), self.y)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()


@contextmanager
def synchronisations(mode: str) -> Iterator[None]:
    """``error`` raises at the first one that torch knows of."""
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("step", "status"), [(24, Status.CYCLE_OPEN), (25, Status.STORED)])
def test_a_step_without_an_update_never_waits_for_the_device(step: int, status: Status) -> None:
    training = Training(store_every_n_steps=5, accelerate_every_n_steps=10)
    for _ in range(step - 1):
        training.step()
        training.accelerator.step(training.loss)
    training.step()
    with synchronisations("error"):
        report = training.accelerator.step(training.loss)
    assert report.status is status


def test_an_update_waits_for_the_device_once(
    recwarn: pytest.WarningsRecorder,
) -> None:
    training = Training()
    for _ in range(29):
        training.step()
        training.accelerator.step(training.loss)
    training.step()
    recwarn.clear()
    with synchronisations("warn"):
        report = training.accelerator.step(training.loss)
    assert report.attempted
    waits = [one for one in recwarn if "synchroniz" in str(one.message)]
    assert len(waits) == 1


def test_cuda_graphs_see_the_candidates() -> None:
    """Graphs replay the addresses of the weights: candidates must be written in place."""
    plain = Training()
    graphed = Training(lambda network: torch.compile(network, mode="reduce-overhead"))
    for _ in range(60):
        for training in (plain, graphed):
            torch.compiler.cudagraph_mark_step_begin()
            training.step()
            training.accelerator.step(training.loss)
    assert plain.accelerator.accepted >= 1
    assert graphed.accelerator.accepted >= 1
    torch.testing.assert_close(float(graphed.loss()), float(plain.loss()), rtol=0.5, atol=1e-4)


def test_steps_that_a_scaler_skips_do_not_count() -> None:
    training = Training(safeguard="none", store_every_n_steps=1, accelerate_every_n_steps=2)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**120)  # overflows at first
    statuses = []
    for _ in range(200):
        training.optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = training.loss()
        scaler.scale(loss).backward()
        scaler.step(training.optimizer)
        scaler.update()
        statuses.append(training.accelerator.step().status)
    skipped = statuses.count(Status.NO_OPTIMIZER_STEP)
    assert skipped > 0
    assert training.accelerator.optimizer_steps == 200 - skipped
    assert all(bool(one.isfinite().all()) for one in training.network.parameters())
