"""Did an optimizer step really happen, and did anything else touch the weights?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_stableaa.dtensors import is_dtensor, local_part


def unwrap_optimizers(optimizer: Optimizer | Sequence[Optimizer]) -> list[Optimizer]:
    """The torch optimizers behind the wrappers of Fabric and Lightning.

    Raises:
        TypeError: not an optimizer.
        ValueError: none at all, or LBFGS.
    """
    given = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    unwrapped = [getattr(one, "optimizer", one) for one in given]
    if not unwrapped:
        raise ValueError("optimizer must be one optimizer or several, got an empty list")
    for one in unwrapped:
        if not isinstance(one, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(one).__name__}")
        if isinstance(one, LBFGS):
            raise ValueError(
                "optimizer must make one update a step, got LBFGS, which iterates inside its "
                "step and extrapolates on its own; use SGD or Adam"
            )
    return unwrapped


class StepWatch:
    """Hooks on the optimizers of one training loop.

    A step that GradScaler skips never reaches the optimizer, or reaches a fused one with a flag;
    one without any gradient (``training_step`` returned None) reaches it and moves nothing.
    Neither counts. Several optimizers that step between two calls of ``take`` make one step
    together.

    Args:
        optimizers: unwrapped optimizers.
        before_step: called before every step of any of them.
    """

    def __init__(self, optimizers: Sequence[Optimizer], before_step: Callable[[], None]) -> None:
        self._before_step = before_step
        self._stepped = False
        self._parameters: Sequence[Tensor] = ()
        self._versions: list[int] = []
        self._hooks = [
            hook
            for one in optimizers
            for hook in (
                one.register_step_pre_hook(self._before),
                one.register_step_post_hook(self._after),
            )
        ]

    def take(self) -> bool:
        """Whether the weights were stepped since the last call."""
        stepped, self._stepped = self._stepped, False
        return stepped

    def follow(self, parameters: Sequence[Tensor]) -> None:
        """Watch these weights from now on."""
        # of a DTensor, an optimizer writes to the whole and we to the part
        parts = [local_part(one) for one in parameters if is_dtensor(one)]
        self._parameters = [*parameters, *parts]
        self.mark()

    def mark(self) -> None:
        """Take the weights as they are now for the optimizer's own."""
        self._versions = self._current()

    @property
    def disturbed(self) -> bool:
        """Whether anything wrote to the weights since the last step or ``mark``.

        Every in-place operation of torch raises a tensor's version; writes through ``.data``
        go unseen.
        """
        return self._versions != self._current()

    def detach(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _before(self, *_: object) -> None:
        self._before_step()

    def _after(self, optimizer: Optimizer, *_: object) -> None:
        if _has_gradient(optimizer) and not _overflowed(optimizer):
            self._stepped = True
        self.mark()

    def _current(self) -> list[int]:
        return [parameter._version for parameter in self._parameters]


def _has_gradient(optimizer: Optimizer) -> bool:
    return any(
        parameter.grad is not None
        for group in optimizer.param_groups
        for parameter in group["params"]
    )


def _overflowed(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer skipped its step: GradScaler calls it all the same, with a flag.

    Reading the flag waits for the device, as GradScaler does for every other optimizer.
    """
    found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)
