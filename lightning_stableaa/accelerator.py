"""AndersonAccelerator: the state machine observe -> extrapolate -> accept | reject."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lightning_stableaa import saved
from lightning_stableaa.distributed import Communicator
from lightning_stableaa.dtensors import is_split
from lightning_stableaa.extrapolation import extrapolate
from lightning_stableaa.memory import out_of_memory
from lightning_stableaa.options import (
    ApplyTo,
    HistoryPlacement,
    OptimizerState,
    Options,
    Safeguard,
    Smoothing,
)
from lightning_stableaa.placement import check_placement
from lightning_stableaa.points import PointStore
from lightning_stableaa.report import StepReport
from lightning_stableaa.safeguard import LossFunction
from lightning_stableaa.smoother import Smoother
from lightning_stableaa.status import Status
from lightning_stableaa.watch import StepWatch, unwrap_optimizers
from lightning_stableaa.weights import reset_momentum, trainable_parameters

log = logging.getLogger(__name__)

STATE_VERSION = 2

_COUNTERS = (
    "optimizer_steps",
    "attempted",
    "accepted",
    "loss_evaluations",
    "_cycle_steps",
    "_steps_since_attempt",
)

# Reports of the steps on which nothing is due: nothing to compute, nothing to allocate.
_NO_STEP = StepReport(status=Status.NO_OPTIMIZER_STEP)
_OPEN = StepReport(status=Status.CYCLE_OPEN)


class AndersonAccelerator:
    """Stable Anderson acceleration of an optimizer, for any training loop.

    Call ``step`` after ``optimizer.step()``. Every ``store_every_n_steps`` real optimizer steps
    the weights enter the history; every ``accelerate_every_n_steps`` candidates are formed from
    it, and the best one replaces the weights if it lowers the loss.

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
        look_ahead_cycles: with a safeguard, one candidate more that goes on by so many cycles
            where residuals are a steady drift, by less where they are not; 0 for no such one.
        regularization: lambda >= 0, relative to the mean squared residual norm; one value, or a
            grid from which the safeguard takes the best candidate. ``None`` is
            ``options.GUARDED_GRID`` with a safeguard and ``options.UNGUARDED_GRID`` without.
        max_extrapolation: longest jump, in units of the residual norm sqrt(tr(K)/m).
        safeguard: ``"loss"`` accepts a candidate only if it lowers the loss of the current
            batch; ``"none"`` accepts every finite one.
        optimizer_state: momentum on acceptance: ``"keep"``, ``"mix"`` (with the mixing weights of
            the candidate; doubles the memory of the history) or ``"reset"``.
        smoothing: ``None``, or the adaptive moving average of the iterates.
        apply_to: ``"training"``: candidates replace the weights; ``"evaluation"``: they are only
            seen inside ``evaluation_weights``; ``"both"``.
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
            optimizer_state=optimizer_state,
            smoothing=smoothing,
            apply_to=apply_to,
            history=history,
            history_device=history_device,
        )
        self._optimizers = unwrap_optimizers(optimizer)
        # now, and later after a step: between, toggle_optimizer may hide those of the others
        self._parameters = trainable_parameters(self._optimizers)
        check_placement(history, split=is_split(self._parameters))
        self._process_group = process_group
        self._history_device = torch.device(history_device) if history_device else None
        self._has_no_memory = False
        self.optimizer_steps = 0
        self.attempted = 0
        self.accepted = 0
        self.loss_evaluations = 0
        self.outcomes: Counter[Status] = Counter()
        self._cycle_steps = 0
        self._steps_since_attempt = 0
        self._has_evaluation_weights = False
        self._evaluating = False  # parameters and candidate have changed places
        self._points: PointStore | None = None
        self._smoother: Smoother | None = None
        self._loaded: dict[str, Any] | None = None
        self._watch = StepWatch(self._optimizers, self._before_optimizer_step)

    def step(self, loss_fn: LossFunction | None = None) -> StepReport:
        """Take note of the optimizer step that was just made; extrapolate when it is due.

        Args:
            loss_fn: returns the scalar loss of the current batch, a tensor, at the current
                weights. Called a few times when an extrapolation is due, with gradients enabled,
                and never differentiated. Buffers that it changes are the caller's to restore:
                see :func:`~lightning_stableaa.safeguard.undo_side_effects`. Without a safeguard
                it is not called.

        Raises:
            ValueError: the safeguard is ``"loss"`` and there is no ``loss_fn``.
        """
        if loss_fn is None and self.options.safeguard == "loss":
            raise ValueError(
                "safeguard='loss' needs a loss_fn, got None: call step(loss_fn) with the loss of "
                "the current batch, or choose safeguard='none'"
            )
        if self.options.safeguard == "none":
            loss_fn = None
        if not self._watch.take():
            return _NO_STEP
        self.optimizer_steps += 1
        if self._points is None:  # no memory, or not yet again
            return StepReport(status=Status.OUT_OF_MEMORY)
        self._cycle_steps += 1
        self._steps_since_attempt += 1
        if self._smoother is not None:
            self._smoother.observe(self._cycle_steps)
        if self._cycle_steps < self.options.store_every_n_steps:
            return _OPEN
        try:
            return self._close_cycle(loss_fn)
        except RuntimeError as error:
            self._give_back_memory(error)
            return StepReport(status=Status.OUT_OF_MEMORY)

    @property
    def evaluation_weights_ready(self) -> bool:
        """Whether ``evaluation_weights`` would show other weights than the optimizer's."""
        return self._has_evaluation_weights

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """The parameters hold the accepted candidate inside (``apply_to`` evaluation or both)."""
        if self._points is None or not self._has_evaluation_weights:
            yield
            return
        self._notice_changes()
        self._evaluating = True
        try:
            with self._points.candidate_in_place():
                yield
        finally:
            self._evaluating = False
            self._watch.mark()

    def evaluation_tensors(self) -> dict[Tensor, Tensor]:
        """By parameter, copies of what ``evaluation_weights`` shows; empty without a candidate."""
        return self._copies(of_candidate=not self._evaluating)

    def training_tensors(self) -> dict[Tensor, Tensor]:
        """By parameter, copies of what the optimizer works on; empty without a candidate."""
        return self._copies(of_candidate=self._evaluating)

    @property
    def placement_reason(self) -> str | None:
        """Where the history lives and why; None before the first optimizer step."""
        return None if self._points is None else self._points.placement_reason

    def detach(self) -> None:
        """Remove the hooks from the optimizers; the accelerator sees no further steps."""
        self._watch.detach()

    def state_dict(self) -> dict[str, Any]:
        """Everything a bitwise continuation needs: plain containers and CPU tensors.

        Loads under ``torch.load(weights_only=True)``. Of a sharded history it holds this rank's
        slice, which loads on the same rank of as many: save one file a rank, or use
        ``whole_state_dict``.
        """
        if self._loaded is not None:  # loaded and not yet in use
            return self._loaded
        if self._evaluating:  # saved in the middle of a validation: the state is that of training
            assert self._points is not None
            with self._points.candidate_in_place():
                return self._state()
        self._notice_changes()  # a continuation could not know of them
        return self._state()

    def whole_state_dict(self) -> dict[str, Any]:
        """``state_dict`` of all ranks together, on the first one; loads on any number of ranks.

        A collective call where the history is sharded: every rank has to make it, and only the
        result on the first rank is of use. Vectors are gathered one at a time.
        """
        state = self.state_dict()
        return state if self._points is None else saved.make_whole(state, self._points)

    def _state(self) -> dict[str, Any]:
        points = self._points
        vectors = (
            saved.NOTHING
            if points is None
            else saved.save(
                points, self._smoother, self.options, evaluation=self._has_evaluation_weights
            )
        )
        return vectors | {
            "version": STATE_VERSION,
            "counters": {name: getattr(self, name) for name in _COUNTERS},
            "outcomes": {status.value: count for status, count in self.outcomes.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``. Tensors stay where they are until the next step.

        A history of other weights, or stored under other options, is dropped with a warning.

        Raises:
            ValueError: the state was written by a newer version of this package.
        """
        if state["version"] > STATE_VERSION:
            raise ValueError(
                f"the accelerator state has version {state['version']}, this package reads up to "
                f"{STATE_VERSION}: update lightning-stableaa, or drop the state"
            )
        if state["version"] < STATE_VERSION:
            log.warning(
                "the Anderson history of the checkpoint was dropped and starts anew: "
                "it was stored by an earlier version of lightning-stableaa"
            )
            state = state | saved.NOTHING
        for name in _COUNTERS:
            setattr(self, name, int(state["counters"][name]))
        self.outcomes = Counter({Status(name): n for name, n in state["outcomes"].items()})
        self._loaded = state
        self._points = self._smoother = None  # built anew at the next step, from the state

    def _copies(self, *, of_candidate: bool) -> dict[Tensor, Tensor]:
        points = self._points
        if points is None or not self._has_evaluation_weights:
            return {}
        parameters = points.parameters
        copies = (
            points.weights.unpack(points.candidate)
            if of_candidate
            else [one.detach().clone() for one in parameters]
        )
        return dict(zip(parameters, copies, strict=True))

    def _before_optimizer_step(self) -> None:
        """Make sure that the cycle about to begin, or to go on, has a start in the history."""
        if self._has_no_memory:
            return
        try:
            if self._points is None:
                self._build()
            self._begin_cycle()
        except RuntimeError as error:
            self._give_back_memory(error)

    def _begin_cycle(self) -> None:
        if self._watch.seems_disturbed:
            self._restart_cycle()
        assert self._points is not None
        if not self._points.history.chained and not self._averages_into_history():
            self._points.push_weights()

    def _build(self) -> None:
        """Set up the history for the parameters as they are now, and fill it from a checkpoint."""
        parameters, options = self._parameters, self.options
        communicator = Communicator(self._process_group)
        self._points = points = PointStore(
            parameters,
            depth=options.history_depth,
            communicator=communicator,
            placement=options.history,
            device=self._history_device,
            optimizers=self._optimizers if options.optimizer_state == "mix" else (),
        )
        if options.smoothing is not None:
            self._smoother = Smoother(
                options.smoothing,
                cycle=options.store_every_n_steps,
                read=points.read,
                length=points.length,
                dtype=points.weights.dtype,
                device=points.device,
                communicator=communicator if points.sharded else None,
                skipped=points.skipped,
            )
        self._has_evaluation_weights = False
        state, self._loaded = self._loaded, None
        if state is not None:
            self._restore(state)
        self._watch.follow(parameters)

    def _give_back_memory(self, error: RuntimeError) -> None:
        """Move the history to the host, or do without one: training goes on with its own weights.

        Raises:
            RuntimeError: not of memory, or one of several ranks that share the weights: the others
                are in the middle of what this one would leave.
        """
        alone = Communicator(self._process_group).world_size == 1
        if not out_of_memory(error) or not alone:
            raise error
        device = self._parameters[0].device
        self._points = self._smoother = self._loaded = None
        self._has_evaluation_weights = False
        self._cycle_steps = 0
        self.outcomes[Status.OUT_OF_MEMORY] += 1
        self._has_no_memory = "cpu" in (device.type, getattr(self._history_device, "type", ""))
        self._history_device = torch.device("cpu")
        log.warning(
            "out of memory (%s): %s",
            str(error).splitlines()[0],
            f"training goes on without acceleration; {Status.OUT_OF_MEMORY.remedy}"
            if self._has_no_memory
            else "the Anderson history starts anew in the memory of the host",
        )

    def _restore(self, state: dict[str, Any]) -> None:
        points = self._points
        assert points is not None
        if state["points"] is None:
            self._cycle_steps = 0
            return
        different = saved.load(state, points, self._smoother, self.options)
        if different:
            log.warning(
                "the Anderson history of the checkpoint was dropped and starts anew: "
                "it was stored with another %s",
                ", ".join(different),
            )
            self._cycle_steps = 0
        elif state["evaluation"] is not None:
            self._has_evaluation_weights = True

    def _notice_changes(self) -> None:
        if self._points is not None and self._watch.disturbed:
            self._restart_cycle()

    def _restart_cycle(self) -> None:
        """Something else than the optimizer moved the weights: no residual across it."""
        assert self._points is not None
        self.outcomes[Status.WEIGHTS_CHANGED] += 1
        self._points.break_chain()
        self._cycle_steps = 0
        if self._smoother is not None:
            self._smoother.restart()
        self._watch.mark()

    def _averages_into_history(self) -> bool:
        return self._smoother is not None and self._smoother.averages_into_history

    def _close_cycle(self, loss_fn: LossFunction | None) -> StepReport:
        self._cycle_steps = 0
        points = self._points
        assert points is not None
        self._parameters = trainable_parameters(self._optimizers)
        if not points.still_fits(self._parameters):
            self._points = None  # built anew at the next step
            return StepReport(status=Status.PARAMETERS_CHANGED)
        if self._watch.disturbed:
            self._restart_cycle()
            return StepReport(status=Status.WEIGHTS_CHANGED)
        rsd = self._store(points)
        report = StepReport(
            status=Status.STORED,
            stored=True,
            rsd=rsd,
            smoothing_on=None if self._smoother is None else self._smoother.on,
        )
        if self._steps_since_attempt < self.options.accelerate_every_n_steps:
            return report
        if self.optimizer_steps < self.options.warmup_steps:
            return dataclasses.replace(report, status=Status.WARMUP)
        if points.history.residual_count < 2:
            return dataclasses.replace(report, status=Status.HISTORY_TOO_SHORT)
        return self._extrapolate(points, loss_fn, report)

    def _store(self, points: PointStore) -> float | None:
        """Append the end of the cycle to the history; return the RSD where it is watched."""
        smoother = self._smoother
        if smoother is None:
            points.push_weights()
            return None
        averaged_before = smoother.averages_into_history
        rsd = smoother.close()
        if smoother.averages_into_history != averaged_before:
            points.break_chain()  # the lag of an average is not a step of the optimizer
        if smoother.averages_into_history:
            points.push(smoother.average)
            return rsd
        if smoother.on:
            points.load(smoother.average)
            points.weights.write(points.candidate)
            self._has_evaluation_weights = False
            self._watch.mark()
        points.push_weights()
        return rsd

    def _extrapolate(
        self, points: PointStore, loss_fn: LossFunction | None, report: StepReport
    ) -> StepReport:
        self._steps_since_attempt = 0
        self._has_evaluation_weights = False
        found = extrapolate(points, self.options, loss_fn)
        self._watch.mark()  # candidates came and went: the weights are the optimizer's again
        self.attempted += 1
        self.outcomes[found.status] += 1
        self.loss_evaluations += found.loss_evaluations
        if found.status is Status.REJECTED_NON_FINITE_HISTORY:
            points.clear()
        if found.jump is not None:
            self.accepted += 1
            self._take(points, found.jump)
        return dataclasses.replace(
            report,
            status=found.status,
            attempted=True,
            accepted=found.accepted,
            residual_norm=found.residual_norm,
            jump_norm=found.jump_norm,
            condition=found.condition,
            regularization=found.regularization,
            looked_ahead=found.looked_ahead,
            loss_before=found.loss_before,
            loss_after=found.loss_after,
        )

    def _take(self, points: PointStore, jump: Tensor) -> None:
        """Put the accepted candidate where ``apply_to`` wants it."""
        into_training = self.options.apply_to != "evaluation"
        if into_training:
            self._adapt_momentum(points, jump)
        self._has_evaluation_weights = self.options.apply_to != "training"
        if into_training:
            points.weights.write(points.candidate)
            points.break_chain()
        self._watch.mark()

    def _adapt_momentum(self, points: PointStore, jump: Tensor) -> None:
        if self.options.optimizer_state == "mix":
            points.mix_momentum(jump)
            points.form(jump)  # the momentum was formed in its place
        elif self.options.optimizer_state == "reset":
            reset_momentum(self._optimizers, points.parameters)
