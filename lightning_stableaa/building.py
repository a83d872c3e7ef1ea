"""Setting up the cycles: on all ranks or on none, from a checkpoint, and where memory allows it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lightning_stableaa.agreement import same_everywhere
from lightning_stableaa.cycles import Cycles
from lightning_stableaa.distributed import Communicator
from lightning_stableaa.memory import first_line, out_of_memory
from lightning_stableaa.options import Options
from lightning_stableaa.status import Status
from lightning_stableaa.watch import StepWatch

log = logging.getLogger(__name__)


class Builder:
    """Builds cycles for an engine, and remembers where their history did not fit.

    Args:
        options: those of the engine.
        optimizers: those that move the weights.
        watch: notices what else moves them.
        process_group: ranks that train the same weights; ``None`` is the default group.
    """

    def __init__(
        self,
        options: Options,
        optimizers: Sequence[Optimizer],
        watch: StepWatch,
        process_group: dist.ProcessGroup | None,
    ) -> None:
        self._options = options
        self._optimizers = optimizers
        self._watch = watch
        self._process_group = process_group
        name = options.history_device
        self._history_device = torch.device(name) if name else None
        self.why_not: Status | None = None  # the last time, no cycles were built
        self.has_no_memory = False  # on any device

    def build(self, parameters: Sequence[Tensor], state: dict[str, Any] | None) -> Cycles | None:
        """Cycles of these parameters; a collective call.

        Args:
            parameters: the weights.
            state: of an engine, to be continued; dropped with a warning where it does not fit.

        Returns:
            The same on all ranks: ``None`` where these have other parameters each, or one of
            several no memory. It is an error in a process alone, see ``out_of_memory``.
        """
        device = parameters[0].device if parameters else torch.device("cpu")
        communicator = Communicator(self._process_group)
        restores = state is not None and state["points"] is not None
        shapes = [(one.shape, one.stride(), one.dtype) for one in parameters]
        same_weights, same_state = same_everywhere(
            communicator, device, repr(shapes), str(restores)
        )
        if not same_weights:
            self._wait_for_the_same_weights()
            return None
        cycles = None
        with communicator.in_step():
            cycles = Cycles(
                parameters,
                self._options,
                communicator=communicator,
                device=self._history_device,
                optimizers=self._optimizers,
                watch=self._watch,
            )
        if communicator.any_shortage(device) or cycles is None:
            self.move_to_host(communicator.shortage, device)
            return None
        if state is not None and restores:
            _restore(cycles, state, together=same_state)
            if same_state and communicator.any_shortage(device):
                self.move_to_host(communicator.shortage, device)
                return None
        self.why_not = None
        return cycles

    def out_of_memory(self, error: RuntimeError | MemoryError, device: torch.device) -> None:
        """Go on with the history on the host, or without one.

        Args:
            error: what was raised.
            device: that of the weights.

        Raises:
            RuntimeError: not of memory, or in one of several ranks where the others wait for it.
        """
        if not out_of_memory(error):
            raise error
        world = Communicator(self._process_group).world_size
        if world > 1:
            raise RuntimeError(
                f"out of memory in one of {world} processes, in the middle of what they do "
                f"together ({first_line(error)}): {Status.OUT_OF_MEMORY.remedy}"
            ) from error
        self.move_to_host(first_line(error), device)

    def move_to_host(self, shortage: str, device: torch.device) -> None:
        """Build on the host from now on, or not at all; on all ranks.

        Args:
            shortage: what the error said; empty where it was another process's.
            device: that of the weights.
        """
        self.why_not = Status.OUT_OF_MEMORY
        self.has_no_memory = "cpu" in (device.type, getattr(self._history_device, "type", ""))
        self._history_device = torch.device("cpu")
        log.warning(
            "out of memory (%s): %s",
            shortage or "in another process",
            f"training goes on without acceleration; {Status.OUT_OF_MEMORY.remedy}"
            if self.has_no_memory
            else "the Anderson history starts anew in the memory of the host",
        )

    def _wait_for_the_same_weights(self) -> None:
        if self.why_not is not Status.PARAMETERS_CHANGED:
            log.warning(
                "the parameters that are trained differ between processes: training goes on "
                "without acceleration until they are the same"
            )
        self.why_not = Status.PARAMETERS_CHANGED


def _restore(cycles: Cycles, state: dict[str, Any], *, together: bool) -> None:
    """Continue from a state, or say why not; a collective call if all ranks are together."""
    different = ["state on another rank"]
    if together:
        different = cycles.load_state_dict(state, steps=int(state["counters"]["_cycle_steps"]))
    if different:
        log.warning(
            "the Anderson history of the checkpoint was dropped and starts anew: "
            "it was stored with another %s",
            ", ".join(different),
        )
