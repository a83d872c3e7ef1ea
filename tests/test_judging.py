"""Candidates that are judged by a group of ranks each: the arithmetic, and four real processes."""

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.scaling import in_groups, messages
from lightning_stableaa import judging
from lightning_stableaa.groups import RankGroups
from lightning_stableaa.solver import LOOK_AHEAD_LAMBDA
from tests import judging_jobs
from tests.ddp_jobs import start
from tests.judging_jobs import AT_ONCE, CASES, GRID, GROUPS, SHORT, N

Ranks = tuple[dict[str, Any], ...]

CPU = torch.device("cpu")
LAMBDAS = (*GRID, LOOK_AHEAD_LAMBDA)


class Post:
    """A communicator that keeps what is sent until it is asked for."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.sent: dict[int, Tensor] = {}
        self.received: dict[int, Tensor] = {}
        self.ranks = range(0)
        self.gathered = torch.empty(0)

    def exchange(self, sent: Any, received: Any, device: torch.device) -> None:
        self.sent, self.received = sent, received

    def among(self, ranks: range) -> Any:
        self.ranks = ranks
        return self

    def gather(self, whole: Tensor, device: torch.device) -> None:
        self.gathered = whole


@pytest.mark.parametrize("candidates", [2, 3, 5])
@pytest.mark.parametrize("world", [5, 6, 7, 16, 48, 49])
@pytest.mark.parametrize("length", [1, 4, 7])
def test_every_group_receives_its_own_vector(world: int, candidates: int, length: int) -> None:
    wholes = torch.arange(1.0, candidates * world * length + 1).view(candidates, -1)
    posts = [Post(rank, world) for rank in range(world)]
    groups = [RankGroups(post, candidates) for post in posts]  # pyright: ignore[reportArgumentType]
    for rank, group in enumerate(groups):
        mine = wholes[:, rank * length : (rank + 1) * length].contiguous()
        group.gather(mine, torch.zeros(world * length + world), CPU)
    for sender, receiver in itertools.product(posts, posts):
        arrives = receiver.rank in sender.sent
        assert arrives == (sender.rank in receiver.received)
        if arrives:
            receiver.received[sender.rank].copy_(sender.sent[receiver.rank])

    sizes = {len(post.ranks) for post in posts}
    assert sizes <= {world // candidates, -(-world // candidates)}
    for post, group in zip(posts, groups, strict=True):
        assert post.rank in post.ranks
        assert group.share == len(post.ranks) / world
        members = [posts[rank] for rank in post.ranks]
        parts = [
            one.gathered.view(len(members), -1)[position] for position, one in enumerate(members)
        ]
        assert torch.equal(torch.cat(parts)[: world * length], wholes[group.own])


@pytest.mark.parametrize(
    ("world", "candidates", "split", "grouped"),
    [
        (47, 3, False, False),
        (48, 3, False, True),
        (1536, 3, False, True),
        (1536, 1, False, False),
        (1536, 3, True, False),
    ],
)
def test_groups_judge_where_there_are_sixteen_ranks_a_candidate(
    world: int, candidates: int, split: bool, grouped: bool
) -> None:
    asked = []
    communicator = SimpleNamespace(
        world_size=world, any=lambda flag, device: asked.append(flag) or flag
    )
    points: Any = SimpleNamespace(
        split=split,
        communicator=communicator,
        weights=SimpleNamespace(device=CPU),
        groups=lambda count: count,
    )
    assert judging._enough_ranks(points, candidates) == grouped
    assert judging._groups(points, candidates, communicates=False) == candidates
    assert judging._groups(points, candidates, communicates=True) is None
    assert asked == [False, True]
    if not split:
        assert in_groups(world, candidates) == grouped


def test_slots_have_the_mean_difference_of_their_group() -> None:
    """Five ranks in three groups; exact in binary."""
    before = [1.0, 2.0, 4.0, 8.0, 16.0]
    after = [0.5, 1.0, 4.5, 7.0, 15.5]
    slots = []
    for rank in range(5):
        groups = RankGroups(Post(rank, 5), 3)  # pyright: ignore[reportArgumentType]
        first, second = torch.tensor([before[rank], after[rank]], dtype=torch.float64)
        slots.append(torch.stack(judging._in_slots(first, second, groups, 3)))
    # groups of the ranks 0, of 1 and 2, of 3 and 4
    differences = torch.tensor([-0.5, (-1.0 + 0.5) / 2, (-1.0 - 0.5) / 2], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(slots).mean(dim=0), 31 / 5 + differences)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What four ranks saw in all jobs, which fail where one waits for another for 30 s."""
    folder = tmp_path_factory.mktemp("judging")
    return start(judging_jobs.main, folder, judging_jobs.WORLD)


processes = [pytest.mark.ddp, pytest.mark.slow, pytest.mark.timeout(300)]


def of_all(ranks: Ranks, job: str, case: tuple[str, str]) -> list[dict[str, Any]]:
    """What the ranks that train together saw; they must agree about decisions and weights."""
    seen = [ranks[rank][job][case] for rank in GROUPS[case[0]]]
    for other in seen[1:]:
        assert torch.equal(other["weights"], seen[0]["weights"])
        for name in ("status", "chosen", "before", "after"):
            values = [[update[name] for update in one["updates"]] for one in (seen[0], other)]
            assert str(values[0]) == str(values[1]), name  # a NaN is a NaN
    return seen


def group_of(position: int, world: int) -> int:
    return next(one for one in range(3) if world * one // 3 <= position < world * (one + 1) // 3)


class TestProcesses:
    pytestmark = processes

    @pytest.mark.parametrize("case", CASES)
    def test_the_lowest_mean_difference_decides(self, ranks: Ranks, case: tuple[str, str]) -> None:
        seen = of_all(ranks, "trained", case)
        world, chosen, statuses = len(seen), set(), set()
        for at, update in enumerate(seen[0]["updates"]):
            judged = [one["updates"][at]["judged"] for one in seen]
            assert {len(one) for one in judged} == {2}
            found: list[list[float]] = [[], [], []]
            for position, (before, after) in enumerate(judged):
                found[group_of(position, world)].append(after - before)
            means = [sum(one) / len(one) for one in found]
            best = min(range(3), key=means.__getitem__)
            mean_before = sum(before for before, _ in judged) / world
            assert update["before"] == pytest.approx(mean_before, rel=1e-14)
            assert update["after"] == pytest.approx(mean_before + means[best], rel=1e-14)
            statuses.add(update["status"])
            if means[best] >= 0:
                assert update["status"] == "rejected_loss"
                continue
            assert update["status"] == "accepted"
            assert update["chosen"] == LAMBDAS[best]
            chosen.add(best)
            for position, one in enumerate(seen):
                # whose group judged it has the accepted candidate, bit for bit
                same = one["updates"][at]["loss now"] == judged[position][1]
                assert same == (group_of(position, world) == best)
        assert statuses == {"accepted", "rejected_loss"}
        assert len(chosen) >= 2

    @pytest.mark.parametrize("case", CASES)
    def test_a_rank_evaluates_two_losses(self, ranks: Ranks, case: tuple[str, str]) -> None:
        for one in of_all(ranks, "trained", case):
            assert one["evaluations"] == 2 * len(one["updates"]) >= 10
        for one in of_all(ranks, "all judge all", case):
            assert one["evaluations"] == 4 * len(one["updates"])

    @pytest.mark.parametrize("name", GROUPS)
    def test_slices_give_what_replicas_give(self, ranks: Ranks, name: str) -> None:
        replicated = of_all(ranks, "trained", (name, "replicated"))[0]
        sharded = of_all(ranks, "trained", (name, "sharded"))[0]
        for one, other in zip(replicated["updates"], sharded["updates"], strict=True):
            assert (one["status"], one["chosen"]) == (other["status"], other["chosen"])
        difference = (replicated["weights"] - sharded["weights"]).norm()
        assert difference <= 1e-12 * replicated["weights"].norm()

    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("job", ["trained", "all judge all"])
    def test_the_cost_model_counts_every_message(
        self, ranks: Ranks, case: tuple[str, str], job: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(judging, "RANKS_A_CANDIDATE", 1 if job == "trained" else 2)
        world = len(GROUPS[case[0]])
        for rank, seen in enumerate(of_all(ranks, job, case)):
            for update in seen["updates"]:
                accepted = update["status"] == "accepted"
                expected = messages(
                    case[1],
                    n=N,
                    differences=update["differences"],
                    world=world,
                    candidates=3,
                    itemsize=8,
                    accepted=accepted,
                    judged_last=update["chosen"] == LOOK_AHEAD_LAMBDA,
                    at_once=AT_ONCE,
                    rank=rank,
                )
                assert update["sent"] == expected

    @pytest.mark.parametrize("case", CASES)
    def test_a_candidate_that_is_nan_on_one_rank_is_out(
        self, ranks: Ranks, case: tuple[str, str]
    ) -> None:
        seen = of_all(ranks, "nan candidate", case)
        statuses = {update["status"] for update in seen[0]["updates"]}
        assert all(math.isfinite(update["after"]) for update in seen[0]["updates"])
        assert "accepted" in statuses
        assert LOOK_AHEAD_LAMBDA not in {update["chosen"] for update in seen[0]["updates"]}

    @pytest.mark.parametrize("case", CASES)
    def test_a_loss_before_that_is_nan_on_one_rank_makes_all_reject(
        self, ranks: Ranks, case: tuple[str, str]
    ) -> None:
        seen = of_all(ranks, "nan before", case)
        assert {update["status"] for update in seen[0]["updates"]} == {"rejected_non_finite_loss"}

    @pytest.mark.parametrize("case", CASES)
    def test_a_loss_that_communicates_is_not_mixed_between_candidates(
        self, ranks: Ranks, case: tuple[str, str]
    ) -> None:
        """All ranks judge all, as where they are few."""
        for one in of_all(ranks, "loss communicates", case):
            assert one["evaluations"] == 4 * len(one["updates"])
            for update in one["updates"]:
                assert update["before"] == pytest.approx(update["judged"][0], rel=1e-14)
                assert update["after"] == pytest.approx(min(update["judged"][1:]), rel=1e-14)

    @pytest.mark.parametrize("case", CASES)
    def test_one_rank_without_memory_leaves_no_other_waiting(
        self, ranks: Ranks, case: tuple[str, str]
    ) -> None:
        met = set()
        for what in SHORT:
            first, *others = (ranks[rank]["short"][case][what] for rank in GROUPS[case[0]])
            for other in others:
                assert other["statuses"] == first["statuses"]
                assert torch.equal(other["weights"], first["weights"])
            if first["statuses"][-1] == "out_of_memory":
                met.add(what)
        expected = {"first slice", "is it finite"}
        if case[1] == "sharded":
            expected |= {"room for slices", "accepted candidate", "swap"}
        assert met == expected
