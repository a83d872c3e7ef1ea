"""The commands answer at once, and say what is missing."""

import subprocess
import sys
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from lightning_stableaa.recipes import train
from tests.recipes.conftest import Command

ANSWERED = [
    "--help",
    "recipe=burger2d",
    "recipe=burgers2d trainer.max_stps=3",
    "recipe=burgers2d +trainer.stps=3",
    "recipe=burgers2d +callbacks.best.mde=min",
    "recipe=burgers2d trainer.precision=half",
    "recipe=burgers2d trainer.max_epochs=0",
    "recipe=burgers2d optimizer.lr=nan",
    "recipe=burgers2d optimizer.lr=-1",
    "recipe=burgers2d +optimizer.momentum=0.9",
    "recipe=burgers2d data.grid=[6]",
    "recipe=burgers2d model.activation=cos",
    "recipe=burgers2d module._target_=lightning.LightningModule",
    "recipe=burgers2d optimizer._target_=torch.optim.Adamm",
    "recipe=burgers2d callbacks.anderson.relaxation=2",
    "recipe=burgers2d callbacks=paper callbacks.smoothing.average_window=1",
    "recipe=burgers2d cluster=slurm_sbatch",
    "recipe=burgers2d resume_from=last.ckpt",
    "recipe=burgers2d resume_from=auto evaluate=last.ckpt",
    "recipe=burgers2d run_name=a run_folder=b",
    "recipe=burgers2d seed=-1",
    "recipe=admissions_mlp data.csv=table.csv",
    "recipe=admissions_mlp data.batch_size=0",
    "recipe=resnet50_cifar10 data.folder=images",
]
ANSWERED_BY_COMPARE = [
    "--help",
    "recipe=nothing",
    "recipe=burgers2d compare.seeds=0",
    "recipe=burgers2d evaluate=best.ckpt",
    "recipe=burgers2d --seeds 3",
    "recipe=own",
    "recipe=burgers2d compare.variants=[nothing]",
    "recipe=burgers2d compare.mode=best compare.variants=[ema]",
    "recipe=burgers2d trainer.max_steps=many compare.variants=[ema]",
    "recipe=burgers2d seed=3",
    "recipe=admissions_mlp data.csv=table.csv compare.variants=[ema]",
]
# refused by constructors of torch, or by networks
ANSWERED_WITH_TORCH = [
    "recipe=burgers2d optimizer.betas=[0.9,2]",
    "recipe=burgers2d model.widths=[2,5.5,1]",
    *([] if torch.cuda.is_available() else ["recipe=burgers2d trainer=gpu"]),
]
ANSWER = """
import sys
from lightning_stableaa.recipes import commands

for line in {lines}:
    sys.argv = ["stableaa-{command}", *line.split()]
    try:
        commands.{command}()
    except SystemExit as error:
        assert error.code == (0 if line == "--help" else 2), line
    heavy = [name for name in {unwanted} if name in sys.modules]
    assert not heavy, (line, heavy)
"""
WITHOUT_HYDRA = """
import sys
sys.modules["hydra"] = None
from lightning_stableaa.recipes import commands
commands.{command}()
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("command", "lines"), [("train", ANSWERED), ("compare", ANSWERED_BY_COMPARE)]
)
def test_command_help_and_refusals_import_no_torch(
    tmp_path: Path, command: str, lines: list[str]
) -> None:
    unwanted = ["torch", "lightning", "matplotlib", "pandas"]
    program = ANSWER.format(lines=lines, unwanted=unwanted, command=command)
    done = run(tmp_path, "-c", program)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == len(lines) - 1
    assert "== Options of recipe=admissions_mlp ==" in done.stdout
    assert not list(tmp_path.iterdir())


def test_command_refusals_of_torch_import_no_lightning(tmp_path: Path) -> None:
    program = ANSWER.format(lines=ANSWERED_WITH_TORCH, unwanted=["lightning"], command="train")
    done = run(tmp_path, "-c", program)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == len(ANSWERED_WITH_TORCH)


@pytest.mark.parametrize("command", ["train", "compare"])
def test_command_without_hydra_names_extra(command: str, tmp_path: Path) -> None:
    done = run(tmp_path, "-c", WITHOUT_HYDRA.format(command=command))
    assert done.returncode == 2
    assert done.stderr == (
        f"stableaa-{command}: the package hydra is not installed; "
        "pip install 'lightning-stableaa[recipes]' brings it\n"
    )


@pytest.mark.parametrize(
    ("line", "completions"),
    [
        ("recipe=burgers100d_", "recipe=burgers100d_product"),
        ("recipe=burgers2d optimizer.l", "optimizer.lr="),
        ("strategy=ddp_", "strategy=ddp_fork strategy=ddp_static"),
    ],
)
def test_command_completes_groups_and_options(
    line: str,
    completions: str,
    command: Command,
    empty_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    typed = f"stableaa-train {line}"
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    monkeypatch.setenv("COMP_LINE", typed)
    monkeypatch.setenv("COMP_POINT", str(len(typed)))
    assert command(train.main, "-sc", "query=bash").split() == completions.split()
    assert not list(empty_folder.iterdir())


def test_command_version_is_of_the_package(tmp_path: Path) -> None:
    program = "from lightning_stableaa.recipes.commands import train; train()"
    done = run(tmp_path, "-c", program, "--version")
    expected = ", ".join(f"{one} {version(one)}" for one in ("lightning", "torch"))
    assert done.stdout == f"lightning-stableaa {version('lightning-stableaa')}, {expected}\n"


def test_command_help_describes_every_group() -> None:
    conf = files("lightning_stableaa.conf")
    groups = {one.name for one in conf.iterdir() if one.is_dir() and one.name[0] != "_"} - {"hydra"}
    header = (conf / "hydra/run_folder.yaml").read_text().partition("header: |")[2]
    described = header.partition("footer")[0].split("\n\n")[1]
    assert {line.split()[0] for line in described.splitlines()[:-1]} == groups
