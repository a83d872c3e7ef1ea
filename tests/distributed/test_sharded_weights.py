"""Two ranks that hold shards of the weights: FSDP2, and DTensors of every layout."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.functional import mse_loss

from lightning_stableaa import AndersonAccelerator, Smoothing
from tests.helpers.problems import Quadratic, assert_bitwise_equal
from tests.helpers.ranks import Ranks

pytestmark = pytest.mark.ddp

SHAPES = [(5,), (3, 4), (7, 3), (1,), (6,)]
SIZE = 45

# Shape of the mesh, and placements of one tensor after another; None is a plain tensor.
ROWS, COLUMNS, REPLICA = [Shard(0)], [Shard(1)], [Replicate()]
BOTH, ROWS_OF_REPLICAS = [Shard(0), Shard(1)], [Shard(0), Replicate()]
LAYOUTS: dict[str, tuple[tuple[int, ...], list[Any]]] = {
    "plain": ((2,), [None] * 5),
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


def sharded_quadratic(layout: str, **options: Any) -> Quadratic:
    """Its unknowns in five tensors, placed on a mesh."""
    mesh_shape, placements = LAYOUTS[layout]

    def place(x: Tensor) -> list[Tensor]:
        mesh = init_device_mesh("cpu", mesh_shape) if layout != "plain" else None
        parts = x.split([torch.Size(shape).numel() for shape in SHAPES])
        shaped = [part.reshape(shape) for part, shape in zip(parts, SHAPES, strict=True)]
        return [
            part if placement is None else distribute_tensor(part, mesh, placement)
            for part, placement in zip(shaped, placements, strict=True)
        ]

    setting: dict[str, Any] = {"learning_rate": 0.5, "momentum": 0.5, "regularization": 1e-2}
    cycle: dict[str, Any] = {"store_every_n_steps": 3, "accelerate_every_n_steps": 6}
    return Quadratic(size=SIZE, place=place, **setting | cycle | options)


def minimise(layout: str, name: str) -> dict[str, Any]:
    problem = sharded_quadratic(layout, **OPTIONS[name])
    reports = problem.run(24, stochastic=False)
    return {
        "solution": problem.solution(),
        "accepted": problem.accelerator.accepted,
        "norms": [one.residual_norm for one in reports if one.attempted],
        "rsd": [one.rsd for one in reports if one.rsd is not None],
        "reason": problem.accelerator.placement_reason,
    }


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "plain"])
@pytest.mark.parametrize("name", OPTIONS)
def test_layout_of_dtensors_gives_what_replicas_give(layout: str, name: str, ranks: Ranks) -> None:
    """Norms would show an element that is counted twice, or not at all."""
    expected = ranks.run(minimise, "plain", name)[0]
    first, second = ranks.run(minimise, layout, name)
    assert_bitwise_equal(first, second)
    assert first["reason"] == "the weights are sharded over 2 processes, and the history too"
    assert first["accepted"] == expected["accepted"] >= 1
    # sums in another order, multiplied by a few extrapolations
    rtol = 1e-5 if name == "float32" else 1e-11
    assert first["norms"] == pytest.approx(expected["norms"], rel=rtol)
    assert first["rsd"] == pytest.approx(expected["rsd"], rel=rtol)
    error = (first["solution"] - expected["solution"]).norm()
    assert error <= rtol * expected["solution"].norm()


def train_network(shard: bool, kind: str, steps: int = 48) -> dict[str, Any]:
    """A regression on the same samples in all ranks, under FSDP2 or not.

    Shards are uneven, some of them empty, of two modules the outer of which holds the inner.
    """
    torch.manual_seed(0)
    layers = nn.Linear(4, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 1)
    network: Any = nn.Sequential(*layers).double()
    if shard:
        mesh = init_device_mesh("cpu", (2,))
        fully_shard(network[0], mesh=mesh)
        fully_shard(network, mesh=mesh)
    make: Any = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[kind]
    optimizer = make(network.parameters(), lr={"sgd": 0.02, "adamw": 0.003}[kind])
    accelerator = AndersonAccelerator(
        optimizer, store_every_n_steps=3, accelerate_every_n_steps=6, regularization=1e-2
    )
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 4, generator=generator, dtype=torch.float64)
    y = x.sum(dim=1, keepdim=True).sin()
    for _ in range(steps):
        optimizer.zero_grad()
        mse_loss(network(x), y).backward()
        optimizer.step()
        accelerator.step(lambda: mse_loss(network(x), y), stochastic=False)
    parts = [getattr(one, "full_tensor", lambda one=one: one)() for one in network.parameters()]
    return {
        "weights": torch.cat([one.detach().flatten() for one in parts]),
        "outcomes": {status.value: count for status, count in accelerator.outcomes.items()},
        "disabled": accelerator.disabled,
    }


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_fsdp2_trains_as_replicated_weights_do(kind: str, ranks: Ranks) -> None:
    replicated = ranks.run(train_network, False, kind)[0]
    first, second = ranks.run(train_network, True, kind)
    assert_bitwise_equal(first, second)
    assert first["outcomes"] == replicated["outcomes"]
    assert first["outcomes"]["accepted"] >= 1
    # float64; what sums in another order round grows with the training
    torch.testing.assert_close(first["weights"], replicated["weights"], rtol=1e-8, atol=1e-8)


def fault_on_second_rank(fault: str) -> tuple[list[str], Tensor]:
    """The fault comes after step 8; statuses of the attempts that follow it."""
    problem = sharded_quadratic("mixed")
    statuses = []
    for step in range(1, 25):
        statuses.append(problem.step(stochastic=False).status.value)
        if step == 8 and dist.get_rank() == 1:
            shard: Any = problem.parameters[2]
            with torch.no_grad():
                shard.to_local().mul_(float("nan") if fault == "nan" else 1.0)
    return statuses[11::6], problem.solution()


@pytest.mark.parametrize(
    ("fault", "statuses"),
    [
        ("written", ["external_update", "accepted", "accepted"]),
        ("nan", ["external_update", *["rejected_non_finite_history"] * 2]),
    ],
)
def test_fault_in_the_shard_of_one_rank_counts_for_all(
    fault: str, statuses: list[str], ranks: Ranks
) -> None:
    first, second = ranks.run(fault_on_second_rank, fault)
    assert_bitwise_equal(first, second)
    assert first[0] == statuses
    assert bool(first[1].isnan().any()) is (fault == "nan")


def save_and_resume(name: str) -> dict[str, Any]:
    whole, interrupted = (sharded_quadratic("mixed", **OPTIONS[name]) for _ in range(2))
    whole.run(30, stochastic=False)
    solutions = []
    for stop in (0, 4, 9, 17):
        interrupted.run(stop - interrupted.step_index, stochastic=False)
        own = interrupted.state_dict()
        full = [interrupted.accelerator.full_state_dict()]
        dist.broadcast_object_list(full)
        for state in (own["accelerator"], full[0]):
            resumed = sharded_quadratic("mixed", **OPTIONS[name])
            resumed.load_state_dict(own | {"accelerator": state})
            resumed.run(30 - stop, stochastic=False)
            solutions.append((resumed.solution(), dict(resumed.accelerator.outcomes)))
    end = whole.solution(), dict(whole.accelerator.outcomes)
    return {"end": end, "resumed": solutions, "full": full[0]}


@pytest.mark.parametrize("name", ["float64", "averages", "maximum"])
def test_sharded_weights_resume_bitwise_from_local_and_full_states(
    name: str, ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    results = ranks.run(save_and_resume, name)
    for result in results:
        for number, resumed in enumerate(result["resumed"]):
            assert_bitwise_equal(resumed, result["end"], f"end {number}")
    alone = sharded_quadratic("plain", **OPTIONS[name])
    alone.accelerator.load_state_dict(results[0]["full"])
    with caplog.at_level(logging.WARNING):
        alone.step()
    assert alone.accelerator.optimizer_steps == 18
    assert "was dropped and restarts: it was stored with another" in caplog.text
    assert "sharding of the weights" in caplog.text


def refusals() -> list[str]:
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    messages = []
    for options in ({"history": "replicated"}, {"process_group": alone}):
        problem = sharded_quadratic("mixed", **options)
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
