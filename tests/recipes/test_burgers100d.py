import lightning
import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import mse_loss

from lightning_stableaa.recipes.burgers100d import (
    Burgers100dData,
    Burgers100dModule,
    LogisticBurgers,
    ProductBurgers,
)
from lightning_stableaa.recipes.burgers100d.data import Points, draw_points
from lightning_stableaa.recipes.burgers100d.laplacian import derivatives
from lightning_stableaa.recipes.burgers100d.problems import Derivatives
from lightning_stableaa.recipes.networks import mlp
from lightning_stableaa.recipes.train import train

PROBLEMS = [LogisticBurgers(), ProductBurgers()]


def by_autograd(function, points: Tensor) -> Derivatives:
    """One second derivative after another: slow and plain."""
    points = points.clone().requires_grad_()
    value = function(points)
    (gradient,) = torch.autograd.grad(value.sum(), points, create_graph=True)
    laplacian = torch.zeros_like(value)
    for i in range(points.shape[1] - 1):
        (row,) = torch.autograd.grad(gradient[:, i].sum(), points, create_graph=True)
        laplacian = laplacian + row[:, i]
    return Derivatives(value, gradient[:, -1], gradient[:, :-1].sum(dim=1), laplacian)


def tanh_network(widths: list[int]) -> nn.Sequential:
    torch.manual_seed(0)
    return mlp(widths, "tanh").double()


class TestProblems:
    @pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: type(p).__name__)
    def test_exact_solution_has_no_residual(self, problem):
        points = problem.interior_points(20, Generator().manual_seed(1)).double()
        u = by_autograd(problem.exact, points)
        # each term of the equation is of the size of its largest: rounding is relative to that
        scale = max(term.detach().abs().max() for term in u)
        assert problem.residual(points, u).abs().max() < 1e-13 * scale

    def test_logistic_equation_in_the_coordinates_of_the_source(self):
        problem, d = LogisticBurgers(), 100
        scaled = problem.interior_points(20, Generator().manual_seed(1)).double()
        points = torch.cat((d * scaled[:, :-1], scaled[:, -1:]), dim=1)

        def source_solution(points: Tensor) -> Tensor:
            s = torch.exp(points[:, -1] + points[:, :-1].mean(dim=1))
            return s / (1 + s)

        u = by_autograd(source_solution, points)
        residual = (
            u.time + d**2 / 2 * u.laplacian + (u.value - (2 + d) / (2 * d)) * d * u.divergence
        )
        assert torch.allclose(source_solution(points), problem.exact(scaled), rtol=1e-12)
        assert residual.abs().max() < 1e-13

    def test_points_of_the_logistic_problem_follow_its_process(self):
        problem = LogisticBurgers()
        interior = problem.interior_points(500, Generator().manual_seed(0))
        data = problem.data_points(500, Generator().manual_seed(0))
        assert interior.shape == data.shape == (500, 101)
        assert (data[:, -1] == 1).all()
        assert 0 <= interior[:, -1].min() < 0.01
        assert 0.99 < interior[:, -1].max() < 1
        # 50,000 coordinates of variance 1: the standard error of their variance is 0.006
        standardised = interior[:, :-1] / interior[:, -1:].sqrt()
        assert standardised.var().item() == pytest.approx(1, abs=0.03)
        assert problem.exact(torch.zeros(1, 101)).item() == 0.5

    def test_product_solution_is_as_small_as_documented(self):
        problem = ProductBurgers()
        points = problem.interior_points(100_000, Generator().manual_seed(0))
        assert points.shape == (100_000, 100)
        # a heavy tail carries the mean square, so a sample shows only its order
        assert 1e-9 < problem.exact(points).square().mean().sqrt().item() < 1e-8


class TestLaplacian:
    # fewer hidden units than dimensions takes the reduced basis, more takes the unit vectors
    @pytest.mark.parametrize("widths", [[13, 5, 5, 1], [4, 7, 6, 5, 1], [3, 4, 1]])
    def test_exact_agrees_with_autograd_in_values_and_gradients(self, widths):
        network = tanh_network(widths)
        points = torch.randn(11, widths[0], generator=Generator().manual_seed(0)).double()
        fast = derivatives(network, points)
        slow = by_autograd(lambda x: network(x)[:, 0], points)
        for name, quantity in fast._asdict().items():
            assert torch.allclose(quantity, getattr(slow, name), rtol=1e-12, atol=1e-14), name
        weights = list(network.parameters())
        gradients = [
            torch.autograd.grad(torch.stack(u).square().sum(), weights) for u in (fast, slow)
        ]
        for ours, theirs in zip(*gradients, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-13)

    def test_chunks_do_not_change_the_result(self, monkeypatch):
        network = tanh_network([8, 5, 5, 1])
        points = torch.randn(10, 8, dtype=torch.float64)
        whole = derivatives(network, points)
        monkeypatch.setattr("lightning_stableaa.recipes.burgers100d.laplacian.CPU_CHUNK", 3)
        for ours, theirs in zip(derivatives(network, points), whole, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-13, atol=1e-15)

    @pytest.mark.parametrize("estimator", ["hutchinson", "sampled"])
    def test_estimates_are_unbiased(self, estimator):
        network = tanh_network([7, 5, 5, 1])
        points = torch.randn(3, 7, generator=Generator().manual_seed(0)).double()
        generator = Generator().manual_seed(0)
        with torch.no_grad():
            exact = derivatives(network, points)
            draws = [
                derivatives(network, points, estimator=estimator, probes=2, generator=generator)
                for _ in range(1500)
            ]
        estimates = torch.stack([draw.laplacian for draw in draws])
        # The mean of N independent unbiased draws is normal around the exact value with the
        # standard error std/sqrt(N); five of them are exceeded once in two million seeds.
        standard_error = estimates.std(dim=0) / len(draws) ** 0.5
        assert ((estimates.mean(dim=0) - exact.laplacian).abs() < 5 * standard_error).all()
        # the bound is sharp enough to see an error of a few per cent
        assert (5 * standard_error < 0.1 * exact.laplacian.abs().max()).all()
        for name in ("value", "time", "divergence"):
            assert torch.allclose(getattr(draws[0], name), getattr(exact, name), rtol=1e-12)

    def test_all_dimensions_sampled_are_exact(self):
        network = tanh_network([7, 5, 5, 1])
        points = torch.randn(3, 7, dtype=torch.float64)
        sampled = derivatives(network, points, estimator="sampled", probes=6)
        assert torch.allclose(sampled.laplacian, derivatives(network, points).laplacian, rtol=1e-12)

    def test_other_networks_are_refused(self):
        network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
        with pytest.raises(TypeError, match=r"got Sequential\(Linear, ReLU, Linear\)"):
            derivatives(network, torch.zeros(2, 3))

    @pytest.mark.parametrize(
        ("estimator", "message"),
        [
            ("sampled", r"probes must be in 1 .. 2 for sampled dimensions, got 3"),
            ("exactly", r"laplacian must be one of \('exact', 'hutchinson', 'sampled'\)"),
        ],
    )
    def test_wrong_options_are_refused(self, estimator, message):
        with pytest.raises(ValueError, match=message):
            derivatives(mlp([3, 4, 1], "tanh"), torch.zeros(2, 3), estimator=estimator, probes=3)


def fit(module, data, steps, path):
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=path,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, data)
    assert trainer.global_step == steps
    return trainer


class TestData:
    def test_points_are_redrawn_on_schedule_and_depend_on_seed_and_step_alone(self, tmp_path):
        class Recorder(Burgers100dModule):
            def training_step(self, batch, batch_idx):
                seen.append(batch)
                return super().training_step(batch, batch_idx)

        seen = []
        problem = LogisticBurgers()
        module = Recorder(mlp([101, 4, 1], "tanh"), torch.optim.Adam, problem=problem)
        data = Burgers100dData(
            problem, interior_points=5, data_points=4, redraw_every=3, epoch_length=4, seed=7
        )
        fit(module, data, 8, tmp_path)
        assert [points.step for points in seen] == list(range(8))
        for points in seen:
            expected = draw_points(problem, 5, 4, seed=(7, 0, points.step // 3))
            assert all(torch.equal(a, b) for a, b in zip(points[:3], expected, strict=True))
        assert torch.equal(seen[0].data_values, problem.exact(seen[0].data))
        assert not torch.equal(seen[2].interior, seen[3].interior)

    def test_validation_points_are_the_same_for_every_seed(self):
        loaders = [Burgers100dData(ProductBurgers(), seed=s).val_dataloader() for s in (0, 1)]
        (points, exact), (others, _) = (next(iter(loader)) for loader in loaders)
        assert torch.equal(points, others)
        assert torch.equal(exact, ProductBurgers().exact(points))

    def test_empty_batches_are_refused(self):
        with pytest.raises(ValueError, match="data_points must be >= 1, got 0"):
            Burgers100dData(LogisticBurgers(), data_points=0)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: type(p).__name__)
def test_two_training_steps_are_those_of_a_plain_loop(problem, tmp_path):
    def network():
        torch.manual_seed(0)
        return mlp([problem.space_dimension + 1, 8, 8, 1], "tanh")

    def adam(parameters):
        return torch.optim.Adam(parameters, lr=1e-2)

    data = Burgers100dData(
        problem, interior_points=6, data_points=5, redraw_every=1, epoch_length=2
    )
    module = Burgers100dModule(network(), adam, problem=problem)
    trainer = fit(module, data, 2, tmp_path)

    plain = network()
    optimizer = adam(plain.parameters())
    losses = []
    for step in range(2):
        interior, given, values = draw_points(problem, 6, 5, seed=(0, 0, step))
        residual = problem.residual(interior, derivatives(plain, interior))
        loss = residual.square().mean() + mse_loss(plain(given)[:, 0], values)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for ours, theirs in zip(module.network.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)

    points, exact = next(iter(data.val_dataloader()))
    error = (plain(points)[:, 0] - exact).norm() / exact.norm()
    logged = trainer.callback_metrics
    # single precision on our side, double in the metric
    assert logged["val/relative_l2"].item() == pytest.approx(error.item(), rel=1e-5)
    assert logged["train/loss"].item() == losses[-1]


def test_estimate_follows_the_step_and_not_the_random_state():
    problem = LogisticBurgers()
    module = Burgers100dModule(
        mlp([101, 8, 1], "tanh"),
        torch.optim.Adam,
        problem=problem,
        laplacian="hutchinson",
        probes=2,
    )
    drawn = draw_points(problem, 6, 5, seed=(0,))
    losses = [module.anderson_loss(Points(*drawn, step)).item() for step in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("recipe", ["burgers100d", "burgers100d_product"])
def test_two_steps_of_the_recipe(recipe, compose):
    results = train(
        compose(
            f"recipe={recipe}",
            "data.interior_points=20",
            "trainer.max_steps=2",
            "trainer.val_check_interval=1",
            "callbacks=none",
            "callbacks.progress=null",
            "logger=none",
        )
    )
    assert results["best/val/relative_l2"] <= results["val/relative_l2"]
    # the product is of the order of 1e-9: an untrained network is off by a factor of millions
    assert (results["val/relative_l2"] > 1e6) == (recipe == "burgers100d_product")
