"""Two real processes (gloo) that share the weights: FSDP2, and parts laid out in other ways."""

import logging
from typing import Any

import pytest
import torch

from tests import fsdp_jobs
from tests.ddp_jobs import start

pytestmark = [pytest.mark.ddp, pytest.mark.timeout(240)]

Ranks = tuple[dict[str, Any], ...]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What both ranks saw in all jobs, which share one pair of processes."""
    return start(fsdp_jobs.main, tmp_path_factory.mktemp("fsdp"), fsdp_jobs.WORLD)


@pytest.mark.parametrize(("precision", "tolerance"), [("", 1e-6), (" float64", 1e-12)])
def test_fsdp2_gives_the_candidate_of_ddp(ranks: Ranks, precision: str, tolerance: float) -> None:
    replicated, split = (ranks[0][f"{one}{precision}"] for one in ("ddp", "fsdp"))
    (expected,), (found,) = (one["after first acceptance"] for one in (replicated, split))

    assert split["outcomes"] == replicated["outcomes"]
    assert split["outcomes"].keys() == {"accepted", "rejected_loss"}  # both occurred
    assert (found - expected).norm() <= tolerance * expected.norm()
    # and so do 40 steps, with what they round
    assert (split["end"] - replicated["end"]).norm() <= 100 * tolerance * expected.norm()


def test_ranks_that_share_the_weights_agree(ranks: Ranks) -> None:
    for job in ("fsdp", "fsdp float64"):
        first, second = (rank[job] for rank in ranks)
        assert torch.equal(first["trace"], second["trace"])
        assert first["counters"] == second["counters"]
        assert first["outcomes"] == second["outcomes"]


def test_nan_in_the_part_of_one_rank_is_reported_by_all(ranks: Ranks) -> None:
    first, second = (rank["nan"] for rank in ranks)

    lost = first["trace"][10].isnan()
    assert bool(lost.any())
    assert not lost.all()  # the next forward pass will lose the rest
    assert first["steps"] == second["steps"] == 24
    assert first["outcomes"] == second["outcomes"]
    # lost in step 11: the extrapolations after steps 12, 16, 20 and 24
    assert first["outcomes"]["rejected_non_finite_history"] == 4


@pytest.mark.parametrize(("job", "is_folder"), [("resume", True), ("resume one file", False)])
def test_a_resumed_run_is_bitwise_the_whole_run(ranks: Ranks, job: str, is_folder: bool) -> None:
    """With smoothing, and momentum that is mixed: everything that has a history."""
    for rank in ranks:
        seen, whole, resumed = rank[job], rank[job]["whole"], rank[job]["resumed"]
        assert seen["is folder"] == is_folder
        assert torch.equal(resumed["trace"], whole["trace"][8:])
        assert resumed["counters"] == whole["counters"]
        assert whole["counters"]["accepted"] >= 1


def test_evaluation_sees_the_candidate_of_ddp(ranks: Ranks) -> None:
    for rank in ranks:
        split, replicated = rank["evaluation"], rank["evaluation ddp"]
        assert torch.equal(split["whole"]["trace"], replicated["whole"]["trace"])
        # exported; the Gram is summed in parts, which may round the candidate otherwise
        torch.testing.assert_close(
            split["whole"]["end"], replicated["whole"]["end"], rtol=1e-5, atol=1e-6
        )
        assert not torch.equal(split["whole"]["end"], split["whole"]["trace"][-1])
        assert split["whole"]["metrics"] == pytest.approx(replicated["whole"]["metrics"], rel=1e-6)
        assert split["saved"].keys() == replicated["saved"].keys()
        for name, expected in replicated["saved"].items():
            torch.testing.assert_close(split["saved"][name], expected, rtol=1e-5, atol=1e-6)


def test_a_resumed_run_goes_on_with_the_weights_of_training(ranks: Ranks) -> None:
    for rank in ranks:
        whole, resumed = rank["evaluation"]["whole"], rank["evaluation"]["resumed"]
        assert torch.equal(resumed["trace"], whole["trace"][16:])
        assert torch.equal(resumed["end"], whole["end"])
        assert resumed["metrics"] == whole["metrics"]


@pytest.mark.parametrize("layout", sorted(fsdp_jobs.LAYOUTS.keys() - {"plain"}))
def test_every_layout_gives_what_replicas_give(ranks: Ranks, layout: str) -> None:
    """Norms would tell an element that is counted twice, or not at all."""
    for rank in ranks:
        for case, (dtype, _) in fsdp_jobs.CASES.items():
            split, replicated = rank["layouts"][layout][case], rank["layouts"]["plain"][case]
            tolerance = 1e-12 if dtype == torch.float64 else 1e-6
            assert split["accepted"] == replicated["accepted"] >= 1, case
            assert split["norms"] == pytest.approx(replicated["norms"], rel=tolerance), case
            assert split["rsd"] == pytest.approx(replicated["rsd"], rel=tolerance), case
            error = (split["weights"] - replicated["weights"]).norm()
            assert error <= tolerance * replicated["weights"].norm(), case
            assert torch.equal(split["weights"], ranks[0]["layouts"][layout][case]["weights"])


def test_averages_of_parts_are_parts_of_averages(ranks: Ranks) -> None:
    for rank in ranks:
        expected = rank["averages"]["plain"]
        for layout, found in rank["averages"].items():
            assert found["rsd"] == pytest.approx(expected["rsd"], rel=1e-12), layout
            torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-12, atol=0)


def test_the_history_of_other_parts_is_dropped_with_a_warning(
    ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    """Here: of two processes, in one that has all of the weights."""
    problem = fsdp_jobs.Minimisation(list, torch.float64)
    problem.accelerator.load_state_dict(ranks[0]["layouts"]["mixed"]["float64"]["state"])
    with caplog.at_level(logging.WARNING):
        problem.step()
    assert problem.accelerator.optimizer_steps == 17
    assert "was dropped and starts anew: it was stored with another" in caplog.text
    assert "division of the weights among processes" in caplog.text


def test_what_cannot_work_is_refused(ranks: Ranks) -> None:
    for rank in ranks:
        assert rank["refused"]["replicas"] == (
            "history='replicated' needs the whole weights in every process, and these are split "
            "over several (DTensors): use history='auto'"
        )
        assert rank["refused"]["group"].endswith(
            " elements of 45 sharded weights: pass the group over whose processes they are sharded"
        )


def test_weights_that_other_libraries_hide_are_refused() -> None:
    def refusal(name: str, value: object) -> str:
        parameter = torch.nn.Parameter(torch.ones(2))
        setattr(parameter, name, value)
        return fsdp_jobs.message(
            lambda: fsdp_jobs.AndersonAccelerator(torch.optim.SGD([parameter], lr=0.1))
        )

    assert refusal("_fsdp_flattened", True) == (
        "weights sharded by FullyShardedDataParallel (FSDP1) are not supported: use "
        "torch.distributed.fsdp.fully_shard (FSDP2)"
    )
    assert refusal("ds_id", 0) == (
        "weights partitioned by DeepSpeed are not supported: use DDP, or "
        "torch.distributed.fsdp.fully_shard (FSDP2)"
    )
