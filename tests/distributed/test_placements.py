"""Two ranks: replicas or shards of the history, plain weights or DTensors, one training."""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from lightning_stableaa import AndersonAccelerator, Smoothing
from lightning_stableaa.distributed import sharding
from tests.helpers.problems import Quadratic, assert_bitwise_equal
from tests.helpers.ranks import Ranks

pytestmark = pytest.mark.ddp

both_placements = pytest.mark.parametrize("history", ["replicated", "sharded"])

CYCLE: dict[str, Any] = {"store_every_n_steps": 2, "accelerate_every_n_steps": 4}

SHAPES = [(5,), (3, 4), (7, 3), (1,), (6,)]
SIZE = 45  # odd: shards of the history are padded

# Shape of the mesh, and placements of one tensor after another; None is a plain tensor. Without a
# mesh all are plain, and the history is what is sharded or not.
ROWS, COLUMNS, REPLICA = [Shard(0)], [Shard(1)], [Replicate()]
BOTH, ROWS_OF_REPLICAS = [Shard(0), Shard(1)], [Shard(0), Replicate()]
LAYOUTS: dict[str, tuple[tuple[int, ...], list[Any]]] = {
    "mixed": ((2,), [ROWS, REPLICA, COLUMNS, ROWS, None]),
    "replicated shards": ((2, 1), [[Replicate(), Shard(0)]] * 4 + [None]),
    "two dimensions": ((1, 2), [ROWS_OF_REPLICAS, BOTH, BOTH, ROWS_OF_REPLICAS, None]),
}

OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": torch.float32},
    "float64": {},
    "averages": {"smoothing": Smoothing(rsd_threshold=0.3)},
    "maximum": {"smoothing": Smoothing(of="iterates", rsd="max", rsd_threshold=0.02)},
}


def quadratic_of(layout: str, **options: Any) -> Quadratic:
    """Its unknowns in five tensors; ``layout`` is one of ``LAYOUTS``, or of the history."""

    def place(x: Tensor) -> list[Tensor]:
        parts = x.split([torch.Size(shape).numel() for shape in SHAPES])
        shaped = [part.reshape(shape) for part, shape in zip(parts, SHAPES, strict=True)]
        if layout not in LAYOUTS:
            return shaped
        mesh_shape, placements = LAYOUTS[layout]
        mesh = init_device_mesh("cpu", mesh_shape)
        return [
            part if placement is None else distribute_tensor(part, mesh, placement)
            for part, placement in zip(shaped, placements, strict=True)
        ]

    setting: dict[str, Any] = {"learning_rate": 0.5, "momentum": 0.5, "regularization": 1e-2}
    setting |= {"store_every_n_steps": 3, "accelerate_every_n_steps": 6}
    if layout not in LAYOUTS:
        setting["history"] = layout
    return Quadratic(size=SIZE, place=place, **setting | options)


def minimise(layout: str, name: str) -> dict[str, Any]:
    problem = quadratic_of(layout, **OPTIONS[name])
    reports = problem.run(24, stochastic=False)
    return {
        "solution": problem.solution(),
        "accepted": problem.accelerator.accepted,
        "norms": [one.residual_norm for one in reports if one.attempted],
        "rsd": [one.rsd for one in reports if one.rsd is not None],
        "reason": problem.accelerator.placement_reason,
    }


@pytest.mark.parametrize("layout", ["sharded", *LAYOUTS])
@pytest.mark.parametrize("name", OPTIONS)
def test_shards_give_what_replicas_give(layout: str, name: str, ranks: Ranks) -> None:
    """Norms would show an element that is counted twice, or not at all."""
    expected = ranks.run(minimise, "replicated", name)[0]
    first, second = ranks.run(minimise, layout, name)
    assert_bitwise_equal(first, second)
    of_weights = "the weights are sharded over 2 processes, and the history too"
    assert first["reason"] == (of_weights if layout in LAYOUTS else "history='sharded'")
    assert first["accepted"] == expected["accepted"] >= 1
    # sums in another order, multiplied by a few extrapolations
    rtol = 1e-5 if name == "float32" else 1e-11
    assert first["norms"] == pytest.approx(expected["norms"], rel=rtol)
    assert first["rsd"] == pytest.approx(expected["rsd"], rel=rtol)
    error = (first["solution"] - expected["solution"]).norm()
    assert error <= rtol * expected["solution"].norm()


# --- ranks with data of their own ---


def train_ddp(history: str, steps: int) -> dict[str, Any]:
    """A regression under DDP, on different samples with batch statistics of every rank."""
    torch.manual_seed(0)
    layers = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)  # 65 weights: odd
    model = DistributedDataParallel(nn.Sequential(*layers))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5)
    options: Any = CYCLE | {"history": history}
    accelerator = AndersonAccelerator(optimizer, **options)
    generator = torch.Generator().manual_seed(dist.get_rank())
    digests, buffers = [], []
    for _ in range(steps):
        x = torch.randn(32, 4, generator=generator)
        noise = torch.randn(32, 1, generator=generator)
        y = x.sum(dim=1, keepdim=True).sin() + 0.1 * noise
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()
        buffers = [one.clone() for one in model.buffers()]
        accelerator.step(lambda x=x, y=y: mse_loss(model.module(x), y))
        for one, kept in zip(model.buffers(), buffers, strict=True):
            one.copy_(kept)
        weights = torch.cat([one.detach().flatten() for one in model.parameters()])
        digests.append(hashlib.sha256(weights.numpy().tobytes()).hexdigest())
    outcomes = {status.value: count for status, count in accelerator.outcomes.items()}
    return {"digests": digests, "outcomes": outcomes, "buffers": buffers}


@both_placements
def test_ranks_stay_bitwise_equal_for_200_steps(history: str, ranks: Ranks) -> None:
    first, second = ranks.run(train_ddp, history, 200)
    assert first["digests"] == second["digests"]
    assert first["outcomes"] == second["outcomes"]
    assert sum(first["outcomes"].values()) == 50
    assert {"accepted", "skipped_noise_dominated"} <= first["outcomes"].keys()
    assert not torch.equal(first["buffers"][0], second["buffers"][0])  # of samples of their own


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
    layout: str, change: str, at: int, early: bool, **options: Any
) -> dict[str, Any]:
    """24 steps; cycles of 3, attempts every 6. Saved and loaded after step 19."""
    problem, resumed, statuses = quadratic_of(layout, momentum=0.0, **options), None, []
    for step in range(1, 25):
        if resumed is not None:
            resumed.step(stochastic=False)
        problem.train_step()
        if early and step == at:
            apply_change(problem.parameters[2], change)
        statuses.append(problem.accelerator.step(problem.loss, stochastic=False).status.value)
        if not early and step == at:
            apply_change(problem.parameters[2], change)
        if step == 16 and change == "frozen":
            problem.parameters[2].requires_grad_(True)
            dist.broadcast(problem.parameters[2].detach(), src=0)
        if step == 19:
            state = [problem.accelerator.full_state_dict()]
            dist.broadcast_object_list(state)
            resumed = quadratic_of(layout, momentum=0.0, **options)
            resumed.load_state_dict(problem.state_dict() | {"accelerator": state[0]})
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
    """On the second rank, and but for NaN without another value: the ranks stay equal."""
    if dist.get_rank() == 0:
        return
    own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    if change in ("written", "nan"):
        own.mul_(1.0 if change == "written" else float("nan"))
    elif change == "replaced":
        parameter.data = parameter.clone()
    else:
        parameter.requires_grad_(False)
        parameter.grad = None


@pytest.mark.parametrize("layout", ["replicated", "sharded", "mixed"])
@pytest.mark.parametrize(
    "options", [{}, {"smoothing": Smoothing(rsd_threshold=0.0)}], ids=["", "averages"]
)
@pytest.mark.parametrize(("at", "early"), [(8, False), (9, False), (11, True), (12, True)])
def test_external_write_on_one_rank_clears_the_history_of_all_at_the_next_attempt(
    at: int, early: bool, options: dict[str, Any], layout: str, ranks: Ranks
) -> None:
    first, second = ranks.run(change_on_second_rank, layout, "written", at, early, **options)
    assert_bitwise_equal(first, second)
    # one average is no residual: with averages the first attempt is that of step 9
    attempt = (9 if at == 8 else 15) if options else 12
    statuses = first["statuses"]
    assert [n for n, one in enumerate(statuses, 1) if one == "external_update"] == [attempt]
    assert {"accepted", "rejected_loss_increase"} & set(statuses[attempt:])
    assert torch.equal(first["resumed"], first["weights"])


def test_nan_in_the_shard_of_one_rank_counts_for_all(ranks: Ranks) -> None:
    first, second = ranks.run(change_on_second_rank, "mixed", "nan", 8, False)
    assert_bitwise_equal(first, second)
    expected = ["external_update", *["rejected_non_finite_history"] * 2]
    assert first["statuses"][11::6] == expected
    assert bool(first["weights"].isnan().any())


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
@pytest.mark.parametrize(
    ("history", "vectors", "work_space"),
    # chunks of the Gram matrix, of a swap and of a gather, and what gloo buffers of a gather while
    # the other process is late; 31 MiB are a vector
    [("replicated", 6 + 2, 0.75), ("sharded", 7 / 2 + 1, 1.25)],
)
def test_memory_peak_of_a_rank_is_the_documented_bound(
    history: str, vectors: float, work_space: float, ranks: Ranks
) -> None:
    """Depth 6: m + 2 vectors, or (m + 1)/P + 1."""
    for peak in ranks.run(measure_memory, history, 8_000_000, 6):
        assert 0.95 * vectors <= peak <= vectors + work_space


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


def refusals() -> list[str]:
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    messages = []
    for options in ({"history": "replicated"}, {"process_group": alone}):
        problem = quadratic_of("mixed", **options)
        try:
            problem.step()
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_sharded_weights_refuse_replicas_and_groups_of_other_ranks(ranks: Ranks) -> None:
    for replicas, group in ranks.run(refusals):
        assert replicas.startswith("history='replicated' needs the full weights in every process")
        assert group.endswith(
            f" elements of {SIZE} sharded weights: pass the group over whose processes they are "
            "sharded"
        )


# --- states ---


def save_and_resume(layout: str, name: str) -> dict[str, Any]:
    """Each rank's own state, and the full one of the first rank, continued to 30 steps."""
    whole, interrupted = (quadratic_of(layout, **OPTIONS[name]) for _ in range(2))
    whole.run(30, stochastic=False)
    ends, own = [], {}
    for stop in (0, 4, 9, 17):
        interrupted.run(stop - interrupted.step_index, stochastic=False)
        own = interrupted.state_dict()
        full = [interrupted.accelerator.full_state_dict()]
        dist.broadcast_object_list(full)
        for state in (own, own | {"accelerator": full[0]}):
            resumed = quadratic_of(layout, **OPTIONS[name])
            resumed.load_state_dict(state)
            resumed.run(30 - stop, stochastic=False)
            ends.append((resumed.solution(), resumed.accelerator.state_dict()))
        own["accelerator"] = full[0]
    end = (whole.solution(), whole.accelerator.state_dict())
    return {"end": end, "resumed": ends, "full": own}


@pytest.mark.parametrize("layout", ["sharded", "mixed"])
@pytest.mark.parametrize("name", ["float64", "averages", "maximum"])
def test_shards_resume_bitwise_from_local_and_full_states(
    name: str, layout: str, ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    results = ranks.run(save_and_resume, layout, name)
    for rank, result in enumerate(results):
        state = result["end"][1]
        assert state["shard"] == [rank, 2]
        assert state["counters"]["accepted"] >= 1
        for number, resumed in enumerate(result["resumed"]):
            assert_bitwise_equal(resumed, result["end"], f"end {number}")
    alone, full = quadratic_of("replicated", **OPTIONS[name]), results[0]["full"]
    if layout == "mixed":
        alone.accelerator.load_state_dict(full["accelerator"])
        with caplog.at_level(logging.WARNING):
            alone.step()
        assert alone.accelerator.optimizer_steps == 18
        assert "was dropped and restarts: it was stored with another" in caplog.text
        assert "sharding of the weights" in caplog.text
        return
    assert results[0]["end"][1]["iterates"]["rows"].shape[1] == 23  # of 45 weights
    alone.load_state_dict(full)
    alone.run(13, stochastic=False)
    counts = {status.value: count for status, count in alone.accelerator.outcomes.items()}
    assert counts.items() <= results[0]["end"][1]["outcomes"].items()
    # sums in another order; a ridge of 1e-2 multiplies what they round by 1e3 or less
    torch.testing.assert_close(alone.solution(), results[0]["end"][0], rtol=1e-9, atol=1e-12)
