"""The loss of the current step as a function of the weights: repeatable, without side effects."""

from __future__ import annotations

import logging
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_stableaa.distributed.dtensor import full_tensor
from lightning_stableaa.model.rng import global_generators
from lightning_stableaa.model.snapshot import StateSnapshot

log = logging.getLogger(__name__)

LossFunction = Callable[[], Tensor]


class Objective:
    """A loss that can be evaluated again and again at other weights.

    A context, within which every evaluation draws the same random numbers, and after which their
    generators are where they were; buffers and the like are restored by a subclass, or by
    ``preserve_state`` within the function.

    Args:
        loss_fn: returns the scalar loss at the current weights; never differentiated.
        stochastic: the loss is that of a sample, such as a mini-batch. ``False`` where it is the
            same function at every step.
        maximize: the optimizers raise the loss.
        device: of the weights.
        collective: other ranks wait for this one inside of it, as within SyncBatchNorm.
    """

    def __init__(
        self,
        loss_fn: LossFunction,
        *,
        stochastic: bool,
        maximize: bool = False,
        device: torch.device | None = None,
        collective: bool = False,
    ) -> None:
        self._loss_fn = loss_fn
        self._device = device or torch.device("cpu")
        self._sign = -1.0 if maximize else 1.0
        self._rng: StateSnapshot | None = None
        self.stochastic = stochastic
        self.collective = collective
        self.precision = float(torch.finfo(torch.float32).eps)  # of a loss
        self.error: Exception | SystemExit | None = None  # that the last evaluation raised

    @property
    def unavailable(self) -> str | None:
        """Why the loss cannot be evaluated; ``None`` where it can."""
        return None

    def __enter__(self) -> Objective:
        self._rng = StateSnapshot(global_generators(self._device))
        return self

    def __exit__(self, *_: object) -> None:
        self._rng = None

    def __call__(self) -> Tensor:  # () float64
        """The loss to be minimised at the current weights; gradients enabled, but no backward.

        NaN where it raises an error, runs out of memory or is None: the other ranks wait for a
        number.

        Raises:
            ValueError: the loss is not a single number.
            Exception: what the loss raised, where other ranks wait inside of it.
        """
        self.error = None
        # autocast around the caller keeps casts of weights, which are others inside than outside
        torch.clear_autocast_cache()
        try:
            with torch.enable_grad():  # the loss of a PINN differentiates the network itself
                loss = self._evaluate()
        except (Exception, SystemExit) as error:  # a candidate may be outside of the domain
            if self.collective or _is_of_signal(error):
                raise
            self.error = error
            loss = None
        finally:
            torch.clear_autocast_cache()
        if loss is None:
            return torch.full((), torch.nan, dtype=torch.float64, device=self._device)
        loss = scalar(loss)
        if loss.is_floating_point():
            self.precision = float(torch.finfo(loss.dtype).eps)
        return self._sign * loss.to(self._device, torch.float64)

    def _evaluate(self) -> Any:
        """One evaluation; a loss that draws random numbers is one of a sample."""
        assert self._rng is not None, "an objective is evaluated within its context"
        try:
            loss = self._loss_fn()
        finally:
            self.stochastic = self._rng.restore() or self.stochastic
        if loss is None:
            raise ValueError("the loss must be a single number, got None: return it")
        return loss


def scalar(loss: Any) -> Tensor:  # ()
    """The loss as a tensor without dimensions, detached.

    Raises:
        ValueError: it is not a single number.
    """
    if not isinstance(loss, Tensor):
        kind = type(loss).__name__
        try:
            loss = torch.as_tensor(loss)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"the loss must be a single number, got a {kind}") from error
    loss = full_tensor(loss).detach()
    if loss.numel() != 1:
        raise ValueError(
            f"the loss must be a single number, got shape {tuple(loss.shape)}; reduce it with "
            ".mean()"
        )
    return loss.reshape(())


@contextmanager
def preserve_state(module: nn.Module) -> Iterator[None]:
    """Restores everything but the trained parameters of ``module`` on leaving.

    For the loss function of a custom training loop whose module changes with every forward pass
    (batch normalisation, metrics, counters): ``with preserve_state(model): return loss(...)``.
    """
    trained = [one for one in module.parameters() if one.requires_grad]
    snapshot = StateSnapshot([module], trained)
    try:
        yield
    finally:
        snapshot.restore()


def _is_of_signal(error: BaseException) -> bool:
    """Whether a handler of signals has asked the program to end."""
    handlers = map(signal.getsignal, signal.valid_signals())
    codes = {getattr(one, "__code__", None) for one in handlers}
    return isinstance(error, SystemExit) and any(
        frame.f_code in codes for frame, _ in traceback.walk_tb(error.__traceback__)
    )
