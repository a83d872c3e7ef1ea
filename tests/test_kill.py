"""kill -9 at any moment; what is resumed from the last checkpoint ends bitwise as the whole run."""

import csv
import multiprocessing
import os
import random
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import kill_jobs
from tests.kill_jobs import CASES, MOMENTS, Death

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

DEATHS = int(os.environ.get("STABLEAA_KILLS", "50"))

# A start also asks for the exit codes of all other children. Each code can be read once: where two
# threads ask for the same one at a time, the second gets 255.
ONE_AT_A_TIME = threading.Lock()


def process(folder: Path, case: str, death: Death | None, *, resume: bool = False) -> int:
    """Exit code of a fit in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.kill_jobs"])
    folder.mkdir(exist_ok=True)
    child = context.Process(target=kill_jobs.run, args=(str(folder), case, death, resume))
    with ONE_AT_A_TIME:
        child.start()
    wait([child.sentinel])
    with ONE_AT_A_TIME:
        child.join()
    assert child.exitcode is not None
    return child.exitcode


def assert_equal(one: Any, other: Any, where: str = "") -> None:
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name in one:
            assert_equal(one[name], other[name], f"{where}.{name}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{where}[{index}]")
    elif isinstance(one, Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other or (one != one and other != other), where


def logged(folder: Path, version: str) -> dict[int, list[tuple[str, str]]]:
    """Values by step, all of one step together."""
    rows: dict[int, list[tuple[str, str]]] = {}
    with (folder / "log" / version / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            values = [(name, value) for name, value in row.items() if value and name != "step"]
            rows.setdefault(int(row["step"]), []).extend(values)
    return {step: sorted(values) for step, values in rows.items()}


def deaths(passed: dict[str, dict[str, list[int]]]) -> list[tuple[str, Death]]:
    """Random micro-batches after the first checkpoint; cases and moments take turns."""
    draw = random.Random(0)
    cases = list(CASES)
    chosen = []
    for number in range(DEATHS):
        case = cases[number % len(cases)]
        moment = MOMENTS[(number // len(cases)) % len(MOMENTS)]
        first = passed[case]["saving"][0]
        batch = draw.choice([one for one in passed[case][moment] if one > first])
        chosen.append((case, Death(batch, moment)))
    return chosen


def test_fifty_killed_runs_end_bitwise_as_if_nothing_had_happened(tmp_path: Path) -> None:
    whole: dict[str, dict[str, Any]] = {}
    for case in CASES:
        # the first starts the server that the others are forked from
        assert process(tmp_path / case, case, None) == 0
        whole[case] = torch.load(tmp_path / case / "end.pt", weights_only=False)
        counters = whole[case]["callback"]["counters"]
        assert counters["attempted"] > counters["accepted"] > 0, case
    passed = {case: end.pop("passed") for case, end in whole.items()}

    def killed_and_resumed(number: int, case: str, death: Death) -> tuple[int, int]:
        folder = tmp_path / f"{number}"
        return process(folder, case, death), process(folder, case, None, resume=True)

    planned = [(number, case, death) for number, (case, death) in enumerate(deaths(passed))]
    with ThreadPoolExecutor(2) as two_at_a_time:
        codes = list(two_at_a_time.map(lambda one: killed_and_resumed(*one), planned))
    for (number, case, death), code in zip(planned, codes, strict=True):
        assert code == (-signal.SIGKILL, 0), (case, death)
        folder = tmp_path / f"{number}"
        end = torch.load(folder / "end.pt", weights_only=False)
        del end["passed"]
        assert_equal(end, whole[case], f"{case} {death}")
        resumed, undisturbed = logged(folder, "resumed"), logged(tmp_path / case, "first")
        assert resumed, (case, death)
        first = min(resumed)
        # the step of the checkpoint was logged before it was saved
        expected = {step: values for step, values in undisturbed.items() if step > first}
        assert {s: v for s, v in resumed.items() if s > first} == expected, (case, death)
