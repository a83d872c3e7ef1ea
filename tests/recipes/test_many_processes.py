"""stableaa-train as people launch it: several processes, one run folder, the same weights."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from lightning_stableaa.recipes.pictures import read_metrics
from tests.recipes.conftest import SMALL

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
STEPS = list(range(12))
CHECKOUT = Path(__file__).parents[2]


def start(
    folder: Path, *arguments: str, launcher: Sequence[str] = (), **environ: str
) -> subprocess.Popen[str]:
    """Starts the command in ``folder``, in a session of its own."""
    return subprocess.Popen(
        [sys.executable, *launcher, *MODULE, *BURGERS, *ANDERSON, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"} | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # SIGKILL to a whole "machine"
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


def nodes_by_torchrun(folder: Path) -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    launcher = torchrun(
        *["--nnodes=2", "--nproc-per-node=1", "--rdzv-id=pair"],
        *["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}"],
    )
    # named after the time, by the clock of one of them
    finish(*(start(folder, "cluster=torchrun", launcher=launcher) for _ in range(2)))


def submitit(folder: Path) -> None:
    finish(start(folder, "cluster=submitit_local", "trainer.devices=2"))


@pytest.mark.parametrize(
    ("launch", "world"),
    [
        (two_devices, 2),
        (torchrun_of_four, 4),
        (nodes_by_hand, 4),
        (nodes_by_torchrun, 2),
        (submitit, 2),
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
