"""Two real processes (gloo): ranks that stay equal, whatever one of them meets."""

import itertools
import re
from typing import Any

import pytest
import torch

from benchmarks.scaling import messages
from lightning_stableaa.distributed import GATHERED_AT_ONCE
from tests import ddp_jobs

pytestmark = [pytest.mark.ddp, pytest.mark.timeout(240)]

Ranks = tuple[dict[str, Any], ...]

# Before the first step, whether all ranks have the same weights and room for the history; at each
# of nine cycles' ends without an update, whether anything disturbed one of them.
BETWEEN = [("all_reduce", 4), *[("all_reduce", 1)] * 10]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What both ranks saw in all jobs, which share one pair of processes."""
    return ddp_jobs.start(ddp_jobs.main, tmp_path_factory.mktemp("ddp"), ddp_jobs.WORLD)


def test_ranks_stay_bitwise_equal_for_200_steps(ranks: Ranks) -> None:
    first, second = (rank["replicated"] for rank in ranks)

    assert len(first["trace"]) == first["steps"] == 200
    assert first["trace"] == second["trace"]
    assert first["counters"] == second["counters"]
    assert first["outcomes"] == second["outcomes"]
    assert first["outcomes"].keys() == {"accepted", "rejected_loss"}  # both occurred
    assert sum(first["outcomes"].values()) == first["counters"]["attempted"] == 50
    assert not torch.equal(first["buffers"], second["buffers"])  # each rank saw its own samples


def test_one_rank_s_nan_makes_all_ranks_reject(ranks: Ranks) -> None:
    first, second = (rank["nan judge"] for rank in ranks)

    assert first["outcomes"] == second["outcomes"] == {"rejected_non_finite_loss": 4}
    assert first["trace"] == second["trace"] == ranks[0]["plain"]["trace"]


def test_a_nan_in_training_is_reported_by_all_ranks_alike(ranks: Ranks) -> None:
    first, second = (rank["nan loss"] for rank in ranks)

    assert bool(first["weights"].isnan().all())
    assert first["steps"] == second["steps"] == 24
    assert first["outcomes"] == second["outcomes"]
    # the loss of step 11 broke: those of steps 12, 16, 20 and 24
    assert first["outcomes"]["rejected_non_finite_history"] == 4


def test_weights_of_nan_on_one_rank_make_all_ranks_reject(ranks: Ranks) -> None:
    for history in ("replicated", "sharded"):
        for safeguard in ("loss", "none"):
            first, second = (rank["spoiled"][history, safeguard] for rank in ranks)
            assert first["statuses"] == second["statuses"], (history, safeguard)
            # the weights of the second rank are NaN from the fourth step on
            assert first["statuses"][1] == "accepted"
            assert set(first["statuses"][2:]) == {"rejected_non_finite_history"}
            assert first["finite"]
            assert not second["finite"]


def test_a_sharded_history_gives_the_replicated_candidate(ranks: Ranks) -> None:
    replicated = ranks[0]["replicated"]["after first acceptance"][0]
    sharded = ranks[0]["sharded"]["after first acceptance"][0]

    assert replicated.dtype == torch.float32
    assert torch.equal(sharded, ranks[1]["sharded"]["after first acceptance"][0])
    assert (sharded - replicated).norm() <= 1e-6 * replicated.norm()
    assert ranks[0]["sharded"]["trace"] == ranks[1]["sharded"]["trace"]


def test_what_has_to_confirm_a_candidate_is_averaged_over_the_ranks(ranks: Ranks) -> None:
    first, second = (rank["confirmed"] for rank in ranks)
    expected = {
        "yes": "accepted",
        "no": "rejected_loss",
        "NaN": "rejected_non_finite_loss",
        "one": "accepted",
    }
    for (history, name), one in first.items():
        assert one["statuses"] == [expected[name]] * 6, history
        # of five lambdas, and twice more of the best
        assert one["losses"] == 6 * (1 + 5 + 2)
        assert torch.equal(one["x"], second[history, name]["x"])
    assert not torch.equal(first["replicated", "yes"]["x"], first["replicated", "no"]["x"])


def test_ranks_leave_training_alone_together_and_mend_a_leap_that_one_of_them_saw(
    ranks: Ranks,
) -> None:
    """What one of them does not know, none does; what leapt is the mean of both."""
    for history, one in ranks[0]["amid noise"].items():
        assert one["statuses"] == ["rejected_noise"] * 5 + ["accepted", "rejected_noise"]
        assert one["asked"] == [2, 0, 0, 2, 0, 2, 0]
        other = ranks[1]["amid noise"][history]
        assert (one["statuses"], one["asked"]) == (other["statuses"], other["asked"])
        assert one["sent"] == other["sent"]
        assert torch.equal(one["x"], other["x"])
    sent = ranks[0]["amid noise"]["replicated"]["sent"]
    assert [sent[k] for k in (0, 1, 5, 6)] == [[9], [7], [7, 9, 1], [7]]


def test_replicated_updates_send_a_few_numbers_whatever_n_is(ranks: Ranks) -> None:
    for rank in ranks:
        small, large = (rank["traffic"]["replicated", n, 1] for n in (51, 5001))
        assert small == large
        assert small["between"] == BETWEEN
        # what was noted, norm, noisiness and rest of the residuals, whether a sample judges and
        # others confirm, the loss of training, that before and after; the jump over four
        # differences: of six points an accepted candidate starts anew; if it is finite
        update = [("all_reduce", 9), ("broadcast", 4), ("all_reduce", 1)]
        assert small["updates"] == [(True, update)] * 3


def test_sharded_updates_send_the_gram_and_gather_the_candidates(ranks: Ranks) -> None:
    """And of several the accepted one once more, unless it was judged last."""
    for rank in ranks:
        for n, candidates in itertools.product((51, 5001), (1, 5)):
            seen = rank["traffic"]["sharded", n, candidates]
            gather = ("all_gather_into_tensor", n + 1)  # padded to two slices of equal size
            judged = [("all_reduce", 4 * 4), *[gather] * candidates, ("all_reduce", 8 + candidates)]
            accepted = [("broadcast", 4), *[gather] * (candidates > 1), ("all_reduce", 1)]
            assert seen["between"] == BETWEEN
            assert seen["updates"] == [(True, judged + accepted)] * 3


@pytest.mark.parametrize("history", ["replicated", "sharded"])
@pytest.mark.parametrize("n", [51, 5001])
@pytest.mark.parametrize("candidates", [1, 5])
def test_the_cost_model_counts_every_message(
    ranks: Ranks, history: str, n: int, candidates: int
) -> None:
    expected = messages(
        history,
        n=n,
        differences=4,
        world=2,
        candidates=candidates,
        at_once=GATHERED_AT_ONCE,
    )
    sent = [(one.name, one.elements) for one in expected]
    for rank in ranks:
        seen = rank["traffic"][history, n, candidates]
        assert seen["updates"] == [(True, sent)] * 3
        assert seen["bytes"] == {sum(one.bytes for one in expected)}


def test_a_run_resumed_from_a_checkpoint_is_bitwise_the_whole_run(ranks: Ranks) -> None:
    for rank in ranks:
        whole, resumed = rank["resume"]["whole"], rank["resume"]["resumed"]
        assert whole["steps"] == resumed["steps"] == 24
        assert resumed["trace"] == whole["trace"][8:]
        assert resumed["counters"] == whole["counters"]
        assert whole["counters"]["attempted"] == 4


def test_a_sharded_run_resumed_from_a_checkpoint_is_bitwise_the_whole_run(ranks: Ranks) -> None:
    """One rank writes the checkpoint, with the slices of all."""
    for rank in ranks:
        whole, resumed = (rank["resume sharded"][one] for one in ("whole", "resumed"))
        assert whole["steps"] == resumed["steps"] == 24
        assert resumed["trace"] == whole["trace"][8:]
        assert resumed["counters"] == whole["counters"]
        assert whole["counters"]["accepted"] >= 1


def test_auto_keeps_replicas_of_small_weights_and_says_so(ranks: Ranks) -> None:
    for rank in ranks:
        assert re.fullmatch(
            r"history='auto' is replicated: a replica takes [\d.e-]+ GB in each of 2 processes, "
            r"at most 10% of the memory of one \([\d.]+ GB\)",
            rank["auto"]["said"],
        )


def test_every_rank_can_save_its_own_slice(ranks: Ranks) -> None:
    for number, rank in enumerate(ranks):
        seen = rank["local state"]
        assert seen["shard"] == [number, 2]
        assert seen["rows"][1] == 26  # of 51 weights
        assert seen["equal"]
        assert seen["accepted"][0] == seen["accepted"][1] >= 1


def test_a_sharded_state_loads_where_there_is_one_process(ranks: Ranks) -> None:
    """To rounding: one process sums in another order than two."""
    seen = ranks[0]["local state"]
    alone = ddp_jobs.Quadratic(51, accelerate_every_n_steps=3)
    with torch.no_grad():
        alone.x.copy_(seen["at saving"])
    alone.accelerator.load_state_dict(seen["gathered"])
    for _ in range(8):
        alone.step()
    assert alone.accelerator.accepted == seen["accepted"][0]
    torch.testing.assert_close(alone.x.detach(), seen["end"], rtol=1e-4, atol=1e-5)
