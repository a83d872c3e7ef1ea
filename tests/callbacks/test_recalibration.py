"""Running statistics of batch normalisation before a validation that follows an acceptance."""

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from lightning_stableaa import AndersonCallback
from tests.callbacks.regression import (
    INPUTS,
    Record,
    Regression,
    anderson,
    batches,
    counters,
    fit,
    network,
    weights,
)

EPOCHS = 12  # single steps, each followed by a validation


class Normalised(Regression):
    """With statistics so slow that those of training never follow a jump."""

    def __init__(self) -> None:
        super().__init__(
            network(
                nn.Linear(INPUTS, 8), nn.BatchNorm1d(8, momentum=0.01), nn.Tanh(), nn.Linear(8, 1)
            )
        )
        self.seen: list[Tensor] = []
        self.losses: list[float] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.seen.append(weights(self))
        self.losses.append(mse_loss(self.network(x), y).item())

    def val_dataloader(self) -> Any:
        return batches(1)


def run(callback: AndersonCallback, **options: Any) -> tuple[Normalised, list[Tensor]]:
    """The module, and its weights after every training batch."""
    module, trained = Normalised(), Record(lambda _, module: weights(module))
    settings: dict[str, Any] = {"num_sanity_val_steps": 0, "max_epochs": EPOCHS} | options
    fit(module, batches(1), callback, trained, **settings)
    return module, trained.values


def expected_statistics(module: Normalised) -> Tensor:
    """Mean and variance that the layer has on the one batch of training."""
    layer = copy.deepcopy(module.network)[0]
    (x, _) = next(iter(batches(1)))
    hidden = layer(x)
    return torch.cat([hidden.mean(dim=0), hidden.var(dim=0)])


def test_statistics_are_those_of_the_weights_that_are_validated() -> None:
    accepted_at = 4
    stale, _ = run(anderson(safeguard="none"), max_epochs=accepted_at)
    fresh, _ = run(anderson(safeguard="none", recalibrate_batch_norm=3), max_epochs=accepted_at)
    for module, close in ((stale, False), (fresh, True)):
        layer: Any = module.network[1]
        found = torch.cat([layer.running_mean, layer.running_var])
        assert torch.allclose(found, expected_statistics(module), rtol=1e-5, atol=1e-6) == close
    # validation has the batch of training: with statistics that fit, also its loss
    apart = [abs(module.losses[-1] - training_loss(module)) for module in (fresh, stale)]
    assert apart[0] < 0.25 * apart[1]


def training_loss(module: Normalised) -> float:
    x, y = next(iter(batches(1)))
    return mse_loss(module.network.train()(x), y).item()


def test_training_is_bitwise_what_it_is_without() -> None:
    """The weights, that is: running statistics have no part in training."""
    parameters = sum(p.numel() for p in Normalised().parameters())
    _, with_it = run(anderson(safeguard="none", recalibrate_batch_norm=2))
    _, without = run(anderson(safeguard="none"))
    names = list(Normalised().state_dict())
    sizes = [value.numel() for value in Normalised().state_dict().values()]
    of_parameters = torch.cat(
        [
            torch.full((size,), name in dict(Normalised().named_parameters()))
            for name, size in zip(names, sizes, strict=True)
        ]
    )
    assert int(of_parameters.sum()) == parameters
    for one, other in zip(with_it, without, strict=True):
        assert torch.equal(one[of_parameters], other[of_parameters])


def test_evaluation_shows_its_own_statistics_and_training_keeps_its_own() -> None:
    module, trained = run(
        anderson(safeguard="none", apply_to="evaluation", recalibrate_batch_norm=3)
    )
    plain = Normalised()
    record = Record(lambda _, module: weights(module))
    fit(plain, batches(1), record, num_sanity_val_steps=0, max_epochs=EPOCHS)
    assert all(map(torch.equal, trained, record.values))
    differs = [not torch.equal(a, b) for a, b in zip(module.seen, trained, strict=True)]
    assert differs == [False] * 3 + [True] * 9
    # after fit the module holds the candidate with its statistics
    layer: Any = module.network[1]
    found = torch.cat([layer.running_mean, layer.running_var])
    assert torch.allclose(found, expected_statistics(module), rtol=1e-5, atol=1e-6)


def test_checkpoints_pair_weights_with_statistics_of_their_own(tmp_path: Path) -> None:
    """Also right after an acceptance, and where a resumed fit recalibrates for itself."""
    options: dict[str, Any] = {"apply_to": "evaluation", "recalibrate_batch_norm": 3}

    class Saves(lightning.pytorch.Callback):
        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")
            copied = copy.deepcopy(pl_module)
            untouched = {"state_dict": copied.state_dict()}
            copied.on_save_checkpoint(untouched)  # of a copy: not a matter of this fit
            for name, value in pl_module.state_dict().items():
                assert torch.equal(untouched["state_dict"][name], value)

    module = Normalised()
    settings: dict[str, Any] = {"num_sanity_val_steps": 0, "max_epochs": EPOCHS}
    fit(module, batches(1), anderson(safeguard="none", **options), Saves(), **settings)

    def saved(step: int) -> Tensor:
        state = torch.load(tmp_path / f"{step}.ckpt", weights_only=True)["state_dict"]
        return torch.cat([value.flatten().double() for value in state.values()])

    # accepted at 4 and 8, validated after every step; a checkpoint of step 6 is what was validated
    assert torch.equal(saved(6), module.seen[4])
    plain = Record(lambda _, module: dict(module.named_buffers())["network.1.running_mean"].clone())
    fit(Normalised(), batches(1), plain, **settings)
    at_acceptance = torch.load(tmp_path / "8.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(at_acceptance["network.1.running_mean"], plain.values[7])

    resumed = Normalised()
    callback = anderson(safeguard="none", **options)
    fit(resumed, batches(1), callback, ckpt_path=tmp_path / "6.ckpt", **settings)
    # step 7: the candidate of step 4 again, whose statistics had to be computed anew, from the one
    # batch seen since; all but the count of batches is as it was
    differs = ~torch.isclose(resumed.seen[0], module.seen[6])
    assert differs.sum() == 1
    assert (resumed.seen[0][differs].item(), module.seen[6][differs].item()) == (1, 3)


def test_it_happens_only_after_an_acceptance_and_leaves_no_trace() -> None:
    calls: list[int] = []

    class Counts(Normalised):
        def anderson_loss(self, batch: Any) -> Tensor:
            calls.append(self.global_step)
            self.log("forbidden", 1.0)
            x, y = batch
            return mse_loss(self.network(x), y)

    module, callback = Counts(), anderson(safeguard="none", recalibrate_batch_norm=2)
    trainer = fit(module, batches(1), callback, num_sanity_val_steps=0, max_epochs=EPOCHS)
    assert counters(callback)["accepted"] == 3
    assert calls == [4, 4, 8, 8, 12, 12]
    assert callback.extra_losses == 6
    assert "forbidden" not in trainer.callback_metrics
    assert module.network.training


@pytest.mark.parametrize("apply_to", ["training", "both"])
def test_where_memory_runs_out_statistics_stay_as_they_are(
    apply_to: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class NoRoom(Normalised):
        def anderson_loss(self, batch: Any) -> Tensor:
            self.network[:2](batch[0])  # the layer has seen the batch
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    ends = []
    for module, batches_kept in ((NoRoom(), 2), (NoRoom(), 0)):
        callback = anderson(
            safeguard="none", recalibrate_batch_norm=batches_kept, apply_to=apply_to
        )
        fit(module, batches(1), callback, num_sanity_val_steps=0, max_epochs=EPOCHS)
        ends.append((module.seen, weights(module)))
    (seen, trained), (expected, plain) = ends
    assert all(map(torch.equal, seen, expected))
    assert torch.equal(trained, plain)
    messages = [one.getMessage() for one in caplog.records if "ran out of memory" in one.message]
    assert len(messages) == 1
    assert messages[0].startswith("recalibrating batch normalisation")


def test_networks_without_batch_norm_keep_no_batch() -> None:
    module, callback = Regression(), anderson(safeguard="none", recalibrate_batch_norm=2)
    plain = Regression()
    fit(module, batches(4), callback, max_epochs=2)
    fit(plain, batches(4), anderson(safeguard="none"), max_epochs=2)
    assert torch.equal(weights(module), weights(plain))


@pytest.mark.parametrize("value", [-1, 1.5, True, "2"])
def test_other_than_a_count_is_refused(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="recalibrate_batch_norm must be"):
        AndersonCallback(recalibrate_batch_norm=value)


def test_manual_optimization_needs_a_loss_to_run_the_network() -> None:
    module = Normalised()
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="anderson_loss"):
        fit(module, batches(1), anderson(safeguard="none", recalibrate_batch_norm=2), max_epochs=1)
