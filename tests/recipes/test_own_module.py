"""stableaa-train on a module of the user's own, and the evaluation of a checkpoint."""

from pathlib import Path

import pytest
from torch import Tensor
from torch.nn.functional import mse_loss

from lightning_stableaa.recipes.plots import read_metrics
from lightning_stableaa.recipes.train import main, train
from tests.helpers.own_module import Module
from tests.recipes.conftest import SMALL, Command, Compose, Refuses

OWN = "tests.helpers.own_module"
MODULE = ["recipe=own", f"module._target_={OWN}.Module", f"data._target_={OWN}.Data"]
EVALUABLE = [*MODULE, f"module._target_={__name__}.Evaluable"]
LENGTH = ["trainer.max_epochs=3", "callbacks.anderson.store_every_n_steps=5", "logger=csv"]


class Evaluable(Module):
    """Validates without an optimizer."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", mse_loss(self.network(batch[0]), batch[1]))


def test_own_module_trains_and_evaluates(compose: Compose, tmp_path: Path) -> None:
    options = [*EVALUABLE, *LENGTH, "metric=val/loss", "+module.width=4"]
    results = train(compose(*options))
    losses = read_metrics(tmp_path / "run/metrics.csv")["val/loss"].values
    assert len(losses) == 3
    assert results["best/val/loss"] == pytest.approx(min(losses), rel=1e-6)
    assert results["cost/gradients"] == 15

    best = tmp_path / "run/checkpoints/best.ckpt"
    other = tmp_path / "other"
    evaluated = train(compose(*options, f"evaluate={best}", f"run_folder={other}"))
    assert evaluated == {"val/loss": results["best/val/loss"]}
    assert not other.exists()


def test_evaluation_command_prints_metrics_and_writes_nothing(
    compose: Compose, command: Command, empty_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = [*SMALL["burgers2d"], "trainer.max_steps=5", "pictures=false", "logger=none"]
    results = train(compose(*options))
    before = sorted(empty_folder.rglob("*"))
    capfd.readouterr()
    last = empty_folder / "run/checkpoints/last.ckpt"
    printed = command(main, *options, f"evaluate={last}")
    assert printed == f"val/relative_l2 {results['val/relative_l2']:.4g}\n"
    assert sorted(empty_folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["recipe=own"], r"module._target_ is not given; name a LightningModule, .*"),
        (MODULE, r"module._target_=.*Module has no monitor; .*metric=val/loss; other recipes .*"),
        ([*MODULE, "metric=val/acc", *LENGTH], r".*monitor='val/acc'.*"),
        (
            [*EVALUABLE, "metric=val/losss", *LENGTH],
            r"metric=val/losss: validation logs no such metric; did you mean val/loss\?",
        ),
        pytest.param(
            ["recipe=own", f"module._target_={OWN}.Module", "metric=val/loss", *LENGTH],
            r".*train_dataloader` must be implemented .*, or data._target_ given",
            marks=pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
        ),
        (
            [
                *("recipe=own", f"module._target_={OWN}.Module", "metric=val/loss"),
                *("+data.batch_size=3", *LENGTH),
            ],
            r"data.batch_size: data._target_ is not given; name a LightningDataModule",
        ),
        ([*MODULE, "metric=val/loss", "mode=least"], r".*mode.*least.*"),
        ([*MODULE, "metric=val/loss", "+module.wdth=4"], r"module.wdth: .* did you mean width\?"),
        (
            [*MODULE, "metric=val/loss", "evaluate=no.ckpt"],
            r"evaluate=no.ckpt: there is no such .*",
        ),
        (
            [*MODULE, "metric=val/loss", f"module._target_={OWN}.NeedsWidth"],
            r"module: .*missing 1 required positional argument: 'width'.*",
        ),
        (
            [*MODULE, "metric=val/loss", f"module._target_={OWN}.Data"],
            r"module._target_: expected LightningModule .*",
        ),
        (
            [
                *MODULE,
                "metric=val/loss",
                "module._target_=pytorch_lightning.demos.boring_classes.BoringModel",
            ],
            r"module._target_=.*: is a module of pytorch_lightning; .*",
        ),
    ],
)
def test_own_module_mistake_is_one_sentence(
    options: list[str], sentence: str, refuses: Refuses
) -> None:
    refuses(main, options, sentence)
