"""What acceleration costs: an update against the memory floor, a push, a step, a model's step.

    python benchmarks/cost.py                 # tables
    python benchmarks/cost.py --json FILE     # the same, for machines
    python benchmarks/cost.py --plot FILE     # update and push against n and m, with their floors

The floor of an update reads the window twice (Gram, combination) and writes the weights once:
2 (m + 1) n reads and n writes, at the bandwidth at which the same run copies a block as large as
the window; that of a push is a copy. The floor of the safeguard is as many bare forward passes as
it asks for losses. Figures are medians, ratios are taken within one run. On a CPU with one thread,
the default, times are processor time, so that other programs on the same cores do not count.
"""

from __future__ import annotations

import argparse
import copy
import io
import itertools
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from lightning_stableaa import AndersonAccelerator
from lightning_stableaa.core.anderson import anderson_step
from lightning_stableaa.distributed.communicator import Communicator
from lightning_stableaa.model.iterates import IterateStore
from lightning_stableaa.options import Options
from lightning_stableaa.recipes.files import write_atomically

DEPTH = 10
IDLE_STEPS = 5000
LARGEST_COPY = 1 << 26  # elements, 256 MiB: beyond any cache
TENSORS = 160  # as many as ResNet-50 has
SIZES = (5_000_000, 25_600_000)
STEPS = Options.accelerate_every_n_steps
PLOTTED_SIZES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)
PLOTTED_SIZE = 2_000_000
PLOTTED_DEPTHS = (2, 5, 10, 20, 50)

Row = dict[str, float | str]


class Clock:
    """Seconds of one call: of the device where it is a GPU, else of the processor."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._now = (
            time.perf_counter if self._cuda or torch.get_num_threads() > 1 else time.process_time
        )

    def once(self, function: Callable[[], object]) -> float:
        """Of a single call."""
        self._wait()
        start = self._now()
        function()
        self._wait()
        return self._now() - start

    def median(
        self,
        function: Callable[[], object],
        *,
        before: Callable[[], object] = lambda: None,
        repeats: int = 9,
    ) -> float:
        """Median of calls, after one to warm up; what comes ``before`` each is not counted."""
        times = []
        for _ in range(repeats + 1):
            before()
            times.append(self.once(function))
        return statistics.median(times[1:])

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


def filled_store(n: int, depth: int, device: torch.device) -> IterateStore:
    """A full window of n weights in as many tensors as a ResNet-50 has."""
    sizes = [n // TENSORS] * (TENSORS - 1)
    sizes.append(n - sum(sizes))
    parameters = [nn.Parameter(torch.randn(size, device=device)) for size in sizes if size]
    store = IterateStore(parameters, depth=depth, communicator=Communicator())
    for _ in range(depth + 1):
        move(store)
        store.push_weights()
    return store


def move(store: IterateStore) -> None:
    """What an optimizer does: the weights of the next iterate."""
    with torch.no_grad():
        for parameter in store.parameters:
            parameter.add_(parameter, alpha=1e-3)


def update(store: IterateStore) -> None:
    """Gram matrix, solve, combination, write."""
    step = anderson_step(store.gram(), store.history.is_residual, regularization=1e-6)
    store.form_candidate(step.coefficients)
    store.weights.write(store.candidate)


def textbook(iterates: Sequence[Tensor]) -> Tensor:
    """The usual route: stack, difference, least squares on the changes of the residuals."""
    x = torch.stack(list(iterates), dim=1)
    residuals = x[:, 1:] - x[:, :-1]
    changes = residuals[:, 1:] - residuals[:, :-1]
    gamma = torch.linalg.lstsq(changes, residuals[:, -1:]).solution
    return x[:, -1] - ((x[:, 2:] - x[:, 1:-1]) @ gamma)[:, 0]


def measure_copy(n: int, depth: int, clock: Clock, device: torch.device, *, repeats: int) -> float:
    """Seconds to copy n elements, at the bandwidth of a block as large as the window.

    Source and target of n elements alone may stay in a cache that the window does not fit into.
    """
    size = max(n, min((depth + 1) * n, LARGEST_COPY))
    source, target = torch.randn(size, device=device), torch.empty(size, device=device)
    return clock.median(lambda: target.copy_(source), repeats=repeats) * n / size


def measure_update(n: int, depth: int, device: torch.device) -> Row:
    """An update after one new iterate, and a push, beside the floor and a copy."""
    clock = Clock(device)
    repeats = 9 if n <= 30_000_000 else 3
    copying = measure_copy(n, depth, clock, device, repeats=4 * repeats)
    store = filled_store(n, depth, device)

    def step_and_push() -> None:
        move(store)
        store.push_weights()

    updating = clock.median(lambda: update(store), before=step_and_push, repeats=repeats)
    gram = clock.median(store.gram, before=step_and_push, repeats=repeats)
    pushing = clock.median(store.push_weights, before=lambda: move(store), repeats=repeats)
    floor = (2 * (depth + 1) + 1) / 2 * copying  # a copy moves 2 n elements
    return {
        "n": n,
        "m": depth,
        "copy_ms": 1e3 * copying,
        "floor_ms": 1e3 * floor,
        "update_ms": 1e3 * updating,
        "gram_ms": 1e3 * gram,
        "push_ms": 1e3 * pushing,
        "update_over_floor": updating / floor,
        "push_over_copy": pushing / copying,
    }


def measure_textbook(n: int, depth: int, device: torch.device) -> Row:
    """The textbook route beside ours."""
    clock = Clock(device)
    store = filled_store(n, depth, device)
    iterates = [torch.randn(n, device=device) for _ in range(depth + 1)]

    def step_and_push() -> None:
        move(store)
        store.push_weights()

    ours = clock.median(lambda: update(store), before=step_and_push, repeats=5)
    theirs = clock.median(lambda: textbook(iterates), repeats=3)
    return {"n": n, "m": depth, "textbook_ms": 1e3 * theirs, "textbook_over_update": theirs / ours}


def measure_idle_step(device: torch.device) -> Row:
    """What the accelerator does in a step on which nothing is due: its two hooks and ``step``.

    Clocks stand before and after each of them, and their own time is taken off: a difference
    of steps with and without it varies by more from run to run.
    """
    parameters = [nn.Parameter(torch.ones(4, device=device)) for _ in range(TENSORS)]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.SGD(parameters, lr=0.0, foreach=True)
    times: list[float] = []

    def look(*_: object) -> None:
        times.append(time.thread_time())

    optimizer.register_step_pre_hook(look)
    optimizer.register_step_post_hook(look)
    accelerator = AndersonAccelerator(
        optimizer, store_every_n_steps=10**6, accelerate_every_n_steps=10**6, safeguard="none"
    )
    optimizer.register_step_pre_hook(look)
    optimizer.register_step_post_hook(look)

    def step() -> float:
        times.clear()
        optimizer.step()
        look()
        accelerator.step()
        look()
        look()
        spent = sum(times[1:6:2]) - sum(times[0:6:2])
        return spent - 3 * (times[6] - times[5])

    added = [step() for _ in range(IDLE_STEPS)]
    return {"tensors": TENSORS, "added_us": 1e6 * statistics.median(added[IDLE_STEPS // 10 :])}


def models() -> dict[str, tuple[nn.Module, Callable[[], tuple[Tensor, Tensor]], Any, int]]:
    """Network, batch, loss and cycles to measure, small and large."""
    from lightning_stableaa.recipes.images.networks import resnet_small

    def mlp(*widths: int) -> nn.Module:
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.Tanh()]
        return nn.Sequential(*layers[:-1])

    def images(count: int, size: int) -> Callable[[], tuple[Tensor, Tensor]]:
        return lambda: (torch.randn(count, 3, size, size), torch.randint(10, (count,)))

    return {
        "MLP 7-64-64-64-1, batch 40": (
            mlp(7, 64, 64, 64, 1),
            lambda: (torch.randn(40, 7), torch.randn(40, 1)),
            mse_loss,
            300,
        ),
        "MLP 2-20x8-1, 4400 points": (
            mlp(2, *[20] * 8, 1),
            lambda: (torch.randn(4400, 2), torch.randn(4400, 1)),
            mse_loss,
            40,
        ),
        "small ResNet, 128 images of 32 x 32": (
            resnet_small(num_classes=10, width=16, small_images=True),
            images(128, 32),
            cross_entropy,
            9,
        ),
    }


def measure_model(
    name: str,
    model: nn.Module,
    batch: Callable[[], Any],
    loss: Any,
    cycles: int,
) -> Row:
    """The default schedule, safeguard included, beside the same steps without it.

    Cycles with and without it take turns, so that both see the same machine.

    Args:
        cycles: measured, after three that fill the history.
    """
    clock = Clock(torch.device("cpu"))
    inputs, targets = batch()
    accelerated = copy.deepcopy(model)
    plain_optimizer, optimizer = (
        torch.optim.SGD(one.parameters(), lr=1e-6) for one in (model, accelerated)
    )

    def loss_of(network: nn.Module) -> Tensor:
        return loss(network(inputs), targets)

    def plain_cycle() -> None:
        for _ in range(STEPS):
            plain_optimizer.zero_grad()
            loss_of(model).backward()
            plain_optimizer.step()

    def accelerated_cycle() -> None:
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss_of(accelerated).backward()
            optimizer.step()
            accelerator.step(lambda: loss_of(accelerated), stochastic=False)

    def bare_losses() -> None:
        for _ in range(accelerator.loss_evaluations // accelerator.attempted):
            loss_of(model)

    plain_cycle()
    accelerator = AndersonAccelerator(optimizer)
    for _ in range(3):
        accelerated_cycle()
    turns = [
        [clock.once(one) for one in (plain_cycle, accelerated_cycle, bare_losses)]
        for _ in range(cycles)
    ]
    before, after, losses = (statistics.median(times) for times in zip(*turns, strict=True))
    return {
        "model": name,
        "parameters": sum(one.numel() for one in model.parameters()),
        "step_ms": 1e3 * before / STEPS,
        "overhead": after / before - 1,
        "floor": losses / before,
        "losses": accelerator.loss_evaluations / accelerator.optimizer_steps,
    }


# Compiles the package in the first round, as pip does on installation, and not again.
IMPORTS = """
import json, sys, tempfile, time
import torch, lightning.pytorch
sys.dont_write_bytecode, seconds = False, []
with tempfile.TemporaryDirectory() as sys.pycache_prefix:
    for _ in range(9):
        for name in [name for name in sys.modules if name.split(".")[0] == "lightning_stableaa"]:
            del sys.modules[name]
        start = time.perf_counter()
        from lightning_stableaa import AndersonCallback, SmoothingMonitor
        seconds.append(time.perf_counter() - start)
print(json.dumps(seconds[1:]))
"""


def measure_import() -> Row:
    """What the import of the callbacks adds to that of torch and Lightning."""
    printed = subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True)
    seconds = json.loads(printed.stdout.splitlines()[-1])
    return {"what": "both callbacks", "import_ms": 1e3 * statistics.median(seconds)}


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were taken on."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def sizes_that_fit(sizes: Sequence[int], depth: int, device: torch.device) -> list[int]:
    """Those whose window, weights and copies take at most half of the memory that is free."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable"))
        free = 1024 * int(available.split()[1])
    return [n for n in sizes if 4 * n * (depth + 6) <= free / 2]


def exponent(rows: list[Row], name: str) -> float:
    """p of the power law n^p between the last two rows, of n and of the quantity."""
    (n0, y0), (n1, y1) = ((float(row["n"]), float(row[name])) for row in rows[-2:])
    return math.log(y1 / y0) / math.log(n1 / n0)


def draw(path: Path, against_n: list[Row], against_m: list[Row]) -> None:
    """Times of an update and of a push, and their floors, against n and against m."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    lines = {
        "update_ms": ("update", "o-", "#D55E00"),
        "floor_ms": ("floor of an update", "--", "#D55E00"),
        "push_ms": ("push", "s-", "#0072B2"),
        "copy_ms": ("a copy", "--", "#0072B2"),
    }
    for axes, rows, key in ((left, against_n, "n"), (right, against_m, "m")):
        x = [row[key] for row in rows]
        for name, (label, style, color) in lines.items():
            axes.loglog(x, [row[name] for row in rows], style, color=color, label=label)
        axes.set(xlabel=f"{key}, {'weights' if key == 'n' else 'residuals'}", ylabel="ms")
        axes.legend(fontsize="small")
    right.set_xticks(PLOTTED_DEPTHS, [str(m) for m in PLOTTED_DEPTHS])
    right.minorticks_off()
    left.set_title(f"m = {against_n[0]['m']}; at the end n^{exponent(against_n, 'update_ms'):.2f}")
    right.set_title(f"n = {against_m[0]['n']:,}")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format=path.suffix[1:])
    plt.close(figure)
    write_atomically(path, picture.getvalue())


def _print(title: str, rows: list[Row]) -> None:
    print(f"\n{title}")
    print("  ".join(f"{name:>18}" for name in rows[0]))
    for row in rows:
        print(
            "  ".join(
                f"{value:>18}" if isinstance(value, str) else f"{value:>18.4g}"
                for value in row.values()
            )
        )


def main(words: Sequence[str] | None = None) -> None:
    """Measure everything, print it, and write it where asked to."""
    parser = argparse.ArgumentParser(description="cost of stable Anderson acceleration")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--plot", type=Path, help="draw an update against n and m to this file")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on the CPU")
    arguments = parser.parse_args(words)
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, list[Row]] = {
        "update": [measure_update(n, DEPTH, device) for n in SIZES],
        "textbook": [measure_textbook(SIZES[0], DEPTH, device)],
        "idle step": [measure_idle_step(device)],
        "import": [measure_import()],
        "models": [measure_model(name, *setting) for name, setting in models().items()],
    }
    if arguments.plot:
        sizes = sizes_that_fit(PLOTTED_SIZES, DEPTH, device)
        results["against n"] = [measure_update(n, DEPTH, device) for n in sizes]
        results["against m"] = [measure_update(PLOTTED_SIZE, m, device) for m in PLOTTED_DEPTHS]
        draw(arguments.plot, results["against n"], results["against m"])
    print(json.dumps(machine(device)))
    for title, rows in results.items():
        _print(title, rows)
    if arguments.json:
        text = json.dumps({"machine": machine(device), **results}, indent=1)
        write_atomically(arguments.json, text + "\n")


if __name__ == "__main__":
    main()
