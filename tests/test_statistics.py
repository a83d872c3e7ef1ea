import math
from typing import Any

import numpy as np
import pytest
import torch

from lightning_stableaa import statistics as statistics_module
from lightning_stableaa.statistics import (
    RunningStatistics,
    Switch,
    relative_standard_deviation,
)


def observe_all(statistics: RunningStatistics, iterates: torch.Tensor) -> None:
    for iterate in iterates:
        statistics.observe(
            lambda out, start, iterate=iterate: out.copy_(iterate[start : start + len(out)])
        )


def make(length: int, **options: Any) -> RunningStatistics:
    return RunningStatistics(
        length=length,
        dtype=torch.float64,
        device=torch.device("cpu"),
        **options,
    )


def rsd_of(iterates: torch.Tensor, **options: Any) -> float:
    statistics = make(iterates.shape[1], **options)
    observe_all(statistics, iterates)
    return relative_standard_deviation(statistics.moments(), rsd=statistics.rsd)


def numpy_rsd(iterates: np.ndarray, rsd: Any, of: Any) -> float:
    values = np.diff(iterates, axis=0) if of == "updates" else iterates
    sigma, mu = values.std(axis=0, ddof=1), values.mean(axis=0)
    if rsd == "norm":
        return float(np.linalg.norm(sigma) / np.linalg.norm(mu))
    return float(sigma.max() / np.abs(mu).max())


@pytest.mark.parametrize(
    ("rsd", "of"), [("norm", "iterates"), ("max", "iterates"), ("norm", "updates")]
)
@pytest.mark.parametrize("chunk", [4, 1000])
def test_streaming_equals_numpy(
    rsd: Any, of: Any, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics_module, "_CHUNK", chunk)
    generator = torch.Generator().manual_seed(1)
    iterates = 3.0 + torch.randn(9, 11, generator=generator, dtype=torch.float64)
    statistics = make(11, rsd=rsd, of=of)
    for _ in range(2):  # the second window must not remember the first
        statistics.reset()
        observe_all(statistics, iterates)
    moments = statistics.moments()
    assert relative_standard_deviation(moments, rsd=statistics.rsd) == pytest.approx(
        numpy_rsd(iterates.numpy(), rsd, of), rel=1e-12
    )
    torch.testing.assert_close(statistics.mean, iterates.mean(dim=0), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("rsd", ["norm", "max"])
def test_one_sample_has_no_deviation(rsd: Any) -> None:
    assert rsd_of(torch.ones(1, 3, dtype=torch.float64), rsd=rsd) == 0.0


@pytest.mark.parametrize("rsd", ["norm", "max"])
def test_a_zero_mean_gives_infinity_and_constant_zeros_give_zero(rsd: Any) -> None:
    signs = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    assert rsd_of(signs.expand(2, 3), rsd=rsd) == math.inf
    assert rsd_of(torch.zeros(4, 3, dtype=torch.float64), rsd=rsd) == 0.0


def test_deviations_whose_squares_are_below_float16_count() -> None:
    """``rsd="max"`` keeps a square for every weight."""
    iterates = torch.tensor([[1e-3], [2e-3], [3e-3]], dtype=torch.float16)
    statistics = RunningStatistics(
        length=1, dtype=torch.float16, device=torch.device("cpu"), rsd="max"
    )
    observe_all(statistics, iterates)
    found = relative_standard_deviation(statistics.moments(), rsd="max")
    assert found == pytest.approx(0.5, rel=1e-2)  # the precision of the mean


def test_max_is_safe_for_negative_weights() -> None:
    iterates = torch.tensor([[-1.0, -4.0], [-3.0, -4.0]], dtype=torch.float64)
    assert rsd_of(iterates, rsd="max") == pytest.approx(math.sqrt(2) / 4)


def test_steady_updates_have_no_noise() -> None:
    line = torch.arange(6, dtype=torch.float64)[:, None] * torch.ones(1, 3, dtype=torch.float64)
    assert rsd_of(line, of="updates") == 0.0
    assert rsd_of(line, of="iterates") > 0.5


def test_nan_stays_nan_and_switches_on() -> None:
    iterates = torch.ones(3, 2, dtype=torch.float64)
    iterates[1, 0] = math.nan
    value = rsd_of(iterates)
    assert math.isnan(value)
    assert Switch(0.1).update(value)


def test_the_switch_has_hysteresis() -> None:
    switch = Switch(0.1)
    values = [0.09, 0.1, 0.11, 0.09, 0.081, 0.079, 0.09, math.inf, 0.0]
    assert [switch.update(value) for value in values] == [
        False, False, True, True, True, False, False, True, False,
    ]  # fmt: skip


def test_a_threshold_of_zero_is_on_whenever_anything_varies() -> None:
    switch = Switch(0.0)
    assert [switch.update(value) for value in (1e-9, 0.0, 1e-9)] == [True, False, True]


@pytest.mark.parametrize(
    ("rsd", "of"), [("norm", "iterates"), ("max", "iterates"), ("norm", "updates")]
)
def test_the_state_continues_an_open_window(rsd: Any, of: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    iterates = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    whole, first, second = (make(5, rsd=rsd, of=of) for _ in range(3))
    observe_all(whole, iterates)
    observe_all(first, iterates[:3])
    second.load_state_dict(first.state_dict())
    observe_all(second, iterates[3:])
    assert torch.equal(whole.moments(), second.moments())
    assert torch.equal(whole.mean, second.mean)
