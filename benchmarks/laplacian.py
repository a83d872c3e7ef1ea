"""What a training step of burgers100d costs with each way to get the Laplacian.

    python benchmarks/laplacian.py [--points 4000] [--repeats 5] [--threads 1] [--device cpu]

Prints a table: the median time of loss and gradient (on a CPU in seconds of processor time, which
other load on the machine changes little), and how far the Laplacian of the untrained
network lies from the exact one (relative root mean square over points and draws).
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap

from lightning_stableaa.recipes.burgers100d.laplacian import Estimator, derivatives
from lightning_stableaa.recipes.burgers100d.problems import Derivatives, LogisticBurgers
from lightning_stableaa.recipes.networks import mlp

Method = Callable[[nn.Module, Tensor], Derivatives]


def one_backward_pass_per_dimension(network: nn.Module, points: Tensor) -> Derivatives:
    """The loop of the authors' code."""
    points = points.clone().requires_grad_()
    value = network(points)[:, 0]
    (gradient,) = torch.autograd.grad(value.sum(), points, create_graph=True)
    laplacian = torch.zeros_like(value)
    for i in range(points.shape[1] - 1):
        (row,) = torch.autograd.grad(gradient[:, i].sum(), points, create_graph=True)
        laplacian = laplacian + row[:, i]
    return Derivatives(value, gradient[:, -1], gradient[:, :-1].sum(dim=1), laplacian)


def nested_jvp(network: nn.Module, points: Tensor) -> Derivatives:
    """torch.func: a forward derivative of a forward derivative, vectorised over dimensions."""
    weights: dict[str, Tensor] = dict(network.named_parameters())

    def value(points: Tensor) -> Tensor:
        return functional_call(network, weights, points)[:, 0]

    def slope(points: Tensor, direction: Tensor) -> Tensor:
        return jvp(value, (points,), (direction.expand_as(points),))[1]

    def second(direction: Tensor) -> tuple[Tensor, Tensor]:
        along = direction.expand_as(points)
        first, second, *_ = jvp(lambda x: slope(x, direction), (points,), (along,))
        return first, second

    unit = torch.eye(points.shape[1], device=points.device)
    gradient, curvature = vmap(second, chunk_size=10)(unit)
    return Derivatives(
        value(points), gradient[-1], gradient[:-1].sum(dim=0), curvature[:-1].sum(dim=0)
    )


def taylor(estimator: Estimator, probes: int = 1) -> Method:
    return lambda network, points: derivatives(network, points, estimator=estimator, probes=probes)


METHODS: dict[str, Method] = {
    "one backward pass per dimension": one_backward_pass_per_dimension,
    "torch.func, nested jvp": nested_jvp,
    "Taylor pass, exact": taylor("exact"),
    **{f"Taylor pass, hutchinson {k}": taylor("hutchinson", k) for k in (1, 4, 16)},
    **{f"Taylor pass, sampled {k}": taylor("sampled", k) for k in (1, 4, 16)},
}


def seconds_per_step(method: Method, network: nn.Module, points: Tensor, repeats: int) -> float:
    problem = LogisticBurgers()
    clock = time.perf_counter if points.is_cuda else time.process_time
    times = []
    for _ in range(repeats + 1):
        start = clock()
        network.zero_grad()
        problem.residual(points, method(network, points)).square().mean().backward()
        if points.is_cuda:
            torch.cuda.synchronize()
        times.append(clock() - start)
    return statistics.median(times[1:])  # the first warms up


def relative_error(method: Method, network: nn.Module, points: Tensor, draws: int = 20) -> float:
    exact = one_backward_pass_per_dimension(network, points).laplacian.detach()
    estimates = torch.stack([method(network, points).laplacian.detach() for _ in range(draws)])
    errors = estimates - exact
    return (errors.square().mean() / exact.square().mean()).sqrt().item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the ways to a Laplacian.")
    parser.add_argument("--points", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    problem = LogisticBurgers()
    network = mlp([problem.space_dimension + 1, 50, 50, 50, 1], "tanh").to(options.device)
    points = problem.interior_points(options.points, torch.Generator().manual_seed(0))
    points = points.to(options.device)
    machine = torch.cuda.get_device_name() if points.is_cuda else f"{options.threads} CPU thread(s)"
    print(f"torch {torch.__version__}, {machine}, {platform.machine()}, {options.points} points\n")
    print("| method | ms per step | error of the Laplacian |\n|---|---|---|")
    for name, method in METHODS.items():
        seconds = seconds_per_step(method, network, points, options.repeats)
        error = relative_error(method, network, points[:200])
        print(f"| {name} | {1000 * seconds:.0f} | {error:.1e} |", flush=True)


if __name__ == "__main__":
    main()
