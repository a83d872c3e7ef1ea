"""Files are written whole, or not at all."""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lightning_stableaa.recipes import files
from lightning_stableaa.recipes.files import write_atomically


@contextmanager
def no_file_longer_than(length: int) -> Iterator[None]:
    """A disk on which a file can grow to ``length`` bytes: what follows fails like a full one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (length, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_write_replaces_old_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.txt"
    write_atomically(path, "first")
    write_atomically(path, "größer")
    assert path.read_text(encoding="utf-8") == "größer"
    write_atomically(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert list(path.parent.iterdir()) == [path]


def test_write_full_disk_keeps_old_file(tmp_path: Path) -> None:
    path = tmp_path / "results.txt"
    write_atomically(path, "old")
    with no_file_longer_than(1000), pytest.raises(OSError, match="File too large"):
        write_atomically(path, "new" * 1000)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_recipes_write_files_atomically_only() -> None:
    # lines are appended to a worker's log; metrics and events are appended to by Lightning
    allowed = {("files.py", '.open("w'), ("runner.py", '.open("w')}
    writers = (
        "write_text(",
        "write_bytes(",
        ".savefig(path",
        "OmegaConf.save(",
        "json.dump(",
        '.open("w',
    )
    found = [
        (path.name, writer)
        for path in Path(files.__file__).parent.rglob("*.py")
        for writer in writers
        if writer in path.read_text() and (path.name, writer) not in allowed
    ]
    assert found == []
