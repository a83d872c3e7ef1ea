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
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lightning_stableaa.recipes.cli_errors import USER_ERRORS, format_error
from lightning_stableaa.recipes.comparison.provenance import contents_of, processor
from lightning_stableaa.recipes.comparison.variants import RUN_FOLDER, Job, Plan
from lightning_stableaa.recipes.errors import UserError
from lightning_stableaa.recipes.files import write_atomically
from lightning_stableaa.recipes.plots import read_metrics
from lightning_stableaa.recipes.train import filter_warnings, train

RESULT = "result.json"
CURVE = "curve.json"  # of the recorder, in the folder of the training
LOG = "log.txt"
KEPT_RSD = 200  # points of the RSD that are kept, evenly spaced


@dataclass(frozen=True)
class Run:
    """What is kept of a run; ``error`` is None where it finished, and ``labels`` are its job's."""

    variant: str
    seed: int
    labels: dict[str, Any]
    curve: dict[str, list[float]] = field(default_factory=dict)  # see CostRecorder
    disabled: str | None = None  # why acceleration was switched off
    processor: str | None = None  # what computed
    error: str | None = None
    is_user_error: bool = False  # a wrong configuration, which no other run would survive
    peak_memory: int | None = None  # bytes: of the device on CUDA, else of the whole process
    rsd_gradients: list[float] = field(default_factory=list)
    rsd: list[float] = field(default_factory=list)
    smoothing_on: float | None = None  # share of the windows; None without a SmoothingMonitor


def run_all(jobs: Sequence[Job], *, processes: int) -> Iterator[Run]:
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
    errors: dict[str, set[str | None]] = defaultdict(set)  # None where a run was finished
    finished = {job.folder: run for job in jobs if (run := finished_run(job)) is not None}
    for run in finished.values():
        errors[run.variant].add(None)
        yield run
    waiting = deque(job for job in jobs if job.folder not in finished)
    made = _in_this_process(waiting) if processes == 0 else _in_workers(waiting, processes)
    for job, run in made:
        if run.is_user_error and run.variant == jobs[0].variant:
            shutil.rmtree(job.folder, ignore_errors=True)
            with suppress(OSError):  # not empty: other runs are there
                os.removedirs(job.folder.parent)  # up to the locked folder of the comparison
            raise UserError(run.error)
        again = run.error is not None and errors[run.variant] == {run.error}
        errors[run.variant].add(run.error)
        yield run
        if run.is_user_error or again:
            for other in [other for other in waiting if other.variant == run.variant]:
                waiting.remove(other)
                yield dataclasses.replace(run, seed=other.seed, labels=other.labels)


def finished_run(job: Job) -> Run | None:
    """The finished run of a job, whose folder names its fingerprint; None where there is none."""
    run = _read(job.folder)
    return None if run is None or run.error is not None else run


def finished_runs(plan: Plan) -> list[Run]:
    """Every finished run in the folder with the settings of the plan, of whatever variant.

    Of a variant that was made with several settings of its callbacks, those of the plan, or else
    the latest.
    """
    paths = sorted(plan.folder.glob(f"runs/*/*/{RESULT}"), key=lambda path: path.stat().st_mtime)
    runs = [run for path in paths if (run := _read(path.parent)) is not None and not run.error]
    runs = [run for run in runs if run.labels["comparison"] == plan.comparison]
    latest = {run.variant: run.labels["configuration"] for run in runs}
    latest |= {job.variant: job.labels["configuration"] for job in plan.jobs}
    return [run for run in runs if run.labels["configuration"] == latest[run.variant]]


def run_job(job: Job) -> Run:
    """Trains, and writes ``result.json``, of a failure too."""
    run = Run(job.variant, job.seed, job.labels)
    training = job.folder / "training"
    settings = json.dumps(job.settings).replace(RUN_FOLDER, json.dumps(str(training))[1:-1])
    try:
        train(DictConfig(json.loads(settings)))
        if not (training / CURVE).exists():
            raise UserError(
                "training ended before its first step: train_dataloader has no batches, or "
                "trainer.max_steps or trainer.max_epochs is 0"
            )
        recorded = json.loads((training / CURVE).read_text()) | {"processor": processor()}
        recorded |= _smoothing_log(training / "metrics.csv")
        if multiprocessing.parent_process() is not None:  # else the peak is not of this run alone
            recorded["peak_memory"] = _peak_memory()
        run = dataclasses.replace(run, **recorded)
    except USER_ERRORS as error:
        run = dataclasses.replace(run, error=format_error(error), is_user_error=True)
    except Exception as error:
        traceback.print_exc()
        message = " ".join(str(error).split())
        run = dataclasses.replace(run, error=f"{type(error).__name__}: {message}")
    write_atomically(job.folder / RESULT, json.dumps(dataclasses.asdict(run)))
    return run


def _in_this_process(waiting: deque[Job]) -> Iterator[tuple[Job, Run]]:
    while waiting:
        job = waiting.popleft()
        shutil.rmtree(job.folder, ignore_errors=True)
        yield job, run_job(job)


def _in_workers(waiting: deque[Job], processes: int) -> Iterator[tuple[Job, Run]]:
    # Forked from a server that has done the imports and nothing else: workers start at once, and
    # the peak memory of each is its own. Not a pool: a worker that is killed breaks those.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "lightning_stableaa.recipes.training"])
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides what ends
    forkserver.ensure_running()
    signal.signal(signal.SIGINT, before)
    running: dict[Any, tuple[BaseProcess, Job]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                job = waiting.popleft()
                _refuse_edited(job)
                worker = context.Process(target=_work, args=(job,), name=job.variant)
                worker.start()
                running[worker.sentinel] = worker, job
            for sentinel in wait(list(running)):
                worker, job = running.pop(sentinel)
                worker.join()
                yield job, _read(job.folder) or _killed(job, worker.exitcode or 0)
    finally:
        for worker, _ in running.values():
            worker.terminate()
            worker.join()


def _refuse_edited(job: Job) -> None:
    """A worker imports the module again: it would train another one."""
    for name, _ in sorted(job.contents.items() ^ contents_of(job.settings).items()):
        raise UserError(
            f"{name} was edited while the comparison ran; the same command starts over with what "
            "it is now; leave it alone until all runs are made"
        )


def _work(job: Job) -> None:
    """What a worker process does; everything printed goes to the log of the run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir(parents=True)
    with (job.folder / LOG).open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    filter_warnings()
    run_job(job)


def _exit_with_parent() -> None:
    """Or a worker whose main process was killed would write beside that of the next attempt."""
    main = multiprocessing.parent_process()
    assert main is not None
    main.join()
    os._exit(1)


def _read(folder: Path) -> Run | None:
    try:
        return Run(**json.loads((folder / RESULT).read_text()))
    except (FileNotFoundError, TypeError):  # of another version
        return None


def _killed(job: Job, exit_code: int) -> Run:
    ending = f"signal {signal.Signals(-exit_code).name}" if exit_code < 0 else f"code {exit_code}"
    error = f"the worker process ended with {ending}"
    return Run(job.variant, job.seed, job.labels, error=error)


def _peak_memory() -> int:
    import torch

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
