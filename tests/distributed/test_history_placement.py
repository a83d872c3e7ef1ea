"""Two ranks that share plain weights: replicated and sharded histories give the same training."""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from lightning_stableaa import AndersonAccelerator, Smoothing
from lightning_stableaa.distributed import sharding
from tests.helpers.problems import Quadratic, assert_bitwise_equal
from tests.helpers.ranks import Ranks

pytestmark = pytest.mark.ddp

both_placements = pytest.mark.parametrize("history", ["replicated", "sharded"])

CYCLE: dict[str, Any] = {"store_every_n_steps": 2, "accelerate_every_n_steps": 4}


# --- ranks with data of their own ---


def train_ddp(history: str, dtype: torch.dtype, steps: int) -> dict[str, Any]:
    """A regression under DDP, on different samples with batch statistics of every rank."""
    torch.manual_seed(0)
    layers = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)  # 65 weights: odd
    model = DistributedDataParallel(nn.Sequential(*layers).to(dtype))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5)
    options: Any = CYCLE | {"history": history}
    accelerator = AndersonAccelerator(optimizer, **options)
    generator = torch.Generator().manual_seed(dist.get_rank())
    digests, first, buffers = [], None, []
    for _ in range(steps):
        x = torch.randn(32, 4, generator=generator, dtype=torch.float64).to(dtype)
        noise = torch.randn(32, 1, generator=generator, dtype=torch.float64).to(dtype)
        y = x.sum(dim=1, keepdim=True).sin() + 0.1 * noise
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()
        buffers = [one.clone() for one in model.buffers()]
        report = accelerator.step(lambda x=x, y=y: mse_loss(model.module(x), y))
        for one, kept in zip(model.buffers(), buffers, strict=True):
            one.copy_(kept)
        weights = torch.cat([one.detach().flatten() for one in model.parameters()])
        digests.append(hashlib.sha256(weights.numpy().tobytes()).hexdigest())
        if report.accepted and first is None:
            first = weights
    outcomes = {status.value: count for status, count in accelerator.outcomes.items()}
    return {"digests": digests, "outcomes": outcomes, "first": first, "buffers": buffers}


@both_placements
def test_ranks_stay_bitwise_equal_for_200_steps(history: str, ranks: Ranks) -> None:
    first, second = ranks.run(train_ddp, history, torch.float32, 200)
    assert first["digests"] == second["digests"]
    assert first["outcomes"] == second["outcomes"]
    assert sum(first["outcomes"].values()) == 50
    assert {"accepted", "skipped_noise_dominated"} <= first["outcomes"].keys()
    assert not torch.equal(first["buffers"][0], second["buffers"][0])  # of samples of their own


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_sharded_candidate_equals_replicated_candidate(
    dtype: torch.dtype, rtol: float, ranks: Ranks
) -> None:
    """To the rounding of sums in another order."""
    (replicated, _), (sharded, _) = (
        ranks.run(train_ddp, history, dtype, 40) for history in ("replicated", "sharded")
    )
    assert replicated["outcomes"] == sharded["outcomes"]
    error = (sharded["first"] - replicated["first"]).norm()
    assert error <= rtol * replicated["first"].norm()


# --- one rank meets what the other does not ---


def fail(kind: str, history: str, safeguard: str) -> tuple[list[str], str | None, bool]:
    """The loss or the weights of the second rank are at fault, in 16 steps with 4 attempts."""
    options: Any = CYCLE | {"history": history, "safeguard": safeguard, "size": 51}
    problem, plain = Quadratic(**options), Quadratic(size=51, warmup_steps=100)
    second, calls, statuses = dist.get_rank() == 1, itertools.count(), []
    own = problem.solution()

    def loss() -> Tensor:
        at_candidate = not torch.equal(problem.solution(), own)
        if second and (kind == "always raises" or (kind == "raises" and at_candidate)):
            raise ArithmeticError("outside of the domain")
        value = {"nan": float("nan"), "unrepeatable": next(calls)}.get(kind, 0.0)
        return problem.loss() + (value if second else 0.0)

    for step in range(16):
        plain.step()
        problem.train_step()
        if step == 1 and second and kind == "weights":  # as where nothing averages gradients
            problem.parameters[0].grad = torch.full_like(problem.x, float("nan"))
            problem.optimizer.step()
        own = problem.solution()
        statuses.append(problem.accelerator.step(loss, stochastic=False).status.value)
    unchanged = torch.equal(problem.solution(), plain.solution())
    return statuses[3::4], problem.accelerator.disabled, unchanged


@both_placements
@pytest.mark.parametrize(
    ("kind", "safeguard", "status"),
    [
        ("nan", "loss", "rejected_non_finite_loss"),
        ("raises", "loss", "rejected_error"),
        ("unrepeatable", "loss", "disabled"),
        ("always raises", "loss", "disabled"),
        ("weights", "loss", "rejected_non_finite_history"),
        ("weights", "none", "rejected_non_finite_history"),
    ],
)
def test_fault_of_one_rank_rejects_on_all(
    kind: str, safeguard: str, status: str, history: str, ranks: Ranks
) -> None:
    first, second = ranks.run(fail, kind, history, safeguard)
    assert first[0] == second[0] == [status] * 4
    assert (first[2], second[2]) == (True, kind != "weights")
    reasons = [(one[1] or "").split(";")[0] for one in (first, second)]
    again = "the loss cannot be evaluated again, and raised"
    assert reasons == {
        "unrepeatable": [
            "two losses of the same batch at the same weights differ, so that candidates cannot be "
            "compared"
        ]
        * 2,
        "always raises": [
            f"{again} an error on another process",
            f"{again} ArithmeticError: outside of the domain",
        ],
    }.get(kind, ["", ""])


def change_on_second_rank(
    history: str, change: str, at: int, early: bool, **options: Any
) -> dict[str, Any]:
    """24 steps; cycles of 3, attempts every 6. Saved and loaded after step 19."""

    def split(x: Tensor) -> list[Tensor]:
        return list(x.split(26))

    options |= {"history": history, "size": 51, "place": split, "learning_rate": 0.5}
    options |= {"store_every_n_steps": 3, "accelerate_every_n_steps": 6}
    problem, resumed, statuses = Quadratic(**options), None, []
    for step in range(1, 25):
        if resumed is not None:
            resumed.step(stochastic=False)
        problem.train_step()
        if early and step == at:
            apply_change(problem.parameters[1], change)
        statuses.append(problem.accelerator.step(problem.loss, stochastic=False).status.value)
        if not early and step == at:
            apply_change(problem.parameters[1], change)
        if step == 16 and change == "frozen":
            problem.parameters[1].requires_grad_(True)
            dist.broadcast(problem.parameters[1].detach(), src=0)
        if step == 19:
            state = [problem.state_dict() | {"accelerator": problem.accelerator.full_state_dict()}]
            dist.broadcast_object_list(state)
            resumed = Quadratic(**options)
            resumed.load_state_dict(state[0])
    assert resumed is not None
    return {
        "statuses": statuses,
        "weights": problem.solution(),
        "outcomes": dict(problem.accelerator.outcomes),
        "ends_cycle": problem.accelerator.state_dict()["iterates"]["ends_cycle"],
        "resumed": resumed.solution(),
    }


@torch.no_grad()
def apply_change(parameter: Any, change: str) -> None:
    """On the second rank, and without another value: the ranks stay equal."""
    if dist.get_rank() == 0:
        return
    if change == "written":
        parameter.mul_(1.0)
    elif change == "replaced":
        parameter.data = parameter.clone()
    else:
        parameter.requires_grad_(False)
        parameter.grad = None


@both_placements
@pytest.mark.parametrize(
    "options", [{}, {"smoothing": Smoothing(rsd_threshold=0.0)}], ids=["", "averages"]
)
@pytest.mark.parametrize(("at", "early"), [(8, False), (9, False), (11, True), (12, True)])
def test_external_write_on_one_rank_clears_the_history_of_all_at_the_next_attempt(
    at: int, early: bool, options: dict[str, Any], history: str, ranks: Ranks
) -> None:
    first, second = ranks.run(change_on_second_rank, history, "written", at, early, **options)
    assert_bitwise_equal(first, second)
    # one average is no residual: with averages the first attempt is that of step 9
    attempt = (9 if at == 8 else 15) if options else 12
    statuses = first["statuses"]
    assert [n for n, one in enumerate(statuses, 1) if one == "external_update"] == [attempt]
    assert {"accepted", "rejected_loss_increase"} & set(statuses[attempt:])
    assert torch.equal(first["resumed"], first["weights"])


@both_placements
def test_parameters_replaced_on_one_rank_restart_the_history_of_all(
    history: str, ranks: Ranks
) -> None:
    first, second = ranks.run(change_on_second_rank, history, "replaced", 10, False)
    assert_bitwise_equal(first, second)
    assert first["statuses"][5::6] == ["accepted", "parameters_changed", "accepted", "accepted"]
    assert torch.equal(first["resumed"], first["weights"])


@both_placements
def test_parameters_frozen_on_one_rank_pause_all_until_they_are_the_same(
    history: str, ranks: Ranks
) -> None:
    """Frozen from step 8 to 16: seen at the attempt of step 12, and looked at in every step."""
    first, second = ranks.run(change_on_second_rank, history, "frozen", 8, False)
    assert first["statuses"] == second["statuses"]
    assert first["statuses"][11:17] == ["parameters_changed"] * 6
    assert first["statuses"][17:20] == ["accumulating", "accumulating", "stored"]
    assert first["statuses"][22] == "accepted"
    assert first["ends_cycle"] == second["ends_cycle"]


# --- messages, memory and placement ---


COLLECTIVES = ("all_reduce", "broadcast", "all_gather_into_tensor", "gather", "barrier")


def record_messages(history: str, size: int) -> dict[str, Any]:
    """Collectives of 12 steps, with counts of elements."""
    options: Any = {"history": history, "size": size, "regularization": 1e-2}
    problem = Quadratic(accelerate_every_n_steps=4, **options)
    sent: list[tuple[str, int]] = []

    def record(name: str, original: Any, tensor: Tensor, *arguments: Any, **named: Any) -> Any:
        sent.append((name, tensor.numel()))
        return original(tensor, *arguments, **named)

    attempts, between = [], []
    with pytest.MonkeyPatch.context() as patch:
        for name in COLLECTIVES:
            patch.setattr(dist, name, functools.partial(record, name, getattr(dist, name)))
        for _ in range(12):
            problem.train_step()
            sent.clear()
            report = problem.accelerator.step(problem.loss, stochastic=False)
            (attempts if report.attempted else between).append(list(sent))
    return {"attempts": attempts, "between": between, "accepted": problem.accelerator.accepted}


@pytest.mark.parametrize("size", [51, 5001])
@both_placements
def test_messages_of_an_attempt(history: str, size: int, ranks: Ranks) -> None:
    """Events and step; losses. Sharded: the Gram matrix before, and the candidate's slices."""
    scalars = [("all_reduce", 3 + 6 + 4), ("all_reduce", 7)]
    expected = scalars
    if history == "sharded":
        gather = ("all_gather_into_tensor", size + 1)  # padded to two equal slices
        expected = [("all_reduce", 4 * 4), scalars[0], gather, scalars[1]]
    for seen in ranks.run(record_messages, history, size):
        assert seen["accepted"] == 3
        assert seen["between"] == [[]] * 9
        # once, whether an optimizer keeps copies of the weights
        assert seen["attempts"][0] == [*expected, ("all_reduce", 1)]
        # of a fuller window a longer step is sent, and nothing that grows with the weights
        names = [[name for name, _ in attempt] for attempt in seen["attempts"][1:]]
        assert names == [[name for name, _ in expected]] * 2


def measure_memory(history: Any, size: int, depth: int) -> float:
    """What an accelerator adds to the peak of the process, in vectors of the weights."""

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

    def train(x: nn.Parameter) -> int:
        optimizer = torch.optim.SGD([x], lr=1e-2, foreach=False)
        accelerator = AndersonAccelerator(
            optimizer,
            history_depth=depth,
            store_every_n_steps=1,
            accelerate_every_n_steps=1,
            warmup_steps=depth + 1,  # a full window
            history=history,
        )
        for _ in range(depth + 2):
            x.grad.copy_(x.detach())  # type: ignore[union-attr]
            optimizer.step()
            accelerator.step(lambda: torch.dot(x.detach(), x.detach()), stochastic=False)
        accelerator.detach()
        return accelerator.accepted

    small, large = (nn.Parameter(torch.linspace(1, 2, n)) for n in (300_000, size))
    small.grad, large.grad = torch.zeros_like(small), torch.zeros_like(large)
    train(small)  # what libraries take when they are first used
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    assert train(large) >= 1
    return (status("VmHWM") - before) / (4 * size)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are those of Linux")
@pytest.mark.parametrize(("history", "vectors"), [("replicated", 6 + 2), ("sharded", 7 / 2 + 1)])
def test_memory_peak_of_a_rank_is_the_documented_bound(
    history: str, vectors: float, ranks: Ranks
) -> None:
    """Depth 6: m + 2 vectors, or (m + 1)/P + 1."""
    for peak in ranks.run(measure_memory, history, 8_000_000, 6):
        # work space: chunks of the Gram matrix, of a swap and of a gather; 31 MiB are a vector
        assert 0.95 * vectors <= peak <= vectors + 0.75


def placement_reasons() -> list[str | None]:
    """Of small weights; where nothing may be replicated; and in a group of its own."""
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    reasons = []
    for share, group in ((sharding.REPLICA_SHARE, None), (0.0, None), (0.0, alone)):
        kept, sharding.REPLICA_SHARE = sharding.REPLICA_SHARE, share
        problem = Quadratic(process_group=group)
        problem.run(1)
        sharding.REPLICA_SHARE = kept
        reasons.append(problem.accelerator.placement_reason)
    return reasons


def test_placement_auto_depends_on_memory_and_group_and_gives_its_reason(ranks: Ranks) -> None:
    for small, large, alone in ranks.run(placement_reasons):
        size = r"a replica takes [\d.e-]+ GB in each of 2 processes"
        limit = r"\d+% of the memory of one \([\d.]+ GB\)"
        assert re.fullmatch(rf"history='auto' is replicated: {size}, at most {limit}", small)
        assert re.fullmatch(rf"history='auto' is sharded: {size}, more than {limit}", large)
        assert alone == "one process: the history is not sharded"


# --- states ---

STATEFUL: dict[str, Any] = {
    "size": 51,
    "learning_rate": 0.5,
    "momentum": 0.5,
    "history": "sharded",
    "store_every_n_steps": 3,
    "accelerate_every_n_steps": 6,
    "regularization": 1e-2,
    "smoothing": Smoothing(rsd_threshold=0.7),
}


def save_and_resume() -> dict[str, Any]:
    """Each rank's own state, and the full one of the first rank, after every step."""
    whole, interrupted = Quadratic(**STATEFUL), Quadratic(**STATEFUL)
    whole.run(30, stochastic=False)
    ends, saved = [], []
    for stop in range(0, 30, 4):
        own = interrupted.state_dict()
        full = [interrupted.accelerator.full_state_dict()]
        dist.broadcast_object_list(full)
        for state in (own, own | {"accelerator": full[0]}):
            resumed = Quadratic(**STATEFUL)
            resumed.load_state_dict(state)
            resumed.run(30 - stop, stochastic=False)
            ends.append(resumed.state_dict())
        saved.append((stop, own | {"accelerator": full[0]}))
        interrupted.run(4, stochastic=False)
    return {"whole": whole.state_dict(), "ends": ends, "saved": saved}


def test_sharded_states_resume_bitwise_and_the_full_one_in_a_single_process(ranks: Ranks) -> None:
    results = ranks.run(save_and_resume)
    for rank, result in enumerate(results):
        whole = result["whole"]["accelerator"]
        assert whole["shard"] == [rank, 2]
        assert whole["iterates"]["rows"].shape[1] == 26  # of 51 weights
        assert whole["counters"]["accepted"] >= 1
        for number, end in enumerate(result["ends"]):
            assert_bitwise_equal(end, result["whole"], f"end {number}")
    for stop, state in results[0]["saved"]:
        alone = Quadratic(**STATEFUL)
        alone.load_state_dict(state)
        alone.run(30 - stop, stochastic=False)
        assert alone.accelerator.outcomes == {
            status: count
            for status, count in alone.accelerator.outcomes.items()
            if results[0]["whole"]["accelerator"]["outcomes"][status.value] == count
        }
        # sums in another order; a ridge of 1e-2 multiplies what they round by 1e3 or less
        torch.testing.assert_close(
            alone.solution(), results[0]["whole"]["x"][0], rtol=1e-9, atol=1e-12
        )
