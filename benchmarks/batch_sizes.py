"""Noise against batch size: oscillation, RSD, gain, and what acceleration brings.

    STABLEAA_ADMISSIONS_CSV=... STABLEAA_CIFAR10_DIR=... python -m benchmarks.batch_sizes FOLDER

Admissions: the network of the recipe, SGD with momentum, 10 to 400 rows a step (400 is the full
batch). Images: a network of three convolutions on CIFAR-10, halved to 16 x 16 pixels, 32 to 4,096
images a step, in micro-batches of 1,024. Text: a small transformer that predicts the next byte of
the standard library of Python, Adam, 8 to 128 windows of 64 bytes a step. As many steps for every
batch size, so that only the noise differs. ``FOLDER/batch_sizes.png`` and ``FOLDER/table.md``;
medians over the seeds.

Columns: RSD of the updates of a cycle (median over the plain run); oscillation, the standard
deviation of the training loss about its trend in the last third, over its mean; rho, the median
gain of the proposed steps; the loss on a fixed part of the training samples at the end over
plain's, at equal cost (of the accelerated run at that cost), and the same of the best validation.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sysconfig
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, mse_loss

from lightning_stableaa import AndersonAccelerator, Smoothing

MICRO_BATCH = 1024
CONTEXT = 64  # bytes of a window of text

TEXTBOOK: dict[str, Any] = {
    "lag_compensation": 0.0,
    "max_horizon": 0.0,
    "safeguard": "none",
    "regularization": 1e-8,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "anderson": {},
    "anderson, smoothing": {"smoothing": Smoothing()},
    "textbook": TEXTBOOK,
    "paper": TEXTBOOK | {"smoothing": Smoothing()},
}


class Problem(NamedTuple):
    """Data, network, loss and schedule."""

    data: Callable[[int], tuple[Tensor, Tensor, Tensor, Tensor]]  # of a seed
    network: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    steps: int
    sizes: tuple[int, ...]
    samples: int = 4096  # of the training data, whose loss is looked at


def admissions(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training features and targets, and those of validation."""
    from lightning_stableaa.recipes.admissions_mlp.data import AdmissionsData

    data = AdmissionsData(os.environ["STABLEAA_ADMISSIONS_CSV"], seed=seed)
    data.setup("fit")
    return (*data.training.tensors, *data.validation.tensors)  # type: ignore[return-value]


def cifar10(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """16 x 16 pixels, standardised; read once a machine."""
    folder = Path(os.environ["STABLEAA_CIFAR10_DIR"])
    cache = Path(tempfile.gettempdir()) / "cifar10_16.pt"
    if not cache.exists():
        from PIL import Image

        parts: list[Tensor] = []
        for name in ("train", "test"):
            with zipfile.ZipFile(folder / f"{name}.zip") as archive:
                files = sorted(one for one in archive.namelist() if one.endswith(".jpg"))
                classes = sorted({one.split("/")[1] for one in files})
                pixels = [np.asarray(Image.open(io.BytesIO(archive.read(one)))) for one in files]
                images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
                parts += [
                    avg_pool2d((images - 0.473) / 0.251, 2),
                    torch.tensor([classes.index(one.split("/")[1]) for one in files]),
                ]
        torch.save(parts, cache)
    x, y, x_val, y_val = torch.load(cache, weights_only=True)
    return x, y, x_val[::4], y_val[::4]


def text(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Windows of ``CONTEXT`` bytes, and the bytes that follow each; the last tenth validates."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    content = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))[:2_000_000]
    bytes_ = torch.frombuffer(bytearray(content), dtype=torch.uint8).long().clamp(max=127)
    windows = bytes_[: len(bytes_) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
    x, y = windows[:, :-1], windows[:, 1:]
    split = len(x) * 9 // 10
    order = torch.randperm(split, generator=torch.Generator().manual_seed(seed))
    return x[:split][order], y[:split][order], x[split:][::8], y[split:][::8]


def next_byte(logits: Tensor, following: Tensor) -> Tensor:
    """Cross-entropy of logits (batch, length, 128) and bytes (batch, length), in nats."""
    return cross_entropy(logits.flatten(0, 1), following.flatten())


class Transformer(nn.Module):
    """Two causal blocks of 64 features and four heads on 128 different bytes; 120,576 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Embedding(128, 64)
        self.positions = nn.Embedding(CONTEXT, 64)
        block = nn.TransformerEncoderLayer(
            64, 4, 256, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.output = nn.Linear(64, 128)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, length, 128) of the byte after each of (batch, length)."""
        length = x.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        hidden = self.bytes(x) + self.positions.weight[:length]
        return self.output(self.blocks(hidden, mask=mask, is_causal=True))


def perceptron() -> nn.Module:
    """7 - 64 - 64 - 64 - 1."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise([7, 64, 64, 64, 1]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convolutions() -> nn.Module:
    """Three convolutions and a linear layer, 24,000 weights."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(512, 10)),
    )


def momentum(lr: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """SGD with momentum 0.9."""
    return lambda model: torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def adam(lr: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """Adam."""
    return lambda model: torch.optim.Adam(model.parameters(), lr=lr)


PROBLEMS = {
    "admissions": Problem(
        admissions, perceptron, mse_loss, momentum(1e-3), 1000, (10, 20, 40, 80, 160, 400)
    ),
    "images": Problem(
        cifar10, convolutions, cross_entropy, momentum(0.05), 200, (32, 128, 512, 2048, 4096)
    ),
    "text": Problem(text, Transformer, next_byte, adam(2e-3), 400, (8, 32, 128), samples=256),
}


def run(name: str, size: int, variant: str, seed: int) -> dict[str, Any]:
    """One run."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    problem = PROBLEMS[name]
    x, y, x_val, y_val = problem.data(seed)
    model = problem.network()
    optimizer = problem.optimizer(model)
    full_batch = size >= len(x)
    options = {"smoothing": Smoothing(rsd_threshold=math.inf)} | VARIANTS[variant]
    if variant == "plain":
        options |= {"safeguard": "none", "accelerate_every_n_steps": 10**6}
    accelerator = AndersonAccelerator(optimizer, **options)
    generator = torch.Generator().manual_seed(seed)
    rows, rsd, gains, losses, on = [], [], [], [], []
    cost = 0.0

    def loss_of(where: Tensor) -> Tensor:
        parts = where.split(MICRO_BATCH)
        return torch.stack(
            [problem.loss(model(x[one]), y[one]) * len(one) for one in parts]
        ).sum() / len(where)

    order = torch.randperm(len(x), generator=generator)
    for step in range(problem.steps):
        if step % (problem.steps // 50) == 0:
            with torch.no_grad():
                train = float(problem.loss(model(x[: problem.samples]), y[: problem.samples]))
                val = float(problem.loss(model(x_val), y_val))
            rows.append((cost, train, val))
        if len(order) < size:
            order = torch.randperm(len(x), generator=generator)
        where, order = order[:size], order[size:]
        optimizer.zero_grad()
        total = 0.0
        for one in where.split(MICRO_BATCH):
            loss = problem.loss(model(x[one]), y[one]) * len(one) / len(where)
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        losses.append(total)

        def whole(where: Tensor = where) -> Tensor:
            with torch.no_grad():
                return loss_of(where)

        report = accelerator.step(whole, stochastic=not full_batch)
        cost += 1 + report.loss_evaluations / 3
        if report.rsd is not None:
            rsd.append(report.rsd)
            on.append(bool(report.smoothing_on))
        if report.gain is not None:
            gains.append(report.gain)
    last = torch.tensor(losses[-len(losses) // 3 :])
    time = torch.arange(len(last)) - (len(last) - 1) / 2
    trend = last.mean() + time * (time @ last / (time @ time))
    return {
        **{"problem": name, "size": size, "variant": variant, "seed": seed, "rows": rows},
        "rsd": statistics.median(rsd),
        "oscillation": float((last - trend).std() / last.mean()),
        "gain": statistics.median(gains) if gains else None,
        "accepted": accelerator.accepted,
        "attempted": accelerator.attempted,
        "average on": sum(on) / len(on),
    }


def at_cost(rows: Sequence[Sequence[float]], budget: float, column: int) -> float:
    """The last value within the cost."""
    return [row[column] for row in rows if row[0] <= budget + 1e-6][-1]


def best_at_cost(rows: Sequence[Sequence[float]], budget: float) -> float:
    """The best validation within the cost."""
    return min(row[2] for row in rows if row[0] <= budget + 1e-6)


def summarize(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a problem, batch size and variant; medians over the seeds."""
    found = {(r["problem"], r["size"], r["variant"], r["seed"]): r for r in runs}
    summary = []
    for name, problem in PROBLEMS.items():
        for size, variant in itertools.product(problem.sizes, VARIANTS):
            mine = [r for key, r in found.items() if key[:3] == (name, size, variant)]
            pairs = [(r, found.get((name, size, "plain", r["seed"]))) for r in mine]
            complete = [(r, plain) for r, plain in pairs if plain is not None]
            if not complete:
                continue
            losses, values = [], []
            for r, plain in complete:
                budget = plain["rows"][-1][0]
                losses.append(at_cost(r["rows"], budget, 1) / plain["rows"][-1][1])
                values.append(best_at_cost(r["rows"], budget) / best_at_cost(plain["rows"], budget))
            median = statistics.median
            summary.append(
                {
                    **{"problem": name, "size": size, "variant": variant, "seeds": len(mine)},
                    "rsd": median(r["rsd"] for r in mine),
                    "oscillation": median(r["oscillation"] for r in mine),
                    "gain": median(r["gain"] for r in mine) if mine[0]["gain"] else None,
                    "training loss": median(losses),
                    "worst training loss": max(losses),
                    "best validation": median(values),
                    "accepted": sum(r["accepted"] for r in mine),
                    "attempted": sum(r["attempted"] for r in mine),
                    "average on": median(r["average on"] for r in mine),
                }
            )
    return summary


def draw(path: Path, summary: Sequence[dict[str, Any]]) -> None:
    """Noise above, what acceleration brings below, against the batch size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    palette = ("#222222", "#D55E00", "#F5A300", "#B71C1C", "#8E24AA")
    colors = dict(zip(VARIANTS, palette, strict=False))
    figure, grid = plt.subplots(2, 3, figsize=(12, 6), layout="constrained", sharex="col")
    for column, name in enumerate(PROBLEMS):
        rows = [row for row in summary if row["problem"] == name]
        plain = [row for row in rows if row["variant"] == "plain"]
        sizes = [row["size"] for row in plain]
        noise, gain = grid[0][column], grid[1][column]
        noise.loglog(sizes, [row["rsd"] for row in plain], "o-", label="RSD of the updates")
        noise.loglog(
            sizes, [row["oscillation"] for row in plain], "s-", label="oscillation of the loss"
        )
        proposed = [row for row in rows if row["variant"] == "anderson" and row["gain"]]
        noise.loglog(
            [row["size"] for row in proposed], [row["gain"] for row in proposed], "^-", label="rho"
        )
        noise.axhline(0.1, color="grey", linewidth=1, linestyle="--")
        noise.set_title(name)
        noise.legend(fontsize="small")
        for variant in list(VARIANTS)[1:]:
            mine = [row for row in rows if row["variant"] == variant]
            values = [min(row["best validation"], 10.0) for row in mine]
            style = {"color": colors[variant], "label": variant}
            gain.loglog([row["size"] for row in mine], values, "o-", **style)
        gain.axhline(1, color="grey", linewidth=1, linestyle="--")
        gain.set(xlabel="samples a step")
        gain.yaxis.set_major_formatter("{x:g}")
        gain.yaxis.set_minor_formatter("{x:g}")
        if column == 0:
            gain.set_ylabel("best validation over plain's\nat equal cost")
            gain.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def table(summary: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    names = [name for name in summary[0] if name not in ("worst training loss",)]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in summary:
        cells = [
            f"{row[name]:.3g}" if isinstance(row[name], float) else str(row[name] or "")
            for name in names
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main(words: Sequence[str] | None = None) -> None:
    """Make the runs that are missing; write table and figure."""
    parser = argparse.ArgumentParser(description="noise against batch size")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    arguments = parser.parse_args(words)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    path = arguments.folder / "runs.jsonl"
    runs = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(r["problem"], r["size"], r["variant"], r["seed"]) for r in runs}
    jobs = [
        (name, size, variant, seed)
        for seed in range(arguments.seeds)
        for name in arguments.problems
        for size in PROBLEMS[name].sizes
        for variant in VARIANTS
        if (name, size, variant, seed) not in done
    ]
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool, path.open("a") as file:
        for future in as_completed([pool.submit(run, *job) for job in jobs]):
            runs.append(future.result())
            file.write(json.dumps(runs[-1]) + "\n")
            file.flush()
    summary = summarize(runs)
    (arguments.folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (arguments.folder / "table.md").write_text(table(summary))
    draw(arguments.folder / "batch_sizes.png", summary)
    print(table(summary))


if __name__ == "__main__":
    main()
