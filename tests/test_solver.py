import math

import numpy as np
import pytest
import torch

from lightning_stableaa.solver import (
    condition_number,
    jump_weights,
    lag,
    mixing_weights,
    propose,
    propose_on_device,
    remaining_residual,
    residual_noise,
    suitable_lambda,
)
from tests import reference


def gram_of(residuals: torch.Tensor) -> torch.Tensor:
    return residuals @ residuals.T


def random_residuals(m: int, n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("m", [1, 2, 5, 10])
@pytest.mark.parametrize("regularization", [0.0, 1e-8, 1e-3, 1.0])
def test_weights_equal_the_reference(m: int, regularization: float) -> None:
    residuals = random_residuals(m, 40)
    alpha = mixing_weights(gram_of(residuals), regularization=regularization)
    expected = reference.mixing_weights(list(residuals.numpy()), regularization)
    # 1e-12: ten well-conditioned equations in float64
    np.testing.assert_allclose(alpha.numpy(), expected, rtol=1e-12)


def test_weights_sum_to_one_and_are_stationary() -> None:
    residuals = random_residuals(6, 30)
    alpha = mixing_weights(gram_of(residuals), regularization=0.0)
    assert alpha.sum().item() == pytest.approx(1.0, abs=1e-14)
    best = (alpha @ residuals).norm()
    for seed in range(20):
        change = torch.randn(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        change -= change.mean()  # stays on the plane of weights that sum to one
        for size in (1e-3, -1e-3):
            assert ((alpha + size * change) @ residuals).norm() > best


def test_a_grid_solves_every_lambda_from_one_gram() -> None:
    gram = gram_of(random_residuals(5, 30))
    grid = [1e-8, 1e-3, 10.0]
    together = mixing_weights(gram, regularization=grid)
    assert together.shape == (3, 5)
    for row, value in zip(together, grid, strict=True):
        torch.testing.assert_close(row, mixing_weights(gram, regularization=value))


def test_a_huge_lambda_gives_the_plain_average() -> None:
    alpha = mixing_weights(gram_of(random_residuals(4, 30)), regularization=1e12)
    torch.testing.assert_close(alpha, torch.full((4,), 0.25, dtype=torch.float64))


def test_the_scale_of_the_residuals_does_not_matter() -> None:
    gram = gram_of(random_residuals(5, 30))
    alpha = mixing_weights(gram, regularization=1e-3)
    for scale in (1e-300, 1e-20, 1e20):
        torch.testing.assert_close(mixing_weights(gram * scale, regularization=1e-3), alpha)


def test_collinear_residuals_are_extrapolated_to_their_root() -> None:
    # r and 2r: x + 2 r_1 - r_2 = 0 residual, so alpha = (2, -1)
    residuals = torch.tensor([[1.0, 1.0], [2.0, 2.0]], dtype=torch.float64)
    alpha = mixing_weights(gram_of(residuals), regularization=0.0)
    # the floor of the ridge is m * eps; K has entries of order one
    torch.testing.assert_close(alpha, alpha.new_tensor([2.0, -1.0]), rtol=1e-13, atol=1e-13)


def test_equal_residuals_share_the_weight() -> None:
    residuals = torch.ones(3, 4, dtype=torch.float64)
    alpha = mixing_weights(gram_of(residuals), regularization=1e-6)
    torch.testing.assert_close(alpha, torch.full((3,), 1 / 3, dtype=torch.float64))


def test_a_zero_residual_gets_no_weight() -> None:
    residuals = random_residuals(3, 10)
    residuals[1] = 0
    alpha = mixing_weights(gram_of(residuals), regularization=1e-3)
    assert alpha[1] == 0
    kept = mixing_weights(gram_of(residuals[[0, 2]]), regularization=1e-3)
    # the ridge is relative to the mean over residuals that moved, so nothing else changes
    torch.testing.assert_close(alpha[[0, 2]], kept)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_residuals_give_nan_weights(value: float) -> None:
    gram = gram_of(random_residuals(3, 10))
    gram[1, :] = gram[:, 1] = value
    assert mixing_weights(gram, regularization=1e-3).isnan().all()


def test_only_zero_residuals_give_nan_weights() -> None:
    alpha = mixing_weights(torch.zeros(3, 3, dtype=torch.float64), regularization=1e-3)
    assert alpha.isnan().all()


@pytest.mark.parametrize("shape", [(2, 3), (4,), (0, 0)])
def test_a_gram_that_is_not_square_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"gram must be square, \(m, m\) with m >= 1, got"):
        mixing_weights(torch.zeros(*shape, dtype=torch.float64), regularization=1e-3)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_wrong_lambda_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=f"regularization must be finite and >= 0, got {value}"):
        mixing_weights(torch.eye(2, dtype=torch.float64), regularization=value)


@pytest.mark.parametrize(("relaxation", "advance"), [(0.3, 0.0), (1.0, 0.0), (1.0, 3.5)])
@pytest.mark.parametrize(
    "linked", [[True] * 4, [True, False, True, True], [True, True, False, True, False, True]]
)
def test_the_jump_leads_to_the_candidate(
    relaxation: float, advance: float, linked: list[bool]
) -> None:
    points = random_residuals(len(linked) + 1, 7)
    differences = points.diff(dim=0)
    pairs = [
        (points[k].numpy(), points[k + 1].numpy()) for k, is_cycle in enumerate(linked) if is_cycle
    ]
    alpha = mixing_weights(gram_of(differences[torch.tensor(linked)]), regularization=1e-6)
    theta = torch.tensor(advance, dtype=torch.float64)
    jump = jump_weights(alpha, linked, relaxation=relaxation, advance=theta)
    expected = reference.candidate(pairs, alpha.numpy(), relaxation, advance)
    np.testing.assert_allclose((points[-1] + jump @ differences).numpy(), expected, rtol=1e-10)


def test_a_wrong_number_of_residuals_is_refused() -> None:
    with pytest.raises(ValueError, match="alpha has 2 weights for 1 residuals"):
        jump_weights(torch.ones(2) / 2, [True, False], relaxation=1.0)


ALONG = {"relaxation": 1.0, "max_extrapolation": math.inf}


def test_on_a_drift_averages_do_not_fall_behind_and_the_last_candidate_goes_on() -> None:
    drift = random_residuals(1, 9)
    differences = drift.expand(6, -1)
    found = propose(
        gram_of(differences),
        [True] * 6,
        regularization=[1e-8, 1.0, 1e-2],
        lag_compensation=0.75,
        look_ahead_cycles=10.0,
        **ALONG,
    )
    jumps = found.jumps @ differences
    torch.testing.assert_close(jumps[:2], torch.zeros_like(jumps[:2]), atol=1e-6, rtol=0)
    torch.testing.assert_close(jumps[2], 10 * drift[0])
    assert float(found.remaining) == pytest.approx(6.0)
    uncompensated = propose(gram_of(differences), [True] * 6, regularization=[1.0], **ALONG)
    torch.testing.assert_close((uncompensated.jumps @ differences)[0], -2.5 * drift[0])


def test_on_noise_a_share_of_the_lag_is_made_up_and_nothing_goes_on() -> None:
    noise = torch.eye(8, dtype=torch.float64)
    alpha = mixing_weights(gram_of(noise), regularization=1.0)
    assert float(remaining_residual(alpha, gram_of(noise))) == pytest.approx(1.0)
    assert float(lag(alpha)) == pytest.approx(3.5)
    linked = [True] * 8
    options = {"regularization": [1.0], "lag_compensation": 0.5, **ALONG}
    found = propose(gram_of(noise), linked, look_ahead_cycles=10.0, **options)
    expected = jump_weights(alpha, linked, relaxation=1.0, advance=torch.tensor(0.5 * 3.5))
    torch.testing.assert_close(found.jumps[0], expected)


def test_where_residuals_can_be_eliminated_the_candidate_is_the_textbook_one() -> None:
    start = random_residuals(1, 5)
    residuals = torch.cat([0.9**k * start for k in range(6)])
    gram = gram_of(residuals)
    assert float(remaining_residual(mixing_weights(gram, regularization=0.0), gram)) < 1e-6
    options = {"regularization": [0.0], **ALONG}
    textbook = propose(gram, [True] * 6, **options).jumps @ residuals
    ours = propose(gram, [True] * 6, lag_compensation=0.75, **options).jumps @ residuals
    torch.testing.assert_close(ours, textbook, rtol=1e-4, atol=0)


def test_the_cap_shortens_the_jump_and_reports_its_length() -> None:
    points = random_residuals(5, 8)
    gram = gram_of(points.diff(dim=0))
    options = {"regularization": [1e-10, 1e-2], "relaxation": 1.0}
    free = propose(gram, [True] * 4, max_extrapolation=float("inf"), **options)
    capped = propose(gram, [True] * 4, max_extrapolation=0.5, **options)
    longest = 0.5 * free.residual_norm
    assert bool((free.norms > longest).all()), "the cap must bite for this test to say anything"
    torch.testing.assert_close(capped.norms, longest.expand(2))
    lengths = (capped.jumps @ points.diff(dim=0)).norm(dim=1)
    torch.testing.assert_close(lengths, capped.norms)


def test_condition_number() -> None:
    assert condition_number(torch.diag(torch.tensor([4.0, 1.0, 2.0]))) == pytest.approx(4.0)
    assert condition_number(torch.zeros(2, 2)) == float("inf")
    assert np.isnan(condition_number(torch.full((2, 2), float("nan"))))


GRAMS = {
    "noise": random_residuals(8, 40),
    "drift": random_residuals(1, 9).expand(8, -1),
    "eliminated": torch.cat([0.9**k * random_residuals(1, 5) for k in range(8)]),
    "one of zero": random_residuals(8, 40) * torch.tensor([[1.0]] * 3 + [[0.0]] + [[1.0]] * 4),
    "all zero": torch.zeros(8, 5, dtype=torch.float64),
    "tiny": 1e-150 * random_residuals(8, 40),
    "not a number": random_residuals(8, 40) * torch.tensor([[1.0]] * 7 + [[math.nan]]),
    "infinite": random_residuals(8, 40) * torch.tensor([[1.0]] * 7 + [[math.inf]]),
}


def test_lambda_follows_the_noise_of_the_residuals() -> None:
    noise, eliminated = GRAMS["noise"], GRAMS["eliminated"]
    assert lambda_of(gram_of(noise)) == pytest.approx(3e-2)
    assert lambda_of(gram_of(eliminated)) < 1e-12
    for share in (0.003, 0.01, 0.02):  # of noise beside a drift
        residuals = random_residuals(1, 40, seed=1) + share * noise
        expected = reference.suitable_lambda(list(residuals.numpy()))
        assert lambda_of(gram_of(residuals)) == pytest.approx(expected, rel=1e-6)
        assert 1e-8 < expected < 3e-2
        assert lambda_of(1e-20 * gram_of(residuals)) == pytest.approx(expected, rel=1e-6)


def lambda_of(gram: torch.Tensor) -> float:
    return float(suitable_lambda(residual_noise(gram)))


def test_noisiness_tells_noise_from_a_drift_and_from_what_can_be_eliminated() -> None:
    found = {
        name: float(
            propose(gram_of(GRAMS[name]), [True] * 8, regularization=None, **ALONG).noisiness
        )
        for name in ("noise", "drift", "eliminated")
    }
    assert found["noise"] > 0.9
    assert found["drift"] < 1e-6
    assert found["eliminated"] < 1e-6
    for share in (0.01, 0.03, 0.1, 0.2):  # of noise beside a drift
        residuals = random_residuals(1, 40, seed=1) + share * GRAMS["noise"]
        alpha = reference.mixing_weights(
            list(residuals.numpy()), reference.suitable_lambda(list(residuals.numpy()))
        )
        expected = reference.noisiness(list(residuals.numpy()), alpha)
        proposal = propose(gram_of(residuals), [True] * 8, regularization=None, **ALONG)
        assert float(proposal.noisiness) == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("differences", GRAMS.values(), ids=GRAMS)
@pytest.mark.parametrize("grid", [[1e-4, 1e-2, 1.0], None], ids=["grid", "by the noise"])
@pytest.mark.parametrize("unlinked", [(), (1, 5), (0, 2, 3, 4, 5, 6, 7)], ids=len)
@pytest.mark.parametrize(
    ("relaxation", "cap", "compensation", "look_ahead"),
    [(1.0, math.inf, 0.0, 0.0), (0.7, 2.0, 0.75, 0.0), (1.0, 10.0, 1.0, 5.0)],
)
def test_host_and_device_propose_the_same(
    differences: torch.Tensor,
    grid: list[float] | None,
    unlinked: tuple[int, ...],
    relaxation: float,
    cap: float,
    compensation: float,
    look_ahead: float,
) -> None:
    gram = gram_of(differences)
    linked = [k not in unlinked for k in range(8)]
    options = {
        "relaxation": relaxation,
        "max_extrapolation": cap,
        "lag_compensation": compensation,
        "look_ahead_cycles": look_ahead,
    }
    on_host = propose(gram, linked, regularization=grid, **options)
    again = propose(gram.clone(), linked, regularization=grid, **options)
    on_device = propose_on_device(gram, linked, grid, **options)
    torch.testing.assert_close(
        on_host.lambdas, on_device.lambdas, rtol=1e-6, atol=1e-16, equal_nan=True
    )
    if bool(on_device.lambdas[0] < 1e-6):
        assert grid is None
        return  # rounding decides where residuals depend on one another
    scale = on_device.jumps.nan_to_num(0.0).abs().max().clamp_min(1.0)
    torch.testing.assert_close(
        on_host.jumps / scale, on_device.jumps / scale, rtol=0, atol=1e-10, equal_nan=True
    )
    # the sum of jumps that cancel, as on a drift, is rounding
    rounding = 1e-9 * float(on_device.residual_norm.nan_to_num(0.0))
    for name in ("residual_norm", "noisiness", "remaining", "norms", "reaches", "lambdas"):
        one, other = getattr(on_host, name), getattr(on_device, name)
        torch.testing.assert_close(one, other, rtol=1e-6, atol=rounding, equal_nan=True)
    assert on_device.residual_gram is not None
    condition = condition_number(on_device.residual_gram)
    if not condition > 1e12:  # beyond, rounding decides
        assert float(on_host.condition) == pytest.approx(condition, rel=1e-3, nan_ok=True)
    for one, other in ((on_host.jumps, again.jumps), (on_host.numbers, again.numbers)):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)  # to the bit
