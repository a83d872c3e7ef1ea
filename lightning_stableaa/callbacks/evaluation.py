"""What validation, checkpoints and the end of fit see: candidates, and statistics that fit them."""

from __future__ import annotations

import copy
import logging
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lightning_stableaa.accelerator import AndersonAccelerator
from lightning_stableaa.batch_norm import batch_norm_layers, recalibrate_batch_norm
from lightning_stableaa.callbacks.judge import loss_of_batch, silenced
from lightning_stableaa.callbacks.samples import own_copy
from lightning_stableaa.dtensors import drop_gathered, is_split, whole, write_whole
from lightning_stableaa.memory import first_line, out_of_memory
from lightning_stableaa.safeguard import undo_side_effects

log = logging.getLogger(__name__)


class EvaluationModel:
    """Puts what is to be evaluated into the module, and takes it out again.

    Where ``apply_to`` is ``"evaluation"`` or ``"both"``, validation and the checkpoints of the
    Trainer hold the accepted candidate. Where batches are kept, the running statistics of
    batch normalisation are computed anew before a validation that follows an acceptance; they
    stay where there is no candidate to be shown, and else come and go with it.

    Args:
        engine: decides which candidates are accepted.
        trainer: the Trainer of the fit.
        module: the LightningModule.
        batches: training batches to compute statistics from; 0 leaves statistics alone.
        recalibrated_at: acceptances that the statistics know of already.
    """

    def __init__(
        self,
        engine: AndersonAccelerator,
        trainer: Any,
        module: nn.Module,
        *,
        batches: int,
        recalibrated_at: int,
    ) -> None:
        self._engine = engine
        self._trainer = trainer
        self._module = module
        self._recent: deque[tuple[Any, int]] = deque(
            maxlen=batches if batch_norm_layers(module) else 0
        )
        self._trained: set[nn.Module] = set()  # modules in training mode while batches are kept
        self.recalibrated_at = recalibrated_at
        self._of_candidate: dict[str, Tensor] = {}  # statistics that only evaluation sees
        self._of_training: dict[str, Tensor] = {}  # those of the module, while it is evaluated
        self._placed = ExitStack()
        self._into_checkpoints = engine.options.apply_to != "training"
        if self._into_checkpoints:
            hooked: Any = module
            self._hook = _SaveHook(self, hooked.on_save_checkpoint)
            hooked.on_save_checkpoint = self._hook

    def keep(self, batch: Any, batch_idx: int) -> None:
        """Remember a training batch; it stays on its device until later ones push it out."""
        if self._recent.maxlen:
            self._recent.append((batch, batch_idx))
            self._trained = {one for one in self._module.modules() if one.training}

    def place(self) -> int:
        """Before a validation.

        Returns:
            The number of batches that statistics were computed from.
        """
        engine = self._engine
        candidate = engine.evaluation_weights_ready
        self._placed.enter_context(engine.evaluation_weights())
        if not candidate and engine.options.apply_to == "evaluation":
            self._of_candidate = {}
            return 0
        unknown = candidate and not self._of_candidate  # also after a resume
        outdated = bool(self._recent) and (unknown or engine.accepted != self.recalibrated_at)
        forward_passes = len(self._recent) if outdated else 0
        if outdated:
            recalibrated = self._recalibrated()
            self.recalibrated_at = engine.accepted
            if candidate:
                self._of_candidate = recalibrated
            else:
                _write_statistics(self._module, recalibrated)
        if candidate and self._of_candidate:
            self._of_training = _statistics(self._module)
            _write_statistics(self._module, self._of_candidate)
        return forward_passes

    def remove(self) -> None:
        """After a validation, and after whatever interrupted it."""
        self._placed.close()
        _write_statistics(self._module, self._of_training)
        self._of_training = {}

    def close(self) -> None:
        """Checkpoints are the module's own again."""
        self.remove()
        if self._into_checkpoints:
            self._into_checkpoints = False
            if self._module.__dict__.get("on_save_checkpoint") is self._hook:
                self._hook.remove_from(self._module)

    @property
    def in_charge(self) -> bool:
        """Whether checkpoints of the module are those of this fit; not after it was interrupted."""
        return self._into_checkpoints and self._module._trainer is self._trainer

    def export(self) -> None:
        """Leave in the module what validation would see, for what follows the fit."""
        self.close()
        restore(self._module, self.replacements())

    def training_state(self) -> dict[str, Tensor]:
        """By name, on the CPU, what checkpoints lack because they hold the candidate instead.

        Collective where weights are split: the first process gathers them, one at a time.
        """
        if not self._into_checkpoints:
            return {}
        of_training = self._engine.training_tensors()
        named = self._by_name(of_training)
        if named and self._current_statistics():
            named |= self._of_training or _statistics(self._module)
        if not is_split(named.values()):
            return {name: tensor.cpu() for name, tensor in named.items()}
        gathered = {}
        for name, tensor in named.items():
            value = whole(tensor)
            if self._trainer.is_global_zero:
                gathered[name] = value.cpu()
        return gathered

    def _recalibrated(self) -> dict[str, Tensor]:
        """Statistics of the current weights over the batches that are kept.

        Nothing where memory runs out; then no batch is kept any longer.

        Raises:
            RuntimeError: memory ran out in one of several processes, which may wait for this one.
        """

        def forward(kept: tuple[Any, int]) -> None:
            batch = own_copy(kept[0], of_tensors=True)  # it may be needed again
            # with gradients: the loss of a PINN differentiates the network itself
            with torch.enable_grad():
                loss_of_batch(self._trainer, self._module, batch, kept[1])

        # validation runs in inference mode, in which a training step may not be able to run
        with (
            torch.inference_mode(False),
            undo_side_effects(self._module),
            silenced(self._module),
        ):
            try:
                recalibrate_batch_norm(self._module, self._recent, forward, trained=self._trained)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if self._trainer.world_size > 1:
                    raise RuntimeError(
                        "recalibrating batch normalisation ran out of memory in one of "
                        f"{self._trainer.world_size} processes ({first_line(error)}): use smaller "
                        "batches, or recalibrate_batch_norm=0"
                    ) from error
                log.warning(
                    "recalibrating batch normalisation ran out of memory: from now on its "
                    "statistics stay as they are; use smaller batches, or recalibrate_batch_norm=0"
                )
                self._recent = deque(maxlen=0)
                return {}
            return _statistics(self._module)

    def replacements(self) -> dict[str, Tensor]:
        """By name, what evaluation sees in place of what training has; empty where nothing is."""
        weights = self._by_name(self._engine.evaluation_tensors())
        return weights | self._current_statistics() if weights else {}

    def _current_statistics(self) -> dict[str, Tensor]:
        """Of the candidate that there is now; empty where an earlier one was recalibrated for."""
        current = self._engine.accepted == self.recalibrated_at
        return self._of_candidate if current else {}

    def _by_name(self, tensors: Mapping[Tensor, Tensor]) -> dict[str, Tensor]:
        named = self._module.named_parameters(remove_duplicate=False)
        return {name: tensors[parameter] for name, parameter in named if parameter in tensors}


class _SaveHook:
    """Stands before ``on_save_checkpoint`` of a module: the one hook of every kind of checkpoint.

    Callbacks are not asked where only weights are saved. A copy of the module, or one sent to
    another process, gets none of it.
    """

    def __init__(self, evaluation: EvaluationModel | None, own: Any) -> None:
        self._evaluation = evaluation
        self._own = own
        self._said_what_is_missing = False

    def remove_from(self, module: nn.Module) -> None:
        """Leave what stood there before: the method of its class, or somebody else's function."""
        if getattr(self._own, "__self__", None) is module:
            del module.__dict__["on_save_checkpoint"]
        else:
            module.__dict__["on_save_checkpoint"] = self._own

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        if self._evaluation is not None and self._evaluation.in_charge:
            missing = _replace(checkpoint["state_dict"], self._evaluation.replacements())
            if missing and not self._said_what_is_missing:
                self._said_what_is_missing = True
                log.warning(
                    "checkpoints hold the weights of training in place of the candidate where the "
                    "module saves them under other names: %s and so on; save under the names of "
                    "named_parameters, or choose apply_to='training'",
                    missing[0],
                )
        self._own(checkpoint)

    def __deepcopy__(self, memo: Any) -> _SaveHook:
        return _SaveHook(None, copy.deepcopy(self._own, memo))

    def __reduce__(self) -> Any:
        return _SaveHook, (None, self._own)


def _replace(state: dict[str, Any], replacements: Mapping[str, Tensor]) -> list[str]:
    """Put the replacements into a state dict: parts into parts, wholes into the first process's.

    Collective where weights are split and the checkpoint is one file, which the first process
    writes: the others have an empty state dict.

    Returns:
        Names of replacements that the state dict has not.
    """
    of_parts = is_split(state.values())
    for name, tensor in replacements.items():
        value = tensor if of_parts else whole(tensor)
        if name in state:
            state[name] = value.to(state[name].device)
    return [name for name in replacements if name not in state] if state else []


def restore(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy parameters and buffers into the module, by name."""
    targets = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers())
    with torch.no_grad():
        for name, value in state.items():
            if name in targets:
                write_whole(targets[name], value)
    drop_gathered()


def _statistics(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the running statistics, by the names of their buffers."""
    return {
        f"{name}.{key}" if name else key: value.clone()
        for name, layer in batch_norm_layers(module).items()
        for key, value in layer.named_buffers()
    }


def _write_statistics(module: nn.Module, statistics: Mapping[str, Tensor]) -> None:
    with torch.inference_mode(False):
        restore(module, statistics)
