"""Notice to end: the checkpoint is that of a whole step, wherever in a step the notice comes."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from lightning_stableaa.recipes.errors import UserError
from lightning_stableaa.recipes.plots import read_metrics
from lightning_stableaa.recipes.resuming import checkpoint_to_resume
from lightning_stableaa.recipes.train import train
from tests.helpers.train_and_save import call_in_update
from tests.recipes.conftest import SMALL, Compose, composed

END = 24
RUN = [
    *SMALL["burgers2d"],
    f"trainer.max_steps={END}",
    "trainer.val_check_interval=4",
    "callbacks.anderson.store_every_n_steps=2",
    "callbacks.anderson.accelerate_every_n_steps=6",
    "callbacks.progress=null",
    "logger=csv",
    "pictures=false",
]
SLURM = dict.fromkeys(("NTASKS", "NTASKS_PER_NODE", "NNODES"), "1")
SLURM |= dict.fromkeys(("PROCID", "LOCALID", "NODEID"), "0")
SLURM |= {"JOB_ID": "4242", "JOB_NAME": "stableaa"}


class NoticeInside(lightning.Callback):
    """Sends the process a signal at one place in a step; in an update, at the candidate."""

    def __init__(self, number: int, place: str, step: int) -> None:
        self.number, self.place, self.step = number, place, step

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.trainer = trainer
        trainer.optimizers[0].register_step_pre_hook(lambda *_: self.at("before the step"))
        trainer.optimizers[0].register_step_post_hook(lambda *_: self.at("after the step", 1))
        call_in_update(pl_module, lambda: trainer.global_step, lambda _: self.at("in an update", 1))

    def on_after_backward(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.at("after backward")

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.at("in validation")

    def at(self, place: str, counted: int = 0) -> None:
        # Lightning counts a step after the hooks of the optimizer
        if (place, self.trainer.global_step + counted) == (self.place, self.step):
            os.kill(os.getpid(), self.number)


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A SLURM job of one process; the file to which its ``scontrol`` writes."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # Lightning writes them
        monkeypatch.delenv(name)
    for name, value in SLURM.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    calls, folder = tmp_path / "scontrol.txt", tmp_path / "bin"
    folder.mkdir()
    (folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    (folder / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return calls


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """A run that a signal ends leaves Lightning's handlers behind."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def notice(number: int, place: str, step: int) -> list[str]:
    target = f"{NoticeInside.__module__}.NoticeInside"
    return [
        f"+callbacks.notice={{_target_: {target}, number: {int(number)}, place: {place}, "
        f"step: {step}}}"
    ]


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def equal_states(a: Any, b: Any) -> bool:
    """Whether two states are equal, tensors bitwise."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal_states(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal_states, a, b))
    return a == b


def training(path: Path) -> list[Any]:
    """What a checkpoint holds of the training itself."""
    saved = load(path)
    anderson = next(state for key, state in saved["callbacks"].items() if "Anderson" in key)
    return [saved["global_step"], saved["state_dict"], saved["optimizer_states"], anderson]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    run = tmp_path_factory.mktemp("undisturbed")
    train(composed(run, *RUN))
    return training(run / "checkpoints/last.ckpt")


@pytest.mark.parametrize(
    ("place", "step", "saved"),
    [
        ("after backward", 13, 14),
        ("before the step", 13, 14),
        ("after the step", 14, 14),
        ("in an update", 18, 18),
        ("in validation", 16, 17),
    ],
)
def test_slurm_notice_saves_whole_step(
    place: str,
    step: int,
    saved: int,
    undisturbed: list[Any],
    slurm: Path,
    compose: Compose,
    tmp_path: Path,
) -> None:
    train(compose(*RUN, "cluster=slurm_sbatch", *notice(signal.SIGUSR1, place, step)))
    assert slurm.read_text() == "requeue 4242\n"
    checkpoint = tmp_path / "run/hpc_ckpt_1.ckpt"
    assert load(checkpoint)["global_step"] == saved
    # SLURM would have ended the job now; the notice changes nothing where it does not
    assert equal_states(training(tmp_path / "run/checkpoints/last.ckpt"), undisturbed)

    train(compose(*RUN, f"run_folder={tmp_path / 'resumed'}", f"resume_from={checkpoint}"))
    assert equal_states(training(tmp_path / "resumed/checkpoints/last.ckpt"), undisturbed)


def test_sigterm_same_command_resumes(
    undisturbed: list[Any], compose: Compose, tmp_path: Path
) -> None:
    """As Kubernetes and torchrun do it."""
    run = tmp_path / "run"
    options = [*RUN, "resume_from=auto", "cluster=local", *preemption(run)]
    with pytest.raises(SystemExit):
        train(compose(*options, *notice(signal.SIGTERM, "in an update", 18)))
    assert load(run / "checkpoints/preempted.ckpt")["global_step"] == 18
    train(compose(*options))
    assert equal_states(training(run / "checkpoints/last.ckpt"), undisturbed)
    assert read_metrics(run / "metrics.csv")["train/loss"].steps.tolist() == [*range(END)]


def test_submitit_handler_runs_after_step(compose: Compose, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run/checkpoints/preempted.ckpt"
    seen: list[int] = []
    signal.signal(signal.SIGUSR2, lambda *_: seen.append(load(checkpoint)["global_step"]))
    train(compose(*RUN, *preemption(tmp_path / "run"), *notice(signal.SIGUSR2, "in an update", 12)))
    assert seen == [12]


def preemption(run: Path) -> list[str]:
    target = "lightning_stableaa.recipes.preemption.Preemption"
    path = run / "checkpoints/preempted.ckpt"
    return [f"+callbacks.preemption={{_target_: {target}, path: {path}}}"]


def test_resume_auto_takes_newest_complete_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert checkpoint_to_resume("auto", tmp_path) is None
    assert checkpoint_to_resume(None, tmp_path) is None
    folder.mkdir()

    def write(path: Path, time: int, *, complete: bool = True) -> Path:
        torch.save({"global_step": time}, path)
        if not complete:
            path.write_bytes(path.read_bytes()[:-30])  # the disk was full, or the node gone
        os.utime(path, (time, time))
        return path

    best = write(folder / "best.ckpt", 1)
    assert checkpoint_to_resume("auto", tmp_path) == best
    last = write(folder / "last.ckpt", 2)
    write(folder / "preempted.ckpt", 3, complete=False)
    assert checkpoint_to_resume("auto", tmp_path) == last
    on_slurm = write(tmp_path / "hpc_ckpt_1.ckpt", 4)
    assert checkpoint_to_resume("auto", tmp_path) == on_slurm
    sharded = tmp_path / "checkpoints/sharded.ckpt"
    sharded.mkdir()  # newer, but without the file that is written last
    assert checkpoint_to_resume("auto", tmp_path) == on_slurm
    (sharded / "meta.pt").touch()
    assert checkpoint_to_resume("auto", tmp_path) == sharded
    assert checkpoint_to_resume(str(best), tmp_path) == best
    with pytest.raises(UserError, match=r"resume_from=.*nothing.ckpt: there is no such checkpoint"):
        checkpoint_to_resume(str(folder / "nothing.ckpt"), tmp_path)
