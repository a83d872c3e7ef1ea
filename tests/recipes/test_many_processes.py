"""stableaa-train as people launch it: several processes, one run folder, the same weights."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from lightning_stableaa.recipes.pictures import read_metrics
from tests.recipes.conftest import SMALL
from tests.recipes.test_preemption import load, notice

pytestmark = [pytest.mark.ddp, pytest.mark.slow, pytest.mark.timeout(600)]

MODULE = ["-m", "tests.recipes.train_and_tell"]
TRAINER = "trainer._target_=tests.recipes.train_and_tell.Trainer"
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


def torchrun(*options: str) -> list[str]:
    return ["-m", "torch.distributed.run", *options]


def two_devices(folder: Path) -> None:
    finish(start(folder, "strategy=ddp_static", "trainer.devices=2"))


def torchrun_of_four(folder: Path) -> None:
    launcher = torchrun("--standalone", "--nproc-per-node=4")
    finish(start(folder, "cluster=torchrun", launcher=launcher))


def nodes_by_hand(folder: Path) -> None:
    addresses = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    options = ["trainer.devices=2", "trainer.num_nodes=2", "run_name=by_hand"]
    finish(*(start(folder, *options, NODE_RANK=rank, **addresses) for rank in "01"))


def start_nodes_by_torchrun(
    folder: Path, *arguments: str, only_one: Sequence[str] = (), **environ: str
) -> list[subprocess.Popen[str]]:
    """Two torchruns, one process each; ``only_one`` of them gets some more arguments."""
    launcher = torchrun(
        *["--nnodes=2", "--nproc-per-node=1", "--rdzv-id=pair", "--rdzv-backend=c10d"],
        f"--rdzv-endpoint=127.0.0.1:{free_port()}",
    )
    command = ["cluster=torchrun", *arguments]
    return [start(folder, *command, *more, launcher=launcher, **environ) for more in (only_one, [])]


def nodes_by_torchrun(folder: Path) -> None:
    # the run folder is named after the time, by the clock of one of them
    finish(*start_nodes_by_torchrun(folder))


def submitit(folder: Path) -> None:
    finish(start(folder, "cluster=submitit_local", "trainer.devices=2"))


EVERY = pytest.mark.skipif(
    "STABLEAA_EVERY_LAUNCHER" not in os.environ, reason="STABLEAA_EVERY_LAUNCHER is not set"
)


@pytest.mark.parametrize(
    ("launch", "world"),
    [
        pytest.param(two_devices, 2, marks=EVERY),
        pytest.param(torchrun_of_four, 4, marks=EVERY),
        (nodes_by_hand, 4),
        pytest.param(nodes_by_torchrun, 2, marks=EVERY),  # three times below
        pytest.param(submitit, 2, marks=EVERY),
    ],
)
def test_processes_share_one_run_and_its_weights(
    launch: Callable[[Path], None], world: int, tmp_path: Path
) -> None:
    launch(tmp_path)
    told = [torch.load(path) for path in sorted(tmp_path.glob("rank*.pt"))]
    assert [ranks["rank"] for ranks in told] == list(range(world))
    assert {ranks["world"] for ranks in told} == {world}
    assert all(torch.equal(ranks["weights"], told[0]["weights"]) for ranks in told)
    assert {ranks["attempted"] for ranks in told} == {2}
    (run,) = tmp_path.glob("runs/burgers2d/*")
    if launch is submitit:
        run /= "0"  # the only point of the sweep
    assert {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()} == {
        "config.yaml",
        "metrics.csv",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
    }
    assert read_metrics(run / "metrics.csv")["train/loss"].steps.tolist() == STEPS


def told_weights(folder: Path) -> list[torch.Tensor]:
    return [torch.load(path)["weights"] for path in sorted(folder.glob("rank*.pt"))]


def test_a_node_killed_in_an_update_changes_nothing_in_the_end(tmp_path: Path) -> None:
    """The same two commands, started again, end as if nothing had happened."""
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    for folder in (undisturbed, killed):
        folder.mkdir()
    # but for a notice to one of the nodes, in an update: both save a checkpoint after it
    update = notice(signal.SIGUSR1, "in an update", 6)
    finish(*start_nodes_by_torchrun(undisturbed, SHARDED, only_one=update))
    (run,) = undisturbed.glob("runs/burgers2d/*")  # named after the clock of one node
    assert load(run / "checkpoints/preempted.ckpt")["global_step"] == 6
    expected = told_weights(undisturbed)
    assert len(expected) == 2
    assert torch.equal(*expected)

    # two steps after the last checkpoint
    nodes = start_nodes_by_torchrun(killed, SHARDED, "run_name=job", DIE_AT="1:12")
    outputs = [node.communicate(timeout=540)[0] for node in nodes]
    assert all(node.returncode != 0 for node in nodes), outputs
    assert sum(node.returncode == -signal.SIGKILL for node in nodes) == 1
    assert not told_weights(killed)
    assert load(killed / "runs/burgers2d/job/checkpoints/last.ckpt")["global_step"] == 10

    finish(*start_nodes_by_torchrun(killed, SHARDED, "run_name=job"))
    assert all(map(torch.equal, told_weights(killed), expected))
    metrics = read_metrics(killed / "runs/burgers2d/job/metrics.csv")
    assert metrics["train/loss"].steps.tolist() == STEPS
