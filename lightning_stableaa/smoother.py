"""Adaptive moving average: the statistics of one cycle and the switch that they turn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_stableaa.agreement import Agreement
from lightning_stableaa.options import Smoothing
from lightning_stableaa.statistics import (
    Read,
    RunningStatistics,
    Switch,
    relative_standard_deviation,
)
from lightning_stableaa.status import Status

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
        agreement: the ranks, which turn the switch together.
        sharded: whether each of them has but a slice of the iterates.
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
        agreement: Agreement,
        sharded: bool = False,
        skipped: int = 0,
    ) -> None:
        self._smoothing = smoothing
        self._skipped = cycle - (smoothing.average_window or cycle)  # steps before the window
        self._read = read
        self._agreement = agreement
        self._sharded = sharded
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
            with self._agreement.communicator.in_step():
                self._statistics.observe(self._read)

    def close(self) -> tuple[Status | None, float]:
        """End the window and turn the switch; a collective call.

        Returns:
            What disturbed any of the ranks, and the RSD, dimensionless. After a disturbance the
            RSD says nothing, and the switch stays as it is.
        """
        communicator = self._agreement.communicator
        moments = torch.zeros(2, dtype=torch.float64, device=self.average.device)
        with communicator.in_step():
            moments = self._statistics.moments()
        shared = torch.cat([moments, moments.new_full((1,), self._agreement.number)])
        if self._sharded and self._smoothing.rsd == "norm":
            communicator.sum(shared)
        else:  # equal vectors have equal moments: no sum, so that they are those of one process
            communicator.max(shared)
        shared = shared.cpu()
        disturbance = self._agreement.settle(float(shared[2]))
        rsd = relative_standard_deviation(shared[:2], rsd=self._smoothing.rsd)
        if disturbance is None:
            self._switch.update(rsd)
        self._statistics.reset()  # the mean stays readable until the next iterate
        return disturbance, rsd

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
