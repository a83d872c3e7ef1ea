"""Fixtures of the tests in several processes."""

from collections.abc import Iterator

import pytest

from tests.helpers.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Two processes, started once."""
    pool = Ranks(2)
    yield pool
    pool.close()
