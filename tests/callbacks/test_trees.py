"""Both class trees of Lightning, and the two callbacks alone, together and in either order."""

from typing import Any

import pytest
import torch

from lightning_stableaa import AndersonCallback, SmoothingMonitor
from tests.callbacks.regression import (
    TREES,
    anderson,
    batches,
    counters,
    fit,
    regression_class,
    stored_points,
    weights,
)


def fours() -> AndersonCallback:
    return anderson(store_every_n_steps=4, accelerate_every_n_steps=8)


def run(tree: str, *callbacks: Any) -> torch.Tensor:
    module = regression_class(tree)()
    fit(module, batches(1), *callbacks, tree=tree, max_epochs=40)
    return weights(module)


@pytest.mark.parametrize("tree", TREES)
def test_one_engine_step_per_optimizer_step_in_any_order(tree: str) -> None:
    alone, first, last = fours(), fours(), fours()
    monitors = [SmoothingMonitor(rsd_threshold=0.01), SmoothingMonitor(rsd_threshold=0.01)]
    final = {
        "alone": run(tree, alone),
        "anderson first": run(tree, first, monitors[0]),
        "monitor first": run(tree, monitors[1], last),
    }

    assert [counters(one)["optimizer_steps"] for one in (alone, first, last)] == [40, 40, 40]
    # the switch to averages, after the first cycle, starts the history anew
    assert [counters(one)["attempted"] for one in (alone, first, last)] == [5, 4, 4]
    assert [counters(one)["accepted"] for one in (alone, first, last)] == [5, 3, 3]
    assert torch.equal(final["anderson first"], final["monitor first"])
    assert counters(first) == counters(last)
    assert torch.equal(stored_points(first), stored_points(last))
    assert stored_points(first).shape[0] == 10  # one average for each cycle of four steps
    assert not torch.equal(final["alone"], final["monitor first"])  # the averages had an effect
    assert monitors[0].state_dict() == monitors[1].state_dict() == {}  # the engine keeps it


def test_the_trees_train_the_same_weights() -> None:
    finals = [run(tree, fours(), SmoothingMonitor()) for tree in TREES]

    assert torch.equal(*finals)


@pytest.mark.parametrize("tree", TREES)
def test_a_monitor_alone_only_watches(tree: str) -> None:
    monitor = SmoothingMonitor(average_window=4)

    assert torch.equal(run(tree), run(tree, monitor))
    assert monitor.state_dict()["position"] == 0  # ten windows of four, all closed


def test_a_monitor_alone_averages_the_weights_when_asked_to() -> None:
    written = SmoothingMonitor(average_window=4, rsd_threshold=0.0, apply_to="weights")
    watched = SmoothingMonitor(average_window=4, rsd_threshold=1e9, apply_to="weights")

    assert torch.equal(run(TREES[0]), run(TREES[0], watched))
    assert not torch.equal(run(TREES[0]), run(TREES[0], written))
