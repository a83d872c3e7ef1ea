"""Files that are whole whenever something reads them."""

import os
import secrets
from contextlib import suppress
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
