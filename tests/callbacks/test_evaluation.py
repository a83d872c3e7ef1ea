"""Candidates for evaluation: validation sees them, training does not."""

from typing import Any

import lightning.pytorch
import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from lightning_stableaa import AndersonCallback
from tests.callbacks.regression import (
    Record,
    Regression,
    anderson,
    batches,
    counters,
    fit,
    stored_points,
    weights,
)


class Validated(Regression):
    """Keeps the weights that validation saw; may break in the middle of it."""

    def __init__(self, *, break_at: int | None = None) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.break_at = break_at

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(weights(self))
        if len(self.seen) == self.break_at:
            raise RuntimeError("validation broke")
        x, y = batch
        self.log("val/loss", mse_loss(self.network(x), y))

    def val_dataloader(self) -> Any:
        return batches(1)


def unguarded(apply_to: str) -> AndersonCallback:
    return anderson(safeguard="none", apply_to=apply_to)


def run(callback: Any = None, **options: Any) -> tuple[Validated, list[Tensor]]:
    """The module, and its weights after every training batch."""
    module, trained = Validated(), Record(lambda _, module: weights(module))
    callbacks = [callback] if callback else []
    settings: dict[str, Any] = {"num_sanity_val_steps": 0, "max_epochs": 12} | options
    fit(module, batches(1), *callbacks, trained, **settings)
    return module, trained.values


def test_evaluation_leaves_training_bitwise_alone() -> None:
    callback = unguarded("evaluation")
    plain, plain_weights = run()
    evaluated, evaluated_weights = run(callback)

    assert counters(callback)["accepted"] == 3
    assert all(map(torch.equal, plain_weights, evaluated_weights))
    # epochs are single steps here; candidates come at 4, 8 and 12, and stay until the next
    differs = [not torch.equal(a, b) for a, b in zip(plain.seen, evaluated.seen, strict=True)]
    assert differs == [False] * 3 + [True] * 9
    assert torch.equal(evaluated.seen[4], evaluated.seen[3])
    # the history goes on without a break: the start and one point for each of six cycles
    assert stored_points(callback).shape[0] == 7


def test_training_shows_validation_the_weights_that_training_has() -> None:
    module, trained = run(unguarded("training"))

    assert all(map(torch.equal, module.seen, trained))


def test_both_trains_on_and_validates_the_candidate_until_the_next_one() -> None:
    module, trained = run(unguarded("both"))
    _, with_training = run(unguarded("training"))

    assert all(map(torch.equal, trained, with_training))
    # epochs are single steps: the candidate of step 4 is in training as well, at that step alone
    equal = [torch.equal(a, b) for a, b in zip(module.seen, trained, strict=True)]
    assert equal == [True] * 3 + [True, False, False, False] * 2 + [True]
    assert torch.equal(module.seen[6], trained[3])


def test_an_exception_in_validation_leaves_the_training_weights() -> None:
    _, plain_weights = run()
    module, callback = Validated(break_at=5), unguarded("evaluation")
    with pytest.raises(RuntimeError, match="validation broke"):
        fit(module, batches(1), callback, num_sanity_val_steps=0, max_epochs=12)

    assert not torch.equal(module.seen[4], plain_weights[4])
    assert torch.equal(weights(module), plain_weights[4])


def test_a_rejected_candidate_is_not_validated() -> None:
    class Rejects(Validated):
        def anderson_loss(self, batch: Any) -> Tensor:
            return torch.ones(())

    callback, plain, module = anderson(apply_to="evaluation"), Validated(), Rejects()
    fit(plain, batches(1), num_sanity_val_steps=0, max_epochs=6)
    fit(module, batches(1), callback, num_sanity_val_steps=0, max_epochs=6)

    assert counters(callback) | {"attempted": 1, "accepted": 0} == counters(callback)
    assert all(map(torch.equal, plain.seen, module.seen))


def test_a_sanity_check_comes_before_any_candidate() -> None:
    module, _ = run(unguarded("evaluation"), num_sanity_val_steps=1)
    assert torch.equal(module.seen[0], weights(Validated()))


def test_the_candidate_survives_a_resume(tmp_path: Any) -> None:
    class Saves(lightning.pytorch.Callback):
        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "stop.ckpt")

    whole, resumed = Validated(), Validated()
    options: dict[str, Any] = {"num_sanity_val_steps": 0, "max_epochs": 8}
    fit(whole, batches(1), unguarded("evaluation"), Saves(), **options)
    fit(
        resumed,
        batches(1),
        unguarded("evaluation"),
        ckpt_path=str(tmp_path / "stop.ckpt"),
        **options,
    )

    assert torch.equal(weights(whole), weights(resumed))
    # the epochs after the checkpoint, whose candidate is that of step 4, and of step 8
    assert all(map(torch.equal, whole.seen[5:], resumed.seen[-3:]))
