"""Combinations of configuration and launcher: what works passes, the rest ends in a sentence."""

import os
import re
import socket
import subprocess
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lsf import LSFEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

import lightning_stableaa.recipes.train  # noqa: F401  # registers the resolvers
from lightning_stableaa.recipes import launch
from lightning_stableaa.recipes.errors import UserError
from lightning_stableaa.recipes.launch import check_launch, check_sweep
from tests.recipes.conftest import Compose


def variables(text: str) -> dict[str, str]:
    return dict(one.split("=") for one in text.split())


# What each launcher sets for the last of its processes: 2 nodes of 4.
TORCHRUN = variables(
    "TORCHELASTIC_RUN_ID=first WORLD_SIZE=8 LOCAL_WORLD_SIZE=4 GROUP_WORLD_SIZE=2 RANK=7 "
    "LOCAL_RANK=3 GROUP_RANK=1 MASTER_ADDR=node0 MASTER_PORT=29500"
)
SLURM = variables(
    "SLURM_JOB_ID=4242 SLURM_JOB_NAME=stableaa SLURM_STEP_ID=0 SLURM_NTASKS=8 "
    "SLURM_NTASKS_PER_NODE=4 SLURM_NNODES=2 SLURM_NODELIST=gpu[07-08] SLURM_PROCID=7 "
    "SLURM_LOCALID=3 SLURM_NODEID=1"
)
JSRUN = variables(
    "LSB_JOBID=123456 LSB_DJOB_RANKFILE=hosts JSM_NAMESPACE_SIZE=12 JSM_NAMESPACE_RANK=11 "
    "JSM_NAMESPACE_LOCAL_RANK=5"
)
BY_HAND = variables("MASTER_ADDR=node0 MASTER_PORT=29500 NODE_RANK=1")
VARIABLES = TORCHRUN.keys() | SLURM.keys() | JSRUN.keys() | BY_HAND.keys()


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that what Lightning writes there is undone, too
        monkeypatch.delenv(name)
    return monkeypatch


def settings(
    cluster: str = "local",
    devices: Any = 1,
    nodes: int = 1,
    run_name: str | None = None,
    strategy: str = "auto",
) -> dict[str, Any]:
    trainer = {"devices": devices, "num_nodes": nodes, "strategy": strategy}
    own = {"cluster": cluster, "run_name": run_name, "oversubscribe": False}
    return own | {"trainer": trainer}


@pytest.mark.parametrize(("accelerator", "asked"), [("cpu", True), ("auto", True), ("gpu", False)])
def test_more_processes_than_cores_need_a_yes(
    accelerator: str, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(launch, "_cores", lambda: 2)
    one = settings(devices=3)
    one["trainer"]["accelerator"] = accelerator
    sentence = "^trainer.devices=3: .* a CPU of 2 cores .* use trainer.devices=2 or less, or add"
    expected = pytest.raises(UserError, match=sentence) if asked else nullcontext()
    with expected:
        check_launch(one, {})
    check_launch(one | {"oversubscribe": True}, {})
    one["trainer"]["devices"] = 2
    check_launch(one, {})


def without(variables: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in names}


SBATCH = settings("slurm_sbatch", devices=4, nodes=2)


@pytest.mark.parametrize(
    ("config", "environ"),
    [
        (settings(), {}),
        (settings(devices=4), {}),
        (settings(devices=4, nodes=2, run_name="first"), BY_HAND),
        (settings("torchrun", devices=4, nodes=2), TORCHRUN),
        (settings(devices=[0, 1, 2, 3], nodes=2), TORCHRUN),  # trainer=multinode
        (settings("torchrun", devices=4, nodes=2), SLURM | TORCHRUN),  # torchrun within SLURM
        (SBATCH, SLURM),
        (settings(devices=4), SLURM | {"SLURM_JOB_NAME": "interactive"}),
        (settings("lsf_summit", devices=6, nodes=2), JSRUN),
    ],
)
def test_launch_valid_combination_passes(config: dict[str, Any], environ: dict[str, str]) -> None:
    check_launch(config, environ)


@pytest.mark.parametrize(
    ("config", "environ", "sentence"),
    [
        (settings("torchrun"), {}, ".* not started by torchrun; use torchrun .*"),
        (settings("slurm_sbatch"), {}, "cluster=slurm_sbatch: .* by slurm; use srun python .*"),
        (settings("slurm"), {}, "cluster=slurm: .* use stableaa-train -m .*"),
        # in the script, but not under jsrun
        (settings("lsf_summit"), without(JSRUN, "JSM_NAMESPACE_SIZE"), ".* by lsf; use jsrun .*"),
        (
            settings(),
            TORCHRUN,
            "trainer.devices=1 and trainer.num_nodes=1, but torchrun started 8 processes "
            r"\(WORLD_SIZE\), 4 on a node: add cluster=torchrun, or trainer.devices=4 "
            "trainer.num_nodes=2",
        ),
        (settings(devices=2, nodes=2), SLURM, r".* 8 processes \(SLURM_NTASKS\), 4 on a node: .*"),
        (SBATCH, without(SLURM, "SLURM_STEP_ID"), "SLURM has 8 tasks for this job, .*"),
        (SBATCH, without(SLURM, "SLURM_NTASKS_PER_NODE"), "SLURM was asked for --ntasks=8, .*"),
        (settings("lsf_summit", devices=4, nodes=2), JSRUN, r".* lsf started 12 .*, 6 on a node.*"),
        (
            settings(devices=4, nodes=2),
            {"MASTER_PORT": "1"},
            ".* without MASTER_ADDR, .*",
        ),
        (settings(devices=4, nodes=2), BY_HAND, ".* add run_name=NAME, the same on each"),
        (settings(devices=2), {"LOCAL_RANK": "0", "WORLD_SIZE": "4"}, ".* by hand started 4 .*"),
    ],
)
def test_launch_invalid_combination_raises(
    config: dict[str, Any], environ: dict[str, str], sentence: str
) -> None:
    with pytest.raises(UserError) as error:
        check_launch(config, environ)
    assert re.fullmatch(sentence, str(error.value))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["recipe=burgers2d"], "strategy=model_parallel: .*Burgers2dModule differentiates .*"),
        (["recipe=burgers100d"], "strategy=model_parallel: .*; use strategy=ddp"),
        (["recipe=admissions_mlp", "+optimizer.fused=true"], "optimizer.fused=True: .*"),
        (
            ["recipe=admissions_mlp", "optimizer._target_=torch.optim.LBFGS"],
            "optimizer._target_=torch.optim.LBFGS: .* sharded weights; .*",
        ),
        (["recipe=admissions_mlp"], None),
        (["recipe=admissions_mlp", "optimizer=adamw", "+optimizer.fused=true"], None),
        (["recipe=resnet50_imagenet"], None),
    ],
)
def test_launch_model_parallel_checks_recipe(
    overrides: list[str], sentence: str | None, compose: Compose
) -> None:
    config = compose("strategy=model_parallel", *overrides)
    if sentence is None:
        check_launch(config, {})
        return
    with pytest.raises(UserError, match=sentence):
        check_launch(config, {})


BASIC = {"_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher"}
SUBMITIT = {
    "_target_": "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
    "nodes": 2,
    "tasks_per_node": 4,
}


@pytest.mark.parametrize(
    ("config", "launcher", "sentence"),
    [
        (settings(), BASIC, None),
        (settings(devices=2, strategy="ddp_fork"), BASIC, None),
        (settings("slurm", devices=4, nodes=2), SUBMITIT, None),
        (settings(devices=2, strategy="ddp"), BASIC, "-m with trainer.devices=2: every .*"),
        (settings(devices="auto"), BASIC, "-m with trainer.devices=auto: .*"),
        (settings("slurm", devices=8), SUBMITIT, ".*but trainer.num_nodes=1 and .*devices=8: .*"),
    ],
)
def test_sweep_checks_launcher(
    config: dict[str, Any],
    launcher: dict[str, Any],
    sentence: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (srun := tmp_path / "srun").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(srun.parent))
    if sentence is None:
        check_sweep(config, launcher)
        return
    with pytest.raises(UserError) as error:
        check_sweep(config, launcher)
    assert re.fullmatch(sentence, str(error.value))


def test_sweep_without_slurm_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="cluster=slurm: there is no srun on this machine"):
        check_sweep(settings("slurm", devices=4, nodes=2), SUBMITIT)


def test_environment_lightning_reads_same_variables(
    no_launcher: pytest.MonkeyPatch, tmp_path: Path, compose: Compose
) -> None:
    """From environments as recorded: world size, rank and main address, and the sizes we expect."""
    hosts = tmp_path / "hosts"
    # the launch node, then each host once for each of its slots; this one is the second
    hosts.write_text("\n".join(["batch5", *["h41n02"] * 6, *[socket.gethostname()] * 6]))
    lsf = JSRUN | {"LSB_DJOB_RANKFILE": str(hosts)}
    recorded: list[tuple[str, type[ClusterEnvironment], dict[str, str], tuple[Any, ...]]] = [
        ("torchrun", TorchElasticEnvironment, TORCHRUN, (8, 7, 3, 1, "node0", 29500)),
        ("kubernetes", TorchElasticEnvironment, TORCHRUN, (8, 7, 3, 1, "node0", 29500)),
        ("slurm_sbatch", SLURMEnvironment, SLURM, (8, 7, 3, 1, "gpu07", 15000 + 4242)),
        ("lsf_summit", LSFEnvironment, lsf, (12, 11, 5, 1, "h41n02", 10000 + 456)),
    ]
    for cluster, kind, variables, expected in recorded:
        with no_launcher.context() as environment:
            for name in VARIABLES:
                environment.setenv(name, variables.get(name, ""))
                if name not in variables:
                    environment.delenv(name)
            config = compose("recipe=burgers2d", f"cluster={cluster}")
            nodes, devices = config.trainer.num_nodes, config.trainer.devices
            connector = _AcceleratorConnector(devices=devices, num_nodes=nodes, accelerator="cpu")
            seen = connector.cluster_environment
            assert type(seen) is kind
            seen.validate_settings(devices, nodes)
            ranks = seen.world_size(), seen.global_rank(), seen.local_rank(), seen.node_rank()
            assert (*ranks, seen.main_address, seen.main_port) == expected
            assert nodes * devices == expected[0]


SCRIPTS = Path(__file__).parents[2] / "clusters"


def test_sbatch_script_starts_every_task(tmp_path: Path, compose: Compose) -> None:
    """With srun played by a script, as SLURM would call it."""
    arguments = played("srun", SCRIPTS / "slurm.sbatch", tmp_path, "recipe=burgers2d")
    assert arguments[:2] == ["--cpus-per-task=1", "--kill-on-bad-exit=1"]
    module = arguments.index("lightning_stableaa.recipes.train")
    config = compose(*arguments[module + 1 :])
    assert (config.cluster, config.trainer.accelerator) == ("slurm_sbatch", "gpu")
    text = (SCRIPTS / "slurm.sbatch").read_text()
    assert "#SBATCH --signal=SIGUSR1@90" in text
    assert "#SBATCH --requeue" in text


def played(command: str, script: Path, folder: Path, *options: str, **environ: str) -> list[str]:
    """The arguments with which a job script calls ``command``."""
    stand_in = folder / command
    stand_in.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    stand_in.chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", script, *options],
        env={"PATH": path, "HOME": "/home/me"} | environ,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.splitlines()
