"""Did an optimizer step really happen, and did anything else write to the weights?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_stableaa.distributed.dtensor import is_dtensor, to_local
from lightning_stableaa.model.iterates import IterateStore

# Classes of Lightning, Fabric and Accelerate that pass a step on to the ``optimizer`` inside.
_WRAPPERS = {"LightningOptimizer", "_FabricOptimizer", "AcceleratedOptimizer"}

_version_of = attrgetter("_version")


def unwrap_optimizers(optimizer: Optimizer | Sequence[Optimizer]) -> list[Optimizer]:
    """The torch optimizers behind the wrappers of Fabric and Lightning.

    Raises:
        TypeError: not an optimizer, or one that was not initialised as such.
        ValueError: none at all, LBFGS, or some maximise their loss while others minimise it.
    """
    if not isinstance(optimizer, Optimizer | Iterable):
        kind = type(optimizer).__name__
        raise TypeError(f"optimizer must be a torch.optim.Optimizer or several, got a {kind}")
    given = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    unwrapped = [_unwrap(one) for one in given]
    if not unwrapped:
        raise ValueError("optimizer must be one optimizer or several, got an empty list")
    for one in unwrapped:
        if not isinstance(one, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(one).__name__}")
        if not hasattr(one, "_optimizer_step_pre_hooks"):
            raise TypeError(
                f"optimizer must be set up as a torch.optim.Optimizer, got {type(one).__name__}, "
                "which has no step hooks: call super().__init__(params, defaults) in its __init__"
            )
        if isinstance(one, LBFGS):
            raise ValueError(
                "optimizer must make one update a step, got LBFGS, which iterates inside its "
                "step and extrapolates on its own; use SGD or Adam"
            )
    if len(_signs(unwrapped)) > 1:
        raise ValueError(
            "optimizer must minimise or maximise one objective, got maximize=True for some "
            "parameters and False for others: accelerate each of them alone"
        )
    return list(dict.fromkeys(unwrapped))  # one given twice makes one step


def maximizes(optimizers: Sequence[Optimizer]) -> bool:
    """Whether the optimizers raise the loss (``maximize=True``)."""
    return _signs(optimizers) == {True}


def _signs(optimizers: Sequence[Optimizer]) -> set[bool]:
    return {bool(group.get("maximize")) for one in optimizers for group in one.param_groups}


def _unwrap(optimizer: Any) -> Any:
    """What a wrapper steps; optimizers of their own kind may have an inner one as well."""
    names = {kind.__name__ for kind in type(optimizer).__mro__}
    return optimizer.optimizer if names & _WRAPPERS else optimizer


class OptimizerStepMonitor:
    """Counts the steps of the optimizers of one training loop, and sees what else writes.

    A step that GradScaler skips never reaches the optimizer, or reaches a fused one with a flag;
    one without any gradient (``training_step`` returned None) reaches it and moves nothing.
    Neither counts. Several optimizers that step between two calls of ``poll`` make one step
    together.

    Every in-place operation of torch raises a tensor's version. Those that rose between the end of
    one step and the beginning of the next were written by somebody else. So were those that a
    subclass of a torch optimizer writes after the step of its base class (a projection), those of
    other hooks on the step, and those of the closure, which under Lightning is the training step.
    What every closure writes, such as a projection at the beginning of each step, is part of the
    step. Writes through ``.data`` raise no version: while ``backup`` is set, the weights are copied
    as a step ends, and compared with the copy in ``external_write``.

    Args:
        optimizers: unwrapped optimizers.

    Attributes:
        closure_wrote: whether the last closure wrote to the weights; True before the first.
        backup: where the weights are copied as a step ends, if it is set.
        prepare: called as a step begins, if it is set.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._parameters: Sequence[Tensor] = ()
        self._versions: list[int] = []  # at the end of the last step, or at the last rebaseline
        self._stepped = False
        self._depth = 0  # of steps within steps
        self._base_ended = False  # the step of a base class, within one that goes on
        self._written = False
        self.closure_wrote = True  # nothing is known of an earlier one
        self._backed_up = False
        self.backup: IterateStore | None = None
        self.prepare: Callable[[], object] | None = None
        self._hooks = []
        for one in optimizers:
            _hook_base_classes(one)
            before = one.register_step_pre_hook(self._before)
            after = one.register_step_post_hook(self._after)
            # first, so that what other hooks write is seen as theirs
            hooks: Any = one._optimizer_step_post_hooks
            hooks.move_to_end(after.id, last=False)
            self._hooks += [before, after]

    def poll(self) -> bool:
        """Whether the weights were stepped since the last call."""
        stepped, self._stepped = self._stepped, False
        return stepped

    def watch(self, parameters: Sequence[Tensor]) -> None:
        """Watch these weights from now on."""
        # of a DTensor, an optimizer writes to the full tensor and we to the shard
        parts = [to_local(one) for one in parameters if is_dtensor(one)]
        self._parameters = [*parameters, *parts]
        self.rebaseline()

    def rebaseline(self) -> None:
        """Take the weights as they are now for the optimizer's own."""
        self._versions = list(map(_version_of, self._parameters))
        self._written = self._backed_up = False

    def external_write(self) -> bool:
        """Whether anything but the optimizers wrote to the weights since the last rebaseline."""
        if self._backed_up and self.backup is not None and not self.backup.is_unchanged():
            self._written = True
        return self._written or list(map(_version_of, self._parameters)) != self._versions

    def detach(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _before(self, _: Optimizer, arguments: Any, options: Any) -> Any:
        if self.prepare is not None:
            self.prepare()
        if self._depth == 0 and list(map(_version_of, self._parameters)) != self._versions:
            self._written = True
        self._depth += 1
        closure = options.get("closure", arguments[1] if len(arguments) > 1 else None)
        if self._depth > 1 or not callable(closure):
            return None

        def watched() -> Any:
            before = list(map(_version_of, self._parameters))
            try:
                result = closure()
            except BaseException:
                self._depth = 0  # no step ends
                raise
            wrote = list(map(_version_of, self._parameters)) != before
            # what every closure writes, as a renormalised embedding, is part of the map
            self._written = self._written or (wrote and not self.closure_wrote)
            self.closure_wrote = wrote
            return result

        if "closure" in options:
            return arguments, options | {"closure": watched}
        return (arguments[0], watched, *arguments[2:]), options

    def _after(self, optimizer: Optimizer, *_: object) -> None:
        self._depth = max(0, self._depth - 1)
        if _has_stepped(optimizer):
            self._stepped = True
        versions = list(map(_version_of, self._parameters))
        if self._base_ended and versions != self._versions:
            self._written = True
        self._base_ended = self._depth > 0
        self._versions = versions
        self._backed_up = self.backup is not None
        if self.backup is not None:
            self.backup.copy_weights()


def _hook_base_classes(optimizer: Optimizer) -> None:
    """Make torch call hooks on the steps of base classes too, which it does for those in use."""
    for kind in type(optimizer).__mro__[1:]:
        if kind.__module__.startswith("torch.optim.") and kind is not Optimizer:
            kind([torch.zeros((), requires_grad=True)])  # pyright: ignore[reportCallIssue]  # "params" is known to subclasses


def _has_stepped(optimizer: Optimizer) -> bool:
    """Whether there was a gradient, and GradScaler did not skip the step.

    It calls a fused optimizer all the same, with a flag. Reading the flag waits for the device, as
    GradScaler does for every other optimizer.
    """
    found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
    if found_inf is not None and bool(found_inf):
        return False
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                return True
    return False
