"""AndersonCallback: Lightning glue of the engine, and nothing else."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
import re
from typing import Any, Literal

from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_stableaa.accelerator import AndersonAccelerator
from lightning_stableaa.callbacks.base import EngineCallback, log_to_loggers, log_to_progress_bar
from lightning_stableaa.callbacks.batch_objective import BatchObjective, has_own_loss
from lightning_stableaa.callbacks.smoothing import SmoothingMonitor, log_smoothing
from lightning_stableaa.callbacks.summary import summarize
from lightning_stableaa.options import HistoryPlacement, Options, Safeguard, Smoothing, describe
from lightning_stableaa.report import StepReport

log = logging.getLogger(__name__)


class AndersonCallback(EngineCallback):
    """Stable Anderson acceleration of a Lightning run.

    ``Trainer(callbacks=[AndersonCallback()])``: every ``store_every_n_steps`` optimizer steps that
    really happened the weights enter a history; every ``accelerate_every_n_steps`` a candidate is
    extrapolated from it, and replaces the weights if it lowers the loss of the current batch. A
    ``SmoothingMonitor`` in the same list, before or after, adds the adaptive moving average.

    A LightningModule may define ``anderson_loss(batch)``, the loss by which candidates are
    compared, in place of ``training_step``.

    Args:
        history_depth: residuals kept, m >= 2. Lower it where memory is short.
        store_every_n_steps: optimizer steps in one cycle, s >= 1. Lower it for very short runs.
        accelerate_every_n_steps: optimizer steps between two extrapolations; a multiple of s.
            Raise it where a loss evaluation is expensive.
        warmup_steps: plain optimizer steps before the first extrapolation, for objectives that
            change in the beginning. A string counts epochs: ``"2 epochs"``.
        relaxation: share of the mixed residual that is applied, beta in (0, 1]; also called mixing
            or damping. Lower it where undamped steps diverge.
        lag_compensation: a combination of iterates lags behind the newest one; this share of the
            lag, c >= 0, is made up along the mixed residual. 0 is classical Anderson acceleration.
        max_horizon: with a safeguard, the largest number of cycles by which a candidate
            extrapolates along a steady drift. The radius of a trust region, smaller after rejected
            candidates and never beyond the cycles trained so far. 0 is classical.
        regularization: Tikhonov regularization lambda >= 0 of the mixing coefficients, relative to
            the mean squared residual norm. ``None``: 3e-2, and less where residuals are nearly
            dependent, so that it rarely has to be set. Near 0 it is classical.
        max_extrapolation: longest step, in units of the residual norm sqrt(tr(K)/m). Lower it where
            candidates leave the domain of the model.
        safeguard: ``"loss"`` accepts a candidate only if it lowers the loss of the current batch;
            ``"none"`` accepts every finite one.
        stochastic: whether that loss is one of a sample: then candidates are skipped while
            residuals are noise. ``"auto"``: where an epoch has several batches, or the training
            step draws random numbers. ``False`` says that it is the same function at every step,
            such as that of a PINN on fixed points; ``True`` that the one batch of an epoch is drawn
            anew every time.
        smoothing: ``None``, or the adaptive moving average, as by a ``SmoothingMonitor``.
        history: ``"replicated"`` on every rank, ``"sharded"`` over the ranks, or ``"auto"``: by
            the memory there is.
        history_device: where the history lives, such as ``"cpu"``; ``None``: with the weights.

    Logs at every extrapolation, to all loggers: ``anderson/attempted``, ``anderson/accepted``,
    ``anderson/rejected_<why>`` and ``anderson/skipped_<why>`` (counts so far),
    ``anderson/residual_norm``, ``anderson/step_norm`` (units of the weights), ``anderson/noise``
    (1: the residuals are noisy), ``anderson/gain`` (1: they are independent; above: a drift),
    ``anderson/mixing``, ``anderson/horizon`` (cycles), ``anderson/gram_condition``,
    ``anderson/loss_before``, ``anderson/loss_after``. The progress bar shows
    ``anderson_accepted``, and ``rsd`` where the iterates are smoothed.

    Raises:
        TypeError, ValueError: an option is of the wrong type, out of range or in conflict with
            another one; at the start of fit: a strategy, an optimizer or a training step that
            cannot be accelerated.

    Source: arXiv:2110.14813.
    """

    def __init__(
        self,
        *,
        history_depth: int = Options.history_depth,
        store_every_n_steps: int = Options.store_every_n_steps,
        accelerate_every_n_steps: int = Options.accelerate_every_n_steps,
        warmup_steps: int | str = Options.warmup_steps,
        relaxation: float = Options.relaxation,
        lag_compensation: float = Options.lag_compensation,
        max_horizon: float = Options.max_horizon,
        regularization: float | None = Options.regularization,
        max_extrapolation: float = Options.max_extrapolation,
        safeguard: Safeguard = Options.safeguard,
        stochastic: bool | Literal["auto"] = "auto",
        smoothing: Smoothing | None = Options.smoothing,
        history: HistoryPlacement = Options.history,
        history_device: str | None = Options.history_device,
    ) -> None:
        super().__init__()
        if stochastic not in (True, False, "auto"):
            raise ValueError(f"stochastic must be True, False or 'auto', got {stochastic!r}")
        self.stochastic = stochastic
        self.warmup_epochs = _epochs(warmup_steps) if isinstance(warmup_steps, str) else None
        self.options = Options(
            history_depth=history_depth,
            store_every_n_steps=store_every_n_steps,
            accelerate_every_n_steps=accelerate_every_n_steps,
            warmup_steps=0 if isinstance(warmup_steps, str) else warmup_steps,
            relaxation=relaxation,
            lag_compensation=lag_compensation,
            max_horizon=max_horizon,
            regularization=regularization,
            max_extrapolation=max_extrapolation,
            safeguard=safeguard,
            smoothing=smoothing,
            history=history,
            history_device=history_device,
        )
        self._objective: BatchObjective | None = None
        self._reported_placement = False
        self._has_backup = False
        self._validates_within_epochs = False

    def __repr__(self) -> str:
        """Names the options that differ from the defaults."""
        others: dict[str, Any] = {}
        if self.warmup_epochs is not None:
            others["warmup_steps"] = f"{self.warmup_epochs:g} epochs"
        if self.stochastic != "auto":
            others["stochastic"] = self.stochastic
        return describe("AndersonCallback", self.options, **others)

    @property
    def accelerator(self) -> AndersonAccelerator | None:
        """The engine while a fit runs; ``None`` before and after."""
        return self._engine

    @property
    def attempted(self) -> int:
        """Extrapolations so far; after a fit, those of the run."""
        return self._count("attempted")

    @property
    def accepted(self) -> int:
        """Extrapolations that were accepted so far; after a fit, those of the run."""
        return self._count("accepted")

    @property
    def loss_evaluations(self) -> int:
        """Forward passes beside those of training so far."""
        return self._count("loss_evaluations")

    def _count(self, name: str) -> int:
        if self._engine is None:
            return int(self._saved.get("counters", {}).get(name, 0))
        return int(getattr(self._engine, name))

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what cannot work before anything is trained."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            _with_monitor(self.options, trainer)
            if self.options.safeguard == "loss" and not has_own_loss(pl_module):
                _check_training_step(pl_module)

    def make_engine(self, trainer: Any, pl_module: Any) -> AndersonAccelerator:
        """One of the options, with the smoothing of a SmoothingMonitor beside it."""
        options = _with_monitor(self.options, trainer)
        if self.warmup_epochs is not None:
            steps = math.ceil(self.warmup_epochs * _steps_of_an_epoch(trainer))
            options = dataclasses.replace(options, warmup_steps=steps)
        engine = AndersonAccelerator(trainer.optimizers, **vars(options))
        every = trainer.val_check_batch  # None: by time
        self._validates_within_epochs = every is not None and (
            trainer.check_val_every_n_epoch is None or every < trainer.num_training_batches
        )
        self._objective = BatchObjective(trainer, pl_module, stochastic=self.stochastic)
        return engine

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep what the training step is about to change, where an evaluation is due."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        engine, objective = self._engine, self._objective
        if engine is None or objective is None:
            return
        if self._has_backup:
            self._has_backup = False
            engine.recognize_weights()
        if engine.attempt_is_next and self.options.safeguard == "loss":
            objective.save_before_training_step()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One engine step for one optimizer step."""
        engine, objective = self._engine, self._objective
        if engine is None or objective is None:
            return
        if objective.is_due:
            objective.batch = batch
        report = engine.step(objective)
        if report.stored:
            self._report(trainer, pl_module, engine, report)
        if objective.is_due:
            objective.forget()
        if (
            trainer.is_last_batch
            or trainer.should_stop
            or (self._validates_within_epochs and _is_validated(trainer, batch_idx))
        ):
            self._has_backup = True
            engine.backup_weights()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say how it went, once."""
        if self._engine is not None and trainer.is_global_zero:
            level, text = summarize(self._engine)
            # good news where Lightning prints its own: a library's INFO is shown nowhere
            rank_zero_info(text) if level == logging.INFO else log.log(level, text)

    def _release(self) -> None:
        super()._release()
        if self._objective is not None:
            self._objective.forget()
        self._objective = None

    def _report(
        self, trainer: Any, pl_module: Any, engine: AndersonAccelerator, report: StepReport
    ) -> None:
        """Log what a cycle's end brought."""
        if not self._reported_placement and trainer.world_size > 1:
            rank_zero_info(f"Anderson acceleration: {engine.placement_reason}.")
        self._reported_placement = True
        log_smoothing(trainer, pl_module, report)
        if not report.attempted:
            return
        measured = {
            "residual_norm": report.residual_norm,
            "step_norm": report.step_norm,
            "noise": report.noise,
            "gain": report.gain,
            "mixing": report.mixing,
            "horizon": report.horizon,
            "gram_condition": report.condition,
            "loss_before": report.loss_before,
            "loss_after": report.loss_after,
        }
        counts = {"attempted": engine.attempted, "accepted": engine.accepted} | {
            status.value: count for status, count in engine.outcomes.items() if status.rejected
        }
        values = counts | {name: value for name, value in measured.items() if value is not None}
        log_to_loggers(
            trainer, {f"anderson/{name}": float(value) for name, value in values.items()}
        )
        log_to_progress_bar(trainer, pl_module, "anderson_accepted", float(engine.accepted))


def _is_validated(trainer: Any, batch_idx: int) -> bool:
    """Whether a validation may follow this batch, in which others may swap the weights."""
    counted = batch_idx if trainer.check_val_every_n_epoch else trainer.fit_loop.total_batch_idx
    return (counted + 1) % trainer.val_check_batch == 0


def _with_monitor(options: Options, trainer: Any) -> Options:
    """The options, with the smoothing of a SmoothingMonitor in the same Trainer."""
    monitors = [one for one in trainer.callbacks if isinstance(one, SmoothingMonitor)]
    if not monitors:
        return options
    if options.smoothing not in (None, monitors[0].smoothing):
        raise ValueError(
            f"smoothing is given twice, as {options.smoothing} to AndersonCallback and as "
            f"{monitors[0].smoothing} by SmoothingMonitor: remove one of them"
        )
    return dataclasses.replace(options, smoothing=monitors[0].smoothing)


def _epochs(text: str) -> float:
    """The number in ``"2 epochs"``.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*epochs?\s*", text)
    if match is None:
        raise ValueError(
            f"warmup_steps must be an integer, or epochs as in '2 epochs', got {text!r}"
        )
    return float(match[1])


def _steps_of_an_epoch(trainer: Any) -> int:
    """Optimizer steps; the last one may be of fewer batches.

    Raises:
        ValueError: the length of an epoch is unknown.
    """
    batches = trainer.num_training_batches
    if not math.isfinite(batches):
        raise ValueError(
            "warmup_steps is given in epochs, and the training data have no length: give "
            "warmup_steps as a number of optimizer steps, or set limit_train_batches"
        )
    return math.ceil(batches / trainer.accumulate_grad_batches)


def _check_training_step(module: Any) -> None:
    """One that fetches its own batches cannot be evaluated again.

    Raises:
        ValueError: names the ways out.
    """
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise ValueError(
            "training_step(dataloader_iter) fetches batches, and cannot be evaluated again by "
            "AndersonCallback: define anderson_loss(batch) on the LightningModule, or set "
            "safeguard='none'"
        )
