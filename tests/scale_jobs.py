"""What the ranks of tests/test_scale.py run: four processes, one problem, every placement."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_stableaa import AndersonAccelerator, distributed
from tests.memory_jobs import highest_resident, reset_peak, resident

WORLD = 4
N = 10_000_003  # float32, 38 MiB; no multiple of the number of ranks
DEPTH = 6
CASES = [(history, dtype) for history in ("replicated", "sharded") for dtype in ("32", "64")]


def main(rank: int, port: int, folder: str) -> None:
    """All jobs; each rank writes what it saw to ``folder``."""
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(WORLD),
    }
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))  # no job may hang
    at_once, distributed.GATHERED_AT_ONCE = distributed.GATHERED_AT_ONCE, 300  # in several pieces
    seen: dict[str, Any] = {
        f"{history} {dtype}": minimise(history=history, dtype=getattr(torch, f"float{dtype}"))
        for history, dtype in CASES
    }
    distributed.GATHERED_AT_ONCE = at_once
    seen |= {f"memory {history}": memory(history) for history in ("replicated", "sharded")}
    torch.save(seen, Path(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()


def minimise(*, history: str, dtype: torch.dtype) -> dict[str, Any]:
    """The first candidate and the end of gradient descent on 1/2 sum_i a_i x_i^2."""
    generator = torch.Generator().manual_seed(0)
    x = nn.Parameter(torch.randn(1001, generator=generator, dtype=dtype))
    a = torch.logspace(0, -3, 1001, dtype=dtype)
    optimizer = torch.optim.SGD([x], lr=0.5, momentum=0.5)
    # sums in another order: what they round is multiplied by up to m / lambda
    options: dict[str, Any] = {"history": history, "regularization": [1e-3, 1e-1]}
    accelerator = AndersonAccelerator(
        optimizer,
        store_every_n_steps=2,
        accelerate_every_n_steps=8,
        optimizer_state="mix",
        **options,
    )

    def loss() -> Tensor:
        return 0.5 * (a * x * x).sum()

    first = None
    for _ in range(32):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        if accelerator.step(loss).accepted and first is None:
            first = x.detach().clone()
    return {"first": first, "end": x.detach().clone(), "accepted": accelerator.accepted}


def memory(history: Any) -> dict[str, Any]:
    """What an accelerator adds to a training at its peak, in bytes, as the system sees it."""
    x = nn.Parameter(torch.linspace(1, 2, N))
    x.grad = torch.zeros_like(x)
    optimizer = torch.optim.SGD([x], lr=1e-2, foreach=False)
    optimizer.step()
    before = resident()
    reset_peak()
    accelerator = AndersonAccelerator(
        optimizer,
        history_depth=DEPTH,
        store_every_n_steps=1,
        accelerate_every_n_steps=1,
        warmup_steps=DEPTH + 1,  # a full window
        history=history,
    )
    for _ in range(DEPTH + 2):
        x.grad.copy_(x.detach())
        optimizer.step()
        accelerator.step(lambda: torch.dot(x.detach(), x.detach()))
    accelerator.detach()
    assert accelerator._cycles is not None
    store = accelerator._cycles.points
    tensors = (store.candidate, store.history._rows)
    return {
        "peak": highest_resident() - before,
        "held": sum(one.untyped_storage().nbytes() for one in tensors),
        "accepted": accelerator.accepted,
    }
