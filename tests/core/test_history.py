"""Ring of iterates, Gram matrix and combination, against plain formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_stableaa.core import history as history_module
from lightning_stableaa.core.history import History
from tests import reference


def make(
    depth: int = 4, length: int = 5, dtype: torch.dtype = torch.float64, **options: Any
) -> Any:
    return History(depth=depth, length=length, dtype=dtype, device=torch.device("cpu"), **options)


def push_all(history: History, iterates: Tensor) -> None:
    for iterate in iterates:
        history.push(lambda row, iterate=iterate: row.copy_(iterate))


def random_iterates(count: int, length: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, length, generator=generator, dtype=torch.float64)


def gram_of(iterates: Tensor) -> Tensor:
    differences = iterates.double().diff(dim=0)
    return differences @ differences.T


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("depth", [2, 5])
def test_random_pushes_and_restarts_equal_reference(seed: int, depth: int) -> None:
    """Gram matrices are formed at random times: none, one or many new iterates since the last."""
    random = np.random.default_rng(seed)
    history, expected = make(depth=depth), reference.Sequences(depth)
    for _ in range(60):
        if random.random() < 0.25:
            history.restart()
            expected.restart()
        else:
            x = random.normal(size=5)
            history.push(lambda row, x=x: row.copy_(torch.from_numpy(x)))
            expected.push(x)
        assert history.contiguous is expected.contiguous
        assert history.is_residual == expected.ends_cycle[1:]
        assert history.num_residuals == len(expected.pairs()) <= depth
        if random.random() < 0.4 and len(history) > 0:
            differences = np.diff(np.array(expected.iterates), axis=0)
            gram = history.gram().numpy()
            # a row goes from iterate to difference and, at a restart, back: rounded twice
            np.testing.assert_allclose(gram, differences @ differences.T, rtol=1e-12, atol=1e-13)
            np.testing.assert_allclose(history.newest, expected.iterates[-1], rtol=0, atol=1e-14)


@pytest.mark.parametrize("pushed", [2, 4, 5, 7, 11])
@pytest.mark.parametrize("chunk", [3, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gram_and_combine_equal_plain_formulas(
    pushed: int, chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history_module, "_CPU_CHUNK", chunk)
    history, iterates = make(length=8, dtype=dtype), random_iterates(pushed, 8).to(dtype)
    push_all(history, iterates)
    window, rounding = iterates[-5:], 64 * torch.finfo(dtype).eps
    torch.testing.assert_close(history.gram(), gram_of(window), rtol=rounding, atol=rounding)
    gamma = torch.arange(1.0, len(window), dtype=torch.float64)
    out = torch.empty(8, dtype=dtype)
    history.combine(gamma, out)
    expected = window[-1].double() + gamma @ window.double().diff(dim=0)
    torch.testing.assert_close(out.double(), expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("chunk", [3, 1000])
@pytest.mark.parametrize("num_unowned", [0, 2, 3, 4, 8])
def test_gram_leaves_out_unowned_elements(
    num_unowned: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history_module, "_CPU_CHUNK", chunk)
    history, iterates = make(length=8, num_unowned=num_unowned), random_iterates(5, 8)
    push_all(history, iterates)
    owned = gram_of(iterates[:, num_unowned:])
    torch.testing.assert_close(history.gram(), owned, rtol=1e-14, atol=1e-14)
    out = torch.empty(8, dtype=torch.float64)
    history.combine(torch.ones(4), out)  # moves them all the same
    torch.testing.assert_close(out, 2 * iterates[-1] - iterates[0])


def test_gram_of_float32_keeps_small_residuals() -> None:
    # residuals of 1e-4 on weights of size 1: a Gram matrix of raw iterates would lose them all
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1, 20_000, generator=generator)
    steps = 1e-4 * torch.randn(5, 20_000, generator=generator)
    iterates = torch.cat([base, base + steps.cumsum(dim=0)])
    history = make(depth=5, length=20_000, dtype=torch.float32)
    push_all(history, iterates)
    exact = gram_of(iterates)
    # differences of neighbours within a factor of two are exact in float32 (Sterbenz), the others
    # are rounded once: relative error of a product below 4 * 2^-24
    error = (history.gram() - exact).abs().max() / exact.diagonal().min()
    assert error < 4 * 2**-24


@pytest.mark.parametrize("length", [1 << 18, (1 << 20) + 1000, 1 << 22])
def test_single_precision_runs_keep_products_to_1e8(length: int) -> None:
    """Also where all products have one sign."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.rand(3, length, generator=generator)
    history = make(depth=3, length=length, dtype=torch.float32)
    iterates = torch.cat([torch.zeros(1, length), steps]).cumsum(dim=0)
    assert history_module._single_precision_run(history._rows) == math.isqrt(length) // 2
    push_all(history, iterates)
    differences = iterates.diff(dim=0).double()
    exact = differences @ differences.T
    norms = exact.diagonal().sqrt()
    assert ((history.gram() - exact).abs() / torch.outer(norms, norms)).max() < 1e-8


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_coarse_matmul_precision_disables_single_precision_runs(precision: str) -> None:
    rows = torch.empty(1, 1 << 20)
    assert history_module._single_precision_run(rows) == 512
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert history_module._single_precision_run(rows) == 0
    finally:
        torch.set_float32_matmul_precision(before)


def test_clear_forgets_iterates_that_are_not_finite() -> None:
    history, iterates = make(depth=4), random_iterates(4)
    push_all(history, torch.full((7, 5), torch.nan, dtype=torch.float64))
    history.gram()
    history.clear()
    assert (len(history), history.num_residuals, history.contiguous) == (0, 0, False)
    push_all(history, iterates)
    assert bool(history.gram().isfinite().all())
    out = torch.empty(5, dtype=torch.float64)
    history.combine(torch.ones(3, dtype=torch.float64), out)
    torch.testing.assert_close(out, 2 * iterates[3] - iterates[0])


def advance(history: History, iterates: Tensor, grams: set[int], restarts: set[int]) -> None:
    for k, iterate in enumerate(iterates):
        push_all(history, iterate[None])
        if k in grams:
            history.gram()
        if k in restarts:
            history.restart()


@pytest.mark.parametrize("pushed", range(12))
@pytest.mark.parametrize("grams", [set(), {2, 5}, set(range(12))])
@pytest.mark.parametrize("restarts", [set(), {0, 1}, {4}])
def test_state_continues_bitwise_from_any_state(
    pushed: int, grams: set[int], restarts: set[int]
) -> None:
    iterates = random_iterates(20)
    first, second = make(), make()
    advance(first, iterates[:pushed], grams, restarts)
    push_all(second, iterates[:3])  # which loading has to overwrite
    second.gram()
    second.load_state_dict(first.state_dict())
    grams_seen: list[list[Tensor]] = [[], []]
    for history, seen in zip((first, second), grams_seen, strict=True):
        for iterate in iterates[pushed:]:
            push_all(history, iterate[None])
            seen.append(history.gram())
        out = torch.empty(5, dtype=torch.float64)
        history.combine(torch.ones(len(history) - 1), out)
        seen += [out, history.newest]
    assert all(torch.equal(a, b) for a, b in zip(*grams_seen, strict=True))
    assert first.is_residual == second.is_residual


def test_state_of_other_size_raises() -> None:
    history = make(depth=4, length=5)
    push_all(history, random_iterates(5))
    state = history.state_dict()
    with pytest.raises(ValueError, match="holds up to 5 iterates of 6 elements, got 5 of 5"):
        make(depth=4, length=6).load_state_dict(state)
    with pytest.raises(ValueError, match="holds up to 3 iterates of 5 elements, got 5 of 5"):
        make(depth=2, length=5).load_state_dict(state)


class LateStaging:
    """A GPU's copies to the host: rows hold NaN until somebody waits for them."""

    def __init__(self, length: int, dtype: torch.dtype) -> None:
        self._buffer = torch.empty(length, dtype=dtype)
        self._pending: list[tuple[Tensor, Tensor]] = []
        self.waits = 0

    def allocate(self, count: int) -> Tensor:
        return torch.empty(count, len(self._buffer), dtype=self._buffer.dtype)

    def copy_async(self, write: Callable[[Tensor], object], row: Tensor) -> None:
        write(self._buffer)
        row.fill_(math.nan)
        self._pending.append((row, self._buffer.clone()))

    def synchronize(self) -> None:
        self.waits += bool(self._pending)
        for row, vector in self._pending:
            row.copy_(vector)
        self._pending.clear()


def test_staged_iterates_are_awaited_only_where_read() -> None:
    iterates, staging = random_iterates(9), LateStaging(5, torch.float64)
    staged, direct = make(staging=staging), make()
    for history in (staged, direct):
        push_all(history, iterates[:6])
    assert staging.waits == 0
    assert torch.equal(staged.gram(), direct.gram())
    assert staging.waits == 1
    for read in (lambda one: one.newest, lambda one: one.state_dict()["rows"]):
        for history in (staged, direct):
            push_all(history, iterates[6:])
        assert torch.equal(read(staged), read(direct))
    loaded = make(staging=LateStaging(5, torch.float64))
    loaded.load_state_dict(staged.state_dict())
    assert torch.equal(loaded.gram(), direct.gram())
