"""Histories in the memory of the host, of weights on a GPU."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_stableaa import AndersonAccelerator, points


class LateCopies:
    """Stands in for HostCopies: rows hold nothing of use until somebody waits for them."""

    made: list["LateCopies"]

    def __init__(self, *, length: int, dtype: torch.dtype, **_: object) -> None:
        self._buffer = torch.empty(length, dtype=dtype)
        self._pending: list[tuple[Tensor, Tensor]] = []
        self.waited = 0
        self.made.append(self)

    def allocate(self, count: int) -> Tensor:
        return torch.empty(count, len(self._buffer), dtype=self._buffer.dtype)

    def start(self, write: Callable[[Tensor], object], row: Tensor) -> None:
        write(self._buffer)
        row.fill_(float("nan"))
        self._pending.append((row, self._buffer.clone()))

    def finish(self) -> None:
        self.waited += bool(self._pending)
        for row, vector in self._pending:
            row.copy_(vector)
        self._pending.clear()


class Problem:
    """1/2 sum_i a_i x_i^2 by gradient descent with momentum."""

    def __init__(self, device: str = "cpu", n: int = 50, **options: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = nn.Parameter(torch.randn(n, generator=generator, dtype=torch.float64).to(device))
        self.a = torch.logspace(0, -3, n, dtype=torch.float64).to(device)
        self.optimizer = torch.optim.SGD([self.x], lr=0.5, momentum=0.5)
        setting: dict[str, Any] = {
            "store_every_n_steps": 2,
            "accelerate_every_n_steps": 6,
            "history_depth": 4,
        }
        self.accelerator = AndersonAccelerator(self.optimizer, **(setting | options))

    def loss(self) -> Tensor:
        return 0.5 * (self.a * self.x * self.x).sum()

    def run(self, steps: int) -> Tensor:
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.loss().backward()
            self.optimizer.step()
            self.accelerator.step(self.loss)
        return self.x.detach().clone()


@pytest.mark.parametrize("options", [{}, {"optimizer_state": "mix"}, {"apply_to": "both"}])
def test_nobody_reads_a_point_before_it_is_there(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, at_once = Problem(**options), Problem(**options)
    end = expected.run(26)
    LateCopies.made = []
    monkeypatch.setattr(points, "host_copies", LateCopies)
    late = Problem(**options)
    late.run(15)  # in the middle of a cycle
    with torch.no_grad():
        at_once.x.copy_(late.x)  # a checkpoint, while a point is on its way
    at_once.optimizer.load_state_dict(copy.deepcopy(late.optimizer.state_dict()))
    at_once.accelerator.load_state_dict(late.accelerator.state_dict())
    assert torch.equal(late.run(11), end)
    assert torch.equal(at_once.run(11), end)
    assert late.accelerator.accepted == expected.accelerator.accepted >= 2


def test_training_waits_for_points_only_where_they_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    LateCopies.made = []
    monkeypatch.setattr(points, "host_copies", LateCopies)
    Problem(safeguard="none").run(24)
    (copies,) = LateCopies.made
    assert copies.waited == 4  # once an extrapolation; 13 points came


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, {"optimizer_state": "mix"}, {"apply_to": "both"}])
def test_a_history_on_the_host_gives_the_weights_of_one_on_the_gpu(options: dict[str, Any]) -> None:
    there = Problem("cuda", n=1_000_003, **options)
    here = Problem("cuda", n=1_000_003, history_device="cpu", **options)
    expected, found = there.run(26), here.run(26)
    assert here.accelerator.accepted == there.accelerator.accepted >= 2
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert here.accelerator._cycles is not None
    store = here.accelerator._cycles.points
    assert store.history.newest.is_pinned()
    assert store.candidate.is_pinned()
