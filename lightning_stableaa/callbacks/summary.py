"""One paragraph at the end of fit: how many candidates were taken, and what to turn if few were."""

from __future__ import annotations

import logging

from lightning_stableaa.accelerator import AndersonAccelerator
from lightning_stableaa.status import Status


def summary(engine: AndersonAccelerator) -> tuple[int, str]:
    """Log level and text: a warning that names an option when few candidates were taken."""
    attempted, accepted = engine.attempted, engine.accepted
    head = (
        f"Anderson acceleration: {accepted} of {attempted} extrapolations accepted in "
        f"{engine.optimizer_steps} optimizer steps"
    )
    if engine.optimizer_steps == 0:
        return logging.WARNING, (
            f"{head}: no step with gradients was seen of the optimizers of the Trainer; check that "
            "configure_optimizers returns those that are stepped, and that gradients are still "
            "there when their step ends."
        )
    breaks = (Status.PARAMETERS_CHANGED, Status.WEIGHTS_CHANGED)
    why = max(breaks, key=lambda status: engine.outcomes[status])
    if attempted == 0 and engine.outcomes[why]:
        return logging.WARNING, f"{head}: {engine.outcomes[why]} times {why.remedy}."
    if attempted == 0:
        return logging.WARNING, (
            f"{head}: none was due with two residuals in the history; train longer, or lower "
            f"accelerate_every_n_steps ({engine.options.accelerate_every_n_steps}) or warmup_steps "
            f"({engine.options.warmup_steps})."
        )
    rejected = {status: count for status, count in engine.outcomes.items() if status.rejected}
    if 3 * accepted >= attempted or not rejected:  # an earlier version may have had other names
        return logging.INFO, f"{head}."
    why = max(rejected, key=lambda status: rejected[status])
    return logging.WARNING, f"{head}. Most often ({rejected[why]} times) {why.remedy}."
