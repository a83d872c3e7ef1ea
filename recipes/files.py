"""Files that are whole whenever something reads them."""

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def write_atomically(path: Path, contents: str | bytes) -> None:
    """Leaves the old file or the whole new one, whenever it is interrupted.

    Creates the folders above ``path``. A write that fails leaves no temporary file either.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # in the same folder: a rename across file systems would be a copy
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("wb") as file:
            file.write(contents if isinstance(contents, bytes) else contents.encode())
            file.flush()
            os.fsync(file.fileno())  # or a machine that stops may keep the name without the data
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder is this process's alone, as far as others ask in the same way.

    Raises:
        BlockingIOError: it is another process's.
    """
    path = folder / ".lock"
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
