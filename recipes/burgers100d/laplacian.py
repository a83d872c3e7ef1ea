"""The derivatives that a tanh network needs for an equation with a Laplacian in many dimensions.

One forward pass carries, beside the value, the first derivatives along some directions v and the
*sum* of the second derivatives along them (a collapsed Taylor mode). What the directions are
decides what that sum is:

    exact         an orthonormal basis: sum_v v'Hv = tr H, the Laplacian
    hutchinson    random signs / sqrt(m): the expectation of v'Hv is tr H / m
    sampled       m of the d unit vectors, scaled by sqrt(d/m)

Sources: Li et al., A computational framework for neural network-based variational Monte Carlo with
Forward Laplacian (2023); Hu et al., Hutchinson Trace Estimation for high-dimensional and high-order
PINNs (2024) and Tackling the Curse of Dimensionality with Physics-Informed Neural Networks (2023).
"""

from typing import Literal, cast, get_args

import torch
from torch import Generator, Tensor, nn

from lightning_stableaa.recipes.burgers100d.problems import Derivatives

Estimator = Literal["exact", "hutchinson", "sampled"]

CPU_CHUNK = 500  # points; the tangents of a chunk stay in the cache: measured twice as fast as 4000


def laplacian_directions(
    estimator: Estimator,
    first_weight: Tensor,  # (h, d), the weights of the first layer on the space coordinates
    *,
    probes: int,
    generator: Generator | None,
) -> Tensor:
    """Directions (m, d) along which the second derivatives sum to the Laplacian, or its estimate.

    Exact needs only min(h, d) of them: the network is constant orthogonally to the rows of its
    first weight. The basis is a constant to autograd, which leaves the gradient exact: with Q the
    basis, W Q Q' = W, so the derivative of (WQ)(WQ)' equals that of WW'.

    Raises:
        ValueError: ``estimator`` is unknown, or ``probes`` is below 1, or above d for "sampled".
    """
    hidden, d = first_weight.shape
    like = {"dtype": first_weight.dtype, "device": first_weight.device}
    if estimator == "exact":
        if hidden >= d:
            return torch.eye(d, **like)
        return torch.linalg.qr(first_weight.detach().T).Q.T
    if estimator == "hutchinson":
        if probes < 1:
            raise ValueError(f"probes must be >= 1, got {probes}")
        signs = torch.randint(0, 2, (probes, d), generator=generator) * 2 - 1
        return signs.to(**like) / probes**0.5
    if estimator == "sampled":
        if not 1 <= probes <= d:
            raise ValueError(f"probes must be in 1 .. {d} for sampled dimensions, got {probes}")
        chosen = torch.randperm(d, generator=generator)[:probes]
        return torch.eye(d, **like)[chosen.to(first_weight.device)] * (d / probes) ** 0.5
    raise ValueError(f"laplacian must be one of {get_args(Estimator)}, got {estimator!r}")


def derivatives(
    network: nn.Module,
    points: Tensor,  # (n, d + 1), time last
    *,
    estimator: Estimator = "exact",
    probes: int = 16,
    generator: Generator | None = None,
) -> Derivatives:
    """Value, time derivative, divergence and Laplacian of a tanh network with one output.

    Args:
        probes: directions of the two estimators; "exact" ignores it.
        generator: source of their randomness, on the CPU; None is torch's global one.

    Raises:
        TypeError: ``network`` is not a Sequential of Linear, Tanh, ..., Linear.
    """
    layers = _linear_layers(network)
    weight = layers[0].weight
    d = points.shape[1] - 1
    curving = laplacian_directions(estimator, weight[:, :d], probes=probes, generator=generator)
    curving = curving @ weight[:, :d].T  # (m, h)
    sloping = torch.stack((weight[:, d], weight[:, :d].sum(dim=1)))  # (2, h): time, divergence
    chunk = CPU_CHUNK if points.device.type == "cpu" else len(points)
    parts = [_propagate(layers, part, curving, sloping) for part in points.split(chunk)]
    return Derivatives(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _propagate(
    layers: list[nn.Linear],
    points: Tensor,  # (n, d + 1)
    curving: Tensor,  # (m, h) tangents after the first weight, whose second derivatives are summed
    sloping: Tensor,  # (k, h) tangents of which only the first derivative is wanted
) -> Derivatives:
    *hidden, last = layers
    value = points
    curving, sloping = curving.unsqueeze(1), sloping.unsqueeze(1)  # (m, 1, h), then (m, n, h)
    laplacian = torch.zeros((), dtype=points.dtype, device=points.device)
    for depth, layer in enumerate(hidden):
        if depth > 0:
            curving, sloping, laplacian = (
                t @ layer.weight.T for t in (curving, sloping, laplacian)
            )
        # a = tanh z: a' = 1 - a^2, a'' = -2 a a'
        value = torch.tanh(layer(value))
        slope = 1 - value.square()
        laplacian = slope * (laplacian - 2 * value * curving.square().sum(dim=0))
        sloping = slope * sloping
        if layer is not hidden[-1]:
            curving = slope * curving
    time, divergence = sloping @ last.weight[0]
    return Derivatives(last(value)[:, 0], time, divergence, laplacian @ last.weight[0])


def _linear_layers(network: nn.Module) -> list[nn.Linear]:
    layers = list(network) if isinstance(network, nn.Sequential) else []
    alternating = len(layers) % 2 == 1 and all(
        isinstance(layer, nn.Tanh if index % 2 else nn.Linear) for index, layer in enumerate(layers)
    )
    if not alternating or len(layers) < 3:
        raise TypeError(
            "the Laplacian is propagated through a Sequential of Linear, Tanh, ..., Linear; "
            f"got {type(network).__name__}({', '.join(type(m).__name__ for m in layers)})"
        )
    return cast(list[nn.Linear], layers[::2])
