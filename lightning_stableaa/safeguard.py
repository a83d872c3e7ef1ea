"""Loss of a candidate on the current batch, without side effects."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

LossFunction = Callable[[], Tensor]


def loss_value(loss_fn: LossFunction, device: torch.device) -> Tensor:  # () float64
    """Evaluate ``loss_fn`` once, with gradients enabled but no backward; NaN where it gives None.

    Raises:
        ValueError: the result is neither None nor a single number.
    """
    # enabled: the loss of a PINN differentiates the network itself
    with torch.enable_grad():
        loss = loss_fn()
    if loss is None:
        return torch.full((), float("nan"), dtype=torch.float64, device=device)
    loss = torch.as_tensor(loss)
    if loss.numel() != 1:
        raise ValueError(
            f"loss_fn must return a single number, got shape {tuple(loss.shape)}; "
            "reduce it with .mean()"
        )
    return loss.detach().reshape(()).to(device, torch.float64)


class RandomState:
    """The state of the random number generators that a training step may draw from."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._python = random.getstate()
        numpy = sys.modules.get("numpy")
        self._numpy = numpy.random.get_state() if numpy else None
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Put every generator back to the captured state."""
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


@contextmanager
def undo_side_effects(module: nn.Module) -> Iterator[None]:
    """Restore the buffers and metric states of ``module`` on leaving, also after an error.

    A training step in train mode updates running statistics (BatchNorm) and metrics; evaluating
    a candidate must not. Buffers are restored in place.
    """
    buffers = list(module.buffers())
    saved = [buffer.clone() for buffer in buffers]
    metrics = [(metric, _metric_state(metric)) for metric in _metrics(module)]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, saved, strict=True):
                buffer.copy_(value)
        for metric, state in metrics:
            for name, value in state.items():
                setattr(metric, name, value)


def _metrics(module: nn.Module) -> Iterator[Metric]:
    return (one for one in module.modules() if isinstance(one, Metric))


def _metric_state(metric: Metric) -> dict[str, Any]:
    """Attributes that ``update`` and ``forward`` change; states may be tensors or lists."""
    counters = ("_update_count", "_computed", "_forward_cache", "_update_called")
    state = {name: metric.__dict__[name] for name in counters if name in metric.__dict__}
    for name in metric._defaults:
        value = getattr(metric, name)
        state[name] = list(value) if isinstance(value, list) else value.clone()
    return state
