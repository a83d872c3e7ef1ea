"""What happens to one of several ranks, and how all of them come to act on it together.

A rank that acted alone, on weights that only it saw changed or for memory that only it lacks, would
end its cycles at other steps than the others, or leave them in a collective. So it takes note, goes
on in step, and what it noted travels as one number with those that are shared anyway.
"""

from __future__ import annotations

import zlib

import torch

from lightning_stableaa.distributed import Communicator
from lightning_stableaa.status import Status

# Each undoes more than the one before; of several, all ranks act on the last.
DISTURBANCES = (Status.WEIGHTS_CHANGED, Status.PARAMETERS_CHANGED, Status.OUT_OF_MEMORY)


class Agreement:
    """What one rank noted since all of them last agreed.

    Args:
        communicator: the ranks that act together; memory that runs out is noted there.
        device: where the process group communicates.
    """

    def __init__(self, communicator: Communicator, device: torch.device) -> None:
        self.communicator = communicator
        self._device = device
        self.alone = communicator.world_size == 1
        self._noted = 0  # so many of DISTURBANCES, the last of which it is

    def note(self, disturbance: Status) -> None:
        """Something happened to this rank."""
        self._noted = max(self._noted, 1 + DISTURBANCES.index(disturbance))

    @property
    def disturbed(self) -> bool:
        """Whether this rank noted anything."""
        return self._noted > 0

    @property
    def number(self) -> float:
        """What this rank noted, as a number whose sum, or maximum, over ranks says it of all."""
        noted = len(DISTURBANCES) if self.communicator.shortage else self._noted
        return float(self._base ** (noted - 1)) if noted else 0.0

    def settle(self, number: float) -> Status | None:
        """The disturbance of all ranks from the sum of their numbers; it is noted no longer."""
        self._noted = 0
        level = sum(number > self._base**power - 0.5 for power in range(len(DISTURBANCES)))
        return DISTURBANCES[level - 1] if level else None

    def reach(self) -> Status | None:
        """The disturbance of all ranks; a collective call."""
        if self.alone:
            return self.settle(self.number)
        number = torch.full((), self.number, dtype=torch.float64, device=self._device)
        self.communicator.max(number)
        return self.settle(float(number))

    @property
    def _base(self) -> int:
        return self.communicator.world_size + 1  # more than a digit can sum to


def same_everywhere(communicator: Communicator, device: torch.device, *texts: str) -> list[bool]:
    """Which of the texts are the same on all ranks; a collective call."""
    codes = [float(zlib.crc32(text.encode())) for text in texts]
    bounds = torch.tensor([codes, [-one for one in codes]], dtype=torch.float64, device=device)
    communicator.max(bounds)
    return (bounds[0] == -bounds[1]).tolist()
