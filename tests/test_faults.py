"""Two real processes (gloo), one of which meets what the other does not: none waits for ever."""

from typing import Any

import pytest
import torch

from tests import fault_jobs
from tests.ddp_jobs import start
from tests.fault_jobs import CASES, MOMENTS, PLACEMENTS, SHORT

pytestmark = [pytest.mark.ddp, pytest.mark.timeout(240)]

Ranks = tuple[dict[str, Any], ...]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What both ranks saw in all jobs, which fail where one waits for the other for 30 s."""
    return start(fault_jobs.main, tmp_path_factory.mktemp("faults"), fault_jobs.WORLD)


def agreed(first: dict[str, Any], second: dict[str, Any], *, weights: bool = True) -> Any:
    """What both ranks saw, and saw alike: reports, counters, links, and weights bit for bit."""
    for name in first:
        if not isinstance(first[name], torch.Tensor):
            assert first[name] == second[name], name
        elif weights:
            assert torch.equal(first[name], second[name]), name
    return first


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_begin_anew_where_the_weights_of_one_were_written_to(
    ranks: Ranks, case: tuple[str, str]
) -> None:
    for moment, (step, early) in MOMENTS.items():
        seen = agreed(*(rank["edited"][case][moment] for rank in ranks))
        end = step if early else 3 * (step // 3 + 1)
        if seen["statuses"][11] == "accepted" and moment == "after an update":
            assert "weights_changed" not in seen["statuses"]  # the chain was broken anyway
        else:
            assert seen["statuses"][end - 1] == "weights_changed", moment
            assert seen["outcomes"]["weights_changed"] == 1, moment
        # an update that was rejected for it is made up for at the next cycle's end
        assert any(one in ("accepted", "rejected_loss") for one in seen["statuses"][end:]), moment
        assert torch.equal(seen["resumed"], seen["weights"]), moment


def test_no_residual_leads_across_a_write_on_one_rank(ranks: Ranks) -> None:
    for placement in PLACEMENTS:
        seen = ranks[0]["edited"][placement, "guarded"]
        # points of steps 3 and 6, the start after step 8 that is none, 9, 12; accepted; 15 ...
        assert seen["in a cycle"]["links"][:5] == [False, True, True, False, True]
        assert seen["at an update"]["links"][:6] == [False, True, True, True, False, True]


def test_losses_before_a_write_on_one_rank_say_nothing_of_those_after_it(ranks: Ranks) -> None:
    for placement in PLACEMENTS:
        for moment in ("in a cycle", "at an update"):
            seen = ranks[0]["edited"][placement, "guarded"][moment]
            statuses, known = seen["statuses"], seen["recent_losses"]
            changed = statuses.index("weights_changed")
            attempts = [k for k, one in enumerate(statuses) if one.startswith(("acc", "rej"))]
            before = max((k for k in attempts if k < changed), default=0)
            first, second = [k for k in attempts if k > changed][:2]
            assert len(known[first]) == 1, moment
            assert known[first][0] not in known[before], moment
            assert known[second][:1] == known[first], moment


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_write_while_weights_are_evaluated_is_no_write_to_those_of_training(
    ranks: Ranks, placement: str
) -> None:
    """After step 13 they hold the candidate; after step 8 there was none yet, and it is one."""
    seen = agreed(*(rank["validated"][placement] for rank in ranks))
    assert seen["outcomes"]["weights_changed"] == 1
    assert [seen["statuses"][end - 1] for end in (9, 12, 15, 18)] == [
        "weights_changed",
        "accepted",
        "stored",
        "accepted",
    ]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_checkpoint_knows_of_a_write_that_ranks_do_not_yet_agree_about(
    ranks: Ranks, placement: str
) -> None:
    for writer in range(fault_jobs.WORLD):
        seen = agreed(*(rank["saved"][placement][writer] for rank in ranks))
        assert seen["statuses"][11] == "weights_changed"
        # of replicas the first rank saves its own, alone: it has no write of another to tell
        if placement != "replicated" or writer == 0:
            assert torch.equal(seen["resumed"], seen["weights"])


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_parameters_that_moved_on_one_rank_begin_a_new_history_on_all(
    ranks: Ranks, placement: str
) -> None:
    seen = agreed(*(rank["moved"][placement] for rank in ranks))
    assert [seen["statuses"][end - 1] for end in (12, 15, 18, 24)] == [
        "parameters_changed",
        "history_too_short",
        "accepted",
        "accepted",
    ]


@pytest.mark.parametrize("placement", ["replicated", "sharded"])
def test_no_rank_accelerates_while_one_trains_other_parameters(
    ranks: Ranks, placement: str
) -> None:
    first, second = (rank["frozen"][placement] for rank in ranks)
    seen = agreed(first, second, weights=False)  # the optimizers themselves went apart
    assert seen["statuses"][8:17] == ["parameters_changed"] * 9  # frozen after 8 until after 16
    assert seen["statuses"][17:20] == ["cycle_open", "cycle_open", "history_too_short"]
    assert seen["statuses"][22] == "accepted"


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_history_that_fits_on_one_rank_only_is_kept_by_none(ranks: Ranks, placement: str) -> None:
    seen = agreed(*(rank["no room"][placement] for rank in ranks))
    assert seen["statuses"] == ["out_of_memory"] * 12
    assert seen["outcomes"] == {"out_of_memory": 1}
    assert torch.equal(seen["weights"], seen["plain"])


@pytest.mark.parametrize("case", CASES)
def test_one_rank_without_memory_leaves_no_other_waiting(
    ranks: Ranks, case: tuple[str, str]
) -> None:
    """Where the device is the host, all go on without a history."""
    met = set()
    for what in SHORT:
        seen = agreed(*(rank["short"][case][what] for rank in ranks))
        if "out_of_memory" in seen["outcomes"]:
            met.add(what)
            assert seen["outcomes"]["out_of_memory"] == 1
            assert seen["statuses"][-1] == "out_of_memory"
    late = "is it finite" if case[1] == "unguarded" else "last candidate"
    assert met >= {"push", "gram", "first candidate", late}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_all_ranks_accelerate_again_with_the_history_on_the_host(
    ranks: Ranks, placement: str
) -> None:
    seen = agreed(*(rank["moved to the host"][placement] for rank in ranks))
    assert seen["statuses"][5:7] == ["out_of_memory"] * 2
    assert seen["outcomes"]["out_of_memory"] == 1
    assert seen["statuses"][7:].count("accepted") >= 2
    assert torch.equal(seen["resumed"], seen["weights"])


@pytest.mark.parametrize("layout", ["plain", "mixed"])
def test_averages_without_a_history_begin_anew_on_all_ranks(ranks: Ranks, layout: str) -> None:
    seen = agreed(*(rank["smoothed"][layout] for rank in ranks))
    assert seen["statuses"][3::4] == ["stored", "weights_changed"] * 2


def test_lightning_goes_on_where_a_callback_writes_on_one_rank(ranks: Ranks) -> None:
    """DDP with replicas and with slices, and FSDP2."""
    for seen in zip(*(rank["ddp"] for rank in ranks), strict=True):
        assert seen[0]["trace"] == seen[1]["trace"]
        assert seen[0]["outcomes"] == seen[1]["outcomes"]
    fsdp = [rank["fsdp"] for rank in ranks]
    assert torch.equal(fsdp[0]["trace"], fsdp[1]["trace"])
    for rank in ranks:
        for one in (*rank["ddp"], rank["fsdp"]):
            outcomes = one["outcomes"]
            assert outcomes["weights_changed"] == 2
            assert outcomes["accepted"] + outcomes["rejected_loss"] == 7
            assert outcomes["accepted"] >= 1
