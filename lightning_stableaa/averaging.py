"""The adaptive moving average without Anderson acceleration."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_stableaa.agreement import Agreement, same_everywhere
from lightning_stableaa.distributed import Communicator
from lightning_stableaa.dtensors import arranged, is_split, share_of
from lightning_stableaa.options import Smoothing
from lightning_stableaa.report import StepReport
from lightning_stableaa.smoother import DEFAULT_WINDOW, Smoother
from lightning_stableaa.status import Status
from lightning_stableaa.watch import StepWatch, unwrap_optimizers
from lightning_stableaa.weights import (
    FlatTensors,
    has_lazy_parameters,
    signature_of,
    trainable_parameters,
)


class WeightSmoother:
    """Watches the RSD of the iterates; averages the weights while it is high, where asked to.

    With ``apply_to="weights"`` the average of each window replaces the weights while smoothing is
    on; with ``apply_to="history"`` there is no history here, and nothing is changed.

    Processes that train together all have one: where a window ends they turn the switch together.

    Args:
        optimizer: one optimizer, or several whose parameters move together.
        smoothing: the options; a window of ``None`` is 10 steps.
    """

    def __init__(self, optimizer: Optimizer | Sequence[Optimizer], smoothing: Smoothing) -> None:
        self.smoothing = smoothing
        self._optimizers = unwrap_optimizers(optimizer)
        # now, and later after a step: between, toggle_optimizer may hide those of the others
        self._parameters = trainable_parameters(self._optimizers)
        self._some_are_lazy = has_lazy_parameters(self._optimizers)
        self._watch = StepWatch(self._optimizers, self._before_step)
        self._window = smoothing.average_window or DEFAULT_WINDOW
        self._position = 0  # steps taken in the open window
        self._weights: FlatTensors | None = None
        self._smoother: Smoother | None = None
        self._agreement: Agreement | None = None
        self._split = False
        self._loaded: dict[str, Any] | None = None

    def step(self) -> StepReport:
        """Take note of the optimizer step just made; at the end of a window, report the RSD."""
        if not self._watch.take():
            return StepReport(status=Status.NO_OPTIMIZER_STEP)
        self._parameters = trainable_parameters(self._optimizers)
        weights, smoother, agreement = self._weights, self._smoother, self._agreement
        if weights is None or smoother is None or agreement is None:
            return StepReport(status=Status.NO_OPTIMIZER_STEP)
        self._position += 1
        smoother.observe(self._position)
        if self._position < self._window:
            return StepReport(status=Status.CYCLE_OPEN)
        self._position = 0
        disturbance, rsd = smoother.close()
        if disturbance is not None:
            if disturbance is not Status.WEIGHTS_CHANGED:
                self._weights = None  # built anew at the next step
            return StepReport(status=disturbance)
        if smoother.on and self.smoothing.apply_to == "weights":
            weights.write(smoother.average)
            self._watch.mark()
        return StepReport(status=Status.STORED, rsd=rsd, smoothing_on=smoother.on)

    def detach(self) -> None:
        """Remove the hooks from the optimizers."""
        self._watch.detach()

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and CPU tensors.

        Of weights that are split over processes (DTensors) it holds nothing: after loading it the
        window begins anew.
        """
        if self._loaded is not None:
            return self._loaded
        if self._split:
            return {}
        if self._watch.disturbed:  # a continuation could not know of it
            self._notice_changes()
        return {
            "position": self._position,
            "disturbed": self._agreement is not None and self._agreement.disturbed,
            "smoothing": dataclasses.asdict(self.smoothing),
            "layout": None if self._weights is None else self._weights.signature(),
            "weights": None if self._weights is None else self._weights.checksum(),
            "smoother": None if self._smoother is None else self._smoother.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``, from the next step on.

        A window of other weights, or under other options, is dropped.
        """
        self._loaded = state or None
        self._weights = None

    def _before_step(self) -> None:
        if self._some_are_lazy:
            self._some_are_lazy = has_lazy_parameters(self._optimizers)
            if self._some_are_lazy:  # until the closure of this step has seen a batch
                return
            self._parameters = trainable_parameters(self._optimizers)
        weights, agreement = self._weights, self._agreement
        if self._loaded is not None and signature_of(self._parameters) != self._loaded["layout"]:
            # unfrozen since: those of the checkpoint may be those of now
            self._parameters = trainable_parameters(self._optimizers)
        if weights is None or agreement is None:
            self._begin(self._parameters)
        elif not weights.aliases(arranged(self._parameters)):
            if agreement.alone:
                self._begin(self._parameters)
            else:
                agreement.note(Status.PARAMETERS_CHANGED)
        elif self._watch.disturbed:
            self._notice_changes()

    def _notice_changes(self) -> None:
        """Something else than the optimizer moved the weights."""
        if self._smoother is None or self._agreement is None:
            return
        if self._agreement.alone:
            self._smoother.restart()
            self._position = 0
        else:
            self._agreement.note(Status.WEIGHTS_CHANGED)
        self._watch.mark()

    def _begin(self, parameters: Sequence[Tensor]) -> None:
        """Watch these parameters; a collective call, without effect where ranks have others."""
        communicator = Communicator()
        device = parameters[0].device if parameters else torch.device("cpu")
        shapes = [(one.shape, one.stride(), one.dtype) for one in parameters]
        if not all(same_everywhere(communicator, device, repr(shapes))):
            return
        self._watch.follow(parameters)
        share = share_of(parameters, communicator)
        self._agreement = Agreement(communicator, device)
        self._weights = weights = FlatTensors(share.parameters)
        self._split = is_split(parameters)
        self._position = 0
        self._smoother = Smoother(
            self.smoothing,
            cycle=self._window,
            read=lambda out, start: weights.read(out, start=start),
            length=share.length,
            dtype=weights.dtype,
            device=weights.device,
            agreement=self._agreement,
            sharded=self._split,
            skipped=share.skipped,
        )
        state, self._loaded = self._loaded, None
        if state is None:
            return
        same_options = state["smoothing"] == dataclasses.asdict(self.smoothing)
        same_layout = state["layout"] == weights.signature()
        if same_options and same_layout and state.get("weights") in (None, weights.checksum()):
            self._position = int(state["position"])
            if state.get("disturbed"):
                self._agreement.note(Status.WEIGHTS_CHANGED)
            self._smoother.load_state_dict(state["smoother"])
