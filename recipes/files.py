"""Files that are whole whenever something reads them."""

import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning_stableaa.recipes.errors import UserError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
REFUSED = {errno.ENOTDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT}


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


@contextmanager
def disk_errors(option: str, folder: Path) -> Iterator[None]:
    """A folder that cannot be written to, before the work or in its midst.

    Raises:
        UserError: in place of what the system says, with the option that names the folder.
    """
    try:
        yield
    except OSError as error:
        path = Path(str(error.filename)).absolute()
        within = error.filename is None or path.is_relative_to(folder.absolute())
        named = str(error.filename) in {str(folder), *map(str, folder.parents)}
        if error.errno in FULL or (error.errno in REFUSED and (within or named)):
            raise UserError(
                f"{option}={folder}: {error.strerror}; make room or choose another folder"
            ) from error
        raise
    except RuntimeError as error:  # how torch.save says that the disk is full
        if "PytorchStreamWriter failed" in str(error) or "unexpected pos" in str(error):
            raise UserError(
                f"{option}={folder}: a checkpoint could not be written, the disk may be full; "
                "make room and resume, or choose another folder"
            ) from error
        raise
