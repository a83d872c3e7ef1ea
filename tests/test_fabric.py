"""Loops of Lightning Fabric: the same steps as those of plain torch, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from lightning_stableaa import AndersonAccelerator, Smoothing, Status
from tests.helpers.problems import assert_bitwise_equal

OPTIONS: dict[str, Any] = {
    "store_every_n_steps": 3,
    "accelerate_every_n_steps": 6,
    "regularization": 1e-2,
    "smoothing": Smoothing(rsd_threshold=0.3),
}


def train(
    fabric: Fabric | None, *, resume_at: int | None = None, path: Any = None
) -> tuple[list[Tensor], AndersonAccelerator]:
    """30 steps; without ``fabric`` in a plain loop."""

    def build() -> tuple[Any, Any, AndersonAccelerator]:
        torch.manual_seed(0)
        net: Any = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.02)
        if fabric is not None:
            net, optimizer = fabric.setup(net, optimizer)
        return net, optimizer, AndersonAccelerator(optimizer, **OPTIONS)

    net, optimizer, accelerator = build()
    x = torch.randn(32, 4)
    y = x.sum(dim=1, keepdim=True).sin()
    for step in range(30):
        if fabric is not None and step == resume_at:
            own = {"net": net, "optimizer": optimizer, "anderson": accelerator.state_dict()}
            fabric.save(path, own)
            net, optimizer, accelerator = build()
            rest = fabric.load(path, {"net": net, "optimizer": optimizer}, weights_only=True)
            accelerator.load_state_dict(rest["anderson"])
        optimizer.zero_grad()
        loss = mse_loss(net(x), y)
        loss.backward() if fabric is None else fabric.backward(loss)
        optimizer.step()
        accelerator.step(lambda net=net: mse_loss(net(x), y), stochastic=False)
    return [one.detach() for one in net.parameters()], accelerator


def test_fabric_loop_resumed_or_not_is_bitwise_the_plain_loop(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    plain, own = train(None)
    for options in ({}, {"resume_at": 17, "path": tmp_path / "stop.ckpt"}):
        weights, accelerator = train(fabric, **options)
        assert_bitwise_equal(weights, plain)
        assert accelerator.outcomes == own.outcomes
    assert own.outcomes[Status.ACCEPTED] >= 1
