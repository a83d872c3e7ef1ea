"""Four real processes (gloo): what one process gives, in the memory that was promised."""

from typing import Any

import pytest
import torch

from benchmarks.scaling import HISTORIES, RESNET50, predictions
from lightning_stableaa.distributed import GATHERED_AT_ONCE
from tests import scale_jobs
from tests.ddp_jobs import start
from tests.scale_jobs import DEPTH, WORLD, N

pytestmark = [pytest.mark.ddp, pytest.mark.slow, pytest.mark.timeout(300)]

Ranks = tuple[dict[str, Any], ...]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What the ranks saw in all jobs, which share their processes.

    What malloc takes back it returns to the system, so that resident memory is memory in use.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
        return start(scale_jobs.main, tmp_path_factory.mktemp("scale"), WORLD)


def test_the_default_schedule_is_predicted_to_cost_less_than_one_percent() -> None:
    """ResNet-50 on 1,536 GPUs, in both precisions, whole and sharded."""
    default = [row for row in predictions() if row["setting"] == "default"]
    assert len(default) == len(RESNET50) * len(HISTORIES)
    assert all(0 < row["overhead"] < 0.01 for row in default)


@pytest.mark.parametrize(("history", "dtype"), scale_jobs.CASES)
def test_four_processes_give_what_one_gives(history: str, dtype: str, ranks: Ranks) -> None:
    alone = scale_jobs.minimise(history="auto", dtype=getattr(torch, f"float{dtype}"))
    tolerance = {"32": 1e-6, "64": 1e-12}[dtype]
    for rank in ranks:
        seen = rank[f"{history} {dtype}"]
        assert seen["accepted"] == alone["accepted"] >= 2
        assert (seen["first"] - alone["first"]).norm() <= tolerance * alone["first"].norm()
        assert (seen["end"] - alone["end"]).norm() <= 100 * tolerance * alone["end"].norm()
        assert torch.equal(seen["end"], ranks[0][f"{history} {dtype}"]["end"])


# vectors of the size of the weights that a rank may take, by the design
PROMISED = {"replicated": DEPTH + 2, "sharded": (DEPTH + 2) / WORLD + 1}


@pytest.mark.parametrize("history", PROMISED)
def test_a_rank_holds_what_was_promised(history: str, ranks: Ranks) -> None:
    """Exactly; a sharded history lacks the slice that a gather in place does not copy."""
    vectors = {"replicated": DEPTH + 2, "sharded": (DEPTH + 1) / WORLD + 1}
    for rank in ranks:
        held = rank[f"memory {history}"]["held"]
        assert held == pytest.approx(4 * N * vectors[history], abs=4 * (DEPTH + 2) * WORLD)
        assert held <= 1.05 * 4 * N * PROMISED[history]


@pytest.mark.parametrize("history", PROMISED)
def test_the_peak_of_a_process_is_what_was_promised(history: str, ranks: Ranks) -> None:
    """Resident memory. Beside the vectors: chunks of the Gram and of a swap, pieces of a gather."""
    work_space = (8 + 4) * 2**20 + 2 * 4 * GATHERED_AT_ONCE
    for rank in ranks:
        seen = rank[f"memory {history}"]
        assert seen["accepted"] >= 1
        assert 0.95 * seen["held"] <= seen["peak"]
        assert seen["peak"] <= 1.05 * 4 * N * PROMISED[history] + work_space
