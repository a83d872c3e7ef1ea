"""A training step with manual optimization, run without its backward passes and steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_stableaa.model.parameters import trainable_parameters


@contextmanager
def dry_run(
    trainer: Any, optimizers: Sequence[Optimizer]
) -> Iterator[tuple[list[Tensor], set[int]]]:
    """Inside, ``manual_backward`` and steps of optimizers and schedulers compute nothing.

    Args:
        trainer: the Trainer.
        optimizers: unwrapped optimizers, those of the Trainer.

    Yields:
        The losses whose gradients the step asked for so far, and the ids of the optimizers that it
        would have stepped.
    """
    losses: list[Tensor] = []
    stepped: set[int] = set()

    def backward(loss: Tensor, *_: Any, **__: Any) -> Tensor:
        losses.append(loss.detach())
        for parameter in trainable_parameters(optimizers):
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)  # the step may look at its norm
        return loss

    def step_of_strategy(optimizer: Any, closure: Callable[[], Any], *_: Any, **__: Any) -> Any:
        stepped.add(id(optimizer))
        return closure()

    def step(
        optimizer: Optimizer, closure: Callable[[], Any] | None = None, *_: Any, **__: Any
    ) -> Any:
        stepped.add(id(optimizer))
        return None if closure is None else closure()

    with ExitStack() as undo:
        replace_attribute(undo, trainer.strategy, "backward", backward)
        replace_attribute(undo, trainer.strategy, "optimizer_step", step_of_strategy)
        for optimizer in optimizers:
            replace_attribute(undo, optimizer, "step", functools.partial(step, optimizer))
        for config in trainer.lr_scheduler_configs:
            replace_attribute(undo, config.scheduler, "step", lambda *_, **__: None)
        yield losses, stepped


def single_objective(
    losses: Sequence[Tensor], stepped: Collection[int], num_optimizers: int
) -> Tensor:  # ()
    """The loss that all optimizers decrease.

    Several backward passes before the steps of one optimizer add up their gradients. With several
    optimizers they would be of different losses, such as those of a generator and of its
    discriminator, and no candidate could be compared by one of them. Optimizers that take turns
    may follow a loss each: one that is left out now had another step to decide by.

    Args:
        losses: those of one training step, each ().
        stepped: the optimizers that it steps.
        num_optimizers: how many there are.

    Raises:
        ValueError: several optimizers follow several losses, or take turns.
    """
    if 0 < len(stepped) < num_optimizers:
        raise ValueError(
            f"{num_optimizers} optimizers that take turns, so that each may follow another loss"
        )
    if len(losses) > 1 and num_optimizers > 1:
        raise ValueError(
            f"{num_optimizers} optimizers that follow {len(losses)} losses, none of which all of "
            "them decrease"
        )
    return sum(losses[1:], start=losses[0])


def replace_attribute(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute of an instance until the stack is closed."""
    if name in vars(owner):
        undo.callback(setattr, owner, name, vars(owner)[name])
    else:
        undo.callback(delattr, owner, name)
    setattr(owner, name, value)
