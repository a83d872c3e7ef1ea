"""The loss by which a Lightning run judges candidates, without side effects."""

from __future__ import annotations

import functools
import inspect
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_stableaa.callbacks.batches import BatchWatch
from lightning_stableaa.callbacks.loaders import trains_on_mini_batches
from lightning_stableaa.callbacks.samples import (
    ends_in_classes,
    first_samples,
    own_copy,
    samples_in,
    versions_of,
)
from lightning_stableaa.callbacks.validation import BestValidation
from lightning_stableaa.dtensors import whole
from lightning_stableaa.memory import out_of_memory
from lightning_stableaa.safeguard import Judge, undo_side_effects

log = logging.getLogger(__name__)

# a number, all (None), or few of classes and tokens
JudgeSamples = int | Literal["auto"] | None

# Of classes or tokens: in all processes together, and at least in each of them.
AUTO_SAMPLES = 16
AUTO_SAMPLES_EACH = 4
# So many together need nobody to confirm what they say.
ENOUGH_SAMPLES = 256


@dataclass
class Experience:
    """What the batches of a run, and its validations, told so far."""

    watch: BatchWatch = field(default_factory=BatchWatch)
    indivisible: bool = False  # the module failed on a part of one
    alters: bool = False  # the module writes to the tensors of one
    validation: BestValidation = field(default_factory=BestValidation)

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return self.watch.state_dict() | {
            "indivisible": self.indivisible,
            "alters": self.alters,
            "validation": self.validation.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` returned; an empty one is that of the beginning."""
        self.watch.load_state_dict(state)
        self.indivisible = state.get("indivisible", False)
        self.alters = state.get("alters", False)
        self.validation.load_state_dict(state.get("validation", {}))


class BatchLoss(Judge):
    """Loss of the current batch at the current weights; a context manager and a function.

    ``anderson_loss(batch)`` of the LightningModule where it is defined, ``training_step``
    otherwise: on the bare module, since DDP's forward would wait for a backward pass. The first
    call saves buffers and metric states, and leaving the context restores them: batches on which
    nothing is due cost nothing. Every call has dicts and lists of its own; where it writes to the
    tensors in them, later ones have copies of these. What was asked is counted in ``judged``, in
    whole batches.

    Args:
        trainer: for the precision plugin's context.
        module: the LightningModule.
        batch: as given to ``on_train_batch_start``.
        batch_idx: as given to ``on_train_batch_end``.
        outputs: of the training step, as given there.
        samples: of the batch that judge, its first ones; ``None`` takes all, ``"auto"`` what
            ``samples_that_judge`` says.
        earlier: what earlier batches and validations told; this one adds to it.
    """

    def __init__(
        self,
        trainer: Any,
        module: nn.Module,
        batch: Any,
        batch_idx: int,
        *,
        outputs: Any = None,
        samples: JudgeSamples = None,
        earlier: Experience | None = None,
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._batch = batch
        self._batch_idx = batch_idx
        self._outputs = outputs
        self._samples: JudgeSamples = samples
        self._undo: ExitStack | None = None  # from the first call on
        self._part: Any = batch  # that judges
        self._looked = False
        self._judging: int | None = None  # samples that judge; None is all
        self._share = 1.0  # of the batch
        self._earlier = earlier or Experience()
        self._of_sample: bool | Tensor = False
        self._spoiled = False  # no further loss of this batch means anything
        self.judged = 0.0

    def __enter__(self) -> BatchLoss:
        return self

    def __exit__(self, *error: object) -> None:
        if self._undo is not None:
            self._undo.close()

    def __call__(self) -> Tensor:
        self._look_at_batch()
        if self._undo is None:
            with ExitStack() as undo:  # undone where it cannot be completed
                undo.enter_context(undo_side_effects(self._module))
                undo.enter_context(silenced(self._module))
                self._undo = undo.pop_all()
        self.judged += self._share
        if self._spoiled:  # by the loss before this one
            self._loss_of(self._batch)  # in a forward pass others may wait: SyncBatchNorm
            return torch.tensor(math.nan)
        before = versions_of(self._part)
        loss = self._loss_of(self._part) if self._share == 1.0 else self._loss_of_part()
        if versions_of(self._part) != before:
            self._notice_alteration()
        return loss

    @property
    def of_sample(self) -> bool | Tensor:
        """Whether other samples are trained on than those that judge.

        As far as loaders tell, or the batches of the last three extrapolations: those of the first
        process, whose state a checkpoint has.
        """
        self._look_at_batch()
        return self._of_sample

    @property
    def surely_of_sample(self) -> bool:
        """Where loaders tell."""
        return trains_on_mini_batches(self._trainer)

    @property
    def communicates(self) -> bool:
        """As batch normalisation over all processes does; split weights tell of themselves."""
        several = self._trainer.world_size > 1
        return several and any(isinstance(one, nn.SyncBatchNorm) for one in self._module.modules())

    @property
    def training_loss(self) -> Tensor | None:
        """As the step returned it; Lightning divides it by the number of batches accumulated."""
        outputs = self._outputs
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            return None
        batches = self._trainer.accumulate_grad_batches
        scale = batches if getattr(self._module, "automatic_optimization", True) else 1
        return whole(loss.detach()).reshape(()) * scale

    @property
    def validation_got_worse(self) -> bool:
        """By the metric that is monitored, as the first process knows it."""
        return self._earlier.validation.got_worse

    @property
    def asked_in_vain(self) -> bool:
        """Where mini-batches judge, as loaders tell; other batches have to be looked at."""
        return self._earlier.validation.keeps_out_mini_batches

    def confirming(self) -> Callable[[], Tensor] | None:
        """The loss of the whole batch, where ``"auto"`` left the first say to a part of it."""
        self._look_at_batch()
        if self._samples != "auto" or self._judging is None:
            return None
        ranks = self._trainer.world_size
        # all ranks confirm, or none, whatever the size of their own batches
        if self._judging * ranks >= ENOUGH_SAMPLES or self._share == 1.0:
            return None

        def loss() -> Tensor:
            self.judged += 1.0
            return self._loss_of(self._batch)

        return loss

    def _look_at_batch(self) -> None:
        """Once: which part of it judges, and whether it is one of many."""
        if self._looked:
            return
        self._looked = True
        samples = samples_that_judge(self._samples, self._trainer, self._module, self._batch)
        self._judging = samples
        try:
            self._take_part(samples)
            self._of_sample = self._share < 1.0 or self._is_one_of_many()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            self._of_sample = True  # the careful one; its losses say whether there is memory

    def _is_one_of_many(self) -> bool | Tensor:
        if trains_on_mini_batches(self._trainer):
            return True
        return self._trainer.is_global_zero and self._earlier.watch.see(self._batch)

    def _take_part(self, samples: int | None) -> None:
        """So many samples of the batch, or all where it cannot be divided."""
        batch, held = self._batch, None
        if samples is not None and not self._earlier.indivisible:
            held = samples_in(batch)
        if samples is not None and held is not None and samples < held:
            try:
                self._part, self._share = first_samples(batch, samples), samples / held
            except Exception as error:  # of the constructor of a container
                self._notice_indivisible(error)

    def _loss_of(self, batch: Any) -> Tensor:
        own = own_copy(batch, of_tensors=self._earlier.alters)
        return loss_of_batch(self._trainer, self._module, own, self._batch_idx)

    def _loss_of_part(self) -> Tensor:
        """NaN, which rejects, where the module cannot work on a part: then later ones are whole."""
        try:
            return self._loss_of(self._part)
        except Exception as error:
            if out_of_memory(error):
                raise
            self._notice_indivisible(error)
            self._spoiled = True
            return torch.tensor(math.nan)

    def _notice_indivisible(self, error: Exception) -> None:
        self._earlier.indivisible = True
        log.warning(
            "judging a candidate on the first %s samples of the batch failed (%s: %s); from now "
            "on whole batches judge, as with judge_samples=None",
            self._judging,
            type(error).__name__,
            error,
        )

    def _notice_alteration(self) -> None:
        self._earlier.alters = self._spoiled = True
        log.warning(
            "training_step writes to the tensors of its batch, so that no two losses of a batch "
            "are comparable; from now on each candidate is judged on a copy of what the step left"
        )


def samples_that_judge(
    chosen: JudgeSamples, trainer: Any, module: nn.Module, batch: Any
) -> int | None:
    """How many samples of a batch, in each process, judge candidates; ``None`` is all of them.

    ``"auto"``: few where the batch ends in classes or tokens (int64), whose losses are of one size;
    all where it does not, since the residuals of a regression may be those of a few samples, and
    all where the module has a loss of its own for this.
    """
    if chosen != "auto":
        return chosen
    if has_own_loss(module) or not ends_in_classes(batch):
        return None
    return max(AUTO_SAMPLES_EACH, math.ceil(AUTO_SAMPLES / trainer.world_size))


def loss_of_batch(trainer: Any, module: Any, batch: Any, batch_idx: int) -> Any:
    """The module's own loss where it has one, else that of its training step."""
    with trainer.precision_plugin.train_step_context():
        if has_own_loss(module):
            output = module.anderson_loss(batch)
            if output is None:
                warnings.warn(
                    "anderson_loss(batch) returned None, so that no candidate can be judged: "
                    "return the loss, a single number",
                    stacklevel=2,
                )
            return _loss_in(output)
        step = module.training_step
        method = getattr(step, "__func__", None)  # which unlike the module may be kept
        takes_both = _parameters_of(step) > 1 if method is None else _kept_parameters(method) > 2
        output = step(batch, batch_idx) if takes_both else step(batch)
        return _loss_in(output)


def _loss_in(output: Any) -> Any:
    return output["loss"] if isinstance(output, Mapping) else output


def _parameters_of(function: Callable[..., Any]) -> float:
    """How many positions it takes; like Lightning, not by name: none need be called batch_idx."""
    parameters = inspect.signature(function).parameters.values()
    return math.inf if any(p.kind is p.VAR_POSITIONAL for p in parameters) else len(parameters)


_kept_parameters = functools.lru_cache(maxsize=8)(_parameters_of)


def has_own_loss(module: nn.Module) -> bool:
    """Whether the module says itself by which loss candidates are judged."""
    return callable(getattr(module, "anderson_loss", None))


@contextmanager
def silenced(module: nn.Module) -> Iterator[None]:
    """Nothing that the module logs is recorded."""
    hidden = {name: module.__dict__[name] for name in ("log", "log_dict") if name in vars(module)}
    for name in ("log", "log_dict"):
        module.__dict__[name] = _ignore
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            del module.__dict__[name]
        module.__dict__.update(hidden)


def _ignore(*_: object, **__: object) -> None:
    """Stands in for ``LightningModule.log`` while candidates are judged."""
