"""The moving average without acceleration: which steps make a window."""

from __future__ import annotations

import io

import torch
from torch import Tensor, nn

from lightning_stableaa import Smoothing, Status, StepReport
from lightning_stableaa.averaging import WeightSmoother

WINDOW = Smoothing(average_window=4)


def test_optimizers_that_take_turns_make_one_window_together() -> None:
    """As those of a GAN: the weights of the other one are frozen, and have no gradient."""
    networks = [nn.Linear(3, 3), nn.Linear(3, 1)]
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in networks]
    smoother = WeightSmoother(optimizers, WINDOW)
    reports = []
    for _ in range(8):
        for turn, optimizer in enumerate(optimizers):
            for one in networks:
                one.requires_grad_(one is networks[turn])
            networks[turn](torch.ones(3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        for one in networks:
            one.requires_grad_(True)
        reports.append(smoother.step())
    assert [one.status is Status.STORED for one in reports] == [False, False, False, True] * 2
    assert all(one.rsd for one in reports if one.status is Status.STORED)


def reports_of(*, saved_at: int | None, edited_at: int) -> list[StepReport]:
    """Of 16 steps; something writes to the weights after one, then a checkpoint is written."""
    x = nn.Parameter(torch.ones(5))
    optimizer = torch.optim.SGD([x], lr=0.1)
    smoother = WeightSmoother(optimizer, WINDOW)
    reports = []
    for step in range(16):
        x.grad = torch.full((5,), 1.0 + step % 3)
        optimizer.step()
        reports.append(smoother.step())
        if step == edited_at:
            with torch.no_grad():
                x.clamp_(max=0.1)
        if step == saved_at:
            file = io.BytesIO()
            torch.save(smoother.state_dict(), file)
            file.seek(0)
            smoother.detach()
            smoother = WeightSmoother(optimizer, WINDOW)
            smoother.load_state_dict(torch.load(file, weights_only=True))
    return reports


def test_a_continuation_knows_of_an_edit_before_the_checkpoint() -> None:
    whole = reports_of(saved_at=None, edited_at=9)
    assert [i for i, one in enumerate(whole) if one.rsd] == [3, 7, 13], "it begins anew there"
    assert reports_of(saved_at=9, edited_at=9) == whole
    assert reports_of(saved_at=8, edited_at=9) == whole
    assert reports_of(saved_at=11, edited_at=9) == whole


def test_a_window_of_weights_that_were_unfrozen_since_goes_on() -> None:
    """The checkpoint is of a head and a body; they are frozen anew until the fit has begun."""
    head, body = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([head, body], lr=0.1)
    smoother = WeightSmoother(optimizer, WINDOW)

    def step() -> StepReport:
        for one in (head, body):
            one.grad = torch.ones_like(one)
        optimizer.step()
        return smoother.step()

    reports = [step() for _ in range(6)]
    state = smoother.state_dict()
    smoother.detach()
    optimizer.zero_grad()
    body.requires_grad_(False)
    smoother = WeightSmoother(optimizer, WINDOW)
    smoother.load_state_dict(state)
    body.requires_grad_(True)
    reports += [step() for _ in range(4)]
    assert [i for i, one in enumerate(reports) if one.rsd] == [3, 7]


def test_weights_that_join_begin_a_new_window() -> None:
    x, y = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5), requires_grad=False)
    optimizer = torch.optim.SGD([x, y], lr=0.1)
    smoother = WeightSmoother(optimizer, WINDOW)
    ends: list[int] = []
    for step in range(12):
        parameters: list[Tensor] = [one for one in (x, y) if one.requires_grad]
        for one in parameters:
            one.grad = torch.ones(5)
        optimizer.step()
        if smoother.step().rsd:
            ends.append(step)
        y.requires_grad_(step >= 4)
    assert ends == [3, 9], "after the first step of both, the 6th"
