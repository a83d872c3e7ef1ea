"""Combinations of configuration and launcher: what works passes, the rest ends in a sentence."""

import os
import re
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.errors import MissingConfigException
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.lsf import LSFEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

import lightning_stableaa.recipes.train  # noqa: F401  # registers the resolvers
from lightning_stableaa.recipes.errors import UserError
from lightning_stableaa.recipes.launch import LSF, check_launch, check_sweep
from lightning_stableaa.recipes.mistakes import explain
from tests.recipes.conftest import Compose

# What each launcher sets for the last of its processes: 2 nodes of 4.
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "first",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_WORLD_SIZE": "2",
    "RANK": "7",
    "LOCAL_RANK": "3",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_JOB_ID": "4242",
    "SLURM_JOB_NAME": "stableaa",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "8",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_NNODES": "2",
    "SLURM_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "7",
    "SLURM_LOCALID": "3",
    "SLURM_NODEID": "1",
}
JSRUN = {
    "LSB_JOBID": "123456",
    "LSB_DJOB_RANKFILE": "hosts",
    "JSM_NAMESPACE_SIZE": "12",
    "JSM_NAMESPACE_RANK": "11",
    "JSM_NAMESPACE_LOCAL_RANK": "5",
}
BY_HAND = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500", "NODE_RANK": "1"}
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
    return {"cluster": cluster, "run_name": run_name, "trainer": trainer}


def without(variables: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in names}


@pytest.mark.parametrize(
    ("config", "environ"),
    [
        (settings(), {}),
        (settings(devices="auto"), {}),
        (settings(devices=4), {}),
        (settings(devices=4, nodes=2, run_name="first"), BY_HAND),
        (
            settings(devices=4, nodes=2, run_name="first"),
            BY_HAND | {"LOCAL_RANK": "1", "WORLD_SIZE": "8"},  # started by Lightning on a node
        ),
        (settings("torchrun", devices=4, nodes=2), TORCHRUN),
        (settings("kubernetes", devices=4, nodes=2), TORCHRUN),
        (settings(devices=[0, 1, 2, 3], nodes=2), TORCHRUN),  # trainer=multinode
        (settings("torchrun", devices=4, nodes=2), SLURM | TORCHRUN),  # torchrun within SLURM
        (settings("slurm_sbatch", devices=4, nodes=2), SLURM),
        (settings(devices=4), SLURM | {"SLURM_JOB_NAME": "interactive"}),
        (
            settings(),
            without(SLURM, "SLURM_STEP_ID")
            | {"SLURM_NTASKS": "1"}
            | {"SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "1"},
        ),
        (settings("lsf_summit", devices=6, nodes=2), JSRUN),
    ],
)
def test_combination_passes(config: dict[str, Any], environ: dict[str, str]) -> None:
    check_launch(config, environ)


@pytest.mark.parametrize(
    ("config", "environ", "sentence"),
    [
        (
            settings("torchrun"),
            {},
            "cluster=torchrun: this process was not started by torchrun; use torchrun .*",
        ),
        (settings("kubernetes"), SLURM, "cluster=kubernetes: .* not started by torchrun; .*"),
        (settings("slurm_sbatch"), {}, "cluster=slurm_sbatch: .* by slurm; use srun python .*"),
        (settings("slurm"), {}, "cluster=slurm: .* use stableaa-train -m .*"),
        (
            settings("lsf_summit"),
            without(JSRUN, "JSM_NAMESPACE_SIZE"),  # in the script, but not under jsrun
            "cluster=lsf_summit: .* by lsf; use jsrun -r1 -a6 -g6 .*",
        ),
        (
            settings(),
            TORCHRUN,
            "trainer.devices=1 and trainer.num_nodes=1, but torchrun started 8 processes "
            r"\(WORLD_SIZE\), 4 on a node: add cluster=torchrun, or trainer.devices=4 "
            "trainer.num_nodes=2",
        ),
        (settings(devices=2, nodes=4), TORCHRUN, ".* or trainer.devices=4 trainer.num_nodes=2"),
        (
            settings(devices=2, nodes=2),
            SLURM,
            r".* but slurm started 8 processes \(SLURM_NTASKS\), 4 on a node: "
            "add cluster=slurm_sbatch, or trainer.devices=4 trainer.num_nodes=2",
        ),
        (
            settings("slurm_sbatch", devices=4, nodes=2),
            without(SLURM, "SLURM_STEP_ID"),
            "SLURM has 8 tasks for this job, but .* without srun; write srun python .*",
        ),
        (
            settings("slurm_sbatch", devices=1, nodes=2),
            without(SLURM, "SLURM_NTASKS_PER_NODE"),
            "SLURM was asked for --ntasks=8, .*; ask for --nodes=N and --ntasks-per-node=N",
        ),
        (
            settings("lsf_summit", devices=4, nodes=2),
            JSRUN,
            r".* but lsf started 12 processes \(JSM_NAMESPACE_SIZE\), 6 on a node: .*",
        ),
        (
            settings(devices=4, nodes=2),
            {"MASTER_PORT": "29500"},
            "trainer.num_nodes=2, but without MASTER_ADDR, NODE_RANK: start each node with .*",
        ),
        (
            settings(devices=4, nodes=2),
            BY_HAND,
            "trainer.num_nodes=2: .* add run_name=NAME, the same on each",
        ),
        (
            settings(devices=2),
            {"LOCAL_RANK": "0", "WORLD_SIZE": "4"},
            r".* but by hand started 4 processes \(WORLD_SIZE\), .*",
        ),
    ],
)
def test_combination_is_refused(
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
def test_model_parallel(overrides: list[str], sentence: str | None, compose: Compose) -> None:
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
        (
            settings(devices=2, strategy="ddp"),
            BASIC,
            "-m with trainer.devices=2: every process that DDP starts would sweep on its own; .*",
        ),
        (settings(devices="auto"), BASIC, "-m with trainer.devices=auto: .*"),
        (
            settings("slurm", devices=8),
            SUBMITIT,
            "hydra.launcher.nodes=2 and hydra.launcher.tasks_per_node=4, but trainer.num_nodes=1 "
            "and trainer.devices=8: .*",
        ),
    ],
)
def test_sweep(
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


def test_a_machine_without_slurm_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="cluster=slurm: there is no srun on this machine"):
        check_sweep(settings("slurm", devices=4, nodes=2), SUBMITIT)


def test_missing_submitit_is_named() -> None:
    error = MissingConfigException("not found", "hydra/launcher/submitit_slurm", ["basic"])
    assert explain(error) == (
        "hydra/launcher=submitit_slurm: pip install '.[recipes,slurm]' in a checkout brings it"
    )


def test_lightning_reads_the_same_variables(
    no_launcher: pytest.MonkeyPatch, tmp_path: Path, compose: Compose
) -> None:
    """From environments as recorded: world size, rank and main address, and the sizes we expect."""
    hosts = tmp_path / "hosts"
    # the launch node, then each host once for each of its slots; this one is the second
    hosts.write_text("\n".join(["batch5", *["h41n02"] * 6, *[socket.gethostname()] * 6]))
    recorded: list[tuple[str, type[ClusterEnvironment], dict[str, str], tuple[Any, ...]]] = [
        ("torchrun", TorchElasticEnvironment, TORCHRUN, (8, 7, 3, 1, "node0", 29500)),
        ("kubernetes", TorchElasticEnvironment, TORCHRUN, (8, 7, 3, 1, "node0", 29500)),
        ("slurm_sbatch", SLURMEnvironment, SLURM, (8, 7, 3, 1, "gpu07", 15000 + 4242)),
        (
            "lsf_summit",
            LSFEnvironment,
            JSRUN | {"LSB_DJOB_RANKFILE": str(hosts)},
            (12, 11, 5, 1, "h41n02", 10000 + 456),
        ),
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
            assert expected == (
                seen.world_size(),
                seen.global_rank(),
                seen.local_rank(),
                seen.node_rank(),
                seen.main_address,
                seen.main_port,
            )
            assert nodes * devices == expected[0]


def test_nodes_by_hand_are_lightnings_default(no_launcher: pytest.MonkeyPatch) -> None:
    for name, value in BY_HAND.items():
        no_launcher.setenv(name, value)
    seen = _AcceleratorConnector(devices=2, num_nodes=2, accelerator="cpu").cluster_environment
    assert type(seen) is LightningEnvironment
    assert (seen.node_rank(), seen.main_address, seen.main_port) == (1, "node0", 29500)
    assert not seen.creates_processes_externally


def test_lsf_needs_the_variables_that_lightning_needs(no_launcher: pytest.MonkeyPatch) -> None:
    for name in LSF:
        no_launcher.setenv(name, "1")
    assert LSFEnvironment.detect()
    for name in LSF:
        with no_launcher.context() as environment:
            environment.delenv(name)
            assert not LSFEnvironment.detect()


SCRIPTS = Path(__file__).parents[2] / "clusters"


@pytest.mark.parametrize("name", ["slurm.sbatch", "summit.lsf"])
def test_job_scripts_are_bash(name: str) -> None:
    subprocess.run(["bash", "-n", SCRIPTS / name], check=True)


def test_sbatch_script_starts_every_task(tmp_path: Path, compose: Compose) -> None:
    """With srun played by a script, as SLURM would call it."""
    arguments = played("srun", SCRIPTS / "slurm.sbatch", tmp_path, "recipe=burgers2d")
    assert arguments[:2] == ["--cpus-per-task=1", "--kill-on-bad-exit=1"]
    config = compose(*overrides(arguments))
    assert (config.cluster, config.trainer.accelerator) == ("slurm_sbatch", "gpu")
    text = (SCRIPTS / "slurm.sbatch").read_text()
    assert "#SBATCH --signal=SIGUSR1@90" in text
    assert "#SBATCH --requeue" in text


def test_summit_script_is_six_gpus_on_each_of_256_nodes(tmp_path: Path, compose: Compose) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("batch5\n" + "".join(f"h{node}\n" * 42 for node in range(256)))
    arguments = played("jsrun", SCRIPTS / "summit.lsf", tmp_path, LSB_DJOB_HOSTFILE=str(hosts))
    options = dict(zip(arguments[:10:2], arguments[1:10:2], strict=True))
    assert options == {
        "--nrs": "256",
        "--rs_per_host": "1",
        "--tasks_per_rs": "6",
        "--gpu_per_rs": "6",
        "--cpu_per_rs": "42",
    }
    trainer = compose(*overrides(arguments)).trainer
    assert (trainer.num_nodes, trainer.devices) == (256, 6)
    assert "#BSUB -nnodes 256" in (SCRIPTS / "summit.lsf").read_text()


def test_kubernetes_manifest_agrees_with_itself(compose: Compose) -> None:
    service, job = yaml.safe_load_all((SCRIPTS / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    words = (word.partition("=") for word in container["command"])
    options = {name: value for name, _, value in words}
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(options["--nnodes"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(options["--nproc-per-node"])
    host = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert options["--rdzv-endpoint"] == f"{host}:{service['spec']['ports'][0]['port']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    assert compose(*overrides(container["command"])).cluster == "kubernetes"


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


def overrides(command: list[str]) -> list[str]:
    """What stands behind the module on a command line."""
    return command[command.index("lightning_stableaa.recipes.train") + 1 :]
