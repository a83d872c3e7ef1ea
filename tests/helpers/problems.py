"""Problems of known solution, stepped by a plain loop, and comparisons of states."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lightning_stableaa import AndersonAccelerator, StepReport


class Loop:
    """A plain training loop; an iterate enters the history after every step, unless told else.

    Args:
        parameters: what is trained.
        loss: of the parameters as they are; the steps are given where there is none.
        make_optimizer: of the parameters and the rate ``lr``.
        learning_rate: with 1 given updates are what is added to the parameters.
        options: of the accelerator.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        loss: Callable[[], Tensor] | None = None,
        *,
        make_optimizer: Callable[..., Optimizer] = SGD,
        learning_rate: float = 1.0,
        **options: Any,
    ) -> None:
        self.parameters = list(parameters)
        if loss is not None:
            self.loss = loss
        self.optimizer = make_optimizer(self.parameters, lr=learning_rate)
        setting: dict[str, Any] = {"store_every_n_steps": 1, "accelerate_every_n_steps": 3}
        self.accelerator = AndersonAccelerator(self.optimizer, **setting | options)
        self.step_index = 0

    def loss(self) -> Any:
        """That of the current step."""
        raise NotImplementedError

    def train_step(self, *updates: Any) -> None:
        """One step of the optimizer, along the gradient or by given updates of the parameters."""
        self.step_index += 1
        self.optimizer.zero_grad()
        if updates:
            for one, update in zip(self.parameters, updates, strict=False):
                one.grad = -torch.as_tensor(update, dtype=one.dtype)
        else:
            self.loss().backward()
        self.optimizer.step()

    def step(
        self, *updates: Any, loss: Callable[[], Any] | None = None, **options: Any
    ) -> StepReport:
        """One step of the optimizer and of the accelerator, by ``loss`` if not by its own."""
        self.train_step(*updates)
        evaluates = self.accelerator.options.safeguard != "none"
        return self.accelerator.step((loss or self.loss) if evaluates else None, **options)

    def run(self, steps: int, **options: Any) -> list[StepReport]:
        """Reports of so many steps."""
        return [self.step(**options) for _ in range(steps)]


class Quadratic(Loop):
    """Gradient descent on 1/2 x^T A x; A is diagonal, with eigenvalues from 1 to 1/condition.

    Args:
        noise: standard deviation of the gradient noise, which belongs to the step: a resumed run
            sees the same.
        place: turns the initial tensor into the tensors that are trained.
        options: of the accelerator.
    """

    def __init__(
        self,
        *,
        size: int = 20,
        condition: float = 1e3,
        noise: float = 0.0,
        place: Callable[[Tensor], list[Tensor]] = lambda x: [x],
        learning_rate: float = 1.0,
        momentum: float = 0.0,
        dtype: torch.dtype = torch.float64,
        **options: Any,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        exponents = torch.linspace(0, -math.log10(condition), size, dtype=torch.float64)
        self.spectrum = (10**exponents).to(dtype)
        start = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
        self.noise = noise
        super().__init__(
            map(nn.Parameter, place(start)),
            make_optimizer=functools.partial(SGD, momentum=momentum),
            learning_rate=learning_rate,
            **options,
        )

    @property
    def x(self) -> Tensor:
        """All unknowns as one vector, a copy with gradient."""
        return torch.cat([_full(one).flatten() for one in self.parameters])

    def loss(self) -> Tensor:
        """That of the current step."""
        x = self.x
        value = 0.5 * (self.spectrum * x * x).sum()
        if not self.noise:
            return value
        generator = torch.Generator().manual_seed(self.step_index)
        noise = torch.randn(len(x), generator=generator, dtype=torch.float64).to(x.dtype)
        return value + self.noise * (noise * x).sum()

    def solution(self) -> Tensor:
        """The unknowns, a copy."""
        return self.x.detach().clone()

    def state_dict(self) -> dict[str, Any]:
        """Everything, for ``torch.save``."""
        return {
            "x": [one.detach().clone() for one in self.parameters],
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "accelerator": self.accelerator.state_dict(),
            "step_index": self.step_index,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``; the accelerator is loaded first, the weights last."""
        self.accelerator.load_state_dict(state["accelerator"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # it keeps the tensors
        self.step_index = state["step_index"]
        with torch.no_grad():
            for parameter, value in zip(self.parameters, state["x"], strict=True):
                parameter.copy_(value)


def accepted_steps(reports: Iterable[StepReport]) -> list[int]:
    """The steps, from 1, whose candidates were accepted."""
    return [step for step, report in enumerate(reports, start=1) if report.accepted]


def assert_bitwise_equal(one: Any, other: Any, path: str = "state") -> None:
    """Nested containers with the same tensors, bit for bit; NaN equals NaN."""
    assert type(one) is type(other), path
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype, path
        same = torch.isclose(one, other, rtol=0, atol=0, equal_nan=True)
        assert bool(same.all()), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key, value in one.items():
            assert_bitwise_equal(value, other[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_bitwise_equal(a, b, f"{path}[{index}]")
    else:
        assert one == other, path


def _full(tensor: Tensor) -> Tensor:
    full_tensor = getattr(tensor, "full_tensor", None)  # of a DTensor
    return tensor if full_tensor is None else full_tensor()
