"""What many processes cost: bytes, memory and time of an update, measured here and predicted there.

    python benchmarks/scaling.py                 # 1, 2 and 4 processes (gloo), and the prediction
    python benchmarks/scaling.py --json FILE     # the same, for machines
    python benchmarks/scaling.py --worlds        # only the prediction; what FILE has measured stays

Measured: default options, a loss that costs nothing, 160 tensors. Messages and bytes are what is
handed to torch.distributed, held to ``messages`` below by a test; seconds are medians of the
slowest rank by the wall clock, memory is resident memory. All processes share one machine.

Predicted: ``predict``, from the assumptions in ``SUMMIT`` and ``RESNET50``, each with its source.
Nothing of it was measured on such a machine.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from lightning_stableaa import AndersonAccelerator
from lightning_stableaa.distributed.communicator import GATHERED_AT_ONCE
from lightning_stableaa.options import Options

N = 5_000_000
TENSORS = 160  # as many as ResNet-50 has
HISTORIES = ("replicated", "sharded")


class Message(NamedTuple):
    """One collective: its name in torch.distributed, and the size of its (whole) result."""

    name: str
    elements: int
    bytes: int


def messages(
    history: str,
    *,
    n: int,
    differences: int,
    world: int,
    itemsize: int = 4,
    safeguard: bool = True,
    at_once: int | None = None,
) -> list[Message]:
    """What an update sends, in its order; every rank calls the same.

    Args:
        history: ``"replicated"`` or ``"sharded"``.
        n: weights.
        differences: q <= m, of consecutive iterates in the history.
        world: P, ranks.
        itemsize: bytes of a weight.
        safeguard: whether the loss of the candidate is evaluated.
        at_once: elements that one all-gather may have; ``None``: any, as on a GPU.
    """
    if world == 1:
        return []
    part = -(-n // world)
    piece = part if at_once is None else max(1, at_once // world)
    sizes = [world * min(piece, part - low) for low in range(0, part, piece)]
    gather = [Message("all_gather_into_tensor", size, size * itemsize) for size in sizes]
    gram = Message("all_reduce", differences**2, 8 * differences**2)
    # three kinds of events, six numbers of the step, and its coefficients
    step = Message("all_reduce", 9 + differences, 8 * (9 + differences))
    # two losses, overflow, repeatability, two kinds of errors, random numbers drawn
    numbers = 7 if safeguard else 1
    losses = Message("all_reduce", numbers, 8 * numbers)
    if history == "replicated":
        return [step, losses]
    return [gram, step, *gather, losses]


def vectors(history: str, *, depth: int, world: int) -> float:
    """Memory of a rank, in vectors of n elements."""
    return depth + 2 if history == "replicated" else (depth + 1) / world + 1


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """GPUs in nodes, and how long a collective takes: NCCL's own model of itself.

    Rings for all-gathers (protocol Simple), trees for the small rest (protocol LL).
    Source of the latencies and of both formulas: NVIDIA/nccl, src/graph/tuning.cc, commit 01afd20.
    """

    nodes: int
    gpus_per_node: int
    network: float  # bytes/s that a node sends
    memory: float  # bytes/s that a GPU reads or writes
    ring_start: float = 8.4e-6
    ring_in_node: float = 3.4e-6  # NVLink, one step
    ring_between: float = 9.6e-6
    tree_start: float = 4.4e-6
    tree_in_node: float = 1.8 * 0.52e-6
    tree_between: float = 5.0e-6

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    def seconds(self, message: Message) -> float:
        """Of one collective, on all GPUs."""
        if message.name == "all_gather_into_tensor":
            between = self.nodes - 1
            steps = between * self.ring_between + (self.ranks - 1 - between) * self.ring_in_node
            share = (self.ranks - 1) / self.ranks
            return self.ring_start + steps + share * message.bytes / self.network
        levels = math.log2(self.nodes)
        path = (self.gpus_per_node - 1) * self.tree_in_node + levels * self.tree_between
        return self.tree_start + 2 * path + message.bytes / self.network


# 23 GB/s of a node: olcf/olcf-user-docs, systems/summit_user_guide.rst (dual-rail EDR). 900 GB/s
# are the HBM2 of a V100; three quarters of it are assumed to be reached.
SUMMIT = Cluster(nodes=256, gpus_per_node=6, network=23e9, memory=0.75 * 900e9)


@dataclass(frozen=True, kw_only=True)
class Training:
    """One step of a model on one GPU; the all-reduce of its gradients is assumed to be hidden."""

    weights: int
    batch: int
    images_per_second: float
    forward_share: float = 1 / 3  # of a step; a backward pass takes twice a forward pass

    @property
    def step(self) -> float:
        return self.batch / self.images_per_second


# ResNet-50 on a V100 in a DGX-1, a quarter of four: NVIDIA/DeepLearningExamples, commit 20f0977
RESNET50 = {
    "float32": Training(weights=25_557_032, batch=128, images_per_second=1375.5 / 4),
    "mixed": Training(weights=25_557_032, batch=128, images_per_second=2886.9 / 4),
}


def predict(
    cluster: Cluster, training: Training, history: str, options: Options
) -> dict[str, float]:
    """Seconds that an update takes, by cause, and its share of the steps between two of them.

    Every update is taken to be accepted, the history to be full, and nothing to overlap.
    """
    depth, n = options.history_depth, training.weights
    safeguard = options.safeguard == "loss"
    share = cluster.ranks if history == "sharded" else 1
    sent = messages(
        history,
        n=n,
        differences=depth,
        world=cluster.ranks,
        safeguard=safeguard,
    )
    pushes = options.accelerate_every_n_steps // options.store_every_n_steps
    window = 4 * (depth + 1) * n / share
    vector = 4 * n
    parts = {
        "communication": sum(map(cluster.seconds, sent)),
        # the window for the Gram matrix and the candidate, which is written and copied
        "memory": (2 * window + 3 * vector + pushes * 2 * vector / share) / cluster.memory,
        "losses": 2 * safeguard * training.forward_share * training.step,
    }
    between = options.accelerate_every_n_steps * training.step
    return {
        **{f"{name}_ms": 1e3 * seconds for name, seconds in parts.items()},
        **{f"{name}_share": seconds / between for name, seconds in parts.items()},
        "overhead": sum(parts.values()) / between,
    }


def predictions() -> list[dict[str, Any]]:
    """ResNet-50 on 1,536 GPUs: the default schedule, and what would bring it under 1 %."""
    settings = {
        "default": Options(),
        "without a safeguard": Options(safeguard="none"),
        "every 200 steps": Options(accelerate_every_n_steps=200),
    }
    return [
        {"setting": setting, "precision": precision, "history": history}
        | predict(SUMMIT, training, history, options)
        for setting, options in settings.items()
        for precision, training in RESNET50.items()
        for history in HISTORIES
    ]


class Recorder:
    """Counts what is handed to torch.distributed while it is entered."""

    NAMES = ("all_reduce", "all_gather_into_tensor")

    def __init__(self) -> None:
        self.sent: list[Message] = []

    def __enter__(self) -> Recorder:
        self._originals = {name: getattr(dist, name) for name in self.NAMES}
        for name in self.NAMES:
            setattr(dist, name, functools.partial(self._record, name))
        return self

    def __exit__(self, *error: object) -> None:
        for name, original in self._originals.items():
            setattr(dist, name, original)

    def _record(self, name: str, tensor: Tensor, *rest: Any, **options: Any) -> Any:
        self.sent.append(Message(name, tensor.numel(), tensor.nbytes))
        return self._originals[name](tensor, *rest, **options)


def measure(history: str, n: int, updates: int = 5) -> dict[str, Any]:
    """Updates of this rank with a full window, default options but for a cycle of one step."""
    sizes = [n // TENSORS] * (TENSORS - 1)
    sizes.append(n - sum(sizes))
    parameters = [nn.Parameter(torch.linspace(1, 2, size)) for size in sizes]
    for one in parameters:
        one.grad = torch.zeros_like(one)
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    before = _resident()
    depth = Options.history_depth
    options: dict[str, Any] = {"history": history, "warmup_steps": depth + 1}
    accelerator = AndersonAccelerator(
        optimizer, store_every_n_steps=1, accelerate_every_n_steps=1, **options
    )
    seconds, sent = [], []
    for _ in range(depth + updates):
        for one in parameters:
            one.grad.copy_(one.detach())  # type: ignore[union-attr]
        optimizer.step()
        with Recorder() as recorder:
            start = time.perf_counter()
            # weights shrink, and the loss grows: rejected, so that the window stays full
            report = accelerator.step(lambda: -parameters[0].detach().sum(), stochastic=False)
            elapsed = time.perf_counter() - start
        if report.attempted:
            seconds.append(elapsed)
            sent.append(recorder.sent)
    expected = messages(
        history,
        n=n,
        differences=depth,
        world=dist.get_world_size(),
        at_once=GATHERED_AT_ONCE,
    )
    return {
        "update_ms": 1e3 * statistics.median(seconds),
        "messages": len(sent[-1]),
        "messages_by_formula": len(expected),
        "bytes": sum(one.bytes for one in sent[-1]),
        "bytes_by_formula": sum(one.bytes for one in expected),
        "vectors": (_resident() - before) / (4 * n),
        "vectors_by_formula": vectors(history, depth=depth, world=dist.get_world_size()),
    }


def measure_gather(n: int) -> dict[str, float]:
    """Start and bandwidth of an all-gather, a line through its times at several sizes."""
    world, rank = dist.get_world_size(), dist.get_rank()
    sizes, times = [], []
    for size in (world, n // 64, n // 16, n // 4):
        whole = torch.ones(size // world * world)
        part = whole.view(world, -1)[rank].clone()
        seconds = []
        for _ in range(5):
            dist.barrier()
            start = time.perf_counter()
            dist.all_gather_into_tensor(whole, part)
            seconds.append(time.perf_counter() - start)
        sizes.append(float(whole.nbytes))
        times.append(statistics.median(seconds))
    slope, start = statistics.linear_regression(sizes, times)
    return {"start_us": 1e6 * start, "gigabytes_per_second": 1e-9 / slope}


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _rank(rank: int, world: int, port: int, n: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    seen: dict[str, Any] = {history: measure(history, n) for history in HISTORIES}
    seen["gather"] = measure_gather(n) if world > 1 else {}
    Path(folder, f"{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


def measured(world: int, n: int) -> list[dict[str, Any]]:
    """One row a placement; times of the slowest rank, memory of the largest."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, args=(world, port, n, folder), nprocs=world)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]
    rows = []
    for history in HISTORIES:
        of_ranks = [seen[history] for seen in ranks]
        largest = {name: max(one[name] for one in of_ranks) for name in of_ranks[0]}
        rows.append({"world": world, "history": history, "n": n} | largest)
    rows[-1] |= {f"gather_{name}": value for name, value in ranks[0]["gather"].items()}
    return rows


def _print(title: str, rows: Sequence[dict[str, Any]]) -> None:
    print(f"\n{title}")
    for row in rows:
        cells = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        print("  ".join(cells))


def main() -> None:
    """Measure, predict, print, and write it where asked to."""
    parser = argparse.ArgumentParser(description="scaling of stable Anderson acceleration")
    parser.add_argument("--worlds", type=int, nargs="*", default=[1, 2, 4], help="processes")
    parser.add_argument("--weights", type=int, default=N, help="n")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # resident memory is memory in use
    rows = [row for world in arguments.worlds for row in measured(world, arguments.weights)]
    if not rows and arguments.json and arguments.json.exists():
        rows = json.loads(arguments.json.read_text())["measured"]
    results: dict[str, Any] = {
        "measured": rows,
        "measured on GPUs": [],  # NCCL: not measured yet
        "assumptions": {
            "cluster": asdict(SUMMIT),
            "training": {name: asdict(one) for name, one in RESNET50.items()},
        },
        "predicted": predictions(),
    }
    for title in ("measured", "predicted"):
        _print(title, results[title])
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
