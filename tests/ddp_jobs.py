"""What the ranks of tests/test_ddp.py run; imported by the processes that it starts."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import socket
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import mse_loss

from lightning_stableaa import AndersonAccelerator
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
from tests.judges import OfSample

WORLD = 2


def main(rank: int, port: int, folder: str) -> None:
    """All jobs in one pair of processes; each rank writes what it saw to ``folder``."""
    join(rank, port, WORLD)
    jobs = {
        "replicated": lambda: train(anderson(), epochs=25),
        "nan judge": lambda: train(anderson(), kind=OneRankJudgesNaN, epochs=2),
        "plain": lambda: train(epochs=2),
        "nan loss": lambda: train(anderson(), kind=OneRankLosesItself, epochs=3),
        "sharded": lambda: train(anderson(history="sharded"), epochs=5),
        "resume": lambda: resume(Path(folder), history="replicated"),
        "resume sharded": lambda: resume(Path(folder), history="sharded"),
        "traffic": traffic,
        "auto": lambda: auto(anderson(history="auto")),
        "local state": local_state,
        "spoiled": spoiled,
        "confirmed": confirmed,
        "amid noise": amid_noise,
    }
    run(jobs, rank, folder)


def run(jobs: dict[str, Callable[[], Any]], rank: int, folder: str) -> None:
    """What the jobs return, in the file of this rank; then leave the others."""
    torch.save({name: job() for name, job in jobs.items()}, Path(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()


def start(main: Callable[..., None], folder: Path, world: int) -> tuple[dict[str, Any], ...]:
    """Run ``main(rank, port, folder)`` in so many processes; what each of them wrote."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(main, args=(port, str(folder)), nprocs=world, daemon=True)
    return tuple(torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world))


def join(rank: int, port: int, world: int) -> None:
    """Make this process one of ``world``; Lightning takes them for torchrun's."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of Lightning, about loaders; they are not the subject
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "TORCHELASTIC_RUN_ID": "none",
    }
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))  # no job may hang


class Normalised(Regression):
    """With batch statistics, that differ from rank to rank, and a weight count that is odd."""

    def __init__(self) -> None:
        super().__init__(
            network(nn.Linear(INPUTS, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
        )


class OneRankJudgesNaN(Normalised):
    def anderson_loss(self, batch: Any) -> Tensor:
        x, y = batch
        return mse_loss(self.network(x), y) * (float("nan") if self.global_rank == 1 else 1.0)


class OneRankLosesItself(Normalised):
    """One batch of one rank has a loss of NaN: from then on, all weights are NaN."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        broken = self.global_rank == 1 and (self.current_epoch, batch_idx) == (1, 2)
        return loss * float("nan") if broken else loss


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def digest(module: nn.Module) -> str:
    return hashlib.sha256(flat(module).numpy().tobytes()).hexdigest()


def train(
    *callbacks: Any, kind: Any = Normalised, epochs: int, ckpt_path: Any = None
) -> dict[str, Any]:
    """Lightning under DDP, 8 steps an epoch; each rank has its own half of the samples.

    On batches as noisy as these, some candidates are accepted and some are not.
    """
    module = kind()
    trace = Record(lambda _, module: digest(module))
    first: list[Tensor] = []

    def keep_first(*_: Any) -> None:
        if callbacks and not first and callbacks[0].accelerator.accepted:
            first.append(flat(module))

    options: dict[str, Any] = QUIET | {"devices": WORLD, "strategy": "ddp", "max_epochs": epochs}
    trainer = lightning.pytorch.Trainer(
        **options, callbacks=[*callbacks, trace, Record(keep_first)]
    )
    trainer.fit(module, batches(2 * 8, noise=0.3), ckpt_path=ckpt_path)
    return {
        "trace": trace.values,
        "weights": flat(module),
        "buffers": torch.cat([b.flatten().double() for b in module.buffers()]),
        "after first acceptance": first,
        "counters": callbacks[0].state_dict()["counters"] if callbacks else {},
        "outcomes": callbacks[0].state_dict()["outcomes"] if callbacks else {},
        "steps": trainer.global_step,
    }


class SaveAt(lightning.pytorch.Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def resume(folder: Path, *, history: Any) -> dict[str, Any]:
    """Two epochs at once, and the second one again from the checkpoint between them."""
    # a cycle of three is open at the checkpoint, and the order of the samples is fixed
    options: Any = {
        "store_every_n_steps": 3,
        "accelerate_every_n_steps": 6,
        "regularization": [1e-2, 1.0],
        "lag_compensation": 0.0,  # averages lower the loss of noisy batches
        "history": history,
    }
    path = folder / f"{history}.ckpt"
    whole = train(anderson(**options), SaveAt(8, path), epochs=3)
    dist.barrier()
    return {"whole": whole, "resumed": train(anderson(**options), epochs=3, ckpt_path=path)}


def auto(callback: Any) -> dict[str, Any]:
    """What the history's placement is, and the sentence that says why."""
    said = []

    class Listens(lightning.pytorch.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            said.append(callback.accelerator.placement_reason)

    train(callback, Listens(), epochs=1)
    return {"said": said[0]}


def local_state() -> dict[str, Any]:
    """A loop of one's own saves one state a rank; and the whole one, for the process that tests."""
    options: dict[str, Any] = {"history": "sharded", "accelerate_every_n_steps": 3}
    whole, again = Quadratic(51, **options), Quadratic(51, **options)
    for _ in range(7):
        whole.step()
    state, gathered = whole.accelerator.state_dict(), whole.accelerator.whole_state_dict()
    at_saving = whole.x.detach().clone()
    with torch.no_grad():
        again.x.copy_(whole.x)
    again.accelerator.load_state_dict(state)
    for problem in (whole, again):
        for _ in range(8):
            problem.step()
    return {
        "shard": state["shard"],
        "rows": state["points"]["history"]["rows"].shape,
        "equal": torch.equal(whole.x, again.x),
        "accepted": (whole.accelerator.accepted, again.accelerator.accepted),
        "gathered": gathered,
        "at saving": at_saving,
        "end": whole.x.detach().clone(),
    }


class Quadratic:
    """The same on every rank: 1/2 sum_i a_i x_i^2 with ``n`` unknowns, gradient descent."""

    def __init__(self, n: int, **options: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = nn.Parameter(torch.randn(n, generator=generator))
        self.a = torch.logspace(0, -3, n)
        self.optimizer = torch.optim.SGD([self.x], lr=1.0)
        setting: dict[str, Any] = SETTING | {"history_depth": 5, "store_every_n_steps": 1} | options
        self.accelerator = AndersonAccelerator(self.optimizer, **setting)

    def loss(self) -> Tensor:
        return 0.5 * (self.a * self.x * self.x).sum()

    def step(self, *, spoil: bool = False) -> Any:
        self.optimizer.zero_grad()
        (self.loss() * (float("nan") if spoil else 1.0)).backward()
        self.optimizer.step()
        return self.accelerator.step(OfSample(self.loss, self.confirming))

    confirming: Callable[[], Tensor] | None = None


def spoiled(steps: int = 12) -> dict[tuple[str, str], Any]:
    """One gradient of the second rank is NaN, and nobody averages gradients."""
    seen = {}
    for history in ("replicated", "sharded"):
        for safeguard in ("loss", "none"):
            options: dict[str, Any] = {"history": history, "safeguard": safeguard}
            if safeguard == "none":
                options["regularization"] = 1e-4
            problem = Quadratic(51, accelerate_every_n_steps=2, **options)
            statuses = []
            for step in range(steps):
                spoil = step == 4 and dist.get_rank() == 1
                report = problem.step(spoil=spoil)
                if report.attempted:
                    statuses.append(report.status.value)
            finite = bool(problem.x.isfinite().all())
            seen[history, safeguard] = {"statuses": statuses, "finite": finite}
    return seen


def confirmed() -> dict[str, Any]:
    """The losses that have to agree differ from rank to rank."""
    second = dist.get_rank() == 1
    seen = {}
    for history, (name, factor) in itertools.product(
        ("replicated", "sharded"),
        {"yes": 0.5, "no": -2.0, "NaN": float("nan"), "one": 1.0}.items(),
    ):
        problem = Quadratic(51, history=history, accelerate_every_n_steps=2)
        if second or name != "one":
            problem.confirming = lambda p=problem, f=factor: p.loss() * (f if second else 1.0)
        reports = [problem.step() for _ in range(12)]
        seen[history, name] = {
            "statuses": [report.status.value for report in reports if report.attempted],
            "losses": problem.accelerator.loss_evaluations,
            "x": problem.x.detach().clone(),
        }
    return seen


def amid_noise() -> dict[str, Any]:
    """Orthogonal steps; the loss of training is unknown to one rank once, and leaps for the other.

    The third and the sixth extrapolation, before the last one.
    """
    losses = [1.0, 1.0, float("nan"), 1.0, 1.0, 41.0, 1.0] if dist.get_rank() else [1.0] * 7
    seen = {}
    for history in ("replicated", "sharded"):
        x = nn.Parameter(torch.zeros(51, dtype=torch.float64))
        optimizer = torch.optim.SGD([x], lr=1.0)
        accelerator = AndersonAccelerator(
            optimizer, history=history, store_every_n_steps=1, accelerate_every_n_steps=4
        )
        statuses, asked, sent = [], [], []
        for step in range(4 * len(losses)):
            x.grad = torch.zeros_like(x)
            x.grad[step] = 1.0
            optimizer.step()
            answers = iter([9.0, 0.1])
            judge = OfSample(
                lambda answers=answers: torch.tensor(next(answers)), training_loss=losses[step // 4]
            )
            before = accelerator.loss_evaluations
            with Traffic() as one:
                report = accelerator.step(judge)
            if report.attempted:
                statuses.append(report.status.value)
                asked.append(accelerator.loss_evaluations - before)
                sent.append([number for name, number in one.sent if name == "all_reduce"])
        seen[history] = {"statuses": statuses, "asked": asked, "sent": sent, "x": x.detach()}
    return seen


class Traffic:
    """Records what collectives send while it is entered: their names and counts of numbers."""

    NAMES = ("all_reduce", "broadcast", "all_gather_into_tensor")

    def __init__(self) -> None:
        self.sent: list[tuple[str, int]] = []
        self.bytes = 0

    def __enter__(self) -> Traffic:
        self.originals = {name: getattr(dist, name) for name in self.NAMES}
        for name in self.NAMES:
            setattr(dist, name, functools.partial(self._record, name))
        return self

    def __exit__(self, *error: object) -> None:
        for name, original in self.originals.items():
            setattr(dist, name, original)

    def _record(self, name: str, tensor: Tensor, *rest: Any, **options: Any) -> Any:
        self.sent.append((name, tensor.numel()))
        self.bytes += tensor.nbytes
        return self.originals[name](tensor, *rest, **options)


def traffic() -> dict[str, Any]:
    """What every update sends, and what the steps between send, all together.

    Of several candidates, one of a small lambda is the best, and is not judged last.
    """
    seen = {}
    for history, n, candidates in itertools.product(("replicated", "sharded"), (51, 5001), (1, 5)):
        grid = SETTING["regularization"]
        assert len(grid) == 5
        problem = Quadratic(n, history=history, regularization=grid[:candidates])
        updates, sent_bytes, between = [], set(), Traffic()
        for _ in range(12):
            with Traffic() as one:
                report = problem.step()
            if report.attempted:
                updates.append((report.accepted, one.sent))
                sent_bytes.add(one.bytes)
            else:
                between.sent += one.sent
        seen[history, n, candidates] = {
            "updates": updates,
            "bytes": sent_bytes,
            "between": between.sent,
        }
    return seen
