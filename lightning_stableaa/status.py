"""Why a step did what it did, and which option to turn when that is not wanted."""

from __future__ import annotations

from enum import Enum


class Status(Enum):
    """Outcome of one call of ``AndersonAccelerator.step``; ``remedy`` says what a user can do."""

    NO_OPTIMIZER_STEP = "no_optimizer_step"
    CYCLE_OPEN = "cycle_open"
    STORED = "stored"
    WARMUP = "warmup"
    HISTORY_TOO_SHORT = "history_too_short"
    PARAMETERS_CHANGED = "parameters_changed"
    WEIGHTS_CHANGED = "weights_changed"
    ACCEPTED = "accepted"
    REJECTED_LOSS = "rejected_loss"
    REJECTED_SMALL_DECREASE = "rejected_small_decrease"
    REJECTED_NOISE = "rejected_noise"
    REJECTED_BY_VALIDATION = "rejected_by_validation"
    REJECTED_NON_FINITE_LOSS = "rejected_non_finite_loss"
    REJECTED_NON_FINITE_HISTORY = "rejected_non_finite_history"
    REJECTED_NON_FINITE_CANDIDATE = "rejected_non_finite_candidate"
    REJECTED_STAGNATION = "rejected_stagnation"
    OUT_OF_MEMORY = "out_of_memory"

    @property
    def rejected(self) -> bool:
        """Whether candidates were formed, or should have been, and none was taken."""
        return self.value.startswith("rejected")

    @property
    def remedy(self) -> str:
        """One sentence naming the option to turn; empty where nothing is wrong."""
        return _REMEDIES.get(self, "")


_REMEDIES = {
    Status.REJECTED_LOSS: (
        "no candidate lowered the loss of the current batch: try larger values of "
        "regularization, or raise store_every_n_steps so that residuals stand out of their noise"
    ),
    Status.REJECTED_SMALL_DECREASE: (
        "residuals were mostly noise, and what a candidate took off the loss was no more than "
        "averaging does, so training was left alone: lower sufficient_decrease to take it all the "
        "same, or raise the batch size or store_every_n_steps, so that residuals stand out"
    ),
    Status.REJECTED_NOISE: (
        "residuals were mostly noise of the samples, of which a candidate is an average that the "
        "next steps undo, so training was left alone: raise the batch size or store_every_n_steps, "
        "so that residuals stand out, or set sufficient_decrease=0 to take candidates all the same"
    ),
    Status.REJECTED_BY_VALIDATION: (
        "validation was worse than at its best, and what lowers the loss of a batch would have "
        "taken training further into overfitting, so it was left alone: stop earlier, or set "
        "monitor=None to take candidates all the same"
    ),
    Status.REJECTED_NON_FINITE_LOSS: (
        "the loss was not finite, with or without the candidate: lower the learning rate, clip "
        "gradients, or lower max_extrapolation"
    ),
    Status.REJECTED_NON_FINITE_HISTORY: (
        "the weights were not finite and the history was dropped: lower the learning rate or "
        "clip gradients"
    ),
    Status.REJECTED_NON_FINITE_CANDIDATE: (
        "the candidate was beyond the range of the weights' precision: raise regularization or "
        "lower max_extrapolation"
    ),
    Status.PARAMETERS_CHANGED: (
        "the parameters that are trained were others at the end of a cycle, or in other memory, "
        "and the history began anew: freeze and unfreeze them less often than every "
        "store_every_n_steps, and write new values into them (one.copy_(other)) in place of giving "
        "them other memory (one.data = other)"
    ),
    Status.WEIGHTS_CHANGED: (
        "something other than the optimizer changed the weights before a cycle was complete, and "
        "no residual is formed across such a change: do it less often than every "
        "store_every_n_steps, or lower that option"
    ),
    Status.OUT_OF_MEMORY: (
        "the history did not fit into memory: lower history_depth, set history_device='cpu', or "
        "history='sharded' where there are several processes"
    ),
    Status.REJECTED_STAGNATION: (
        "the weights did not move between stored points: check that the optimizer updates them "
        "(learning rate, frozen parameters)"
    ),
}
