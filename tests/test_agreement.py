import itertools

import pytest
import torch

from lightning_stableaa.agreement import DISTURBANCES, Agreement, same_everywhere
from lightning_stableaa.distributed import Communicator
from lightning_stableaa.memory import out_of_memory
from lightning_stableaa.status import Status

CPU = torch.device("cpu")


def ranks(world: int) -> list[Agreement]:
    """Agreements of so many ranks, without anything to send by."""
    communicators = [Communicator() for _ in range(world)]
    for one in communicators:
        one.world_size = world
    return [Agreement(one, CPU) for one in communicators]


@pytest.mark.parametrize("reduce", [sum, max], ids=["sum", "max"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_act_on_the_gravest_of_what_they_noted(world: int, reduce: object) -> None:
    for noted in itertools.product([None, *DISTURBANCES], repeat=world):
        agreements = ranks(world)
        for agreement, disturbance in zip(agreements, noted, strict=True):
            if disturbance is Status.OUT_OF_MEMORY:
                agreement.communicator.shortage = "no room"
            elif disturbance is not None:
                agreement.note(disturbance)
        together = reduce(one.number for one in agreements)  # type: ignore[operator]
        gravest = max(noted, key=lambda one: -1 if one is None else DISTURBANCES.index(one))
        for agreement in agreements:
            assert agreement.settle(together) is gravest
            assert not agreement.disturbed


@pytest.mark.parametrize("world", [2, 7, 1536, 100_000])
def test_a_mean_tells_a_single_rank_among_many(world: int) -> None:
    (first,) = ranks(1)
    first.communicator.world_size = world  # the others are not needed
    for disturbance in DISTURBANCES[:2]:
        first.note(disturbance)
        assert first.settle(first.number / world * world) is disturbance
    # all but one of them noted less than that one did
    first.note(Status.WEIGHTS_CHANGED)
    lesser = first.number * (world - 1)
    assert first.settle(lesser) is Status.WEIGHTS_CHANGED
    first.note(Status.PARAMETERS_CHANGED)
    together = torch.tensor(lesser + first.number, dtype=torch.float64) / world
    assert first.settle(float(together) * world) is Status.PARAMETERS_CHANGED


def test_the_gravest_stays_noted_until_it_is_settled() -> None:
    (alone,) = ranks(1)
    assert alone.reach() is None
    alone.note(Status.PARAMETERS_CHANGED)
    alone.note(Status.WEIGHTS_CHANGED)
    assert alone.disturbed
    assert alone.reach() is Status.PARAMETERS_CHANGED
    assert alone.reach() is None


def test_a_process_alone_agrees_with_itself() -> None:
    assert same_everywhere(Communicator(), CPU, "one", "") == [True, True]


def test_memory_that_runs_out_is_an_error_where_nobody_waits() -> None:
    def run_out(world: int, message: str) -> str:
        (one, *_) = ranks(world)
        with one.communicator.in_step():
            raise RuntimeError(message)
        return one.communicator.shortage

    with pytest.raises(RuntimeError, match="can't allocate"):
        run_out(1, "can't allocate memory")
    with pytest.raises(RuntimeError, match="shape"):
        run_out(2, "shape mismatch")
    assert run_out(2, "can't allocate memory\nwith statistics") == "can't allocate memory"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"), True),
        (RuntimeError("CUDA error: out of memory"), True),  # pinned memory
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_are_of_memory(error: Exception, expected: bool) -> None:
    assert out_of_memory(error) is expected
