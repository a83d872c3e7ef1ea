import math

import pytest
import torch

from lightning_stableaa import history as history_module
from lightning_stableaa.history import History
from tests.histories import points_of


def make(depth: int = 4, length: int = 5, dtype: torch.dtype = torch.float64) -> History:
    return History(depth=depth, length=length, dtype=dtype, device=torch.device("cpu"))


def push_all(history: History, points: torch.Tensor) -> None:
    for point in points:
        history.push(lambda row, point=point: row.copy_(point))


def stored(history: History) -> torch.Tensor:
    return points_of(history.state_dict())


def random_points(count: int, length: int = 5, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, length, generator=generator, dtype=torch.float64)


def test_a_window_of_depth_m_keeps_m_residuals_of_m_plus_one_points() -> None:
    history, points = make(depth=4), random_points(9)
    counts = []
    for point in points:
        push_all(history, point[None])
        counts.append((len(history), history.residual_count))
    assert counts == [(1, 0), (2, 1), (3, 2), (4, 3), (5, 4), (5, 4), (5, 4), (5, 4), (5, 4)]
    assert torch.equal(stored(history), points[-5:])
    assert torch.equal(history.newest, points[-1])


def test_no_residual_is_formed_across_a_break() -> None:
    history, points = make(depth=6), random_points(6)
    push_all(history, points[:3])
    history.break_chain()
    assert not history.chained
    push_all(history, points[3:])
    assert history.linked == [True, True, False, True, True]
    assert history.residual_count == 4


def test_a_start_that_no_cycle_followed_is_forgotten() -> None:
    history, points = make(), random_points(4)
    push_all(history, points[:2])
    history.break_chain()
    push_all(history, points[2:3])  # a start ...
    history.break_chain()  # ... and at once another disturbance
    push_all(history, points[3:])
    assert torch.equal(stored(history), points[[0, 1, 3]])
    assert history.linked == [True, False]


def test_a_break_right_after_the_first_point_leaves_an_empty_history() -> None:
    history, points = make(), random_points(4)
    push_all(history, points[:1])
    history.break_chain()
    assert len(history) == 0
    push_all(history, points[1:])
    differences = points[1:].diff(dim=0)
    torch.testing.assert_close(history.gram(), differences @ differences.T)
    assert torch.equal(stored(history)[-1], points[-1])


def test_a_point_without_a_residual_leaves_with_its_successor() -> None:
    history, points = make(depth=4), random_points(7)
    push_all(history, points[:2])
    history.break_chain()
    push_all(history, points[2:6])  # the sixth point pushes out the first, and the second with it
    assert torch.equal(stored(history), points[2:6])
    assert history.linked == [True, True, True]


@pytest.mark.parametrize("pushed", [2, 4, 5, 7, 11])
@pytest.mark.parametrize("chunk", [3, 1000])
def test_gram_and_combination_equal_the_plain_formulas(
    pushed: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history_module, "_CPU_CHUNK", chunk)
    history, points = make(depth=4, length=8), random_points(pushed, length=8)
    push_all(history, points)
    kept = points[-5:]
    differences = kept.diff(dim=0)
    torch.testing.assert_close(history.gram(), differences @ differences.T, rtol=1e-14, atol=1e-14)
    jump = torch.arange(1.0, len(kept), dtype=torch.float64)
    out = torch.empty(8, dtype=torch.float64)
    history.combine(jump, out)
    torch.testing.assert_close(out, kept[-1] + jump @ differences, rtol=1e-13, atol=1e-13)


def test_the_gram_of_float32_points_keeps_small_residuals() -> None:
    # residuals of 1e-4 on weights of size 1: a Gram of raw float32 points would lose them all
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1, 20_000, generator=generator)
    steps = 1e-4 * torch.randn(5, 20_000, generator=generator)
    points = torch.cat([base, base + steps.cumsum(dim=0)])
    history = make(depth=5, length=20_000, dtype=torch.float32)
    push_all(history, points)
    differences = points.double().diff(dim=0)  # of the very points stored
    exact = differences @ differences.T
    # differences of neighbours within a factor of two are exact in float32 (Sterbenz), the others
    # are rounded once: relative error of a product below 4 * 2^-24
    error = (history.gram() - exact).abs().max() / exact.diagonal().min()
    assert error < 4 * 2**-24


def test_products_are_formed_once_and_stay_right_as_the_ring_turns() -> None:
    history, points = make(depth=4), random_points(12)
    for count in range(2, 13):
        push_all(history, points[len(points[: count - 1]) : count] if count > 2 else points[:2])
        if count % 3:  # one, or two points since the last Gram
            differences = points[max(0, count - 5) : count].diff(dim=0)
            torch.testing.assert_close(
                history.gram(), differences @ differences.T, rtol=1e-13, atol=1e-13
            )


def test_a_start_that_is_forgotten_after_a_gram_leaves_its_predecessor_whole() -> None:
    history, points = make(depth=6), random_points(6)
    push_all(history, points[:3])
    history.break_chain()
    push_all(history, points[3:4])
    history.gram()
    history.break_chain()  # the fourth point goes, the third is the newest again
    torch.testing.assert_close(history.newest, points[2], rtol=1e-14, atol=1e-15)
    push_all(history, points[4:])
    kept = points[[0, 1, 2, 4, 5]].diff(dim=0)
    torch.testing.assert_close(history.gram(), kept @ kept.T, rtol=1e-13, atol=1e-13)
    assert history.linked == [True, True, False, True]


@pytest.mark.parametrize("length", [1 << 18, (1 << 20) + 1000, 1 << 22])
def test_products_of_float32_are_good_to_1e8(length: int) -> None:
    """Summed in single precision over short runs only, also where all products have one sign."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.rand(3, length, generator=generator)
    history = make(depth=3, length=length, dtype=torch.float32)
    points = torch.cat([torch.zeros(1, length), steps]).cumsum(dim=0)
    assert history_module._single_precision_run(history._rows) == math.isqrt(length) // 2
    push_all(history, points)
    differences = points.diff(dim=0).double()
    exact = differences @ differences.T
    norms = exact.diagonal().sqrt()
    assert ((history.gram() - exact).abs() / torch.outer(norms, norms)).max() < 1e-8


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_coarser_matrix_products_of_the_user_do_not_reach_the_gram(precision: str) -> None:
    assert history_module._single_precision_will_do(torch.empty(1, 1 << 20))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert not history_module._single_precision_will_do(torch.empty(1, 1 << 20))
    finally:
        torch.set_float32_matmul_precision(before)


def test_rows_of_forgotten_points_touch_nothing() -> None:
    history, points = make(depth=4), random_points(4)
    push_all(history, torch.full((7, 5), torch.nan, dtype=torch.float64))
    history.clear()
    push_all(history, points)
    assert bool(history.gram().isfinite().all())
    out = torch.empty(5, dtype=torch.float64)
    history.combine(torch.ones(3, dtype=torch.float64), out)
    torch.testing.assert_close(out, 2 * points[3] - points[0])


def test_clear_forgets_everything() -> None:
    history = make()
    push_all(history, random_points(3))
    history.clear()
    assert (len(history), history.residual_count, history.chained) == (0, 0, False)


def test_the_state_continues_the_chain_wherever_the_ring_stood() -> None:
    points = random_points(9)
    for pushed in range(1, 8):
        first, second = make(), make()
        push_all(first, points[:pushed])
        second.load_state_dict(first.state_dict())
        for history in (first, second):
            push_all(history, points[pushed:])
        assert torch.equal(stored(first), stored(second))
        assert first.linked == second.linked
        assert torch.equal(first.gram(), second.gram())


def test_a_state_of_another_size_is_refused() -> None:
    history = make(depth=4, length=5)
    push_all(history, random_points(5))
    state = history.state_dict()
    with pytest.raises(ValueError, match="holds up to 5 points of 6 elements, got 5 of 5"):
        make(depth=4, length=6).load_state_dict(state)
    with pytest.raises(ValueError, match="holds up to 3 points of 5 elements, got 5 of 5"):
        make(depth=2, length=5).load_state_dict(state)
