"""AndersonAccelerator: the state machine observe -> extrapolate -> accept | reject."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lightning_stableaa import saved
from lightning_stableaa.building import Builder
from lightning_stableaa.cycles import Cycles
from lightning_stableaa.dtensors import is_split
from lightning_stableaa.options import (
    ApplyTo,
    HistoryPlacement,
    OptimizerState,
    Options,
    Safeguard,
    Smoothing,
)
from lightning_stableaa.placement import check_placement
from lightning_stableaa.report import StepReport
from lightning_stableaa.safeguard import Judge, LossFunction, as_judge
from lightning_stableaa.status import Status
from lightning_stableaa.watch import StepWatch, unwrap_optimizers
from lightning_stableaa.weights import has_lazy_parameters, trainable_parameters

_COUNTERS = (
    "optimizer_steps",
    "attempted",
    "accepted",
    "loss_evaluations",
    "_steps_since_attempt",
)

# Reports of the steps on which nothing is due: nothing to compute, nothing to allocate.
_NO_STEP = StepReport(status=Status.NO_OPTIMIZER_STEP)
_OPEN = StepReport(status=Status.CYCLE_OPEN)


class AndersonAccelerator:
    """Stable Anderson acceleration of an optimizer, for any training loop.

    Call ``step`` after ``optimizer.step()``. Every ``store_every_n_steps`` real optimizer steps
    the weights enter the history; every ``accelerate_every_n_steps`` a candidate is formed from
    it, and replaces the weights if it lowers the loss.

    Args:
        optimizer: one optimizer, or several whose parameters move together. A step counts when
            the optimizer really stepped: skipped steps (GradScaler) and steps without any
            gradient do not.
        history_depth: m >= 2, residuals kept.
        store_every_n_steps: s >= 1, optimizer steps in one cycle.
        accelerate_every_n_steps: optimizer steps between two extrapolations; a multiple of s.
        warmup_steps: plain optimizer steps before the first extrapolation.
        relaxation: beta in (0, 1], share of the mixed residual applied.
        lag_compensation: c >= 0. A mixture of points lags behind the newest one; it makes up
            this share of the lag, times what it leaves of the residuals and at most 1, along its
            mixed residual. 0 is textbook Anderson acceleration; see ``docs/method.md``.
        look_ahead_cycles: with a safeguard, the candidate of the last lambda goes on by up to so
            many cycles where residuals are a steady drift, by less or not at all where they are
            not, and never by more than were trained so far. Of the loss of a sample, by less after
            one that did not lower the loss, and by more again after one that did; of any other, by
            half as many.
        regularization: lambda >= 0, relative to the mean squared residual norm; one value, or a
            grid from which the safeguard takes the best candidate, at a loss more for each.
            ``None``: one value by the noise of the residuals, 3e-2 where they have some.
        max_extrapolation: longest jump, in units of the residual norm sqrt(tr(K)/m).
        safeguard: ``"loss"`` accepts a candidate only if it lowers the loss of the current
            batch; ``"none"`` accepts every finite one.
        sufficient_decrease: with a safeguard, in [0, 1), share of the magnitude of the loss by
            which a candidate has to lower it where residuals are noise; by less, down to any
            decrease, where they are a steady drift or can be eliminated. ``None``: 0.1 of the loss
            of a sample, and any decrease of a loss that is the same function from step to step.
            Where it is above 0, and residuals of samples are mostly noise, only candidates that
            bring training back from a leap enter it. 0 takes every decrease.
        optimizer_state: momentum on acceptance: ``"keep"``, ``"mix"`` (with the mixing weights of
            the candidate; doubles the memory of the history) or ``"reset"``.
        smoothing: ``None``, or the adaptive moving average of the iterates.
        apply_to: ``"training"``: candidates replace the weights; ``"evaluation"``: they are only
            seen inside ``evaluation_weights``, and every decrease will do; ``"both"``: seen there,
            and those of sufficient decrease replace the weights.
        history: ``"replicated"``, ``"sharded"`` over the ranks, or ``"auto"``.
        history_device: where the history lives, such as ``"cpu"``; ``None``: with the weights.
        process_group: ranks that train the same weights; ``None`` is the default group.

    Raises:
        TypeError, ValueError: an option is of the wrong type, out of range or in conflict with
            another one, or the optimizer is LBFGS.

    Source: arXiv:2110.14813; the safeguard and the ridge relative to tr(K)/m are this project's.
    """

    def __init__(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        history_depth: int = Options.history_depth,
        store_every_n_steps: int = Options.store_every_n_steps,
        accelerate_every_n_steps: int = Options.accelerate_every_n_steps,
        warmup_steps: int = Options.warmup_steps,
        relaxation: float = Options.relaxation,
        lag_compensation: float = Options.lag_compensation,
        look_ahead_cycles: float = Options.look_ahead_cycles,
        regularization: float | Sequence[float] | None = Options.regularization,
        max_extrapolation: float = Options.max_extrapolation,
        safeguard: Safeguard = Options.safeguard,
        sufficient_decrease: float | None = Options.sufficient_decrease,
        optimizer_state: OptimizerState = Options.optimizer_state,
        smoothing: Smoothing | None = Options.smoothing,
        apply_to: ApplyTo = Options.apply_to,
        history: HistoryPlacement = Options.history,
        history_device: str | None = Options.history_device,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.options = Options(
            history_depth=history_depth,
            store_every_n_steps=store_every_n_steps,
            accelerate_every_n_steps=accelerate_every_n_steps,
            warmup_steps=warmup_steps,
            relaxation=relaxation,
            lag_compensation=lag_compensation,
            look_ahead_cycles=look_ahead_cycles,
            regularization=regularization,
            max_extrapolation=max_extrapolation,
            safeguard=safeguard,
            sufficient_decrease=sufficient_decrease,
            optimizer_state=optimizer_state,
            smoothing=smoothing,
            apply_to=apply_to,
            history=history,
            history_device=history_device,
        )
        self._optimizers = unwrap_optimizers(optimizer)
        # now, and later after a step: between, toggle_optimizer may hide those of the others
        self._parameters = trainable_parameters(self._optimizers)
        self._some_are_lazy = has_lazy_parameters(self._optimizers)
        check_placement(history, split=is_split(self._parameters))
        self.optimizer_steps = 0
        self.attempted = 0
        self.accepted = 0
        self.loss_evaluations = 0
        self.outcomes: Counter[Status] = Counter()
        self._steps_since_attempt = 0
        self._cycles: Cycles | None = None
        self._loaded: dict[str, Any] | None = None
        self._watch = StepWatch(self._optimizers, self._before_optimizer_step)
        self._builder = Builder(self.options, self._optimizers, self._watch, process_group)

    def step(self, loss_fn: LossFunction | None = None) -> StepReport:
        """Take note of the optimizer step that was just made; extrapolate when it is due.

        Every rank has to call it after every step.

        Args:
            loss_fn: returns the scalar loss of the current batch, a tensor, at the current
                weights. Called a few times when an extrapolation is due, with gradients enabled,
                and never differentiated. Buffers that it changes are the caller's to restore:
                see :func:`~lightning_stableaa.safeguard.undo_side_effects`. Without a safeguard
                it is not called. A function is taken for the whole of what training minimises:
                that of one mini-batch of many is a :class:`~lightning_stableaa.MiniBatchLoss`, and
                who knows more is a :class:`~lightning_stableaa.safeguard.Judge`.

        Raises:
            ValueError: the safeguard is ``"loss"`` and there is no ``loss_fn``.
        """
        if self.options.safeguard == "none":
            loss_fn = None
        elif loss_fn is None:
            raise ValueError(
                "safeguard='loss' needs a loss_fn, got None: call step(loss_fn) with the loss of "
                "the current batch, or choose safeguard='none'"
            )
        if not self._watch.take():
            return _NO_STEP
        self.optimizer_steps += 1
        cycles = self._cycles
        if cycles is None:
            self._parameters = trainable_parameters(self._optimizers)
            if self._some_are_lazy:
                return StepReport(status=Status.PARAMETERS_CHANGED)
            return StepReport(status=self._builder.why_not or Status.OUT_OF_MEMORY)
        self._steps_since_attempt += 1
        try:
            cycles.observe()
            if cycles.steps < self.options.store_every_n_steps:
                return _OPEN
            return self._close_cycle(cycles, None if loss_fn is None else as_judge(loss_fn))
        except (RuntimeError, MemoryError) as error:
            self._give_back_memory(error)
            return StepReport(status=Status.OUT_OF_MEMORY)

    @property
    def evaluation_weights_ready(self) -> bool:
        """Whether ``evaluation_weights`` would show other weights than the optimizer's."""
        return self._cycles is not None and self._cycles.has_evaluation_weights

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """The parameters hold the accepted candidate inside (``apply_to`` evaluation or both)."""
        if self._cycles is None or not self._cycles.has_evaluation_weights:
            yield
            return
        self._notice_changes(self._cycles)
        with self._cycles.evaluation_weights():
            yield

    def evaluation_tensors(self) -> dict[Tensor, Tensor]:
        """By parameter, copies of what ``evaluation_weights`` shows; empty without a candidate."""
        cycles = self._cycles
        return {} if cycles is None else cycles.copies(of_candidate=not cycles.evaluating)

    def training_tensors(self) -> dict[Tensor, Tensor]:
        """By parameter, copies of what the optimizer works on; empty without a candidate."""
        cycles = self._cycles
        return {} if cycles is None else cycles.copies(of_candidate=cycles.evaluating)

    @property
    def placement_reason(self) -> str | None:
        """Where the history lives and why; None before the first optimizer step."""
        return None if self._cycles is None else self._cycles.points.placement_reason

    def detach(self) -> None:
        """Remove the hooks from the optimizers; the accelerator sees no further steps."""
        self._watch.detach()

    def state_dict(self) -> dict[str, Any]:
        """Everything a bitwise continuation needs: plain containers and CPU tensors.

        Loads under ``torch.load(weights_only=True)``. Of a sharded history it holds this rank's
        slice, which loads on the same rank of as many: save one file a rank, or use
        ``whole_state_dict``.
        """
        return self._state(whole=False)

    def whole_state_dict(self) -> dict[str, Any]:
        """``state_dict`` of all ranks together, on the first one; loads on any number of ranks.

        A collective call where the history is sharded: every rank has to make it, and only the
        result on the first rank is of use. Vectors are gathered one at a time.
        """
        return self._state(whole=True)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``, on all ranks. Tensors stay where they are until a step.

        A history of other weights, or stored under other options, is dropped with a warning.

        Raises:
            ValueError: the state was written by a newer version of this package.
        """
        state = saved.checked(state)
        for name in _COUNTERS:
            setattr(self, name, int(state["counters"][name]))
        known = {status.value: status for status in Status}  # an earlier version had others
        self.outcomes = Counter({known[k]: n for k, n in state["outcomes"].items() if k in known})
        self._loaded = state
        self._cycles = None  # built anew at the next step, from the state

    def _state(self, *, whole: bool) -> dict[str, Any]:
        if self._loaded is not None:  # loaded and not yet in use
            return self._loaded
        cycles = self._cycles
        vectors = saved.NOTHING
        if cycles is not None:
            if not cycles.evaluating:
                self._notice_changes(cycles)  # a continuation could not know of them
            vectors = cycles.whole_state_dict() if whole else cycles.state_dict()
        counters = {name: getattr(self, name) for name in _COUNTERS}
        return vectors | {
            "version": saved.STATE_VERSION,
            "counters": counters | {"_cycle_steps": 0 if cycles is None else cycles.steps},
            "outcomes": {status.value: count for status, count in self.outcomes.items()},
        }

    def _notice_changes(self, cycles: Cycles) -> None:
        if self._watch.disturbed and cycles.notice_changes():
            self.outcomes[Status.WEIGHTS_CHANGED] += 1

    def _before_optimizer_step(self) -> None:
        """Make sure that there are cycles, and that this step belongs to one."""
        if self._builder.has_no_memory:
            return
        try:
            if self._cycles is None:
                if self._some_are_lazy:
                    self._some_are_lazy = has_lazy_parameters(self._optimizers)
                    if self._some_are_lazy:  # until the closure of this step has seen a batch
                        return
                    self._parameters = trainable_parameters(self._optimizers)
                state, self._loaded = self._loaded, None
                self._cycles = self._builder.build(self._parameters, state)
            if self._cycles is None:
                if self._builder.why_not is Status.OUT_OF_MEMORY:
                    self._drop_history()
                return
            # at a cycle's end all weights are looked at
            if self._watch.seems_disturbed and self._cycles.notice_changes():
                self.outcomes[Status.WEIGHTS_CHANGED] += 1
            self._cycles.begin()
        except (RuntimeError, MemoryError) as error:
            self._give_back_memory(error)

    def _give_back_memory(self, error: RuntimeError | MemoryError) -> None:
        """Go on without the history; an error where other ranks wait for this one."""
        self._builder.out_of_memory(error, self._device)
        self._drop_history()

    def _drop_history(self) -> None:
        self._cycles = self._loaded = None
        self.outcomes[Status.OUT_OF_MEMORY] += 1

    @property
    def _device(self) -> torch.device:
        return self._parameters[0].device if self._parameters else torch.device("cpu")

    def _close_cycle(self, cycles: Cycles, judge: Judge | None) -> StepReport:
        self._parameters = trainable_parameters(self._optimizers)
        waiting = self._waiting()
        closing = cycles.close(self._parameters, judge, due=waiting is None)
        if closing.found is not None:
            self.loss_evaluations += closing.found.loss_evaluations
        if closing.disturbance is not None:
            return self._begin_anew(closing.disturbance)
        if closing.found is None:
            report = StepReport(status=waiting or Status.HISTORY_TOO_SHORT)
        else:
            report = closing.found.report
            self._steps_since_attempt = 0
            self.attempted += 1
            self.accepted += report.accepted
            self.outcomes[report.status] += 1
        return dataclasses.replace(
            report,
            stored=True,
            rsd=closing.rsd,
            smoothing_on=None if cycles.smoother is None else cycles.smoother.on,
        )

    def _waiting(self) -> Status | None:
        """Why no extrapolation is due; ``None`` where one is."""
        if self._steps_since_attempt < self.options.accelerate_every_n_steps:
            return Status.STORED
        return Status.WARMUP if self.optimizer_steps < self.options.warmup_steps else None

    def _begin_anew(self, disturbance: Status) -> StepReport:
        """What disturbed any of the ranks undoes as much on all of them."""
        if disturbance is not Status.OUT_OF_MEMORY:
            self.outcomes[disturbance] += 1
            if disturbance is Status.PARAMETERS_CHANGED:
                self._cycles = None  # built anew at the next step
        else:
            assert self._cycles is not None
            self._builder.move_to_host(self._cycles.points.communicator.shortage, self._device)
            self._drop_history()
        return StepReport(status=disturbance)
