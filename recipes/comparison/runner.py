"""Makes the runs of a plan, each in a process of its own, and keeps what they recorded."""

import dataclasses
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import threading
import traceback
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from lightning_stableaa.recipes.cli_errors import USER_ERRORS, format_error
from lightning_stableaa.recipes.comparison.cost import Curve
from lightning_stableaa.recipes.comparison.environment import processor
from lightning_stableaa.recipes.comparison.fingerprint import contents_of
from lightning_stableaa.recipes.comparison.recorder import CURVE
from lightning_stableaa.recipes.comparison.variants import TRAINING, Job
from lightning_stableaa.recipes.errors import UserError
from lightning_stableaa.recipes.files import write_atomically
from lightning_stableaa.recipes.plots import read_metrics
from lightning_stableaa.recipes.train import filter_warnings, train

RESULT = "result.json"
FAILURE = "failure.json"
LOG = "log.txt"
KEPT_RSD = 200  # points of the RSD that are kept, evenly spaced


@dataclass(frozen=True)
class Run:
    """What is kept of a run; ``error`` is None where it finished."""

    variant: str
    seed: int
    fingerprint: str
    curve: Curve = field(default_factory=Curve)
    processor: str | None = None  # what computed
    error: str | None = None
    is_user_error: bool = False  # a wrong configuration, which no other run would survive
    peak_memory: int | None = None  # bytes: of the device on CUDA, else of the whole process
    rsd_gradients: list[float] = field(default_factory=list)
    rsd: list[float] = field(default_factory=list)
    smoothing_on: float | None = None  # share of the windows; None without a SmoothingMonitor


def run_all(
    jobs: Sequence[Job],
    *,
    processes: int,
) -> Iterator[Run]:
    """Yields the run of every job, those that were finished earlier first.

    A variant that is refused for its configuration, or that fails with two seeds in the same way
    before it finished any, has failed with the others as well: they are not made.

    Args:
        jobs: what to run; a run that failed or was interrupted is made again.
        processes: worker processes at a time, each for one run; 0 trains in this process.

    Raises:
        UserError: a run of the first variant is refused for its configuration, or files that runs
            depend on were edited since the jobs were made.
    """
    missing: list[Job] = []
    errors: dict[str, set[str | None]] = defaultdict(set)  # None where a run was finished
    for job in jobs:
        run = read_run(job)
        if run is None:
            missing.append(job)
        else:
            errors[run.variant].add(None)
            yield run
    waiting = deque(missing)
    made = _in_this_process(waiting) if processes == 0 else _in_workers(waiting, processes)
    for run in made:
        if run.is_user_error and run.variant == jobs[0].variant:
            _remove(next(job.folder for job in missing if job.fingerprint == run.fingerprint))
            raise UserError(run.error)
        again = run.error is not None and errors[run.variant] == {run.error}
        errors[run.variant].add(run.error)
        yield run
        if run.is_user_error or again:
            for job in [job for job in waiting if job.variant == run.variant]:
                waiting.remove(job)
                yield dataclasses.replace(run, seed=job.seed, fingerprint=job.fingerprint)


def read_run(job: Job) -> Run | None:
    """The finished run of a job; None where there is none, or one of another configuration."""
    try:
        kept = json.loads((job.folder / RESULT).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None
    if kept["fingerprint"] != job.fingerprint:
        return None
    return Run(**kept | {"curve": Curve(**kept["curve"])})


def run_job(job: Job) -> Run:
    """Trains, and writes ``result.json`` if that succeeds; a failure leaves the log alone."""
    run = Run(job.variant, job.seed, job.fingerprint)
    try:
        train(OmegaConf.create(job.settings))
        if not (job.folder / TRAINING / CURVE).exists():
            raise UserError(
                "training ended before its first step: train_dataloader has no batches, or "
                "trainer.max_steps or trainer.max_epochs is 0"
            )
    except USER_ERRORS as error:
        return dataclasses.replace(run, error=format_error(error), is_user_error=True)
    except Exception as error:
        traceback.print_exc()
        message = " ".join(str(error).split())
        return dataclasses.replace(run, error=f"{type(error).__name__}: {message}")
    run = dataclasses.replace(
        run,
        curve=Curve(**json.loads((job.folder / TRAINING / CURVE).read_text())),
        peak_memory=_peak_memory(),
        processor=processor(),
        **_smoothing_log(job.folder / TRAINING / "metrics.csv"),
    )
    write_atomically(job.folder / RESULT, json.dumps(dataclasses.asdict(run)))
    return run


def _in_this_process(waiting: deque[Job]) -> Iterator[Run]:
    while waiting:
        job = waiting.popleft()
        shutil.rmtree(job.folder, ignore_errors=True)
        # the peak would be that of everything this process has done so far
        yield dataclasses.replace(run_job(job), peak_memory=None)


def _in_workers(waiting: deque[Job], processes: int) -> Iterator[Run]:
    # Forked from a server that has done the imports and nothing else: workers start at once, and
    # the peak memory of each is its own.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with _ignore_sigint():  # as the server stays: the main process decides what ends
        forkserver.ensure_running()
    running: dict[int, tuple[BaseProcess, Job]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                job = waiting.popleft()
                _refuse_edited(job)
                worker = context.Process(target=_work, args=(job,), name=job.variant)
                worker.start()
                running[worker.sentinel] = worker, job
            for sentinel in wait(list(running)):
                worker, job = running.pop(sentinel)  # pyright: ignore[reportArgumentType]  # "Connection" is not "int"
                worker.join()
                yield _outcome(job, worker.exitcode or 0)
    finally:
        for worker, _ in running.values():
            worker.terminate()
            worker.join()


def _refuse_edited(job: Job) -> None:
    """A worker imports the module again: it would train another one."""
    now = contents_of(job.settings)
    for kind in sorted(job.contents.keys() | now.keys()):
        before, after = job.contents.get(kind, {}), now.get(kind, {})
        for name in sorted(before.keys() | after.keys()):
            if before.get(name) != after.get(name):
                raise UserError(
                    f"{name} was edited while the comparison ran; the same command starts over "
                    "with what it is now; leave it alone until all runs are made"
                )


@contextmanager
def _ignore_sigint() -> Iterator[None]:
    """A process that is started inside ignores Ctrl-C, from its first instruction on."""
    if threading.current_thread() is not threading.main_thread():  # which alone may do this
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _work(job: Job) -> None:
    """What a worker process does; everything printed goes to the log of the run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides what ends
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir(parents=True)
    with (job.folder / LOG).open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    filter_warnings()
    run = run_job(job)
    if run.error is not None:
        write_atomically(job.folder / FAILURE, json.dumps(dataclasses.asdict(run)))


def _exit_with_parent() -> None:
    """Or a worker whose main process was killed would write beside that of the next attempt."""
    main = multiprocessing.parent_process()
    if main is not None:
        wait([main.sentinel])
        os._exit(1)


def _outcome(job: Job, exit_code: int) -> Run:
    run = read_run(job)
    if run is not None:
        return run
    failure = job.folder / FAILURE
    if failure.exists():
        kept = json.loads(failure.read_text())
        return Run(**kept | {"curve": Curve(**kept["curve"])})
    ending = f"signal {signal.Signals(-exit_code).name}" if exit_code < 0 else f"code {exit_code}"
    return Run(
        job.variant, job.seed, job.fingerprint, error=f"the worker process ended with {ending}"
    )


def _remove(folder: Path) -> None:
    """Removes a run, and the folders above it that held nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        for parent in folder.parents[:2]:  # variant, runs
            parent.rmdir()


def _peak_memory() -> int:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def _smoothing_log(path: Path) -> dict[str, Any]:
    """The RSD against the optimizer step, thinned, and how often the average was on."""
    metrics = read_metrics(path) if path.exists() else {}
    if "smoothing/rsd" not in metrics:
        return {}
    steps, values = metrics["smoothing/rsd"]
    every = math.ceil(len(steps) / KEPT_RSD)
    return {
        "rsd_gradients": steps[::every].tolist(),
        "rsd": values[::every].tolist(),
        "smoothing_on": float(metrics["smoothing/on"].values.mean()),
    }
