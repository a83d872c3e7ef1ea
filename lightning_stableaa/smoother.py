"""Adaptive moving average: the statistics of one cycle and the switch that they turn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_stableaa.distributed import Communicator
from lightning_stableaa.options import Smoothing
from lightning_stableaa.statistics import (
    Read,
    RunningStatistics,
    Switch,
    relative_standard_deviation,
)

# Iterates of a window where there is no cycle to take it from.
DEFAULT_WINDOW = 10


class Smoother:
    """Watches the last iterates of every cycle; averages them while their RSD is high.

    Args:
        smoothing: the options.
        cycle: optimizer steps in a cycle.
        read: copies a piece of the current iterate (of this rank's slice).
        length: elements of an iterate (of this rank's slice).
        dtype: precision of an iterate.
        device: where the average lives.
        communicator: ranks to sum over where iterates are sharded; ``None`` otherwise.
        skipped: leading elements that another rank counts.
    """

    def __init__(
        self,
        smoothing: Smoothing,
        *,
        cycle: int,
        read: Read,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
        communicator: Communicator | None = None,
        skipped: int = 0,
    ) -> None:
        self._smoothing = smoothing
        self._skipped = cycle - (smoothing.average_window or cycle)  # steps before the window
        self._read = read
        self._communicator = communicator
        self._statistics = RunningStatistics(
            length=length,
            dtype=dtype,
            device=device,
            rsd=smoothing.rsd,
            of=smoothing.of,
            skipped=skipped,
        )
        self._switch = Switch(smoothing.rsd_threshold)

    @property
    def on(self) -> bool:
        """Whether averages are used."""
        return self._switch.on

    @property
    def averages_into_history(self) -> bool:
        """Whether the history takes averages in place of the weights."""
        return self.on and self._smoothing.apply_to == "history"

    @property
    def average(self) -> Tensor:  # (length,)
        """Mean of the iterates of the window."""
        return self._statistics.mean

    def observe(self, position: int) -> None:
        """Take in the iterate after step ``position`` of the cycle, counted from 1."""
        if position > self._skipped:
            self._statistics.observe(self._read)

    def close(self) -> float:
        """End the window: turn the switch and return the RSD, dimensionless."""
        moments = self._statistics.moments()
        if self._communicator is not None:
            if self._smoothing.rsd == "norm":
                self._communicator.sum(moments)
            else:
                self._communicator.max(moments)
        rsd = relative_standard_deviation(moments, rsd=self._smoothing.rsd)
        self._switch.update(rsd)
        self._statistics.reset()  # the mean stays readable until the next iterate
        return rsd

    def restart(self) -> None:
        """Forget the iterates of the open window: the weights were moved by something else."""
        self._statistics.reset()

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and CPU tensors."""
        return {"on": self._switch.on, "statistics": self._statistics.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._switch.on = bool(state["on"])
        self._statistics.load_state_dict(state["statistics"])
