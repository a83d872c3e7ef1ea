"""Something else than the optimizer writes to the weights, in runs that are interrupted or not."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_stableaa import AndersonAccelerator, Status

COUNT = 40  # tensors, more than a glance looks at
STEPS = 80
LATE = 47  # when the habits of the optimizer are known


def run(
    *, edits: dict[int, list[int]], saved_at: int | None = None
) -> tuple[Tensor, AndersonAccelerator]:
    """Weights and engine after ``STEPS`` steps of gradient descent on a quadratic.

    Args:
        edits: tensors that are written to, by the step after which.
        saved_at: the step after which, edits included, it is interrupted and resumed.
    """
    weights = [nn.Parameter(torch.full((2,), 1.0 + i, dtype=torch.float64)) for i in range(COUNT)]
    optimizer = torch.optim.SGD(weights, lr=0.01)

    def loss() -> Tensor:
        return torch.stack([((1 + i % 7) * w * w).sum() for i, w in enumerate(weights)]).sum()

    options: dict[str, Any] = {"store_every_n_steps": 5, "accelerate_every_n_steps": 10}
    engine = AndersonAccelerator(optimizer, **options)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        engine.step(loss)
        for index in edits.get(step, []):
            with torch.no_grad():
                weights[index].add_(0.5)
        if step == saved_at:
            file = io.BytesIO()
            torch.save(engine.state_dict(), file)
            file.seek(0)
            engine.detach()
            engine = AndersonAccelerator(optimizer, **options)
            engine.load_state_dict(torch.load(file, weights_only=True))
    return torch.cat([one.detach() for one in weights]), engine


ALL = list(range(COUNT))


@pytest.mark.parametrize("edited", [[0], [7], [39], ALL], ids=["first", "one", "last", "all"])
@pytest.mark.parametrize("edited_at", [3, 4, 9, 12, LATE, LATE + 2, LATE + 5])
def test_a_resumed_run_is_the_whole_run(edited: list[int], edited_at: int) -> None:
    whole, engine = run(edits={edited_at: edited})
    assert engine.outcomes[Status.ACCEPTED] > 2
    for saved_at in (edited_at - 2, edited_at, edited_at + 1):
        resumed, other = run(edits={edited_at: edited}, saved_at=saved_at)
        assert torch.equal(resumed, whole), saved_at
        assert other.outcomes == engine.outcomes
        assert other.attempted == engine.attempted


@pytest.mark.parametrize("first_at", [2, LATE])
def test_a_resumed_run_is_the_whole_run_after_two_edits_of_a_cycle(first_at: int) -> None:
    edits = {first_at: [7], first_at + 1: ALL}
    whole, engine = run(edits=edits)
    assert engine.outcomes[Status.WEIGHTS_CHANGED] == 1, "the second one begins the cycle anew"
    for saved_at in (first_at - 2, first_at, first_at + 1):
        resumed, other = run(edits=edits, saved_at=saved_at)
        assert torch.equal(resumed, whole), saved_at
        assert other.outcomes == engine.outcomes


def test_of_all_weights_it_begins_the_cycle_anew_and_of_some_it_ends_it() -> None:
    """``STEPS`` are 16 cycles: those of five steps after step 42 end at others, or one is lost."""
    stored = {}
    for name, edited in {"none": [], "all": ALL, "some": [7]}.items():
        _, engine = run(edits={42: edited})
        assert engine.outcomes[Status.WEIGHTS_CHANGED] == (name != "none")
        stored[name] = engine.state_dict()["counters"]["_cycle_steps"]
    assert stored == {"none": 0, "all": 2, "some": 0}
