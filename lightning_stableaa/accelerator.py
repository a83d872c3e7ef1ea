"""AndersonAccelerator: observe -> attempt -> accept | reject, for any training loop."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lightning_stableaa import checkpoint
from lightning_stableaa.core.acceptance import Evaluation, TrustRegion, decide, veto_candidate
from lightning_stableaa.core.anderson import AndersonStep, anderson_step
from lightning_stableaa.core.smoothing import MovingAverage
from lightning_stableaa.distributed.communicator import Communicator
from lightning_stableaa.model.iterates import IterateStore
from lightning_stableaa.model.objective import LossFunction, Objective
from lightning_stableaa.model.parameters import (
    FlatView,
    has_lazy_parameters,
    holds_copy_of_weights,
    trainable_parameters,
)
from lightning_stableaa.model.step_monitor import OptimizerStepMonitor, maximizes, unwrap_optimizers
from lightning_stableaa.model.trial import evaluate_candidate
from lightning_stableaa.options import HistoryPlacement, Options, Safeguard, Smoothing, describe
from lightning_stableaa.report import Status, StepReport

log = logging.getLogger(__name__)

# Evaluations in which the loss is computed twice at the same weights, to see that it is repeatable.
_SELF_CHECKS = 2

# What happened to one rank and counts for all of them, in the order in which it is added up.
_EVENTS = (Status.EXTERNAL_UPDATE, Status.PARAMETERS_CHANGED, Status.DISABLED)

_COUNTERS = ("optimizer_steps", "attempted", "accepted", "loss_evaluations")

# Reports of the steps on which nothing is due: nothing to compute, nothing to allocate.
_NO_STEP = StepReport(status=Status.NO_OPTIMIZER_STEP)
_ACCUMULATING = StepReport(status=Status.ACCUMULATING)
_PARAMETERS_CHANGED = StepReport(status=Status.PARAMETERS_CHANGED)
_DISABLED = StepReport(status=Status.DISABLED)


class AndersonAccelerator:
    """Stable Anderson acceleration of an optimizer, for any training loop.

    Call ``step`` after ``optimizer.step()``. Every ``store_every_n_steps`` real optimizer steps
    the weights enter the history; every ``accelerate_every_n_steps`` a candidate is extrapolated
    from it, and replaces the weights if it lowers the loss.

    Args:
        optimizer: one optimizer, or several whose parameters move together. A step counts when
            the optimizer really stepped: skipped steps (GradScaler) and steps without any
            gradient do not.
        history_depth: residuals kept, m >= 2. Lower it where memory is short.
        store_every_n_steps: optimizer steps in one cycle, s >= 1. Lower it for very short runs.
        accelerate_every_n_steps: optimizer steps between two extrapolations; a multiple of s.
            Raise it where a loss evaluation is expensive.
        warmup_steps: plain optimizer steps before the first extrapolation, for objectives that
            change in the beginning.
        relaxation: share of the mixed residual that is applied, beta in (0, 1]; also called mixing
            or damping. Lower it where undamped steps diverge.
        lag_compensation: a combination of iterates lags behind the newest one; this share of the
            lag, c >= 0, is made up along the mixed residual. 0 is classical Anderson acceleration.
        max_horizon: with a safeguard, the largest number of cycles by which a candidate
            extrapolates along a steady drift. The radius of a trust region, smaller after rejected
            candidates and never beyond the cycles trained so far. 0 is classical.
        regularization: Tikhonov regularization lambda >= 0 of the mixing coefficients, relative to
            the mean squared residual norm. ``None``: 3e-2, and less where residuals are nearly
            dependent, so that it rarely has to be set. Near 0 it is classical.
        max_extrapolation: longest step, in units of the residual norm sqrt(tr(K)/m). Lower it where
            candidates leave the domain of the model.
        safeguard: ``"loss"`` accepts a candidate only if it lowers the loss of the current batch;
            ``"none"`` accepts every finite one.
        smoothing: ``None``, or the paper's adaptive moving average of the iterates.
        history: ``"replicated"`` on every rank, ``"sharded"`` over the ranks, or ``"auto"``: by
            the memory there is.
        history_device: where the history lives, such as ``"cpu"``; ``None``: with the weights.
        process_group: ranks that train the same weights; ``None`` is the default group.

    Attributes:
        options: all of the above but the optimizer and the process group.
        optimizer_steps: steps of the optimizer so far.
        attempted, accepted: extrapolations so far, and those that were accepted.
        loss_evaluations: losses that were evaluated to compare candidates, so far.
        outcomes: how often each ``Status`` ended an attempt, or interrupted a cycle.
        disabled: why nothing is accelerated any longer; ``None`` while it is.

    Raises:
        TypeError, ValueError: an option is of the wrong type, out of range or in conflict with
            another one, or the optimizer cannot be accelerated (LBFGS).

    Source: arXiv:2110.14813; ``docs/method.md`` says what is whose.
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
        max_horizon: float = Options.max_horizon,
        regularization: float | None = Options.regularization,
        max_extrapolation: float = Options.max_extrapolation,
        safeguard: Safeguard = Options.safeguard,
        smoothing: Smoothing | None = Options.smoothing,
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
            max_horizon=max_horizon,
            regularization=regularization,
            max_extrapolation=max_extrapolation,
            safeguard=safeguard,
            smoothing=smoothing,
            history=history,
            history_device=history_device,
        )
        self._optimizers = unwrap_optimizers(optimizer)
        self._process_group = process_group
        # now, and later after a step: between, toggle_optimizer may hide those of the others
        self._parameters: list[Tensor] = []
        if not has_lazy_parameters(self._optimizers):  # else they are complete after a step
            self._refresh_parameters()
            FlatView(self._parameters)  # refuses what cannot be accelerated
        self.optimizer_steps = 0
        self.attempted = 0
        self.accepted = 0
        self.loss_evaluations = 0
        self.outcomes: Counter[Status] = Counter()
        self.disabled: str | None = None
        self._steps_since_attempt = 0
        self._cycle_steps = 0
        self._checks_left = _SELF_CHECKS
        self._draws_samples = False  # a generator moved while the loss was computed, on any rank
        self._has_backup = False
        self._events = 0  # bits of _EVENTS, on this rank, that the other ranks do not know of
        self._trust_region = TrustRegion(max_horizon)
        self._iterates: IterateStore | None = None
        self._average: MovingAverage | None = None
        self._pending_state: dict[str, Any] | None = None
        self._monitor = OptimizerStepMonitor(self._optimizers)
        self._monitor.prepare = self._prepare

    def __repr__(self) -> str:
        """Names the options that differ from the defaults, and what happened so far."""
        counts = f"{self.accepted} of {self.attempted} candidates accepted"
        return f"<{describe('AndersonAccelerator', self.options)}: {counts}>"

    def step(
        self, loss_fn: LossFunction | Objective | None = None, *, stochastic: bool = True
    ) -> StepReport:
        """Observe the optimizer step that was just made; extrapolate when it is due.

        Every rank has to call it after every step.

        Args:
            loss_fn: returns the scalar loss of the current batch, a tensor, at the current
                weights. Called two or three times when an extrapolation is due, with the same
                random numbers each time, and never differentiated. State that it changes, such as
                the running statistics of batch normalisation, is its own to restore: see
                :func:`~lightning_stableaa.preserve_state`. Not needed without a
                safeguard.
            stochastic: the loss is that of a sample, such as a mini-batch. ``False`` says that it
                is the same function of the weights at every step (the full batch, a PINN on fixed
                points): then no candidate is skipped for noise.

        Returns:
            What happened at this step; an error that ``loss_fn`` raises rejects the candidate.

        Raises:
            ValueError: the safeguard is ``"loss"`` and there is no ``loss_fn``.
        """
        if loss_fn is None and self.options.safeguard == "loss":
            raise ValueError(
                "safeguard='loss' needs a loss_fn, got None: call step(loss_fn) with the loss of "
                "the current batch, or choose safeguard='none'"
            )
        if not self._monitor.poll():
            return _NO_STEP
        self.optimizer_steps += 1
        if self.disabled is not None:
            return _DISABLED
        if self._iterates is None:
            self._refresh_parameters()
            self._build()
            return _PARAMETERS_CHANGED
        self._cycle_steps += 1
        self._steps_since_attempt += 1
        if self._average is not None:
            self._observe(self._average, self._iterates)
        if self._cycle_steps < self.options.store_every_n_steps:
            self._monitor.backup = self._iterates if self.attempt_is_next else None
            return _ACCUMULATING
        objective = self._as_objective(loss_fn, self._iterates, stochastic=stochastic)
        return self._end_cycle(self._iterates, objective)

    @property
    def attempt_is_next(self) -> bool:
        """Whether an extrapolation is due after the next optimizer step."""
        options = self.options
        return (
            self._cycle_steps + 1 >= options.store_every_n_steps
            and self._steps_since_attempt + 1 >= options.accelerate_every_n_steps
            and self.optimizer_steps + 1 >= options.warmup_steps
            and self.disabled is None
        )

    @property
    def smoothing_on(self) -> bool | None:
        """Whether averages are in use; ``None`` without smoothing."""
        return None if self._average is None else self._average.on

    @property
    def placement_reason(self) -> str | None:
        """Where the history lives and why; ``None`` before the first optimizer step."""
        return None if self._iterates is None else self._iterates.placement_reason

    def disable(self, reason: str) -> None:
        """Accelerate nothing any longer, and give the memory of the history back."""
        self.disabled = reason
        self._iterates = self._average = self._monitor.backup = None
        log.warning("Anderson acceleration is off for the rest of this run: %s", reason)

    def backup_weights(self) -> None:
        """Keep a copy of the weights, to recognise them in ``recognize_weights``.

        For code that swaps weights in and out again, such as averages for a validation. Uses the
        memory of the candidate.
        """
        if self._iterates is not None and not self._monitor.external_write():
            self._iterates.copy_weights()
            self._has_backup = True

    def recognize_weights(self) -> None:
        """Continue the sequence of iterates if the weights are those of ``backup_weights``."""
        if self._has_backup and self._wrote_back():
            self._monitor.rebaseline()
        self._has_backup = False

    def _wrote_back(self) -> bool:
        """Whether something wrote to the weights, and they are bitwise the same again."""
        return (
            self._iterates is not None
            and self._monitor.external_write()
            and self._iterates.is_unchanged()
        )

    def detach(self) -> None:
        """Remove the hooks from the optimizers; the accelerator sees no further steps."""
        self._monitor.detach()

    def state_dict(self) -> dict[str, Any]:
        """Everything a bitwise continuation needs: plain containers and CPU tensors.

        Loads under ``torch.load(weights_only=True)``. Of a sharded history it holds this rank's
        shard, which loads on the same rank of as many: save one file a rank, or use
        ``full_state_dict``.
        """
        return self._state(full=False)

    def full_state_dict(self) -> dict[str, Any]:
        """``state_dict`` of all ranks together, on the first one; loads on any number of ranks.

        A collective call where the history is sharded: every rank has to make it, and only the
        result on the first rank is of use. Vectors are gathered one at a time.
        """
        return self._state(full=True)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``, on all ranks. Tensors stay where they are until a step.

        A history of other weights, or stored under other options, is dropped with a warning.

        Raises:
            ValueError: the state was written by another version of this package.
        """
        checkpoint.check_version(state)
        for name in _COUNTERS:
            setattr(self, name, int(state["counters"][name]))
        self.outcomes = Counter({Status(name): n for name, n in state["outcomes"].items()})
        self.disabled = state["disabled"]
        self._steps_since_attempt = int(state["steps_since_attempt"])
        self._cycle_steps = int(state["cycle_steps"])
        self._checks_left = int(state["checks_left"])
        self._draws_samples = bool(state["draws_samples"])
        self._monitor.closure_wrote = bool(state["closure_wrote"])
        self._events = int(state["events"])
        self._trust_region.load_state_dict(state["trust_region"])
        self._pending_state = state if self.disabled is None else None
        self._iterates = self._average = None
        self._monitor.prepare = self._prepare

    def _state(self, *, full: bool) -> dict[str, Any]:
        if self._pending_state is not None:  # loaded and not yet in use
            return self._pending_state
        if self._monitor.external_write() and not (self._has_backup and self._wrote_back()):
            self._note(Status.EXTERNAL_UPDATE)  # a continuation could not see it
        iterates, events = self._iterates, self._events
        vectors = checkpoint.EMPTY
        if iterates is not None:
            vectors = checkpoint.save(iterates, self._average, self.options)
            if full:
                vectors = checkpoint.gather_full(vectors, iterates)
            if full and iterates.sharded:
                events = int(iterates.communicator.any(events > 0, iterates.weights.device))
        return vectors | {
            "version": checkpoint.STATE_VERSION,
            "counters": {name: getattr(self, name) for name in _COUNTERS},
            "outcomes": {status.value: count for status, count in self.outcomes.items()},
            "disabled": self.disabled,
            "steps_since_attempt": self._steps_since_attempt,
            "cycle_steps": self._cycle_steps,
            "checks_left": self._checks_left,
            "draws_samples": self._draws_samples,
            "closure_wrote": self._monitor.closure_wrote,
            "events": events,
            "trust_region": self._trust_region.state_dict(),
        }

    # Setting up

    def _prepare(self) -> None:
        """Before an optimizer step, at which weights, devices and sharding are final."""
        if has_lazy_parameters(self._optimizers):  # until the closure has seen a batch
            return
        self._monitor.prepare = None
        if self.disabled is None:
            if not self._parameters:
                self._refresh_parameters()
            self._build()

    def _refresh_parameters(self) -> None:
        self._parameters = trainable_parameters(self._optimizers)

    def _build(self) -> None:
        """Begin a history of the parameters, from a loaded state if there is one; collective."""
        parameters = self._parameters
        device = parameters[0].device if parameters else torch.device("cpu")
        communicator = Communicator(self._process_group)
        state, self._pending_state = self._pending_state, None
        shapes = [(one.shape, one.stride(), one.dtype) for one in parameters]
        if not communicator.equal(device, repr(shapes), str(state is None)):
            if self.outcomes[Status.PARAMETERS_CHANGED] == 0:
                log.warning(
                    "the parameters that are trained differ between processes: training goes on "
                    "without acceleration until they are the same"
                )
            self.outcomes[Status.PARAMETERS_CHANGED] += 1
            self._iterates = self._average = None  # on all ranks: they try again after every step
            return
        options = self.options
        history_device = options.history_device
        self._iterates = iterates = IterateStore(
            parameters,
            depth=options.history_depth,
            communicator=communicator,
            placement=options.history,
            device=torch.device(history_device) if history_device else None,
        )
        if options.smoothing is not None:
            self._average = MovingAverage(
                length=iterates.length,
                dtype=iterates.weights.dtype,
                device=iterates.device,
                threshold=options.smoothing.rsd_threshold,
                rsd=options.smoothing.rsd,
                of=options.smoothing.of,
                num_unowned=iterates.num_unowned,
            )
        self._monitor.watch(iterates.parameters)
        if state is None or not self._restore(iterates, state):
            self._cycle_steps = self._events = 0
            iterates.push_weights()
        self._monitor.backup = iterates if self.attempt_is_next else None

    def _restore(self, iterates: IterateStore, state: dict[str, Any]) -> bool:
        """Continue from a state, on all ranks or on none; a collective call."""
        if state["iterates"] is None:
            return False
        different = checkpoint.load(state, iterates, self._average, self.options)
        if different:
            log.warning(
                "the Anderson history of the checkpoint was dropped and restarts: it was stored "
                "with another %s",
                ", ".join(different),
            )
        return not different

    # One cycle

    def _observe(self, average: MovingAverage, iterates: IterateStore) -> None:
        """Take the iterate into the window, which is the last part of the cycle."""
        assert self.options.smoothing is not None
        cycle = self.options.store_every_n_steps
        if self._cycle_steps > cycle - (self.options.smoothing.average_window or cycle):
            average.observe(iterates.read)

    def _as_objective(
        self,
        loss_fn: LossFunction | Objective | None,
        iterates: IterateStore,
        *,
        stochastic: bool,
    ) -> Objective | None:
        if self.options.safeguard == "none" or loss_fn is None:
            return None
        if isinstance(loss_fn, Objective):
            return loss_fn
        return Objective(
            loss_fn,
            stochastic=stochastic,
            maximize=maximizes(self._optimizers),
            device=iterates.weights.device,
            collective=iterates.sharded_weights,
        )

    def _end_cycle(self, iterates: IterateStore, objective: Objective | None) -> StepReport:
        """Store the iterate, and extrapolate where that is due."""
        self._cycle_steps = 0
        if self._monitor.external_write():
            self._note(Status.EXTERNAL_UPDATE)
        self._refresh_parameters()
        if not iterates.is_current(self._parameters):
            self._note(Status.PARAMETERS_CHANGED)
        if self._events and iterates.communicator.is_single_process:
            return self._handle_event(iterates, self._events)
        rsd = self._store(iterates)
        self._trust_region.cycles += 1
        options = self.options
        if self._steps_since_attempt < options.accelerate_every_n_steps:
            report = StepReport(status=Status.STORED)
        elif self.optimizer_steps < options.warmup_steps:
            report = StepReport(status=Status.WARMUP)
        elif iterates.history.num_residuals < 2:
            report = StepReport(status=Status.HISTORY_TOO_SHORT)
        else:
            report = self._attempt(iterates, objective)
            self._steps_since_attempt = 0
            self.attempted += report.attempted
            self.accepted += report.accepted
            self.loss_evaluations += report.loss_evaluations
            self.outcomes[report.status] += report.attempted
        self._monitor.backup = self._iterates if self.attempt_is_next else None
        return dataclasses.replace(report, stored=True, rsd=rsd, smoothing_on=self.smoothing_on)

    def _note(self, event: Status) -> None:
        self._events |= 1 << _EVENTS.index(event)

    def _handle_event(
        self, iterates: IterateStore, events: int, unavailable: str | None = None
    ) -> StepReport:
        """Undo as much of the history as the gravest of the events makes wrong."""
        event = _EVENTS[events.bit_length() - 1]
        self._events = 0
        if event is Status.DISABLED:
            reason = "another process cannot evaluate its loss again"
            if unavailable is not None:
                reason = f"the loss cannot be evaluated again: {unavailable}"
            self.disable(reason)
            return _DISABLED
        self.outcomes[event] += 1
        if event is Status.PARAMETERS_CHANGED:
            self._build()
        else:
            if not iterates.communicator.is_single_process:
                iterates.history.clear()  # which of the residuals are wrong, one rank alone knows
            self._restart(iterates)
        return StepReport(status=event)

    def _restart(self, iterates: IterateStore) -> None:
        """The sequence of iterates begins again at the current weights."""
        iterates.restart()
        if self._average is not None:
            self._average.reset()
        if not self._averages_into_history:
            iterates.push_weights()
        self._monitor.rebaseline()

    @property
    def _averages_into_history(self) -> bool:
        smoothing = self.options.smoothing
        return (
            smoothing is not None
            and smoothing.apply_to == "history"
            and self._average is not None
            and self._average.on
        )

    def _store(self, iterates: IterateStore) -> float | None:
        """Append the end of the cycle to the history; the RSD of its window, if there is one."""
        average, smoothing = self._average, self.options.smoothing
        if average is None or smoothing is None:
            iterates.push_weights()
            return None
        before, moments = self._averages_into_history, average.moments()
        if iterates.sharded:
            communicator = iterates.communicator
            moments = moments.to(iterates.weights.device)
            combine = communicator.max if smoothing.rsd == "max" else communicator.sum
            combine(moments)
        rsd = average.switch(moments)
        if self._averages_into_history != before:
            iterates.restart()  # the lag of an average is not a step of the optimizer
        if self._averages_into_history:
            iterates.push(average.mean)
            return rsd
        if average.on:
            iterates.write_average(average.mean)
            self._monitor.rebaseline()
        iterates.push_weights()
        return rsd

    # One extrapolation

    def _attempt(self, iterates: IterateStore, objective: Objective | None) -> StepReport:
        """Propose a candidate, evaluate it, and accept or reject it; a collective call.

        Decisions rest on numbers that all ranks share, so all of them take the same branch.
        """
        unavailable = None if objective is None else objective.unavailable
        if unavailable is not None:
            self._note(Status.DISABLED)
        horizon = 0.0 if objective is None else self._trust_region.horizon
        step, events = self._propose(iterates, horizon)
        if events:
            return self._handle_event(iterates, events, unavailable)
        stochastic = objective is not None and (objective.stochastic or self._draws_samples)
        report = StepReport(
            status=Status.ACCEPTED,
            attempted=True,
            residual_norm=_if_finite(step.residual_norm),
            step_norm=_if_finite(step.norm),
            noise=_if_finite(step.noise),
            gain=_if_finite(step.gain),
            mixing=_if_finite(step.mixing),
            condition=_if_finite(step.condition),
            horizon=horizon,
            stochastic=stochastic,
        )
        veto = veto_candidate(step, stochastic=stochastic)
        if veto is not None:
            if veto is Status.REJECTED_NON_FINITE_HISTORY:
                iterates.history.clear()
                iterates.push_weights()
            return dataclasses.replace(report, status=veto)
        iterates.form_candidate(step.coefficients)
        result = evaluate_candidate(iterates, objective, check=self._checks_left > 0)
        self._monitor.rebaseline()  # the candidate came and went
        self._draws_samples = self._draws_samples or result.stochastic
        self._checks_left = max(0, self._checks_left - 1)
        status = decide(result)
        reason = self._reason_to_disable(iterates, result, status)
        if reason is not None:
            self.disable(reason)
            status = Status.DISABLED
        accepted = status is Status.ACCEPTED
        if objective is not None and step.gain > 1:
            self._trust_region.update(accepted=accepted)
        if accepted:
            iterates.weights.write(iterates.candidate)
            self._restart(iterates)
        return dataclasses.replace(
            report,
            status=status,
            accepted=accepted,
            stochastic=result.stochastic,
            loss_before=_if_finite(result.before),
            loss_after=_if_finite(result.after),
            loss_evaluations=result.evaluations,
        )

    def _reason_to_disable(
        self, iterates: IterateStore, result: Evaluation, status: Status
    ) -> str | None:
        """What an evaluation showed that no later one can change; a collective call."""
        if result.raises:
            return (
                f"the loss cannot be evaluated again, and raised {result.raises}; define "
                "anderson_loss(batch) on the LightningModule, or pass another loss_fn"
            )
        if not result.repeatable:
            return (
                "two losses of the same batch at the same weights differ, so that candidates "
                "cannot be compared; define anderson_loss(batch) on the LightningModule, or pass "
                "a loss_fn that gives the same value when it is called again"
            )
        if status is not Status.ACCEPTED or self.accepted > 0:
            return None
        # of sharded weights or optimizers, a rank may hold none of the copies
        copies = holds_copy_of_weights(self._optimizers)
        if iterates.communicator.any(copies, iterates.weights.device):
            return (
                "the optimizer keeps a copy of the weights and writes it over them at its next "
                "step, candidates included; use an optimizer without master weights"
            )
        return None

    def _propose(self, iterates: IterateStore, horizon: float) -> tuple[AndersonStep, int]:
        """The first rank's step on every rank, and what happened to any of them."""
        options = self.options
        step = anderson_step(
            iterates.gram(),
            iterates.history.is_residual,
            regularization=options.regularization,
            relaxation=options.relaxation,
            lag_compensation=options.lag_compensation,
            horizon=horizon,
            max_extrapolation=options.max_extrapolation,
        )
        communicator = iterates.communicator
        if communicator.is_single_process:
            return step, self._events
        own = step.packed()
        if communicator.rank > 0:  # NaN stays: weights of NaN on one rank are rejected by all
            own = [math.nan if math.isnan(step.residual_norm) else 0.0] * len(own)
        events = [float(self._events >> k & 1) for k in range(len(_EVENTS))]
        shared = torch.tensor([*events, *own], dtype=torch.float64)
        shared = shared.to(iterates.weights.device)
        communicator.sum(shared)
        numbers = shared.tolist()
        happened = sum(1 << k for k, number in enumerate(numbers[: len(events)]) if number > 0)
        return AndersonStep.unpacked(numbers[len(events) :]), happened


def _if_finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
