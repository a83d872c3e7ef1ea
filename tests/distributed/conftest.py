"""Fixtures of the tests in several processes."""

from collections.abc import Iterator

import pytest

from tests.helpers.ranks import Ranks


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """Two processes, started once for the tests of a module."""
    pool = Ranks(2)
    yield pool
    pool.close()
