"""The pool itself: a function that fails is one failed test, and nothing waits for ever."""

from __future__ import annotations

import os
import signal

import pytest
import torch
import torch.distributed as dist

from tests.helpers.ranks import Ranks

pytestmark = pytest.mark.ddp


def rank_sum() -> float:
    total = torch.tensor(float(dist.get_rank() + 1))
    dist.all_reduce(total)
    return total.item()


def fail_on_second_rank() -> float:
    if dist.get_rank() == 1:
        raise KeyError("the second rank")
    return rank_sum()


def die_on_second_rank() -> str:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        rank_sum()
    except RuntimeError as error:
        return type(error).__name__
    return "no error"


def test_pool_is_replaced_where_a_function_failed_or_a_rank_was_killed(ranks: Ranks) -> None:
    assert ranks.run(rank_sum) == [3.0, 3.0]
    with pytest.raises(AssertionError, match="KeyError: 'the second rank'"):
        ranks.run(fail_on_second_rank)
    assert ranks.run(die_on_second_rank, killed=1) == ["RuntimeError", -signal.SIGKILL]
    assert ranks.run(rank_sum) == [3.0, 3.0]
