"""stableaa-train as people launch it: several processes, one run folder, the same weights."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from lightning_stableaa.recipes.plots import read_metrics
from tests.recipes.conftest import SMALL
from tests.recipes.test_preemption import load, notice

pytestmark = [pytest.mark.ddp, pytest.mark.slow, pytest.mark.timeout(600)]

MODULE = ["-m", "tests.helpers.train_and_save"]
TRAINER = "trainer._target_=tests.helpers.train_and_save.Trainer"
BURGERS = [*SMALL["burgers2d"], TRAINER, "trainer.max_steps=12", "pictures=false", "logger=csv"]
# accelerated twice in that time
ANDERSON = [
    "callbacks.anderson.history_depth=2",
    "callbacks.anderson.store_every_n_steps=2",
    "callbacks.anderson.accelerate_every_n_steps=6",
]
SHARDED = "callbacks.anderson.history=sharded"
STEPS = list(range(12))
CHECKOUT = Path(__file__).parents[2]


def start(
    folder: Path, *arguments: str, launcher: Sequence[str] = (), **environ: str
) -> subprocess.Popen[str]:
    """Starts the command in ``folder``."""
    return subprocess.Popen(
        [sys.executable, *launcher, *MODULE, *BURGERS, *ANDERSON, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"} | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes: subprocess.Popen[str]) -> None:
    outputs = [process.communicate(timeout=540)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start_nodes_by_torchrun(
    folder: Path, *arguments: str, only_one: Sequence[str] = (), **environ: str
) -> list[subprocess.Popen[str]]:
    """Two torchruns, one process each; ``only_one`` of them gets some more arguments."""
    launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    launcher += ["--rdzv-id=pair", "--rdzv-backend=c10d"]
    launcher.append(f"--rdzv-endpoint=127.0.0.1:{free_port()}")
    command = ["cluster=torchrun", *arguments]
    return [start(folder, *command, *more, launcher=launcher, **environ) for more in (only_one, [])]


def check_results(folder: Path, world: int) -> Path:
    """All ranks have the same weights and one run folder, which is returned."""
    results = [torch.load(path) for path in sorted(folder.glob("rank*.pt"))]
    assert [one["rank"] for one in results] == list(range(world))
    assert {(one["world"], one["attempted"]) for one in results} == {(world, 2)}
    assert all(torch.equal(one["weights"], results[0]["weights"]) for one in results)
    (config,) = folder.rglob("config.yaml")
    files = {path.relative_to(config.parent).as_posix() for path in config.parent.rglob("*.*")}
    assert files >= {"metrics.csv", "checkpoints/best.ckpt", "checkpoints/last.ckpt"}
    assert read_metrics(config.parent / "metrics.csv")["train/loss"].steps.tolist() == STEPS
    return config.parent


def saved_weights(folder: Path) -> list[torch.Tensor]:
    return [torch.load(path)["weights"] for path in sorted(folder.glob("rank*.pt"))]


def test_node_killed_in_update_resumes_bitwise_equal(tmp_path: Path) -> None:
    """The same two commands, started again, end as if nothing had happened."""
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    for folder in (undisturbed, killed):
        folder.mkdir()
    # but for a notice to one of the nodes, in an update: both save a checkpoint after it
    update = notice(signal.SIGUSR1, "in an update", 6)
    finish(*start_nodes_by_torchrun(undisturbed, SHARDED, only_one=update))
    run = check_results(undisturbed, world=2)
    assert load(run / "checkpoints/preempted.ckpt")["global_step"] == 6

    # two steps after the last checkpoint
    nodes = start_nodes_by_torchrun(killed, SHARDED, "run_name=job", DIE_AT="1:12")
    outputs = [node.communicate(timeout=540)[0] for node in nodes]
    assert all(node.returncode != 0 for node in nodes), outputs
    assert sum(node.returncode == -signal.SIGKILL for node in nodes) == 1
    assert not saved_weights(killed)
    assert load(killed / "runs/burgers2d/job/checkpoints/last.ckpt")["global_step"] == 10

    finish(*start_nodes_by_torchrun(killed, SHARDED, "run_name=job"))
    assert check_results(killed, world=2).name == "job"
    assert all(map(torch.equal, saved_weights(killed), saved_weights(undisturbed)))
