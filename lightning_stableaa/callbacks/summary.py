"""One paragraph at the end of fit: what Anderson acceleration did for this run."""

from __future__ import annotations

import logging

from lightning_stableaa.accelerator import AndersonAccelerator
from lightning_stableaa.report import Status

# Attempts from which on their outcomes say something; fewer only where all failed alike.
_ENOUGH = 5


def summarize(engine: AndersonAccelerator) -> tuple[int, str]:
    """Log level and text: a warning only where something is wrong that a user can fix."""
    attempted, accepted = engine.attempted, engine.accepted
    head = (
        f"Anderson acceleration: {accepted} of {attempted} extrapolations accepted in "
        f"{engine.optimizer_steps} optimizer steps"
    )
    if engine.disabled is not None:
        return logging.WARNING, f"{head}, until it was switched off: {engine.disabled}."
    if engine.optimizer_steps == 0:
        return logging.WARNING, (
            f"{head}: no step with gradients was seen of the optimizers of the Trainer; check that "
            "configure_optimizers returns those that are stepped, and that gradients are still "
            "there when their step ends."
        )
    changes = (Status.PARAMETERS_CHANGED, Status.EXTERNAL_UPDATE)
    change = max(changes, key=lambda status: engine.outcomes[status])
    if attempted == 0 and engine.outcomes[change]:
        return logging.WARNING, (
            f"{head}, since {engine.outcomes[change]} cycles were interrupted: {change.hint}."
        )
    if attempted == 0:
        options = engine.options
        warmup = f", or warmup_steps ({options.warmup_steps})" if options.warmup_steps else ""
        return logging.WARNING, (
            f"{head}: none was due with two residuals in the history; train longer, or lower "
            f"accelerate_every_n_steps ({options.accelerate_every_n_steps}) together with "
            f"store_every_n_steps ({options.store_every_n_steps}){warmup}."
        )
    rejected = {status: count for status, count in engine.outcomes.items() if status.rejected}
    if 4 * accepted >= attempted or not rejected:
        return logging.INFO, f"{head}."
    cause = max(rejected, key=lambda status: rejected[status])
    harmless = cause in (Status.SKIPPED_NOISE_DOMINATED, Status.REJECTED_LOSS_INCREASE)
    if attempted < _ENOUGH and (harmless or rejected[cause] < attempted):
        return logging.INFO, f"{head}."
    level = logging.INFO if harmless else logging.WARNING
    return level, f"{head}. Most frequent cause, {rejected[cause]} of {attempted}: {cause.hint}."
