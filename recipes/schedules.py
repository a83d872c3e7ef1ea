"""Learning-rate schedules over a whole run; each is stepped once per optimizer step."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_cosine(
    optimizer: Optimizer,
    total_steps: int,
    *,
    warmup_steps: int = 0,
    final_lr_ratio: float = 0.0,
) -> LambdaLR:
    """Linear rise over ``warmup_steps``, then half a cosine down to ``final_lr_ratio`` x lr.

    Raises:
        ValueError: the warm-up is negative or fills the whole run.
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps must lie in [0, {total_steps}), the length of the run, "
            f"got {warmup_steps}"
        )

    def lr_ratio(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
        return final_lr_ratio + (1 - final_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2

    return LambdaLR(optimizer, lr_ratio)
