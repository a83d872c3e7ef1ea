"""The engine in loops of Lightning Fabric and of plain torch: the same steps, the same bits."""

from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor
from torch.nn.functional import mse_loss

from lightning_stableaa import AndersonAccelerator, Smoothing
from tests.callbacks.regression import SETTING, batches, network, weights

OPTIONS: dict[str, Any] = SETTING | {"smoothing": Smoothing(rsd_threshold=0.02)}


def plain_loop(steps: int) -> tuple[Tensor, AndersonAccelerator]:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    accelerator = AndersonAccelerator(optimizer, **OPTIONS)
    ((x, y),) = batches(1)
    for _ in range(steps):
        optimizer.zero_grad()
        mse_loss(net(x), y).backward()
        optimizer.step()
        accelerator.step(lambda: mse_loss(net(x), y))
    return weights(net), accelerator


def fabric_loop(
    steps: int, *, precision: Any = "32-true", resume_at: int | None = None, path: Any = None
) -> tuple[Tensor, AndersonAccelerator]:
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)

    def build() -> tuple[Any, Any, AndersonAccelerator]:
        net = network()
        net, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9))
        return net, optimizer, AndersonAccelerator(optimizer, **OPTIONS)

    def loss() -> Tensor:
        return mse_loss(net(x), y)

    net, optimizer, accelerator = build()
    ((x, y),) = fabric.setup_dataloaders(batches(1))
    for step in range(steps):
        if step == resume_at:
            fabric.save(
                path, {"net": net, "optimizer": optimizer, "anderson": accelerator.state_dict()}
            )
            net, optimizer, accelerator = build()
            rest = fabric.load(path, {"net": net, "optimizer": optimizer}, weights_only=True)
            accelerator.load_state_dict(rest["anderson"])
        optimizer.zero_grad()
        fabric.backward(loss())
        optimizer.step()
        accelerator.step(loss)
    return weights(net), accelerator


def test_fabric_trains_as_a_plain_loop_does() -> None:
    plain, own = plain_loop(30)
    fabric, wrapped = fabric_loop(30)

    assert torch.equal(plain, fabric)
    assert wrapped.optimizer_steps == own.optimizer_steps == 30
    assert wrapped.outcomes == own.outcomes
    assert own.accepted >= 1


def test_fabric_saves_and_loads_the_engine(tmp_path: Any) -> None:
    whole, first = fabric_loop(30)
    resumed, second = fabric_loop(30, resume_at=17, path=tmp_path / "stop.ckpt")

    assert torch.equal(whole, resumed)
    assert first.outcomes == second.outcomes


def test_fabric_in_mixed_precision() -> None:
    final, accelerator = fabric_loop(30, precision="bf16-mixed")

    assert accelerator.optimizer_steps == 30
    assert bool(final.isfinite().all())


def test_the_wrapped_optimizer_is_refused_for_what_it_wraps() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    net = network()
    _, optimizer = fabric.setup(net, torch.optim.LBFGS(net.parameters()))
    with pytest.raises(ValueError, match=r"^optimizer must make one update a step, got LBFGS"):
        AndersonAccelerator(optimizer)
