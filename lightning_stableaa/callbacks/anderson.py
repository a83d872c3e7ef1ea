"""AndersonCallback: Lightning glue of the engine, and nothing else."""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Sequence
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_stableaa.accelerator import AndersonAccelerator
from lightning_stableaa.callbacks.base import LightningCallback, log_to_loggers
from lightning_stableaa.callbacks.evaluation import EvaluationModel, restore
from lightning_stableaa.callbacks.judge import (
    BatchLoss,
    Experience,
    JudgeSamples,
    has_own_loss,
)
from lightning_stableaa.callbacks.samples import own_copy, samples_in, with_additions
from lightning_stableaa.callbacks.smoothing import SmoothingMonitor, log_smoothing
from lightning_stableaa.callbacks.summary import summary
from lightning_stableaa.callbacks.support import (
    check_manual_optimization,
    check_other_averages,
    check_supported,
)
from lightning_stableaa.callbacks.validation import Mode, check_monitor
from lightning_stableaa.options import (
    ApplyTo,
    HistoryPlacement,
    OptimizerState,
    Options,
    Safeguard,
    Smoothing,
    check_integer,
)
from lightning_stableaa.report import StepReport
from lightning_stableaa.saved import NOTHING, WHOLE

log = logging.getLogger(__name__)


class AndersonCallback(LightningCallback):
    """Stable Anderson acceleration of a Lightning run.

    ``Trainer(callbacks=[AndersonCallback()])``: after every optimizer step that really happened
    the engine takes note of the weights, and now and then replaces them by an extrapolation that
    lowers the loss of the current batch. A ``SmoothingMonitor`` in the same list, before or
    after, adds the adaptive moving average.

    The options are those of :class:`~lightning_stableaa.AndersonAccelerator`, which explains
    them. A LightningModule may define ``anderson_loss(batch)``, the loss by which candidates are
    judged in place of ``training_step``.

    Args:
        recalibrate_batch_norm: training batches, the last ones, from which the running statistics
            of batch normalisation are computed anew before a validation that follows an
            acceptance; 0 leaves them as they are. Costs that many forward passes, and the memory
            of the batches.
        judge_samples: samples of the batch, in each process, on which candidates are judged, its
            first ones; ``None`` takes all. Fewer cost less and tell candidates apart less well.
            ``"auto"`` takes 16 in all processes together, and at least 4 in each, where the batch
            ends in classes or tokens (int64), and all elsewhere; where fewer than 256 let a
            candidate into training, the whole batch has to confirm it. Without effect on batches
            whose tensors differ in length.
        monitor: metric of validation. While it is worse than at its best, candidates by the loss
            of a sample (mini-batches, new points at every step) stay out of training, which they
            would take further into overfitting. ``"auto"``: that of EarlyStopping or
            ModelCheckpoint, else the first that has a loss or an error in its name; ``None``:
            validation has no say.
        monitor_mode: ``"min"`` where less of a metric that is named is better, or ``"max"``.

    With ``apply_to="evaluation"`` or ``"both"``, validation inside fit, checkpoints and the module
    after fit hold the candidate; a resumed fit goes on with the weights of training.

    Logs at every extrapolation, to all loggers: ``anderson/attempted``, ``anderson/accepted`` and
    ``anderson/rejected_<why>`` (counts so far), ``anderson/residual_norm``,
    ``anderson/jump_norm`` (units of the weights), ``anderson/condition`` (of the Gram matrix),
    ``anderson/noisiness`` (1 where residuals are noise), ``anderson/loss_before``,
    ``anderson/loss_after``. The progress bar shows ``anderson_accepted``, and ``rsd`` where the
    iterates are smoothed.

    Raises:
        TypeError, ValueError: an option is of the wrong type, out of range or in conflict with
            another one; at the start of fit: a strategy, an optimizer or manual optimisation that
            cannot be accelerated.

    Source: arXiv:2110.14813.
    """

    uses_smoothing_monitor = True

    def __init__(
        self,
        *,
        history_depth: int = Options.history_depth,
        store_every_n_steps: int = Options.store_every_n_steps,
        accelerate_every_n_steps: int = Options.accelerate_every_n_steps,
        warmup_steps: int = Options.warmup_steps,
        relaxation: float = Options.relaxation,
        lag_compensation: float = Options.lag_compensation,
        look_ahead_cycles: float = Options.look_ahead_cycles,
        regularization: float | Sequence[float] | None = Options.regularization,
        max_extrapolation: float = Options.max_extrapolation,
        safeguard: Safeguard = Options.safeguard,
        sufficient_decrease: float | None = Options.sufficient_decrease,
        optimizer_state: OptimizerState = Options.optimizer_state,
        smoothing: Smoothing | None = Options.smoothing,
        apply_to: ApplyTo = Options.apply_to,
        history: HistoryPlacement = Options.history,
        history_device: str | None = Options.history_device,
        process_group: Any = None,
        recalibrate_batch_norm: int = 0,
        judge_samples: JudgeSamples = "auto",
        monitor: str | None = "auto",
        monitor_mode: Mode = "min",
    ) -> None:
        check_integer("recalibrate_batch_norm", recalibrate_batch_norm, 0)
        if judge_samples not in (None, "auto"):
            check_integer("judge_samples", judge_samples, 1)
        check_monitor(monitor, monitor_mode)
        self.options = Options(
            history_depth=history_depth,
            store_every_n_steps=store_every_n_steps,
            accelerate_every_n_steps=accelerate_every_n_steps,
            warmup_steps=warmup_steps,
            relaxation=relaxation,
            lag_compensation=lag_compensation,
            look_ahead_cycles=look_ahead_cycles,
            regularization=regularization,
            max_extrapolation=max_extrapolation,
            safeguard=safeguard,
            sufficient_decrease=sufficient_decrease,
            optimizer_state=optimizer_state,
            smoothing=smoothing,
            apply_to=apply_to,
            history=history,
            history_device=history_device,
        )
        self._process_group = process_group
        self._recalibrate_batch_norm = recalibrate_batch_norm
        self._engine: AndersonAccelerator | None = None
        self._optimizers: list[Any] = []
        self._loaded: dict[str, Any] = {}
        self._loaded_from_checkpoint = False  # else an earlier fit left it
        self._only_evaluates = False  # what loads the checkpoint
        self._shown_by_checkpoint: dict[str, Any] = {}  # what evaluation saw of the loaded one
        self._fitted: weakref.ref[Any] | None = None
        self._evaluation: EvaluationModel | None = None
        self._judge_samples: JudgeSamples = judge_samples
        self._monitor = monitor
        self._monitor_mode: Mode = monitor_mode
        self._logged_before: dict[str, Any] = {}  # the validation that runs
        self._batch: tuple[Any, Any] = None, None  # while it is trained on: as given, and a copy
        self._batches = Experience()
        self._extra_losses = 0.0
        self._told_judging = False
        self._told_placement = False

    def __getstate__(self) -> dict[str, Any]:
        """For a copy in another process, which has not fitted any module."""
        return vars(self) | {"_fitted": None}

    @property
    def extra_losses(self) -> float:
        """Forward passes beside those of training so far, in whole batches.

        Those that judged candidates, and those of ``recalibrate_batch_norm``.
        """
        return self._extra_losses

    @property
    def accelerator(self) -> AndersonAccelerator | None:
        """The engine while a fit runs."""
        return self._engine

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what cannot work before anything is trained."""
        if stage == "fit":
            self._forget_earlier_fit(pl_module)
            _effective_options(self.options, trainer)
            check_supported(trainer, pl_module, type(self).__name__)
            asked_for = self.options.safeguard == "loss" or self._recalibrate_batch_norm
            judged = not asked_for or has_own_loss(pl_module)
            check_manual_optimization(pl_module, judged=judged, callback=type(self).__name__)
            check_other_averages(trainer, self.options.apply_to, type(self).__name__)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Take up the optimizers, and the state of a checkpoint."""
        check_supported(trainer, pl_module, type(self).__name__)
        self._shown_by_checkpoint = {}
        self._start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Follow the optimizers where they were replaced; keep what the step is about to get."""
        self._batch = batch, own_copy(batch)
        if trainer.optimizers != self._optimizers:
            self._stop()
            self._start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One engine step for one optimizer step."""
        engine, evaluation = self._engine, self._evaluation
        assert engine is not None  # on_train_start ran
        assert evaluation is not None
        (given, kept), self._batch = self._batch, (None, None)
        if given is batch:  # as it was before the step took anything out of it
            batch = with_additions(kept, batch)
        # else fetched by training_step(dataloader_iter): as the loader gave it
        if batch is not None:  # a loader's way to skip a step
            evaluation.keep(batch, batch_idx)
        if self.options.safeguard == "none":
            report = engine.step()
        else:
            with BatchLoss(
                trainer,
                pl_module,
                batch,
                batch_idx,
                outputs=outputs,
                samples=self._judge_samples,
                earlier=self._batches,
            ) as loss_fn:
                report = engine.step(loss_fn)
            if loss_fn.judged:
                self._extra_losses += loss_fn.judged
                self._tell_judging(batch)
        if not self._told_placement and engine.placement_reason is not None:
            self._told_placement = True
            if trainer.world_size > 1:
                rank_zero_info(f"Anderson acceleration: {engine.placement_reason}.")
        if report.rsd is not None:
            log_smoothing(trainer, pl_module, report.rsd, on=bool(report.smoothing_on))
        if report.attempted:
            self._log(trainer, pl_module, engine, report)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say how it went, once."""
        if self._engine is not None and trainer.is_global_zero:
            level, text = summary(self._engine)
            # good news where Lightning prints its own: a library's INFO is shown nowhere
            rank_zero_info(text) if level == logging.INFO else log.log(level, text)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Show validation the candidate, where candidates are for evaluation."""
        if self._evaluation is not None and trainer.state.fn == "fit":
            self._logged_before = dict(trainer.callback_metrics)
            self._extra_losses += self._evaluation.place()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Give training its own weights back, and look at what became of the metric."""
        if self._evaluation is not None:
            self._evaluation.remove()
            if trainer.state.fn == "fit":
                self._batches.validation.see(
                    trainer, self._logged_before, self._monitor, self._monitor_mode
                )
                self._logged_before = {}

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Give training its own weights back, whatever happened."""
        if self._evaluation is not None:
            self._evaluation.remove()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the candidate in the module, where candidates are for evaluation."""
        self._loaded_from_checkpoint = False
        evaluation = self._evaluation
        if evaluation is None:  # there was nothing left to train
            if self.options.apply_to == "evaluation":
                restore(pl_module, self._shown_by_checkpoint)
            self._shown_by_checkpoint = {}
            self._fitted = weakref.ref(pl_module)
            return
        own = self._own_state()
        self._stop()
        if self.options.apply_to == "evaluation":
            evaluation.export()
            # with the weights of training, for a checkpoint saved hereafter
            self._loaded = self._loaded | own

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let go of the optimizers, keeping the state for a checkpoint or another fit."""
        self._stop()

    def state_dict(self) -> dict[str, Any]:
        """Everything a bitwise continuation needs, of all ranks; the first one's is complete.

        Collective during a fit where the history is sharded, as Lightning's saving of a checkpoint
        is. After a fit each rank has its slice, and none of them is saved.
        """
        if self._engine is None or self._evaluation is None:
            alone = self._loaded.get("shard") in (None, WHOLE, [0, 1])
            return self._loaded if alone else self._loaded | NOTHING
        return self._engine.whole_state_dict() | self._own_state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state, on the CPU, until the optimizers exist."""
        if self._only_evaluates:
            self._only_evaluates = False
            return
        self._loaded = state_dict
        self._loaded_from_checkpoint = True

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Go on with the weights of training, where the checkpoint shows those for evaluation.

        Lightning restores callbacks for validate, test and predict as well, which look at what the
        checkpoint shows and leave training where it is.
        """
        if trainer.state.fn != "fit":
            self._only_evaluates = self.state_key in checkpoint.get("callbacks", {})
            return
        self._only_evaluates = False
        state = checkpoint.get("callbacks", {}).get(self.state_key, {})
        of_training, shown = state.get("training", {}), checkpoint.get("state_dict", {})
        self._shown_by_checkpoint = {name: shown[name] for name in of_training if name in shown}
        restore(pl_module, of_training)

    def _own_state(self) -> dict[str, Any]:
        assert self._evaluation is not None
        return {
            "training": self._evaluation.training_state(),
            "recalibrated_at": self._evaluation.recalibrated_at,
            "extra_losses": self._extra_losses,
            "batches": self._batches.state_dict(),
        }

    def _forget_earlier_fit(self, module: Any) -> None:
        """Begin a new history, as the optimizers do; of another module also new counts."""
        self._stop()  # where an exception ended the fit
        if self._loaded and not self._loaded_from_checkpoint:
            same = self._fitted is not None and self._fitted() is module
            self._loaded = self._loaded | NOTHING | {"batches": {}} if same else {}
            self._batches = Experience()
            if not same:
                self._extra_losses = 0.0

    def _start(self, trainer: Any, pl_module: Any) -> None:
        self._fitted = weakref.ref(pl_module)
        options = _effective_options(self.options, trainer)
        self._optimizers = list(trainer.optimizers)
        self._engine = AndersonAccelerator(
            self._optimizers,
            process_group=self._process_group,
            **{field.name: getattr(options, field.name) for field in dataclasses.fields(options)},
        )
        self._evaluation = EvaluationModel(
            self._engine,
            trainer,
            pl_module,
            batches=self._recalibrate_batch_norm,
            recalibrated_at=self._loaded.get("recalibrated_at", 0),
        )
        if self._loaded:
            self._engine.load_state_dict(self._loaded)
            self._batches.load_state_dict(self._loaded.get("batches", {}))
            self._extra_losses = self._loaded.get("extra_losses", 0.0)
            self._loaded = {}
        self._batches.validation.begin(trainer, self._monitor, self._monitor_mode)
        self._loaded_from_checkpoint = False

    def _stop(self) -> None:
        if self._engine is None or self._evaluation is None:
            return
        self._evaluation.close()
        # not gathered: an exception may have stopped this rank alone; and the module is training's
        self._loaded = self._engine.state_dict() | {
            "training": {},
            "recalibrated_at": self._evaluation.recalibrated_at,
            "extra_losses": self._extra_losses,
            "batches": self._batches.state_dict(),
        }
        self._loaded_from_checkpoint = False
        self._engine.detach()
        self._engine = self._evaluation = None

    def _tell_judging(self, batch: Any) -> None:
        """Once, where the option has no effect."""
        samples = self._judge_samples
        if samples not in (None, "auto") and not self._told_judging and samples_in(batch) is None:
            self._told_judging = True
            rank_zero_warn(
                f"judge_samples={samples}: candidates are judged on whole batches, since their "
                "tensors differ in length or there are none; define anderson_loss(batch) on a part"
            )

    def _log(
        self, trainer: Any, pl_module: Any, engine: AndersonAccelerator, report: StepReport
    ) -> None:
        measured = {
            "residual_norm": report.residual_norm,
            "jump_norm": report.jump_norm,
            "condition": report.condition,
            "noisiness": report.noisiness,
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
        if trainer.progress_bar_callback is not None:  # takes longer than a step of a small model
            pl_module.log(
                "anderson_accepted",
                float(engine.accepted),
                prog_bar=True,
                logger=False,
                on_step=True,
                on_epoch=False,
            )


def _effective_options(options: Options, trainer: Any) -> Options:
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
