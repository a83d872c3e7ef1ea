"""Learning-rate schedules over a whole run; each is stepped once per optimizer step."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_cosine(
    optimizer: Optimizer,
    total_steps: int,
    *,
    warmup_share: float = 0.05,
    final_lr_ratio: float = 0.0,
) -> LambdaLR:
    """Linear rise, then half a cosine down to ``final_lr_ratio`` x lr.

    Args:
        warmup_share: share of the run in which the rate rises; a share and not a number of steps,
            so that it holds for any batch size and number of processes; the default is about five
            of ninety epochs (Goyal et al. 2017, Accurate, Large Minibatch SGD).

    Raises:
        ValueError: the warm-up is negative or fills the whole run.
    """
    if not 0 <= warmup_share < 1:
        raise ValueError(f"warmup_share must lie in [0, 1), got {warmup_share}")
    warmup_steps = int(warmup_share * total_steps)

    def lr_ratio(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
        return final_lr_ratio + (1 - final_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2

    return LambdaLR(optimizer, lr_ratio)
