"""Whether the loss is that of a sample, told from the batches of the extrapolations."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_stableaa import AndersonCallback, Status
from lightning_stableaa.callbacks.batches import BatchWatch, mark, mark_on_host
from tests.callbacks.regression import Regression, anderson, fit, rows


class Points(NamedTuple):
    inside: Tensor
    border: dict[str, Tensor]
    step: int


def points(seed: int, *, count: int = 200, step: int = 0) -> Points:
    generator = torch.Generator().manual_seed(seed)
    inside = torch.rand(count, 3, generator=generator)
    return Points(inside, {"x": torch.zeros(5, 3), "kinds": torch.arange(5)}, step)


def seen(batches: list[Any], watch: BatchWatch | None = None) -> list[bool]:
    watch = watch or BatchWatch()
    return [bool(watch.see(batch)) for batch in batches]


def test_new_points_at_every_extrapolation_are_a_sample() -> None:
    assert seen([points(k) for k in range(4)]) == [True] * 4


def test_the_same_points_are_none_and_a_redraw_makes_none() -> None:
    assert seen([points(0, step=k) for k in range(4)]) == [True] + [False] * 3
    assert seen([points(k // 3) for k in range(9)]) == [True] + [False] * 8
    assert seen([points(k) for k in (0, 0, 1, 2, 2, 3)]) == [
        True,
        False,
        False,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("count", [10, 2000])
def test_another_order_is_no_other_sample(count: int) -> None:
    first = points(0, count=count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    shuffled = first._replace(inside=first.inside[order])
    assert seen([first, shuffled, first]) == [True, False, False]
    assert seen([first, points(1, count=count), first]) == [True] * 3


@pytest.mark.parametrize(
    "tensor",
    [
        torch.rand(40, 7),
        torch.arange(5),
        torch.rand(2, 3, 8, 8, dtype=torch.float16),
        torch.tensor(3.0),
        torch.rand(9, 1 << 17),
        torch.tensor([True, False]),
        torch.rand(4, 4, requires_grad=True),
        torch.zeros(4, 2),
    ],
)
def test_marks_of_host_and_device_are_equal(tensor: Tensor) -> None:
    assert abs(mark_on_host(tensor.detach()) - float(mark(tensor.detach()))) < 1e-8


def latin(draw: np.random.Generator, count: int) -> np.ndarray:
    columns = [draw.permutation(count) for _ in range(2)]
    return (np.stack(columns, axis=1) + draw.random((count, 2))) / count


def jittered(draw: np.random.Generator, count: int) -> np.ndarray:
    return (np.arange(count)[:, None] + draw.random((count, 1))) / count


def antithetic(draw: np.random.Generator, count: int) -> np.ndarray:
    half = draw.normal(size=(count // 2, 3))
    return np.concatenate([half, -half])


def sobol(draw: np.random.Generator, count: int) -> np.ndarray:
    engine = torch.quasirandom.SobolEngine(2, scramble=True, seed=int(draw.integers(1 << 30)))
    return engine.draw(count).numpy()


@pytest.mark.parametrize(
    "law",
    [
        latin,
        jittered,
        antithetic,
        sobol,
        lambda draw, count: draw.random((count, 3)),
        lambda draw, count: 1000.0 + draw.random((count, 1)),
        lambda draw, count: 1e-9 * draw.normal(size=(count, 101)),
        lambda draw, count: np.eye(10)[draw.integers(10, size=count)],
        lambda draw, count: np.sign(draw.normal(size=(count, 20))),
        lambda draw, count: draw.integers(50_000, size=(count, 64)),
    ],
)
@pytest.mark.parametrize("count", [100, 1_000, 20_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_law_of_new_points_is_noticed(law: Any, count: int, dtype: torch.dtype) -> None:
    draw = np.random.default_rng(count)
    batches = [torch.from_numpy(law(draw, count)).to(dtype) for _ in range(6)]
    assert seen(batches) == [True] * 6


def test_a_large_batch_costs_no_more_than_a_part_of_it() -> None:
    large = torch.zeros(200, 3, 224, 224, dtype=torch.uint8)
    started = time.perf_counter()
    assert seen([large] * 5) == [True] + [False] * 4
    assert time.perf_counter() - started < 1.0
    wide = torch.rand(2, 10_000_000)
    assert seen([wide, wide + 1.0, wide]) == [True] * 3


def test_another_number_of_samples_or_of_tensors_is_another_batch() -> None:
    first, inside = points(0), points(0).inside
    assert seen([first, (inside, inside, inside), (inside,)]) == [True] * 3
    assert seen([inside, inside[:199], inside]) == [True] * 3


@pytest.mark.parametrize(
    "batch", ["no tensor", [], 3, torch.ones(2, dtype=torch.complex64), torch.eye(2).to_sparse()]
)
def test_what_holds_no_numbers_to_add_tells_nothing(batch: Any) -> None:
    some = [batch] * 3 + [points(0), batch, points(1), points(2)]
    assert seen(some) == [False] * 3 + [True, False, True, True]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16])
def test_every_dtype_counts(dtype: torch.dtype) -> None:
    some = [torch.randint(2, (50,), generator=torch.Generator().manual_seed(k)) for k in range(3)]
    assert seen([one.to(dtype) for one in some]) == [True] * 3


@pytest.mark.parametrize("stop", range(6))
def test_it_continues_from_its_state(stop: int) -> None:
    batches = [points(k) for k in (0, 0, 1, 2, 3, 3)]
    watch, resumed = BatchWatch(), BatchWatch()
    before = seen(batches[:stop], watch)
    resumed.load_state_dict(watch.state_dict())
    assert before + seen(batches[stop:], resumed) == seen(batches)


class Drawn(Dataset):
    """Rows of noise, drawn anew every so many steps."""

    def __init__(self, every: int) -> None:
        self.every = every

    def __len__(self) -> int:
        return 48

    def __getitem__(self, step: int) -> tuple[Tensor, ...]:
        return rows(20, seed=step // self.every, noise=1.0).tensors


def train(every: int, **options: Any) -> tuple[AndersonCallback, Trainer]:
    callback = anderson(
        sufficient_decrease=None,
        store_every_n_steps=1,
        accelerate_every_n_steps=1,
        regularization=1e8,  # averages: each takes a little off the loss
        lag_compensation=0.0,
        look_ahead_cycles=0.0,
    )
    module = Regression(make_optimizer=functools.partial(torch.optim.SGD, lr=0.3))
    loader = DataLoader(Drawn(every), batch_size=None)
    return callback, fit(module, loader, callback, max_epochs=1, **options)


def test_where_points_are_drawn_at_every_step_averages_of_noise_will_not_do() -> None:
    at_every_step, seldom = (train(every)[0] for every in (1, 8))
    noise = Status.REJECTED_NOISE.value
    assert at_every_step.state_dict()["outcomes"][noise] > 40
    assert noise not in seldom.state_dict()["outcomes"]
    # two losses until four residuals told noise, and then no more: training had not leapt
    assert at_every_step.extra_losses == 2 * 3
    assert seldom.extra_losses == 2 * 47


def test_a_resumed_run_knows_the_batches_before_it(tmp_path: Path) -> None:
    callback, trainer = train(1, max_steps=11)
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    kept = torch.load(tmp_path / "part.ckpt", weights_only=True)["callbacks"][callback.state_key]
    resumed = anderson()
    resumed.load_state_dict(kept)
    told = []

    class Sees(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            told.append(resumed._batches.state_dict() == kept["batches"])

    fit(Regression(), DataLoader(Drawn(1), batch_size=None), resumed, Sees(), max_steps=1)
    assert told == [True]
    assert kept["batches"]["changed"]
