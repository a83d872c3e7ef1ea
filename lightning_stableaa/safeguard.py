"""Loss of a candidate on the current batch, without side effects."""

from __future__ import annotations

import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_stableaa.dtensors import is_dtensor, whole
from lightning_stableaa.memory import out_of_memory
from lightning_stableaa.weights import is_dense

log = logging.getLogger(__name__)

LossFunction = Callable[[], Tensor]


class Judge(ABC):
    """The loss by which candidates are judged: a function that knows whom it asks."""

    @abstractmethod
    def __call__(self) -> Tensor:
        """The scalar loss at the current weights."""

    @property
    def of_sample(self) -> bool | Tensor:  # or (), not waited for
        """Whether others would be asked at another step.

        It counts where any rank says so. Where the loss is the same function of the weights from
        step to step, a decrease is one of what is minimised; of a sample it may be that of the
        sample.
        """
        return False

    @property
    def surely_of_sample(self) -> bool:
        """Whether ``of_sample`` is certain beforehand; equal on all ranks."""
        return False

    @property
    def communicates(self) -> bool:
        """Whether other ranks wait for this one inside of it; equal on all ranks.

        Then memory that runs out is an error, since they would wait for good.
        """
        return False

    @property
    def training_loss(self) -> Tensor | None:
        """The loss that the last optimizer step was made with, of any scale; not waited for.

        Where it is known, residuals are noise and candidates are for training alone, nobody is
        asked for the loss of a candidate unless this one leapt. ``None`` where it is not.
        """
        return None

    @property
    def validation_got_worse(self) -> bool:
        """Whether validation is worse than at its best; equal on all ranks.

        Then candidates that a sample lets into training would take it further into overfitting.
        """
        return False

    @property
    def asked_in_vain(self) -> bool:
        """Whether it is certain that ``validation_got_worse`` decides, without any loss.

        Equal on all ranks. Then none is asked for where candidates are for training alone, unless
        the loss of training is known and leapt.
        """
        return False

    def confirming(self) -> LossFunction | None:
        """The loss that has to agree to a candidate for training; ``None`` where none has to.

        Where any rank has one, the others give theirs again.
        """
        return None


class WholeLoss(Judge):
    """A function that is taken for the whole of what training minimises."""

    def __init__(self, loss_fn: LossFunction) -> None:
        self._loss_fn = loss_fn

    def __call__(self) -> Tensor:
        return self._loss_fn()


class MiniBatchLoss(WholeLoss):
    """The loss of one mini-batch of many, in a training loop of one's own.

    ``accelerator.step(MiniBatchLoss(lambda: loss(batch), trained))``: candidates are held to what
    the sample of a loss has to show, as those of ``AndersonCallback`` are.

    Args:
        loss_fn: as that of ``AndersonAccelerator.step``.
        training_loss: that of ``loss.backward()``, a single number; with it no losses are asked
            for where they would change nothing.
        communicates: other processes wait for this one inside of it, as within SyncBatchNorm.
    """

    def __init__(
        self,
        loss_fn: LossFunction,
        training_loss: Tensor | float | None = None,
        *,
        communicates: bool = False,
    ) -> None:
        super().__init__(loss_fn)
        self._communicates = communicates
        self._training_loss = training_loss

    @property
    def of_sample(self) -> bool:
        """Always."""
        return True

    @property
    def surely_of_sample(self) -> bool:
        """Always."""
        return True

    @property
    def communicates(self) -> bool:
        """As given."""
        return self._communicates

    @property
    def training_loss(self) -> Tensor | None:
        """As given."""
        return None if self._training_loss is None else _single(self._training_loss)


def as_judge(loss_fn: LossFunction) -> Judge:
    """A judge as it is, any other function as a ``WholeLoss``."""
    return loss_fn if isinstance(loss_fn, Judge) else WholeLoss(loss_fn)


def loss_value(
    loss_fn: LossFunction,
    device: torch.device,
    *,
    collective: bool = False,
) -> Tensor:  # () float64
    """Evaluate ``loss_fn`` once, with gradients enabled but no backward.

    NaN where it gives None or runs out of memory: under DDP the other ranks wait for a number.

    Args:
        loss_fn: returns the loss.
        device: where the result is wanted.
        collective: whether ``loss_fn`` communicates, as the forward pass of split weights and
            SyncBatchNorm do. Then memory that runs out is an error.

    Raises:
        ValueError: the result is neither None nor a single number.
        RuntimeError: memory ran out where ``loss_fn`` communicates.
    """
    try:
        # enabled: the loss of a PINN differentiates the network itself
        with torch.enable_grad(), _without_casts():
            loss = loss_fn()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        if collective:
            raise RuntimeError(
                "judging a candidate ran out of memory within a forward pass in which the other "
                "processes wait for this one (split weights, SyncBatchNorm): use smaller batches, "
                "judge on a part of them (judge_samples of AndersonCallback), or choose "
                "safeguard='none'"
            ) from error
        log.warning(
            "judging a candidate ran out of memory, and it was rejected: use smaller batches, or "
            "judge on a part of them (judge_samples of AndersonCallback)"
        )
        loss = None
    if loss is None:
        return torch.full((), float("nan"), dtype=torch.float64, device=device)
    return _single(loss).to(device, torch.float64)


def _single(loss: Any) -> Tensor:  # ()
    if not isinstance(loss, Tensor):
        kind = type(loss).__name__
        try:
            loss = torch.as_tensor(loss)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"a loss must be a single number, got a {kind}: give it alone"
            ) from error
    loss = whole(loss).detach()
    if loss.numel() != 1:
        raise ValueError(
            f"a loss must be a single number, got shape {tuple(loss.shape)}; reduce it with .mean()"
        )
    return loss.reshape(()) if loss.ndim else loss


@contextmanager
def _without_casts() -> Iterator[None]:
    """Autocast around the caller keeps casts of weights, which are others inside than outside."""
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


@contextmanager
def undo_side_effects(module: nn.Module) -> Iterator[None]:
    """Restore the buffers and metric states of ``module`` on leaving, also after an error.

    A training step in train mode updates running statistics (BatchNorm) and metrics; evaluating
    a candidate must not. Tensors and lists keep their identity, since others may share them, and
    are put back where ``module`` replaced them. What holds the memory of a weight is the weight's.
    """
    saved = [
        (names, name, value, _copy(value))
        for names in _changeable(module)
        for name, value in names.items()
    ]
    has_tensors = any(isinstance(value, Tensor) for _, _, value, _ in saved)
    weights = {_address(one) for one in module.parameters()} - {None} if has_tensors else set()
    try:
        yield
    finally:
        with torch.no_grad():
            for names, name, value, content in saved:
                if isinstance(value, Tensor):
                    if _address(value) not in weights:
                        _put_back(value, content)
                elif isinstance(value, list):
                    value[:] = content
                names[name] = value


def _changeable(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Where modules keep buffers, and metrics keep states, counters and cached results."""
    for one in module.modules():
        yield one._buffers
        if _is_metric(one):
            yield vars(one)


def _is_metric(module: nn.Module) -> bool:
    # a metric exists only where torchmetrics, which imports matplotlib, was imported already
    torchmetrics = sys.modules.get("torchmetrics")
    return torchmetrics is not None and isinstance(module, torchmetrics.Metric)


def _put_back(tensor: Tensor, content: Tensor) -> None:
    if tensor.is_inference():  # those of validation; nothing here can write them
        return
    if is_dense(tensor) and any(
        step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)
    ):  # expanded: nothing can
        return
    # on a CPU a look is as cheap as a copy, and memory that was not written to may be read-only
    if tensor.device.type != "cpu" or not is_dense(tensor) or not torch.equal(tensor, content):
        tensor.copy_(content)


def _address(tensor: Tensor) -> int | None:
    """Where the memory of a tensor begins; None where there is no such place."""
    if is_dtensor(tensor) or not is_dense(tensor) or is_lazy(tensor):
        return None
    return tensor.untyped_storage().data_ptr() or None


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return list(value) if isinstance(value, list) else value
