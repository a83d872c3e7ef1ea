"""A run from configuration to run folder, and its continuation."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from lightning_stableaa.recipes.errors import UserError
from lightning_stableaa.recipes.pictures import read_metrics
from lightning_stableaa.recipes.train import train
from tests.recipes.conftest import SMALL, Compose


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize("recipe", SMALL)
def test_two_steps_leave_a_complete_run_folder(
    recipe: str, compose: Compose, tmp_path: Path
) -> None:
    config = compose(*SMALL[recipe], "trainer.max_steps=2", "trainer.val_check_interval=1")
    results = train(config)
    run = tmp_path / "run"
    assert {path.relative_to(run).as_posix() for path in run.rglob("*.*") if path.is_file()} >= {
        "config.yaml",
        "metrics.csv",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "pictures/loss.png",
    }
    assert list((run / "tensorboard").glob("events.*"))
    assert OmegaConf.load(run / "config.yaml") == OmegaConf.create(
        OmegaConf.to_container(config, resolve=True)
    )
    assert read_metrics(run / "metrics.csv")["train/loss"].steps.tolist() == [0, 1]
    assert results["cost/gradients"] == 2
    assert results["cost/losses"] == 0


def test_cost_is_counted_in_batches(compose: Compose) -> None:
    of_small_steps = [
        "callbacks.anderson.store_every_n_steps=1",
        "callbacks.anderson.accelerate_every_n_steps=1",
    ]
    length = ["trainer.max_steps=4", "trainer.accumulate_grad_batches=2", "pictures=false"]
    results = train(compose(*SMALL["burgers2d"], *of_small_steps, *length))
    assert results["cost/gradients"] == 8
    assert results["cost/losses"] == 2 * 3


def test_seed_decides_the_run(compose: Compose, tmp_path: Path) -> None:
    def run(name: str, seed: int) -> torch.Tensor:
        folder = tmp_path / name
        options = [f"run_folder={folder}", f"seed={seed}", "trainer.max_steps=5", "pictures=false"]
        train(compose(*SMALL["burgers2d"], *options))
        return weights(folder)["network.0.weight"]

    first = run("first", seed=1)
    assert torch.equal(first, run("again", seed=1))
    assert not torch.equal(first, run("other", seed=2))


@pytest.mark.parametrize("callbacks", ["none", "stable_aa_smoothing"])
@pytest.mark.parametrize(
    ("recipe", "interval", "stop", "end"),
    [
        ("burgers2d", 5, 35, 60),  # mid-epoch, right before a new draw of points
        ("admissions_mlp", 3, 33, 63),  # mid-epoch: ten batches an epoch
        ("admissions_mlp", 10, 30, 60),  # at the end of an epoch
        ("admissions_mlp", 1.0, 30, 60),  # the same, validated by the epoch
        ("admissions_mlp", 1.0, 33, 60),  # three steps after it was validated
        ("burgers2d", 5, 33, 60),
    ],
)
def test_resumed_run_ends_with_the_same_weights(
    callbacks: str,
    recipe: str,
    interval: int | float,
    stop: int,
    end: int,
    compose: Compose,
    tmp_path: Path,
) -> None:
    def run(name: str, steps: int, resume_from: str = "null") -> dict[str, torch.Tensor]:
        train(
            compose(
                *SMALL[recipe],
                f"callbacks={callbacks}",
                "callbacks.progress=null",
                f"run_folder={tmp_path / name}",
                f"trainer.max_steps={steps}",
                f"trainer.val_check_interval={interval}",
                f"resume_from={resume_from}",
                "pictures=false",
            )
        )
        return weights(tmp_path / name)

    expected = run("whole", end)
    run("first", stop)
    first = torch.load(tmp_path / "first/checkpoints/last.ckpt", weights_only=True)
    assert first["global_step"] == stop
    resumed = run("second", end, resume_from=str(tmp_path / "first/checkpoints/last.ckpt"))
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


@pytest.mark.parametrize("stop", ["trainer.max_steps=25", "trainer.max_epochs=2"])
def test_without_validation_the_last_weights_are_kept(
    stop: str, compose: Compose, tmp_path: Path
) -> None:
    options = ["+trainer.limit_val_batches=0", "callbacks.best=null", "pictures=false", stop]
    train(compose(*SMALL["admissions_mlp"], *options))
    last = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == (25 if "steps" in stop else 20)


def test_an_earlier_run_is_not_overwritten(compose: Compose, tmp_path: Path) -> None:
    options = [*SMALL["admissions_mlp"], "trainer.max_epochs=1", "pictures=false", "logger=none"]
    train(compose(*options))
    before = (tmp_path / "run/checkpoints/last.ckpt").read_bytes()
    with pytest.raises(UserError, match=r"holds checkpoints of an earlier run, .*resume_from=auto"):
        train(compose(*options))
    assert (tmp_path / "run/checkpoints/last.ckpt").read_bytes() == before
    train(compose(*options, "resume_from=auto", "trainer.max_epochs=2"))


def test_a_checkpoint_of_another_run_is_refused(compose: Compose, tmp_path: Path) -> None:
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


def test_wrong_configuration_leaves_a_used_folder_alone(compose: Compose, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="Invalid learning rate"):
        train(compose(*SMALL["burgers2d"], "logger=none", "optimizer.lr=-1"))
    assert (run / "notes.txt").read_text() == "mine"


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.timeout(600)  # the processes import everything anew, in turn on a busy machine
def test_two_processes_share_one_run_folder(tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = ["strategy=ddp", "trainer=multinode", "trainer.accelerator=cpu"]
    subprocess.run(
        [
            *[sys.executable, *launcher, "-m", "lightning_stableaa.recipes.train"],
            *[*SMALL["burgers2d"], "trainer.max_steps=5", *options],
        ],
        cwd=tmp_path,
        check=True,
        timeout=540,
    )
    (run,) = (tmp_path / "runs/burgers2d").iterdir()
    assert (run / "checkpoints/last.ckpt").is_file()
    assert read_metrics(run / "metrics.csv")["train/loss"].steps.tolist() == [0, 1, 2, 3, 4]
