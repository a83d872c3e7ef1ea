"""Files are written whole, or not at all."""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lightning_stableaa.recipes import files
from lightning_stableaa.recipes.files import write_atomically
from lightning_stableaa.recipes.pictures import figure


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


def test_text_and_bytes_replace_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.txt"
    write_atomically(path, "first")
    write_atomically(path, "größer")
    assert path.read_text(encoding="utf-8") == "größer"
    write_atomically(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_midway_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "results.txt"
    write_atomically(path, "old")
    with no_file_longer_than(1000), pytest.raises(OSError, match="File too large"):
        write_atomically(path, "new" * 1000)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interruption_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "results.txt", "new")
    assert list(tmp_path.iterdir()) == []


def test_a_picture_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "pictures" / "loss.png"
    with figure(path) as (_, axes):
        axes.plot([1, 2])
    whole = path.read_bytes()
    assert whole.startswith(b"\x89PNG")

    def draw_on_a_full_disk() -> None:
        with no_file_longer_than(1000), figure(path) as (_, axes):
            axes.plot([2, 1])

    with pytest.raises(OSError, match="File too large"):
        draw_on_a_full_disk()
    assert path.read_bytes() == whole
    assert list(path.parent.iterdir()) == [path]


def test_nothing_else_in_the_recipes_writes_files() -> None:
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
