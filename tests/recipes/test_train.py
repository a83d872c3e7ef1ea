"""A run from configuration to run folder, and its continuation."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from lightning_stableaa.recipes.errors import UserError
from lightning_stableaa.recipes.plots import read_metrics
from lightning_stableaa.recipes.train import main, train
from tests.recipes.conftest import SMALL, Command, Compose


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize("recipe", SMALL)
def test_train_two_steps_leave_complete_folder(
    recipe: str, compose: Compose, tmp_path: Path
) -> None:
    config = compose(*SMALL[recipe], "trainer.max_steps=2", "trainer.val_check_interval=1")
    results = train(config)
    run = tmp_path / "run"
    files = {path.relative_to(run).as_posix() for path in run.rglob("*.*") if path.is_file()}
    assert files >= {"config.yaml", "metrics.csv", "pictures/loss.png"}
    assert files >= {"checkpoints/best.ckpt", "checkpoints/last.ckpt"}
    assert list((run / "tensorboard").glob("events.*"))
    resolved = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    assert OmegaConf.load(run / "config.yaml") == resolved
    assert read_metrics(run / "metrics.csv")["train/loss"].steps.tolist() == [0, 1]
    assert results["cost/gradients"] == 2
    assert results["cost/loss_evaluations"] == 0


def test_train_cost_counts_batches(compose: Compose) -> None:
    every = "callbacks.anderson.{}_every_n_steps=1"
    of_small_steps = [every.format("store"), every.format("accelerate")]
    length = ["trainer.max_steps=4", "trainer.accumulate_grad_batches=2", "pictures=false"]
    results = train(compose(*SMALL["burgers2d"], *of_small_steps, *length))
    assert results["cost/gradients"] == 8
    # of four steps the last three attempt: 3 evaluations with a self-check, twice, and 2
    assert results["cost/loss_evaluations"] == 3 + 3 + 2


@pytest.mark.ddp
def test_train_forked_processes_report_as_one(compose: Compose, tmp_path: Path) -> None:
    one, two = (
        train(compose(*SMALL["burgers2d"], *options, "trainer.max_steps=40", "pictures=false"))
        for options in (
            [f"run_folder={tmp_path / 'one'}"],
            ["strategy=ddp_fork", "trainer.devices=2", "oversubscribe=true"],
        )
    )
    assert two.keys() == one.keys() > {"best/val/relative_l2"}
    assert two["cost/gradients"] == 40
    assert two["cost/loss_evaluations"] > 0
    logged = read_metrics(tmp_path / "run/metrics.csv")["cost/gradients"]
    assert logged.values.tolist() == [*range(5, 45, 5)]


@pytest.mark.parametrize("callbacks", ["none", "paper_safeguard", "stable_aa"])
@pytest.mark.parametrize(
    ("recipe", "interval", "stop", "end"),
    [
        ("burgers2d", 5, 35, 60),  # mid-epoch, right before a new draw of points
        ("admissions_mlp", 3, 33, 63),  # mid-epoch: ten batches an epoch
        ("admissions_mlp", 1.0, 30, 60),  # at the end of an epoch
    ],
)
def test_train_resumed_is_bitwise_equal(
    callbacks: str,
    recipe: str,
    interval: int | float,
    stop: int,
    end: int,
    compose: Compose,
    tmp_path: Path,
) -> None:
    def run(name: str, steps: int, resume_from: str = "null") -> dict[str, torch.Tensor]:
        length = [f"trainer.max_steps={steps}", f"trainer.val_check_interval={interval}"]
        options = [*SMALL[recipe], f"callbacks={callbacks}", "callbacks.progress=null", *length]
        where = [f"run_folder={tmp_path / name}", f"resume_from={resume_from}"]
        train(compose(*options, *where, "pictures=false"))
        return weights(tmp_path / name)

    expected = run("whole", end)
    run("first", stop)
    first = torch.load(tmp_path / "first/checkpoints/last.ckpt", weights_only=True)
    assert first["global_step"] == stop
    resumed = run("second", end, resume_from=str(tmp_path / "first/checkpoints/last.ckpt"))
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


@pytest.mark.parametrize("stop", ["trainer.max_steps=25", "trainer.max_epochs=2"])
def test_train_without_validation_keeps_last_weights(
    stop: str, compose: Compose, tmp_path: Path
) -> None:
    options = ["+trainer.limit_val_batches=0", "callbacks.best=null", "pictures=false", stop]
    train(compose(*SMALL["admissions_mlp"], *options))
    last = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == (25 if "steps" in stop else 20)


def test_train_earlier_run_is_not_overwritten(compose: Compose, tmp_path: Path) -> None:
    options = [*SMALL["admissions_mlp"], "trainer.max_epochs=1", "pictures=false", "logger=none"]
    train(compose(*options))
    before = (tmp_path / "run/checkpoints/last.ckpt").read_bytes()
    with pytest.raises(UserError, match=r"holds checkpoints of an earlier run, .*resume_from=auto"):
        train(compose(*options))
    assert (tmp_path / "run/checkpoints/last.ckpt").read_bytes() == before
    train(compose(*options, "resume_from=auto", "trainer.max_epochs=2"))


def test_train_refused_resume_keeps_the_configuration(compose: Compose, tmp_path: Path) -> None:
    options = [*SMALL["admissions_mlp"], "pictures=false", "logger=none", "resume_from=auto"]
    train(compose(*options, "trainer.max_epochs=3"))
    config = (tmp_path / "run/config.yaml").read_text()
    with pytest.raises(UserError, match="max_epochs=1"):
        train(compose(*options, "trainer.max_epochs=1", "seed=7"))
    assert (tmp_path / "run/config.yaml").read_text() == config


def test_command_resumed_after_its_end_keeps_the_results(
    command: Command, empty_folder: Path
) -> None:
    options = [*SMALL["burgers2d"], "trainer.max_steps=5", "run_name=a"]
    options += ["pictures=false", "resume_from=auto"]
    command(main, *options)
    results = empty_folder / "runs/burgers2d/a/results.json"
    first = json.loads(results.read_text())
    assert "train/loss" in first["results"]
    command(main, *options)
    assert json.loads(results.read_text()) == first


def test_train_other_checkpoint_raises(compose: Compose, tmp_path: Path) -> None:
    made = [*SMALL["admissions_mlp"], "trainer.max_epochs=1", "pictures=false", "logger=none"]
    train(compose(*made))
    last = tmp_path / "run/checkpoints/last.ckpt"
    torch.save({"a": 1}, tmp_path / "other.ckpt")
    for options, path in (
        (SMALL["burgers2d"], last),
        ([*SMALL["admissions_mlp"], "model.widths=[7,9,1]"], last),
        ([*SMALL["admissions_mlp"], "optimizer=adam"], last),
        (SMALL["admissions_mlp"], tmp_path / "other.ckpt"),
    ):
        other = [f"run_folder={tmp_path / 'other'}", f"resume_from={path}", "logger=none"]
        with pytest.raises(UserError, match="was written by another model or optimizer"):
            train(compose(*options, *other, "trainer.max_epochs=2", "pictures=false"))
        assert not (tmp_path / "other").exists()


def test_train_user_error_keeps_used_folder(compose: Compose, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="Invalid beta"):
        train(compose(*SMALL["burgers2d"], "logger=none", "optimizer.betas=[0.9,2]"))
    assert (run / "notes.txt").read_text() == "mine"
