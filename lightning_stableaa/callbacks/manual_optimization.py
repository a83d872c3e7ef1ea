"""A training step with manual optimization, run without its backward passes and steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


@contextmanager
def dry_run(trainer: Any, optimizers: Sequence[Optimizer]) -> Iterator[list[Tensor]]:
    """Inside, ``manual_backward`` and steps of optimizers and schedulers compute nothing.

    Args:
        trainer: the Trainer.
        optimizers: unwrapped optimizers, those of the Trainer.

    Yields:
        The losses whose gradients the step asked for so far.
    """
    losses: list[Tensor] = []

    def backward(loss: Tensor, *_: Any, **__: Any) -> Tensor:
        losses.append(loss.detach())
        return loss

    def step_of_strategy(optimizer: Any, closure: Callable[[], Any], *_: Any, **__: Any) -> Any:
        return closure()

    def step(closure: Callable[[], Any] | None = None, *_: Any, **__: Any) -> Any:
        return None if closure is None else closure()

    def step_of_scheduler(*_: Any, **__: Any) -> None:
        pass

    with ExitStack() as undo:
        undo.callback(replace_attribute(trainer.strategy, "backward", backward))
        undo.callback(replace_attribute(trainer.strategy, "optimizer_step", step_of_strategy))
        for optimizer in optimizers:
            undo.callback(replace_attribute(optimizer, "step", step))
        for config in trainer.lr_scheduler_configs:
            undo.callback(replace_attribute(config.scheduler, "step", step_of_scheduler))
        yield losses


def single_objective(losses: Sequence[Tensor], num_optimizers: int) -> Tensor:  # ()
    """The loss that all optimizers decrease.

    Several backward passes before the steps of one optimizer add up their gradients. With several
    optimizers they would be of different losses, such as those of a generator and of its
    discriminator, and no candidate could be compared by one of them.

    Raises:
        ValueError: several optimizers follow several losses.
    """
    if len(losses) > 1 and num_optimizers > 1:
        raise ValueError(
            f"{num_optimizers} optimizers that follow {len(losses)} losses, none of which all of "
            "them decrease"
        )
    return sum(losses[1:], start=losses[0])


def replace_attribute(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute of an instance; the result undoes it."""
    attributes = vars(owner)
    missing = name not in attributes
    before = attributes.get(name)
    setattr(owner, name, value)

    def undo() -> None:
        if missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)

    return undo
