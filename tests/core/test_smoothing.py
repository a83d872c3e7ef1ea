"""Streaming mean, RSD and switch of the moving average, against NumPy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_stableaa.core import smoothing as smoothing_module
from lightning_stableaa.core.smoothing import MovingAverage
from tests import reference

KINDS = [("norm", "iterates"), ("max", "iterates"), ("norm", "updates")]


def make(length: int, *, dtype: torch.dtype = torch.float64, **options: Any) -> MovingAverage:
    options = {"threshold": 0.1, "of": "iterates"} | options
    return MovingAverage(length=length, dtype=dtype, device=torch.device("cpu"), **options)


def observe_all(average: MovingAverage, iterates: Tensor) -> MovingAverage:
    for iterate in iterates:
        average.observe(lambda out, start, x=iterate: out.copy_(x[start : start + len(out)]))
    return average


def random_window(count: int, length: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3.0 + torch.randn(count, length, generator=generator, dtype=torch.float64)


def rsd_of(iterates: Tensor, **options: Any) -> float:
    average = observe_all(make(iterates.shape[1], **options), iterates)
    return average.switch(average.moments())


@pytest.mark.parametrize(("rsd", "of"), KINDS)
@pytest.mark.parametrize("chunk", [4, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_streaming_moments_equal_reference(
    rsd: str, of: str, chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smoothing_module, "_CHUNK", chunk)
    rounding = 64 * torch.finfo(dtype).eps
    average = make(11, rsd=rsd, of=of, dtype=dtype)
    for seed in range(2):  # the second window must not remember the first
        window = random_window(9, 11, seed=seed).to(dtype)
        observe_all(average, window)
        expected = reference.rsd(window.double().numpy(), kind=rsd, of=of)
        assert average.switch(average.moments()) == pytest.approx(expected, rel=rounding)
        torch.testing.assert_close(average.mean, window.mean(dim=0), rtol=rounding, atol=rounding)


@pytest.mark.parametrize("of", ["iterates", "updates"])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0, 3.0, math.inf])
def test_switch_equals_reference(of: str, threshold: float) -> None:
    window = random_window(6, 4)
    average = observe_all(make(4, of=of, threshold=threshold), window)
    average.switch(average.moments())
    smoothed = average.mean if average.on else window[-1]
    expected = reference.smoothed(window.numpy(), kind="norm", of=of, threshold=threshold)
    torch.testing.assert_close(smoothed, torch.from_numpy(expected), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("rsd", ["norm", "max"])
@pytest.mark.parametrize("of", ["iterates", "updates"])
def test_rsd_of_short_window_is_zero(rsd: str, of: str) -> None:
    for count in (0, 1, 2) if of == "updates" else (0, 1):
        assert rsd_of(random_window(count, 3), rsd=rsd if of == "iterates" else "norm", of=of) == 0


@pytest.mark.parametrize("rsd", ["norm", "max"])
def test_rsd_of_zero_mean_is_inf_and_of_zeros_is_zero(rsd: str) -> None:
    signs = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    assert rsd_of(signs.expand(2, 3), rsd=rsd) == math.inf
    assert rsd_of(torch.zeros(4, 3, dtype=torch.float64), rsd=rsd) == 0.0


def test_rsd_max_counts_squares_below_float16() -> None:
    iterates = torch.tensor([[1e-3], [2e-3], [3e-3]], dtype=torch.float16)
    # the mean has the precision of float16
    assert rsd_of(iterates, rsd="max", dtype=torch.float16) == pytest.approx(0.5, rel=1e-2)


@pytest.mark.parametrize("of", ["iterates", "updates"])
def test_rsd_of_nan_is_nan_and_switches_on(of: str) -> None:
    iterates = random_window(4, 2)
    iterates[1, 0] = math.nan
    average = observe_all(make(2, of=of), iterates)
    assert math.isnan(average.switch(average.moments()))
    assert average.on


@pytest.mark.parametrize("chunk", [3, 1000])
@pytest.mark.parametrize("of", ["iterates", "updates"])
@pytest.mark.parametrize("num_unowned", [0, 2, 4, 8])
def test_norms_leave_out_unowned_elements(
    of: str, num_unowned: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smoothing_module, "_CHUNK", chunk)
    window = random_window(5, 8)
    average = observe_all(make(8, of=of, num_unowned=num_unowned), window)
    owned = observe_all(make(8 - num_unowned, of=of), window[:, num_unowned:])
    torch.testing.assert_close(average.moments(), owned.moments(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(average.mean, window.mean(dim=0), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("rsd", "of"), KINDS)
@pytest.mark.parametrize("observed", [0, 1, 3])
def test_state_continues_open_window_bitwise(rsd: str, of: str, observed: int) -> None:
    iterates = random_window(7, 5, seed=2)
    options: dict[str, Any] = {"rsd": rsd, "of": of, "threshold": 0.0}
    unbroken, first = make(5, **options), make(5, **options)
    for average in (unbroken, first):
        observe_all(average, iterates[:4])
        average.switch(average.moments())
        observe_all(average, iterates[:observed])
    second = observe_all(make(5, **options), iterates[:6])  # which loading has to overwrite
    second.load_state_dict(first.state_dict())
    assert second.on is True
    for average in (unbroken, second):
        observe_all(average, iterates[observed:])
    assert torch.equal(unbroken.moments(), second.moments())
    assert torch.equal(unbroken.mean, second.mean)
    assert unbroken.switch(unbroken.moments()) == second.switch(second.moments())
