"""What the ranks of tests/test_fsdp.py run: weights of which every process holds a part."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.functional import mse_loss

from lightning_stableaa import AndersonAccelerator, Smoothing
from lightning_stableaa.averaging import WeightSmoother
from lightning_stableaa.dtensors import whole
from tests.callbacks.regression import (
    INPUTS,
    QUIET,
    SETTING,
    Record,
    Regression,
    anderson,
    batches,
    network,
)
from tests.ddp_jobs import SaveAt, join, run

WORLD = 2


def main(rank: int, port: int, folder: str) -> None:
    """All jobs in one pair of processes; each rank writes what it saw to ``folder``."""
    join(rank, port, WORLD)
    jobs = {
        "ddp": lambda: train(anderson(), split=False),
        "fsdp": lambda: train(anderson()),
        "ddp float64": lambda: train(anderson(), split=False, dtype=torch.float64),
        "fsdp float64": lambda: train(anderson(), dtype=torch.float64),
        "nan": lambda: train(anderson(), kind=OneShardIsLost, epochs=3),
        "evaluation ddp": lambda: evaluate(Path(folder, "ddp"), split=False),
        "evaluation": lambda: evaluate(Path(folder, "parts"), split=True),
        "resume": lambda: resume(Path(folder, "folder.ckpt"), distributed=True),
        "resume one file": lambda: resume(Path(folder, "file.ckpt"), distributed=False),
        "layouts": lambda: {name: minimise(layout) for name, layout in LAYOUTS.items()},
        "averages": lambda: {name: average(layout) for name, layout in LAYOUTS.items()},
        "refused": refusals,
    }
    run(jobs, rank, folder)


class Sharded(Regression):
    """Uneven shards, some of them empty, in two modules of which the outer one holds the inner."""

    def __init__(self, dtype: torch.dtype, *, split: bool) -> None:
        layers = [nn.Linear(INPUTS, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 1)]
        super().__init__(network(*layers).to(dtype))
        self.dtype_of_data = dtype
        self.split = split

    def configure_model(self) -> None:
        if self.split and not isinstance(next(self.parameters()), DTensor):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.network[0], mesh=mesh)
            fully_shard(self.network, mesh=mesh)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [one.to(self.dtype_of_data) for one in batch]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val/loss", mse_loss(self.network(x), y), sync_dist=True)


class OneShardIsLost(Sharded):
    """From one step on, what one rank holds of the weights is NaN."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.global_rank == 1 and self.trainer.global_step == 10:
            for parameter in self.parameters():
                parameter.grad.to_local().fill_(float("nan"))


def flat(parameters: Iterable[Tensor]) -> Tensor:
    """The whole weights, on every rank."""
    return torch.cat([whole(one).detach().flatten() for one in parameters])


def train(
    *callbacks: Any,
    kind: Any = Sharded,
    split: bool = True,
    distributed: bool = True,
    dtype: torch.dtype = torch.float32,
    epochs: int = 5,
    ckpt_path: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """8 steps an epoch; each rank has its own half of the samples."""
    module = kind(dtype, split=split)
    strategy = ModelParallelStrategy(WORLD, 1, save_distributed_checkpoint=distributed)
    trace = Record(lambda _, module: flat(module.parameters()))
    first: list[Tensor] = []

    def keep_first(*_: Any) -> None:
        if callbacks and not first and callbacks[0].accelerator.accepted:
            first.append(flat(module.parameters()))

    trainer = lightning.pytorch.Trainer(
        **QUIET
        | {"devices": WORLD, "strategy": strategy if split else "ddp", "max_epochs": epochs}
        | options,
        callbacks=[*callbacks, trace, Record(keep_first)],
    )
    judged = batches(2, noise=0.3) if "limit_val_batches" in options else None
    trainer.fit(module, batches(2 * 8, noise=0.3), judged, ckpt_path=ckpt_path)
    return {
        "trace": torch.stack(trace.values),
        "after first acceptance": first,
        "counters": callbacks[0].state_dict()["counters"] if callbacks else {},
        "outcomes": callbacks[0].state_dict()["outcomes"] if callbacks else {},
        "steps": trainer.global_step,
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "end": flat(module.parameters()),
    }


def resume(path: Path, *, distributed: bool) -> dict[str, Any]:
    """Three epochs at once, and the last two again from the checkpoint between them."""
    # a cycle of three is open at the checkpoint
    options: Any = {
        "store_every_n_steps": 3,
        "accelerate_every_n_steps": 6,
        "optimizer_state": "mix",
        "smoothing": Smoothing(rsd_threshold=0.01),
    }
    how: Any = {"distributed": distributed, "epochs": 3}
    undisturbed = train(anderson(**options), SaveAt(8, path), **how)
    dist.barrier()
    return {
        "whole": undisturbed,
        "resumed": train(anderson(**options), ckpt_path=path, **how),
        "is folder": path.is_dir(),
    }


def evaluate(path: Path, *, split: bool) -> dict[str, Any]:
    """Validation and checkpoints see the candidate, training does not."""
    how: Any = {"split": split, "distributed": False, "limit_val_batches": 1, "epochs": 3}
    options: Any = {"apply_to": "evaluation"}
    undisturbed = train(anderson(**options), SaveAt(16, path), **how)
    dist.barrier()
    resumed = train(anderson(**options), ckpt_path=path, **how)
    return {
        "whole": undisturbed,
        "resumed": resumed,
        "saved": torch.load(path, weights_only=True)["state_dict"],
    }


class Minimisation:
    """1/2 sum_i a_i x_i^2 over several tensors, laid out over the ranks; gradient descent."""

    def __init__(self, lay_out: LayOut, dtype: torch.dtype, **options: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = [(5,), (3, 4), (7, 3), (1,), (6,)]
        values = [torch.randn(one, generator=generator, dtype=dtype) for one in shapes]
        self.parameters = [nn.Parameter(one) for one in lay_out(values)]
        self.a = torch.logspace(0, -3, sum(one.numel() for one in values), dtype=dtype)
        self.optimizer = torch.optim.SGD(self.parameters, lr=0.5, momentum=0.5)
        setting: dict[str, Any] = SETTING | {"store_every_n_steps": 4} | options
        self.accelerator = AndersonAccelerator(self.optimizer, **setting)

    def loss(self) -> Tensor:
        x = torch.cat([whole(one).flatten() for one in self.parameters])
        return 0.5 * (self.a * x * x).sum()

    def step(self) -> Any:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()
        return self.accelerator.step(self.loss)


LayOut = Callable[[list[Tensor]], list[Tensor]]


def _laid_out(shape: tuple[int, ...], placements: list[Any]) -> LayOut:
    """The placements of one tensor after another; ``None``: every rank has the plain tensor."""

    def lay_out(values: list[Tensor]) -> list[Tensor]:
        mesh = init_device_mesh("cpu", shape)
        return [
            value if placement is None else distribute_tensor(value, mesh, placement)
            for value, placement in zip(values, placements, strict=True)
        ]

    return lay_out


_ROWS, _COLUMNS, _SAME = [Shard(0)], [Shard(1)], [Replicate()]
_BOTH, _ROWS_OF_SAME = [Shard(0), Shard(1)], [Shard(0), Replicate()]
LAYOUTS: dict[str, LayOut] = {
    "plain": list,
    "mixed": _laid_out((2,), [_ROWS, _SAME, _COLUMNS, _ROWS, None]),
    "replicas of shards": _laid_out((2, 1), [[Replicate(), Shard(0)]] * 4 + [None]),
    "two dimensions": _laid_out((1, 2), [_ROWS_OF_SAME, _BOTH, _BOTH, _ROWS_OF_SAME, None]),
}

CASES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "float64": (torch.float64, {}),
    "mix": (torch.float64, {"optimizer_state": "mix", "smoothing": Smoothing(rsd_threshold=0.01)}),
    "reset": (torch.float64, {"optimizer_state": "reset", "smoothing": Smoothing(of="updates")}),
    "max": (torch.float64, {"smoothing": Smoothing(rsd="max")}),
}


def minimise(lay_out: LayOut) -> dict[str, Any]:
    """Weights after a few updates, and what was measured on the way."""
    seen: dict[str, Any] = {}
    for name, (dtype, options) in CASES.items():
        problem = Minimisation(lay_out, dtype, **options)
        reports = [problem.step() for _ in range(16)]
        seen[name] = {
            "weights": flat(problem.parameters),
            "accepted": problem.accelerator.accepted,
            "norms": [one.residual_norm for one in reports if one.attempted],
            "rsd": [one.rsd for one in reports if one.rsd is not None],
            "state": problem.accelerator.whole_state_dict(),
        }
    return seen


def average(lay_out: LayOut) -> dict[str, Any]:
    """Smoothing without acceleration."""
    problem = Minimisation(lay_out, torch.float64)
    problem.accelerator.detach()
    options: Any = {"average_window": 3, "rsd_threshold": 0.0, "apply_to": "weights"}
    smoother = WeightSmoother(problem.optimizer, Smoothing(**options))
    rsd = []
    for _ in range(6):
        problem.step()
        rsd.append(smoother.step().rsd)
    return {"rsd": [rsd[2], rsd[5]], "weights": flat(problem.parameters)}


def refusals() -> dict[str, str]:
    """Messages."""
    parts = LAYOUTS["mixed"]
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    problem = Minimisation(parts, torch.float32, process_group=alone)
    return {
        "replicas": message(lambda: Minimisation(parts, torch.float32, history="replicated")),
        "group": message(problem.step),
    }


def message(function: Callable[[], object]) -> str:
    try:
        function()
    except ValueError as error:
        return str(error)
    return "nothing was refused"
