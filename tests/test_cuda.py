"""What only a CUDA device can show: synchronizations, CUDA graphs, offloading."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from lightning_stableaa import AndersonAccelerator, Status, StepReport

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class Training:
    """A small regression on the device."""

    def __init__(self, wrap: Any = lambda network: network, **options: Any) -> None:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1)).cuda()
        self.network = wrap(network)
        self.x = torch.randn(64, 8, device="cuda")
        self.y = self.x.sum(dim=1, keepdim=True).sin()
        self.optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
        setting: Any = {"store_every_n_steps": 5, "accelerate_every_n_steps": 10} | options
        self.accelerator = AndersonAccelerator(self.optimizer, **setting)

    def loss(self) -> Tensor:
        return mse_loss(self.network(self.x), self.y)

    def optimizer_step(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def run(self, steps: int) -> list[StepReport]:
        reports = []
        for _ in range(steps):
            torch.compiler.cudagraph_mark_step_begin()
            self.optimizer_step()
            reports.append(self.accelerator.step(self.loss, stochastic=False))
        return reports


@pytest.mark.parametrize(("step", "status"), [(24, Status.ACCUMULATING), (25, Status.STORED)])
def test_cuda_step_without_extrapolation_never_synchronizes(step: int, status: Status) -> None:
    training = Training()
    training.run(step - 1)
    training.optimizer_step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        report = training.accelerator.step(training.loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert report.status is status


def test_cuda_graphs_see_the_candidates() -> None:
    """Graphs replay the addresses of the weights: candidates have to be written in place."""
    plain = Training()
    graphed = Training(lambda network: torch.compile(network, mode="reduce-overhead"))
    for training in (plain, graphed):
        training.run(60)
        assert training.accelerator.accepted >= 1
    torch.testing.assert_close(float(graphed.loss()), float(plain.loss()), rtol=0.5, atol=1e-4)


def test_cuda_history_on_the_host_gives_the_candidates_of_the_device() -> None:
    device, host = Training(), Training(history_device="cpu")
    for training in (device, host):
        training.run(30)
    assert device.accelerator.outcomes == host.accelerator.outcomes
    # float32 sums in another order
    torch.testing.assert_close(float(host.loss()), float(device.loss()), rtol=1e-3, atol=1e-6)
