"""stableaa-train as people launch it: several processes, one run folder, the same weights."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch.distributed import run as torchrun
from torch.distributed.launcher.api import elastic_launch

from lightning_stableaa.recipes import train
from lightning_stableaa.recipes.plots import read_metrics
from tests.recipes.conftest import SMALL
from tests.recipes.test_preemption import load, notice

pytestmark = [pytest.mark.ddp, pytest.mark.slow, pytest.mark.timeout(600)]

MODULE = "tests.helpers.train_and_save"
# accelerated twice in 12 steps
OPTIONS = [
    *SMALL["burgers2d"],
    f"trainer._target_={MODULE}.Trainer",
    "trainer.max_steps=12",
    "pictures=false",
    "logger=csv",
    "cluster=torchrun",
    "callbacks.anderson.history_depth=2",
    "callbacks.anderson.store_every_n_steps=2",
    "callbacks.anderson.accelerate_every_n_steps=6",
    "callbacks.anderson.history=sharded",
]
CHECKOUT = Path(__file__).parents[2]


def pair() -> list[str]:
    """Options of torchrun on two nodes, one process each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-id=pair", "--rdzv-backend=c10d"]
    return [*launcher, f"--rdzv-endpoint=127.0.0.1:{port}", "-m", MODULE]


def run_commands(folder: Path, *more: Sequence[str]) -> None:
    """Two torchruns, with ``more`` options each."""
    path = os.pathsep.join([str(CHECKOUT), os.environ["PYTHONPATH"]])
    command = [sys.executable, "-m", "torch.distributed.run", *pair(), *OPTIONS]
    nodes = [
        subprocess.Popen(
            [*command, *options],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for options in more
    ]
    outputs = [node.communicate(timeout=540)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs


def run_forked(folder: Path, *more: str, **environ: str) -> list[int | None]:
    """The same, but that no process has to import anything; returns the exit codes."""
    context = multiprocessing.get_context("fork")
    arguments = (folder, pair(), [*OPTIONS, *more], environ)
    nodes = [context.Process(target=node, args=arguments) for _ in range(2)]
    for one in nodes:
        one.start()
    for one in nodes:
        one.join(timeout=240)
        one.kill()  # it hangs, if it still runs
    return [one.exitcode for one in nodes]


def node(folder: Path, launcher: list[str], options: list[str], environ: dict[str, str]) -> None:
    os.chdir(folder)
    os.environ.update(environ)
    warnings.simplefilter("default")
    config, *_ = torchrun.config_from_args(torchrun.parse_args(launcher))
    config.start_method = "fork"
    elastic_launch(config, worker)(*options)


def worker(*options: str) -> None:
    sys.argv = ["stableaa-train", *options]
    train.main()


def saved(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [torch.load(path) for path in sorted(folder.glob("rank*.pt"))]


def check_results(folder: Path) -> Path:
    """Both ranks have the same weights and one run folder, which is returned."""
    results = saved(folder)
    assert [(one["rank"], one["world"], one["attempted"]) for one in results] == [
        (0, 2, 2),
        (1, 2, 2),
    ]
    assert torch.equal(results[0]["weights"], results[1]["weights"])
    (config,) = folder.rglob("config.yaml")
    files = {path.relative_to(config.parent).as_posix() for path in config.parent.rglob("*.*")}
    assert files >= {"metrics.csv", "checkpoints/best.ckpt", "checkpoints/last.ckpt"}
    steps = read_metrics(config.parent / "metrics.csv")["train/loss"].steps
    assert steps.tolist() == list(range(12))
    return config.parent


def test_node_killed_in_update_resumes_bitwise_equal(tmp_path: Path) -> None:
    """The same two commands, started again, end as if nothing had happened."""
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    for folder in (undisturbed, killed):
        folder.mkdir()
    # but for a notice to one of the nodes, in an update: both save a checkpoint after it
    run_commands(undisturbed, notice(signal.SIGUSR1, "in an update", 6), [])
    run = check_results(undisturbed)
    assert load(run / "checkpoints/preempted.ckpt")["global_step"] == 6

    # two steps after the last checkpoint
    codes = run_forked(killed, "run_name=job", DIE_AT="1:12")
    assert 0 not in codes
    assert codes.count(-signal.SIGKILL) == 1
    assert not saved(killed)
    assert load(killed / "runs/burgers2d/job/checkpoints/last.ckpt")["global_step"] == 10

    assert run_forked(killed, "run_name=job") == [0, 0]
    assert check_results(killed).name == "job"
    assert torch.equal(saved(killed)[0]["weights"], saved(undisturbed)[0]["weights"])
