"""Who started the processes of a run, and what in the configuration contradicts it.

The variables are those that Lightning's cluster environments read, in the order in which it looks
for them; docs/clusters.md has the list.
"""

import os
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

from omegaconf import ListConfig

from lightning_stableaa.recipes.errors import UserError
from lightning_stableaa.recipes.signatures import class_attribute

COMMAND = "-m lightning_stableaa.recipes.train"

# cluster: who has to start the processes, and how
LAUNCHERS = {
    "torchrun": ("torchrun", f"torchrun --nproc-per-node=N {COMMAND} ..."),
    "kubernetes": ("torchrun", f"torchrun --nnodes=N --nproc-per-node=N {COMMAND} ..."),
    "slurm": ("slurm", "stableaa-train -m ..., which submits the job"),
    "slurm_sbatch": ("slurm", f"srun python {COMMAND} ... in a script for sbatch"),
    "lsf_summit": ("lsf", f"jsrun -r1 -a6 -g6 -c42 python {COMMAND} ... in a script for bsub"),
}
# launcher: the variable that says how many processes it started, and the cluster that reads it
PROCESSES = {
    "torchrun": ("WORLD_SIZE", "cluster=torchrun"),
    "slurm": ("SLURM_NTASKS", "cluster=slurm_sbatch"),
    "lsf": ("JSM_NAMESPACE_SIZE", "cluster=lsf_summit"),
    "by hand": ("WORLD_SIZE", "the same WORLD_SIZE"),
}
LSF = {"LSB_JOBID", "LSB_DJOB_RANKFILE", "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_SIZE"}


class Started(NamedTuple):
    """Processes that a launcher says it started; None for what it does not say."""

    launcher: str
    processes: int | None = None
    per_node: int | None = None


# they need whole tensors: torch's own message names an operator
NOT_SHARDABLE = {"torch.optim.LBFGS", "torch.optim.Adafactor"}


def started(environ: Mapping[str, str]) -> Started | None:
    """What started this process; None where Lightning has to start the others itself."""

    def number(name: str) -> int | None:
        return int(environ[name]) if environ.get(name, "").isdigit() else None

    if "TORCHELASTIC_RUN_ID" in environ:
        return Started("torchrun", number("WORLD_SIZE"), number("LOCAL_WORLD_SIZE"))
    interactive = environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if "SLURM_NTASKS" in environ and not interactive:
        return Started("slurm", number("SLURM_NTASKS"), number("SLURM_NTASKS_PER_NODE"))
    if environ.keys() >= LSF:
        return Started("lsf", number("JSM_NAMESPACE_SIZE"))
    if "LOCAL_RANK" in environ:
        return Started("by hand", number("WORLD_SIZE"))
    return None


def check_launch(settings: Any, environ: Mapping[str, str]) -> None:
    """Compares a run's configuration with what started its process.

    Args:
        settings: the configuration, a mapping; ``cluster``, ``run_name``, ``trainer``, ``module``,
            ``optimizer`` and ``oversubscribe`` matter.
        environ: variables of the process.

    Raises:
        UserError: they cannot work together; without it the job would hang, end in an error of
            another component, or train several runs in one folder.
    """
    cluster, trainer = settings["cluster"], settings["trainer"]
    if "ModelParallel" in str(trainer["strategy"]):
        _check_sharding(settings["module"]["_target_"], settings["optimizer"])
    by = started(environ)
    launcher, command = LAUNCHERS.get(cluster, (None, None))
    if launcher is not None and (by is None or by.launcher != launcher):
        raise UserError(
            f"cluster={cluster}: this process was not started by {launcher}; use {command}, or "
            f"leave cluster={cluster} out"
        )
    if by is None:
        _check_cores(settings)
    if by is None or by.launcher == "by hand":
        _check_nodes_by_hand(settings, environ)
    if by is not None:
        if by.launcher == "slurm":
            _check_tasks(by, environ)
        _check_counts(by, trainer)


def check_sweep(settings: Any, launcher: Any) -> None:
    """Compares the configuration of a sweep (``-m``) with Hydra's launcher of its jobs.

    Args:
        settings: the configuration, a mapping; ``cluster``, ``trainer`` and ``oversubscribe``
            matter.
        launcher: ``hydra.launcher``, a mapping.

    Raises:
        UserError: the jobs would start processes that sweep on their own, or too few of them.
    """
    cluster, trainer = settings["cluster"], settings["trainer"]
    on_slurm = launcher["_target_"].endswith("SlurmLauncher")
    if on_slurm and shutil.which("srun") is None:
        raise UserError(
            f"cluster={cluster}: there is no srun on this machine; submit from one that has SLURM, "
            f"or try the same with cluster=submitit_local"
        )
    expected = (count(trainer["num_nodes"]), count(trainer["devices"]))
    if "submitit" in launcher["_target_"]:
        requested = (launcher["nodes"], launcher["tasks_per_node"])
        if not on_slurm:
            _check_cores(settings)
        if requested != expected:
            raise UserError(
                f"hydra.launcher.nodes={requested[0]} and "
                f"hydra.launcher.tasks_per_node={requested[1]}, "
                f"but trainer.num_nodes={trainer['num_nodes']} and trainer.devices="
                f"{trainer['devices']}: set those of the trainer alone, as numbers, with "
                f"cluster=slurm"
            )
    elif cluster == "local" and expected != (1, 1) and _starts_itself_again(trainer["strategy"]):
        raise UserError(
            f"-m with trainer.devices={trainer['devices']}: every process that DDP starts would "
            f"sweep on its own; add cluster=submitit_local or cluster=slurm, or strategy=ddp_fork"
        )


def is_first_process() -> bool:
    """Whether this process has rank 0, by the variables that Lightning's ``rank_zero`` reads."""
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"


def join_submitit() -> None:
    """Tells Lightning the ranks that submitit's local executor gave its processes.

    On SLURM, Lightning asks SLURM itself.
    """
    if os.environ.get("SUBMITIT_EXECUTOR") == "local" and "LOCAL_RANK" not in os.environ:
        from submitit.helpers import TorchDistributedEnvironment

        # Lightning chooses among all devices, by local rank
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False)


def count(value: Any) -> int | None:
    """What ``trainer.devices`` or ``trainer.num_nodes`` amounts to; None for ``auto`` and -1."""
    if isinstance(value, list | ListConfig):
        return len(value)
    return int(value) if str(value).isdigit() else None


def _check_sharding(module: str, optimizer: Any) -> None:
    try:
        shardable = class_attribute(module, "shardable")
    except (AttributeError, ImportError):
        shardable = True
    if not shardable:
        raise UserError(
            f"strategy=model_parallel: the loss of {module} differentiates the network by its "
            f"inputs, which FSDP2 does not support; use strategy=ddp"
        )
    if optimizer is None:  # a module of the user's own has it
        return
    if optimizer["_target_"] in NOT_SHARDABLE:
        raise UserError(
            f"optimizer._target_={optimizer['_target_']}: it does not work on sharded weights; "
            f"use another one, or strategy=ddp"
        )
    if optimizer["_target_"] == "torch.optim.SGD" and optimizer.get("fused"):
        raise UserError(
            "optimizer.fused=True: torch has no fused SGD for sharded weights; leave it out, or "
            "use strategy=ddp"
        )


def _check_cores(settings: Any) -> None:
    """Processes on this machine's CPU; on GPUs, Lightning counts the devices."""
    trainer = settings["trainer"]
    accelerator, processes, cores = trainer.get("accelerator"), count(trainer["devices"]), _cores()
    if processes is None or processes <= cores or settings["oversubscribe"]:
        return
    if accelerator == "cpu" or (accelerator == "auto" and not _has_gpu()):
        raise UserError(
            f"trainer.devices={processes}: so many processes on a CPU of {cores} cores would wait "
            f"for one another; use trainer.devices={cores} or less, or add oversubscribe=true"
        )


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check_nodes_by_hand(settings: Any, environ: Mapping[str, str]) -> None:
    nodes = settings["trainer"]["num_nodes"]
    if nodes == 1:
        return
    names = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
    if missing := [name for name in names if name not in environ]:
        raise UserError(
            f"trainer.num_nodes={nodes}, but without {', '.join(missing)}: start each node "
            f"with torchrun and cluster=torchrun, or set {', '.join(names)} on each"
        )
    if settings["run_name"] is None:
        raise UserError(
            f"trainer.num_nodes={nodes}: nodes started by hand would each name the run folder "
            f"after their own clock; add run_name=NAME, the same on each"
        )


def _check_tasks(by: Started, environ: Mapping[str, str]) -> None:
    if by.processes == 1:
        return
    if "SLURM_STEP_ID" not in environ:
        raise UserError(
            f"SLURM has {by.processes} tasks for this job, but the script started python once, "
            f"without srun; write srun python {COMMAND} ..."
        )
    if by.per_node is None:
        raise UserError(
            f"SLURM was asked for --ntasks={by.processes}, which does not say how many run on a "
            f"node; ask for --nodes=N and --ntasks-per-node=N"
        )


def _check_counts(by: Started, trainer: Any) -> None:
    devices, nodes = count(trainer["devices"]), count(trainer["num_nodes"])
    if by.processes is None or devices is None or nodes is None:
        return  # Lightning compares once it has counted the devices
    if (devices * nodes, devices) != (by.processes, by.per_node or devices):
        variable, cluster = PROCESSES[by.launcher]
        per_node = by.per_node or max(1, by.processes // nodes)
        raise UserError(
            f"trainer.devices={devices} and trainer.num_nodes={nodes}, but {by.launcher} started "
            f"{by.processes} processes ({variable}), {per_node} on a node: add {cluster}, or "
            f"trainer.devices={per_node} trainer.num_nodes={by.processes // per_node}"
        )


def _starts_itself_again(strategy: Any) -> bool:
    """Whether Lightning starts the other processes by the same command line."""
    return not (isinstance(strategy, str) and strategy.endswith(("_spawn", "_fork", "_notebook")))
