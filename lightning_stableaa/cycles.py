"""The cycles of one set of weights: where they begin and end, and what is made of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_stableaa import saved
from lightning_stableaa.agreement import Agreement
from lightning_stableaa.distributed import Communicator
from lightning_stableaa.extrapolation import Extrapolation, extrapolate
from lightning_stableaa.look_ahead import LookAhead
from lightning_stableaa.losses import RecentLosses
from lightning_stableaa.options import Options
from lightning_stableaa.points import PointStore
from lightning_stableaa.safeguard import Judge
from lightning_stableaa.smoother import Smoother
from lightning_stableaa.status import Status
from lightning_stableaa.watch import StepWatch
from lightning_stableaa.weights import reset_momentum


@dataclass(frozen=True, kw_only=True)
class Closing:
    """How a cycle ended.

    Attributes:
        disturbance: what happened in it, on any rank; then nothing was stored.
        rsd: of its iterates, where they are smoothed.
        found: where an extrapolation was due and there were residuals enough.
    """

    disturbance: Status | None = None
    rsd: float | None = None
    found: Extrapolation | None = None


class Cycles:
    """History, smoothing and open cycle of weights that stay the same tensors.

    A process alone begins its cycle anew as soon as the few weights that are looked at before every
    step show that something else moves them. Of others it takes note, as one of several does of
    any; where the cycle ends, all hear of it and begin anew together.

    Args:
        parameters: the weights, laid out alike on all ranks.
        options: those of the engine.
        communicator: the ranks that train the weights; building all this is a collective call.
        device: where the history lives; ``None`` takes that of the weights.
        optimizers: those that move the weights.
        watch: notices what else moves them.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        options: Options,
        *,
        communicator: Communicator,
        device: torch.device | None,
        optimizers: Sequence[Optimizer],
        watch: StepWatch,
    ) -> None:
        self._options = options
        self._optimizers = optimizers
        self._watch = watch
        self.points = PointStore(
            parameters,
            depth=options.history_depth,
            communicator=communicator,
            placement=options.history,
            device=device,
            optimizers=optimizers if options.optimizer_state == "mix" else (),
        )
        self._agreement = Agreement(communicator, self.points.weights.device)
        self.smoother: Smoother | None = None
        if options.smoothing is not None:
            self.smoother = Smoother(
                options.smoothing,
                cycle=options.store_every_n_steps,
                read=self.points.read,
                length=self.points.length,
                dtype=self.points.weights.dtype,
                device=self.points.device,
                agreement=self._agreement,
                sharded=self.points.sharded,
                skipped=self.points.skipped,
            )
        self._losses = RecentLosses()
        self._look_ahead = LookAhead(options.look_ahead_cycles)
        self.steps = 0  # taken in the open cycle
        self._begun = False  # its first step is being made, of several optimizers perhaps
        self.has_evaluation_weights = False
        self.evaluating = False  # parameters and candidate have changed places
        watch.follow(parameters)

    def begin(self) -> None:
        """Make sure that the cycle about to begin, or to go on, has a start in the history."""
        if self.points.history.chained:
            return
        if self.steps == 0 and not self._begun:
            self._begun = True
            self._watch.mark()  # what moved the weights before it begins does not disturb it
        if not self._averages_into_history:
            self.points.push_weights()

    def observe(self) -> None:
        """Take in the step that was made."""
        self.steps += 1
        if self.smoother is not None:
            self.smoother.observe(self.steps)

    def notice_changes(self) -> bool:
        """Something else than the optimizer moved the weights: whether the cycle begins anew.

        A write that a glance does not show is known to some runs at once, and to others where the
        cycle ends: there it counts for all of them, interrupted or not.
        """
        if self._agreement.alone and self._watch.shows_at_a_glance:
            self._agreement.settle(0.0)  # what disturbed the cycle that ends here
            self._restart()
            return True
        if self.steps or self.points.history.chained:  # else no cycle is open
            self._agreement.note(Status.WEIGHTS_CHANGED)
        self._watch.mark()
        return False

    def close(self, parameters: Sequence[Tensor], judge: Judge | None, *, due: bool) -> Closing:
        """Store the end of the cycle, and extrapolate where that is due; a collective call.

        Args:
            parameters: the weights as the optimizers have them now.
            judge: of candidates; ``None`` where nobody judges.
            due: whether it is time for an extrapolation.
        """
        self.steps, self._begun = 0, False
        if self._watch.disturbed:
            self._agreement.note(Status.WEIGHTS_CHANGED)
        if not self.points.still_fits(parameters):
            self._agreement.note(Status.PARAMETERS_CHANGED)
        disturbance, rsd = self._agree_before_storing()
        if disturbance is not None:
            self._restart()
            return Closing(disturbance=disturbance)
        self._store()
        self._look_ahead.note_cycle()
        found = None
        if due and self.points.history.residual_count >= 2:
            found = self._extrapolate(judge)
            disturbance = found.disturbance
        elif self.smoother is None and not self._agreement.alone:
            disturbance = self._agreement.reach()
        if disturbance is Status.WEIGHTS_CHANGED:
            self.points.unlink_newest()
            self._watch.mark()
            self._losses.forget()
        return Closing(disturbance=disturbance, rsd=rsd, found=found)

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """The parameters hold the accepted candidate inside."""
        self.evaluating = True
        try:
            with self.points.candidate_in_place():
                yield
        finally:
            self.evaluating = False
            self._watch.mark()

    def copies(self, *, of_candidate: bool) -> dict[Tensor, Tensor]:
        """By parameter, copies of the accepted candidate, or of the parameters beside it."""
        if not self.has_evaluation_weights:
            return {}
        parameters = self.points.parameters
        copies = (
            self.points.weights.unpack(self.points.candidate)
            if of_candidate
            else [one.detach().clone() for one in parameters]
        )
        return dict(zip(parameters, copies, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """This rank's vectors, and whether it noted a disturbance that others do not know of."""
        if self.evaluating:  # the state is that of training
            with self.points.candidate_in_place(already=True):
                return self._state()
        return self._state()

    def whole_state_dict(self) -> dict[str, Any]:
        """The vectors of all ranks, on the first one; a collective call where they are sharded."""
        state = self.state_dict()
        if self.points.sharded:
            device = self.points.weights.device
            state["disturbed"] = self.points.communicator.any(state["disturbed"], device)
        return saved.make_whole(state, self.points)

    def load_state_dict(self, state: dict[str, Any], *, steps: int) -> list[str]:
        """Continue, on all ranks or on none, what was saved so many steps into a cycle.

        Returns:
            What stands against it; empty where the state was loaded. A collective call.
        """
        different = saved.load(state, self.points, self.smoother, self._options)
        if not different:
            self.steps = steps
            shows = self._options.apply_to != "training"
            self.has_evaluation_weights = shows and state["evaluation"] is not None
            self._losses.load_state_dict(state.get("recent_losses") or {})
            self._look_ahead.load_state_dict(state.get("look_ahead") or {})
            if state.get("disturbed"):
                self._agreement.note(Status.WEIGHTS_CHANGED)
        return different

    def _state(self) -> dict[str, Any]:
        vectors = saved.save(
            self.points, self.smoother, self._options, evaluation=self.has_evaluation_weights
        )
        return vectors | {
            "disturbed": self._agreement.disturbed,
            "recent_losses": self._losses.state_dict(),
            "look_ahead": self._look_ahead.state_dict(),
        }

    def _restart(self) -> None:
        """No residual leads across what moved the weights."""
        self.points.break_chain()
        self._losses.forget()
        self.steps, self._begun = 0, False
        if self.smoother is not None:
            self.smoother.restart()
        self._watch.mark()

    @property
    def _averages_into_history(self) -> bool:
        return self.smoother is not None and self.smoother.averages_into_history

    def _agree_before_storing(self) -> tuple[Status | None, float | None]:
        """What is known to have disturbed the cycle, and its RSD where that is watched."""
        if self._agreement.alone:
            disturbance = self._agreement.reach()
            if disturbance is not None:
                return disturbance, None
        if self.smoother is None:
            return None, None
        averaged_before = self._averages_into_history
        disturbance, rsd = self.smoother.close()
        if self._averages_into_history != averaged_before:
            self.points.break_chain()  # the lag of an average is not a step of the optimizer
        return disturbance, rsd

    def _store(self) -> None:
        """Append the end of the cycle to the history."""
        smoother, points = self.smoother, self.points
        if smoother is not None and smoother.averages_into_history:
            points.push(smoother.average)
            return
        if smoother is not None and smoother.on:
            points.load(smoother.average)
            points.weights.write(points.candidate)
            self.has_evaluation_weights = False
            self._watch.mark()
        points.push_weights()

    def _extrapolate(self, judge: Judge | None) -> Extrapolation:
        self.has_evaluation_weights = False
        found = extrapolate(
            self.points,
            self._options,
            judge,
            self._agreement,
            self._losses,
            self._look_ahead,
        )
        self._watch.mark()  # candidates came and went: the weights are the optimizer's again
        if found.report.status is Status.REJECTED_NON_FINITE_HISTORY:
            self.points.clear()
        if found.jump is not None:
            self._take(found.jump, replaces=found.report.replaced, mends=found.mends)
        return found

    def _take(self, jump: Tensor, *, replaces: bool, mends: bool) -> None:
        """Put the accepted candidate where ``apply_to`` wants it.

        Args:
            jump: (q,), from the newest point.
            replaces: it enters training.
            mends: training had leapt away: its momentum would carry the candidate off as well.
        """
        points, options = self.points, self._options
        self.has_evaluation_weights = options.apply_to != "training"
        if not replaces:
            return
        points.weights.write(points.candidate)
        if options.optimizer_state == "reset" or mends:
            reset_momentum(self._optimizers, points.parameters)
        elif options.optimizer_state == "mix":
            points.mix_momentum(jump)
            if self.has_evaluation_weights:
                points.form(jump)  # the momentum was formed in its place
        points.break_chain()
        self._watch.mark()
