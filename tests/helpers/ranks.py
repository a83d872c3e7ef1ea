"""A pool of real processes (gloo) that run functions of the tests, one rank each."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pickle
import shutil
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Imported once, by the server that all processes are forked from.
PRELOAD = (
    *("torch.distributed.tensor", "torch.distributed.fsdp"),
    *("tests.helpers.ranks", "tests.helpers.regression"),
)

COLLECTIVE_TIMEOUT = timedelta(seconds=30)  # of one that another rank does not join
RUN_TIMEOUT = 120.0  # seconds, of a function
GRACE = 2.0  # seconds, for the error messages of the other ranks once one has failed


class Ranks:
    """Processes that wait for functions; new ones are started when a function has failed.

    Args:
        world_size: number of processes.
    """

    def __init__(self, world_size: int = 2) -> None:
        self.world_size = world_size
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(PRELOAD))
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        self._folder: str | None = None

    def run(
        self, function: Callable[..., Any], *arguments: Any, killed: int | None = None, **named: Any
    ) -> list[Any]:
        """What ``function``, one of a module, returns on every rank.

        Args:
            function: called on every rank with the other arguments.
            killed: the rank that kills itself; its result is the exit code.

        Raises:
            AssertionError: it raised an error, or did not return; with the traceback.
        """
        if not self._processes:
            self._start()
        call = pickle.dumps((function.__module__, function.__qualname__, arguments, named))
        for connection in self._connections:
            connection.send_bytes(call)
        results: dict[int, Any] = {}
        errors: list[str] = []
        deadline = time.monotonic() + RUN_TIMEOUT
        while len(results) < self.world_size:
            pending = {c: rank for rank, c in enumerate(self._connections) if rank not in results}
            ready = wait(list(pending), max(0.0, deadline - time.monotonic()))
            if not ready:
                errors.append(f"ranks {sorted(pending.values())} did not return")
                break
            for connection in ready:
                rank = pending[connection]  # type: ignore[index]
                try:
                    succeeded, results[rank] = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
                except EOFError:
                    self._processes[rank].join()
                    code = self._processes[rank].exitcode
                    succeeded = rank == killed
                    results[rank] = code if succeeded else f"exit code {code}"
                if not succeeded:
                    errors.append(f"rank {rank}: {results[rank]}")
                    deadline = min(deadline, time.monotonic() + GRACE)
        if errors or killed is not None:
            self.close()
        assert not errors, "\n".join(errors)
        return [results[rank] for rank in range(self.world_size)]

    def close(self) -> None:
        """End the processes."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.kill()
            process.join()
        if self._folder is not None:
            shutil.rmtree(self._folder)
        self._processes, self._connections, self._folder = [], [], None

    def _start(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="ranks-")
        for rank in range(self.world_size):
            here, there = self._context.Pipe()
            process = self._context.Process(
                target=_serve, args=(there, rank, self.world_size, self._folder), daemon=True
            )
            process.start()
            there.close()
            self._processes.append(process)
            self._connections.append(here)


def _serve(connection: Connection, rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of Lightning, about loaders; they are not the subject
    os.environ |= {  # Lightning takes the processes for those of torchrun
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "TORCHELASTIC_RUN_ID": "none",
    }
    file = Path(folder, "store").as_uri()
    dist.init_process_group("gloo", file, COLLECTIVE_TIMEOUT, world_size, rank)
    with suppress(EOFError):  # the tests are over
        while True:
            module, name, arguments, named = pickle.loads(connection.recv_bytes())
            try:
                function = getattr(importlib.import_module(module), name)
                answer = pickle.dumps((True, function(*arguments, **named)))
            except Exception:
                answer = pickle.dumps((False, traceback.format_exc()))
            connection.send_bytes(answer)
