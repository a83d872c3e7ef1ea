"""The callback in two processes: both take the same branch, whatever one of them meets."""

import functools
import hashlib
import os
import signal
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import mse_loss

from lightning_stableaa import Status
from tests.helpers.ranks import Ranks
from tests.helpers.regression import (
    INPUTS,
    Record,
    Regression,
    Reports,
    Steered,
    Steering,
    anderson,
    batches,
    fit,
    network,
    outcomes,
    trained,
)

pytestmark = [pytest.mark.ddp, pytest.mark.slow]


class Normalised(Steered):
    """Batch statistics differ between the ranks, and so does the loss of one rank at candidates."""

    def __init__(self, offset: float) -> None:
        net = network(nn.Linear(INPUTS, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
        super().__init__(net, steering=Steering(offset))


def train_on_rank(mode: str) -> dict[str, Any]:
    """Two epochs of eight steps under DDP, each rank with its half of the samples."""
    offset = -1e3 if mode == "accepted" or dist.get_rank() == 1 else float("nan")
    if mode == "rejected by mean":
        offset = 3e3 if dist.get_rank() == 0 else -1e3
    module, callback = Normalised(offset), anderson()
    digest = lambda m: hashlib.sha256(trained(m).numpy().tobytes()).hexdigest()  # noqa: E731
    trace = Record(lambda _, m: digest(m))
    callbacks = [] if mode == "plain" else [callback]
    trainer = fit(
        module,
        batches(16),
        *callbacks,
        trace,
        devices=2,
        strategy="ddp",
        max_epochs=2,
    )
    buffers = torch.cat([b.flatten().double() for b in module.buffers()])
    state = callback.state_dict() if callbacks else {}
    return {"trace": trace.values, "buffers": buffers, "state": state, "step": trainer.global_step}


class Sharded(Regression):
    """By FSDP2: uneven shards in two modules, of which the outer one holds the inner."""

    def __init__(self, *, split: bool) -> None:
        layers = [nn.Linear(INPUTS, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 1)]
        adam = functools.partial(torch.optim.AdamW, lr=0.05)
        super().__init__(network(*layers).double(), adam)
        self.split = split
        self.register_buffer("calls", torch.zeros(()))

    def configure_model(self) -> None:
        if self.split and not isinstance(next(self.parameters()), DTensor):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.network[0], mesh=mesh)
            fully_shard(self.network, mesh=mesh)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.calls += 1
        return super().training_step([one.double() for one in batch], batch_idx)


def train_sharded(split: bool) -> tuple[Any, ...]:
    """Outcomes, losses and full weights of three epochs of eight steps."""
    module, callback = Sharded(split=split), anderson()
    reports, strategy = Reports(callback), ModelParallelStrategy(2, 1) if split else "ddp"
    options = {"devices": 2, "strategy": strategy, "max_epochs": 3}
    fit(module, batches(16), callback, reports, **options)
    found = [(one.status, one.loss_before, one.loss_after) for one in reports.attempted]
    full = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]
    return [one.detach() for one in full], float(module.calls), found


def test_fsdp_run_is_ddp_run(ranks: Ranks) -> None:
    (replicated, _), (first, second) = (ranks.run(train_sharded, split) for split in (False, True))
    assert replicated[1] == first[1] == second[1] == 24
    assert [one[0] for one in first[2]] == [one[0] for one in replicated[2]]
    assert {one[0] for one in first[2]} == {Status.ACCEPTED, Status.REJECTED_LOSS_INCREASE}
    # sums over shards are in another order; float64
    for rank in (first, second):
        torch.testing.assert_close(rank[0], replicated[0], rtol=1e-12, atol=1e-13)


def train_communicating(gathers: bool) -> str | dict[str, int]:
    """The second rank raises at a candidate, where the first one may wait for it."""

    class Communicates(Steered):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.global_rank == 1 and self.steering.at_candidate(self):
                raise ArithmeticError("outside of the domain")
            x, y = batch
            loss = mse_loss(self.network(x), y)
            self.log("train/loss", loss, sync_dist=True)
            return loss * (1 + self.all_gather(loss.detach()).mean()) if gathers else loss

    callback = anderson()
    try:
        fit(Communicates(), batches(16), callback, devices=2, strategy="ddp", max_epochs=2)
    except ArithmeticError:
        os.kill(os.getpid(), signal.SIGKILL)  # as the launcher ends a rank that failed
    except RuntimeError:
        return "the connection was closed"
    return outcomes(callback)


def test_error_at_a_candidate_within_a_collective_ends_the_run(ranks: Ranks) -> None:
    """A rejection would leave the other rank waiting for ever."""
    found = ranks.run(train_communicating, True, killed=1)
    assert found == ["the connection was closed", -signal.SIGKILL]


def test_error_at_a_candidate_beside_synchronized_logs_is_a_rejection(ranks: Ranks) -> None:
    """What an evaluation logs is thrown away, and nothing is sent for it."""
    assert ranks.run(train_communicating, False) == [{"rejected_error": 8}] * 2


def test_ddp_ranks_take_the_same_branch_and_keep_own_buffers(ranks: Ranks) -> None:
    modes = ("plain", "accepted", "nan on one rank", "rejected by mean")
    results = {mode: ranks.run(train_on_rank, mode) for mode in modes}
    plain = results.pop("plain")
    for mode, (first, second) in results.items():
        assert first["trace"] == second["trace"], mode
        assert first["step"] == 16
        counts = first["state"]["counters"]
        assert counts["attempted"] == 8
        assert counts["accepted"] == (8 if mode == "accepted" else 0), mode
    assert results["accepted"][0]["trace"] != plain[0]["trace"]
    for mode in ("nan on one rank", "rejected by mean"):
        for rank in range(2):
            assert results[mode][rank]["trace"] == plain[rank]["trace"]
            assert torch.equal(results[mode][rank]["buffers"], plain[rank]["buffers"])
    assert results["nan on one rank"][0]["state"]["outcomes"] == {"rejected_non_finite_loss": 8}
    assert results["rejected by mean"][0]["state"]["outcomes"] == {"rejected_loss_increase": 8}
