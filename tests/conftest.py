"""Settings of the whole test suite."""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning_utilities.core.rank_zero import rank_zero_only

from tests.helpers.startup import sitecustomize

# Processes that tests start read this module on their own.
paths = [str(Path(sitecustomize.__file__).parent), os.environ.get("PYTHONPATH", "")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files come first, or one process runs them while the others have finished."""
    import torch  # takes seconds, and the controller of pytest-xdist does without

    # The tensors are small: a second thread only waits for the first, longer where cores are busy.
    torch.set_num_threads(1)
    slow = {one.path for one in items if one.get_closest_marker("slow")}
    tests = Counter(one.path for one in items)
    items.sort(key=lambda one: (one.path not in slow, -tests[one.path]))


@pytest.fixture(autouse=True)
def first_rank() -> Iterator[None]:
    """A test that stands for another rank does so for itself alone: later ones log as the first."""
    shared: Any = rank_zero_only
    before = getattr(shared, "rank", 0)
    yield
    shared.rank = before


@pytest.fixture(autouse=True)
def levels_of_loggers() -> Iterator[None]:
    """A script that makes Lightning quiet does so for itself alone."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "hydra.utils")]
    before = [one.level for one in loggers]
    yield
    for one, level in zip(loggers, before, strict=True):
        one.setLevel(level)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Variables that a test leaves behind, such as the port of its processes, go with it."""
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)
