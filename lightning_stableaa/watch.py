"""Did an optimizer step really happen, and did anything else touch the weights?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from operator import add, attrgetter, sub
from typing import Any

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_stableaa.dtensors import is_dtensor, local_part

# Steps alike in a row from which the habits of an optimizer are taken to be known.
_LEARNED_AFTER = 10

# Classes of Lightning, Fabric and Accelerate that pass a step on to the ``optimizer`` inside.
_WRAPPERS = {"LightningOptimizer", "_FabricOptimizer", "AcceleratedOptimizer"}

# Weights looked at before every step once habits are known: all of a small model.
_GLANCES = 8

_version_of = attrgetter("_version")


def unwrap_optimizers(optimizer: Optimizer | Sequence[Optimizer]) -> list[Optimizer]:
    """The torch optimizers behind the wrappers of Fabric and Lightning.

    Raises:
        TypeError: not an optimizer.
        ValueError: none at all, or LBFGS.
    """
    given = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    unwrapped = [_unwrapped(one) for one in given]
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


def _unwrapped(optimizer: Any) -> Any:
    """What a wrapper steps; optimizers of their own kind may have an inner one as well."""
    names = {kind.__name__ for kind in type(optimizer).__mro__}
    return optimizer.optimizer if names & _WRAPPERS else optimizer


class StepWatch:
    """Hooks on the optimizers of one training loop.

    A step that GradScaler skips never reaches the optimizer, or reaches a fused one with a flag;
    one without any gradient (``training_step`` returned None) reaches it and moves nothing.
    Neither counts. Several optimizers that step between two calls of ``take`` make one step
    together.

    Every in-place operation of torch raises a tensor's version. Reading all of them takes as long
    as a small step, so how often an optimizer of torch writes to each weight is learned from a few
    steps, before and after which all are read. From then on a full look compares with what so many
    steps come to: one too many is somebody else's, also where it came from a hook or a closure of
    the step. One too few is a weight without a gradient: then, and with all other optimizers,
    versions are read before and after every step.

    Args:
        optimizers: unwrapped optimizers.
        before_step: called before every step of any of them; looks whether the weights are
            disturbed, and marks them if so.
    """

    def __init__(self, optimizers: Sequence[Optimizer], before_step: Callable[[], None]) -> None:
        self._optimizers = optimizers
        self._before_step = before_step
        self._stepped = False
        self._parameters: Sequence[Tensor] = ()
        self._few = slice(None)  # those to glance at
        self._glanced_at: Sequence[Tensor] = ()
        self._versions: list[int] = []  # at the last mark
        self._glance: list[int] = []  # expected of those glanced at
        self._glance_writes: dict[Optimizer, list[int]] = {}  # to them, in one step
        self._steps: Counter[Optimizer] = Counter()  # since the last mark, while habits are known
        self._habits = _Habits(optimizers)
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
        self._few = slice(None, None, max(1, math.ceil(len(self._parameters) / _GLANCES)))
        self._glanced_at = self._parameters[self._few]
        self._habits = _Habits(self._optimizers if not parts else ())
        self.mark()

    def mark(self) -> None:
        """Take the weights as they are now for the optimizer's own."""
        self._versions = _versions(self._parameters)
        self._glance = self._versions[self._few]
        self._steps.clear()

    @property
    def disturbed(self) -> bool:
        """Whether anything wrote to the weights since the last step or ``mark``.

        Writes through ``.data`` go unseen.
        """
        expected, found = self._expected(), _versions(self._parameters)
        if found == expected:
            return False
        if not self._habits.known:
            return True
        if any(one > other for one, other in zip(found, expected, strict=True)):
            self._habits.forget()
            return True
        self._habits.give_up()
        self.mark()
        return False

    @property
    def shows_at_a_glance(self) -> bool:
        """Whether a few weights are enough to notice, whatever is known of habits."""
        return _versions(self._glanced_at) != self._glance

    @property
    def seems_disturbed(self) -> bool:
        """``disturbed``, of a few weights where that is enough to notice a write to all of them.

        A write to others shows when ``disturbed`` is asked for.
        """
        if self._habits.known and not self.shows_at_a_glance:
            return False
        return self.disturbed

    def detach(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _before(self, *_: object) -> None:
        self._before_step()

    def _after(self, optimizer: Optimizer, *_: object) -> None:
        moved = _has_gradient(optimizer)
        if moved and not _overflowed(optimizer):
            self._stepped = True
        if self._habits.known:
            if moved:  # also by nothing, where a fused optimizer found an overflow
                self._steps[optimizer] += 1
                self._glance = list(map(add, self._glance, self._glance_writes[optimizer]))
            return
        before = self._versions
        self.mark()
        if moved:
            self._habits.learn(optimizer, self._parameters, before, self._versions)
            self._glance_writes[optimizer] = self._habits.of.get(optimizer, [])[self._few]

    def _expected(self) -> list[int]:
        """Versions, if nobody but the optimizers wrote."""
        expected = self._versions
        for optimizer, steps in self._steps.items():
            writes = self._habits.of[optimizer]
            expected = [one + steps * more for one, more in zip(expected, writes, strict=True)]
        return expected


class _Habits:
    """How often each optimizer writes to each of the weights in one step.

    Args:
        optimizers: all that move the weights; none, for habits that are never to be learned.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        regular = all(type(one).__module__.startswith("torch.optim.") for one in optimizers)
        self._learns = regular and len(optimizers) > 0
        self._optimizers = optimizers
        self._alike: Counter[Optimizer] = Counter()  # steps in a row that wrote alike
        self.of: dict[Optimizer, list[int]] = {}
        self.known = False

    def learn(
        self,
        optimizer: Optimizer,
        parameters: Sequence[Tensor],
        before: list[int],
        after: list[int],
    ) -> None:
        """Take in the versions before and after a step."""
        if not self._learns:
            return
        writes = list(map(sub, after, before))
        if self.of.get(optimizer) != writes:
            self.of[optimizer] = writes
            self._alike[optimizer] = 0
        self._alike[optimizer] += 1
        if self._alike[optimizer] == _LEARNED_AFTER:
            own = {one for group in optimizer.param_groups for one in group["params"]}
            moved = {one for one, count in zip(parameters, writes, strict=True) if count}
            self._learns = moved >= own.intersection(parameters)  # else some may join later
        self.known = self._learns and all(
            self._alike[one] >= _LEARNED_AFTER for one in self._optimizers
        )

    def forget(self) -> None:
        """Learn anew."""
        self._alike.clear()
        self.known = False

    def give_up(self) -> None:
        """The optimizers are not as regular as they seemed to be."""
        self._learns = self.known = False


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(_version_of, tensors))


def _has_gradient(optimizer: Optimizer) -> bool:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                return True
    return False


def _overflowed(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer skipped its step: GradScaler calls it all the same, with a flag.

    Reading the flag waits for the device, as GradScaler does for every other optimizer.
    """
    found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)
