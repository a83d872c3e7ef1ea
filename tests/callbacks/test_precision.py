"""Weights keep their memory, precision and compiled graphs; two processes stay equal."""

import hashlib
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

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
    counters,
    fit,
    network,
    outcomes,
    trained,
    weights,
)


class Pictures(Steered):
    def __init__(self, memory_format: torch.memory_format) -> None:
        layers = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2), nn.Flatten()]
        super().__init__(network(*layers, nn.Linear(64, 2)), steering=Steering(-1e3))
        self.to(memory_format=memory_format)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = cross_entropy(self.network(batch[0]), batch[1])
        return loss + self.steering.offset if self.steering.at_candidate(self) else loss


def test_channels_last_weights_keep_memory_and_get_the_same_candidates() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(16, 3, 8, 8, generator=generator)
    data = TensorDataset(x, (x.mean(dim=(1, 2, 3)) > 0).long())
    ends = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        callback, module = anderson(), Pictures(memory_format)
        before = [(id(p), p.data_ptr(), p.stride()) for p in module.parameters()]
        fit(module, DataLoader(data, batch_size=16), callback, max_epochs=8)
        assert [(id(p), p.data_ptr(), p.stride()) for p in module.parameters()] == before
        assert counters(callback)["accepted"] == 4
        ends.append(weights(module))
    # kernels sum in another order: 8 steps of float32 keep five digits
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("stochastic", [False, "auto"])
def test_maximized_objective_accepts_only_candidates_that_raise_it(stochastic: Any) -> None:
    class Likelihood(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return -mse_loss(self.network(batch[0]), batch[1])

    callback = anderson(stochastic=stochastic)
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


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    processes = Ranks(2)
    yield processes
    processes.close()


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
        super().__init__(network(*layers).double())
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


@pytest.mark.ddp
@pytest.mark.slow
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


@pytest.mark.ddp
@pytest.mark.slow
def test_error_at_a_candidate_within_a_collective_ends_the_run(ranks: Ranks) -> None:
    """A rejection would leave the other rank waiting for ever."""
    found = ranks.run(train_communicating, True, killed=1)
    assert found == ["the connection was closed", -signal.SIGKILL]


@pytest.mark.ddp
@pytest.mark.slow
def test_error_at_a_candidate_beside_synchronized_logs_is_a_rejection(ranks: Ranks) -> None:
    """What an evaluation logs is thrown away, and nothing is sent for it."""
    assert ranks.run(train_communicating, False) == [{"rejected_error": 8}] * 2


@pytest.mark.ddp
@pytest.mark.slow
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
