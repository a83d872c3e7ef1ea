"""A process of its own for tests/test_memory.py: real limits on memory, and a real peak."""

from __future__ import annotations

import gc
import json
import logging
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_stableaa import AndersonAccelerator, Smoothing
from lightning_stableaa.history import _products, _products_in_memory

MIB = 2**20
N = 10 * MIB  # weights: 40 MiB
OPTIONS: dict[str, Any] = {
    "history_depth": 4,
    "store_every_n_steps": 1,
    "accelerate_every_n_steps": 1,
    "regularization": 1e-8,
}


class Training:
    """Gradient descent on 1/2 |x|^2; a step allocates nothing."""

    def __init__(self, **options: Any) -> None:
        self.x = nn.Parameter(torch.linspace(1, 2, N))
        self.x.grad = torch.zeros_like(self.x)
        self.optimizer = torch.optim.SGD([self.x], lr=1e-2, foreach=False)
        self.accelerator = AndersonAccelerator(self.optimizer, **OPTIONS | options)

    def loss(self) -> Tensor:
        return torch.dot(self.x.detach(), self.x.detach())

    def step(self, loss: Callable[[], Tensor] | None = None) -> str:
        assert self.x.grad is not None
        self.x.grad.copy_(self.x.detach())
        self.optimizer.step()
        return self.accelerator.step(loss or self.loss).status.value


def main() -> dict[str, Any]:
    torch.set_num_threads(1)
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lightning_stableaa").addHandler(handler)
    jobs = {
        "no room": no_room,
        "judge": judge,
        "work space": work_space,
        "peak": peak,
        # the running mean is one vector more
        "peak with smoothing": lambda: peak(
            extra=1, smoothing=Smoothing(), store_every_n_steps=2, accelerate_every_n_steps=2
        ),
    }
    seen = {}
    for name, job in jobs.items():
        warnings.clear()
        seen[name] = job() | {"warnings": list(warnings)}
    return seen


def no_room() -> dict[str, Any]:
    """The window does not fit; training goes on, and is what it is without acceleration."""
    training = Training()
    with limited(3 * 40 * MIB):
        statuses = [training.step() for _ in range(4)]
    plain = torch.linspace(1, 2, N)
    for _ in range(4):
        plain.add_(plain.clone(), alpha=-1e-2)
    return {
        "statuses": statuses,
        "equal": torch.equal(training.x.detach(), plain),
        "counted": training.accelerator.optimizer_steps,
    }


def judge() -> dict[str, Any]:
    """The loss asks for more than there is: rejected, and the weights are the optimizer's."""
    training = Training()
    statuses = [training.step() for _ in range(2)]
    before = training.x.detach().clone()
    with limited(64 * MIB):
        statuses.append(training.step(lambda: torch.empty(MIB * 1024).sum()))
    plain = before.add_(before.clone(), alpha=-1e-2)
    return {"statuses": statuses, "equal": torch.equal(training.x.detach(), plain)}


def work_space() -> dict[str, Any]:
    """The Gram works in smaller pieces where the larger do not fit."""
    rows = torch.randn(6, 8 * MIB, generator=torch.Generator().manual_seed(0))  # 192 MiB
    exact = torch.stack(_products(rows, [1, 4], 0))
    with limited(150 * MIB):  # a copy in float64 takes 384
        failed = False
        try:
            _products(rows, [1, 4], 0)
        except RuntimeError:
            failed = True
        found = torch.stack(_products_in_memory(rows, [1, 4], 0))
    return {"failed": failed, "error": ((found - exact).abs().max() / exact.max()).item()}


def peak(*, extra: int = 0, **options: Any) -> dict[str, Any]:
    """What the accelerator adds at its peak, in vectors of the size of the weights."""
    gc.collect()  # what earlier jobs left in cycles is not given back between the two looks
    before = resident()
    training = Training(**options)
    own = 2  # its weights and gradient
    reset_peak()
    accepted = 0
    for _ in range(24):
        training.step()
        accepted = training.accelerator.accepted
    return {
        "vectors": (highest_resident() - before) / (4 * N) - own,
        "expected": OPTIONS["history_depth"] + 2 + extra,
        "accepted": accepted,
    }


@contextmanager
def limited(allowance: int) -> Iterator[None]:
    """Inside, the process can take ``allowance`` bytes more than it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    taken = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + allowance, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def highest_resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    json.dump(main(), sys.stdout)
