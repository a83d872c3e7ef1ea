"""Which weights are where: in checkpoints, in validation, and after the fit."""

from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.nn.functional import mse_loss

from tests.callbacks.regression import Record, Regression, anderson, batches, fit, weights

# epochs are single steps: candidates come at 4, 8 and 12, validation after every step
EPOCHS = 13
APPLY_TO = ("training", "evaluation", "both")


class Everywhere(Regression):
    """Notes the weights with which each of Lightning's loops runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[Tensor]] = {"val": [], "test": [], "predict": []}

    def note(self, stage: str, batch: Any) -> None:
        self.seen[stage].append(weights(self))
        if stage != "predict":
            self.log(f"{stage}/loss", mse_loss(self.network(batch[0]), batch[1]))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.note("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.note("test", batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.note("predict", batch)
        return self.network(batch[0])

    def val_dataloader(self) -> Any:
        return batches(1)

    test_dataloader = predict_dataloader = val_dataloader


def flat(path: Path | str, key: str = "state_dict") -> Tensor:
    state = torch.load(path, weights_only=True)
    return torch.cat([one.flatten().double() for one in state[key].values()])


@pytest.mark.parametrize("apply_to", APPLY_TO)
def test_every_cell_of_the_table(apply_to: Any, tmp_path: Path) -> None:
    """The rows of "Which weights are where" in docs/checkpoints.md."""
    best = ModelCheckpoint(tmp_path, "{step}", monitor="val/loss", save_last=True, save_top_k=-1)
    light = ModelCheckpoint(tmp_path, "light-{step}", save_weights_only=True, save_top_k=-1)
    module = Everywhere()
    callback = anderson(safeguard="none", apply_to=apply_to)
    trained = Record(lambda _, module: weights(module))
    trainer = fit(
        module,
        batches(1),
        callback,
        trained,
        best,
        light,
        num_sanity_val_steps=0,
        enable_checkpointing=True,
        max_epochs=EPOCHS,
    )
    validated = module.seen["val"]
    differs = [not torch.equal(a, b) for a, b in zip(validated, trained.values, strict=True)]
    # what is accepted goes into training, beside it, or (both) stays while training goes on
    assert any(differs) == (apply_to != "training")
    # weights that were validated are the weights that are saved, whatever is left out beside them
    for path in (best.best_model_path, best.last_model_path):
        step = int(torch.load(path, weights_only=True)["global_step"])
        assert torch.equal(flat(path), validated[step - 1])
    for step in range(1, EPOCHS + 1):
        assert torch.equal(flat(tmp_path / f"light-step={step}.ckpt"), validated[step - 1])
    reloaded = Everywhere.load_from_checkpoint(best.best_model_path)
    assert torch.equal(weights(reloaded), flat(best.best_model_path))
    # after the fit
    kept = validated[-1] if apply_to == "evaluation" else trained.values[-1]
    assert torch.equal(weights(module), kept)
    for loop in (trainer.validate, trainer.test, trainer.predict):
        loop(module, verbose=False) if loop != trainer.predict else loop(module)
    for stage in ("val", "test", "predict"):
        assert torch.equal(module.seen[stage][-1], kept)
    # what is evaluated from a file is what the file shows, where training was elsewhere as well
    before = callback.state_dict()["counters"]
    for step in {EPOCHS, 1 + differs.index(max(differs))}:
        path = tmp_path / f"step={step}.ckpt"
        trainer.test(module, ckpt_path=path, verbose=False)
        assert torch.equal(module.seen["test"][-1], validated[step - 1])
    assert callback.state_dict()["counters"] == before


@pytest.mark.parametrize("apply_to", ["evaluation", "both"])
@pytest.mark.parametrize("stop", [6, 8])
def test_a_resumed_fit_goes_on_with_the_weights_of_training(
    apply_to: Any, stop: int, tmp_path: Path
) -> None:
    ends = []
    for ckpt_path in (None, tmp_path / f"step={stop}.ckpt"):
        module, callback = Everywhere(), anderson(apply_to=apply_to)
        folder = tmp_path / ("resumed" if ckpt_path else ".")
        trainer = fit(
            module,
            batches(1),
            callback,
            ModelCheckpoint(folder, "{step}", save_top_k=-1),
            num_sanity_val_steps=0,
            enable_checkpointing=True,
            max_epochs=EPOCHS,
            ckpt_path=ckpt_path,
        )
        ends.append((module, callback.state_dict(), trainer))
    (whole, whole_state, _), (resumed, state, _) = ends
    assert whole_state["counters"]["accepted"] >= 1
    assert torch.equal(weights(whole), weights(resumed))
    validated = whole.seen["val"][stop:]
    assert all(map(torch.equal, validated, resumed.seen["val"]))
    assert state["counters"] == whole_state["counters"]


class SavesInValidation(lightning.pytorch.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step == 5:
            trainer.save_checkpoint(self.path)


def test_a_checkpoint_saved_in_the_middle_of_validation_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "middle.ckpt"
    whole, resumed = Everywhere(), Everywhere()
    options: dict[str, Any] = {"num_sanity_val_steps": 0, "max_epochs": EPOCHS}
    saves = SavesInValidation(path)
    fit(whole, batches(1), anderson(safeguard="none", apply_to="both"), saves, **options)
    assert torch.equal(flat(path), whole.seen["val"][4])
    state = torch.load(path, weights_only=True)["callbacks"]["AndersonCallback"]
    trained = torch.cat([one.flatten().double() for one in state["training"].values()])
    assert not torch.equal(trained, flat(path))

    fit(
        resumed,
        batches(1),
        anderson(safeguard="none", apply_to="both"),
        ckpt_path=path,
        **options,
    )
    assert torch.equal(weights(resumed), weights(whole))


def test_a_checkpoint_saved_after_the_fit_holds_both(tmp_path: Path) -> None:
    module, callback = Everywhere(), anderson(safeguard="none", apply_to="evaluation")
    trained = Record(lambda _, module: weights(module))
    trainer = fit(module, batches(1), callback, trained, num_sanity_val_steps=0, max_epochs=EPOCHS)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert torch.equal(flat(tmp_path / "after.ckpt"), module.seen["val"][-1])

    other = Everywhere()
    first = Record(lambda _, module: weights(module))
    fit(
        other,
        batches(1),
        anderson(safeguard="none", apply_to="evaluation"),
        first,
        num_sanity_val_steps=0,
        max_epochs=EPOCHS + 1,
        ckpt_path=tmp_path / "after.ckpt",
    )
    whole = Record(lambda _, module: weights(module))
    fit(
        Everywhere(), batches(1), whole, num_sanity_val_steps=0, max_epochs=EPOCHS + 1
    )  # training is untouched by candidates for evaluation
    assert torch.equal(first.values[-1], whole.values[-1])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_validation_leaves_the_weights_of_training(error: Any) -> None:
    class Breaks(Everywhere):
        def note(self, stage: str, batch: Any) -> None:
            super().note(stage, batch)
            if len(self.seen["val"]) == 6:
                raise error("in validation")

    module, plain = Breaks(), Record(lambda _, module: weights(module))
    with pytest.raises((error, SystemExit)):
        fit(
            module,
            batches(1),
            anderson(safeguard="none", apply_to="evaluation"),
            num_sanity_val_steps=0,
            max_epochs=EPOCHS,
        )
    fit(Everywhere(), batches(1), plain, num_sanity_val_steps=0, max_epochs=EPOCHS)
    assert not torch.equal(module.seen["val"][5], plain.values[5])
    assert torch.equal(weights(module), plain.values[5])


@pytest.mark.parametrize("apply_to", ["evaluation", "both"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_outside_of_training_leaves_what_was_there(error: Any, apply_to: Any) -> None:
    """In validate, test and predict, and in the sanity check of a second fit."""

    class Breaks(Everywhere):
        broken: str | None = None

        def note(self, stage: str, batch: Any) -> None:
            super().note(stage, batch)
            if stage == self.broken:
                raise error(f"in {stage}")

    module, callback = Breaks(), anderson(safeguard="none", apply_to=apply_to)
    trainer = fit(module, batches(1), callback, max_epochs=6)
    there = weights(module)
    for stage, again in (
        ("val", lambda: trainer.validate(module, verbose=False)),
        ("test", lambda: trainer.test(module, verbose=False)),
        ("predict", lambda: trainer.predict(module)),
        ("val", lambda: fit(module, batches(1), callback, num_sanity_val_steps=1, max_epochs=1)),
    ):
        module.broken = stage
        with pytest.raises((error, SystemExit)):
            again()
        assert torch.equal(module.seen[stage][-1], there)
        assert torch.equal(weights(module), there)
