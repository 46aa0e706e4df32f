"""The files that commands write and read: private, complete or absent, and never overwritten."""

import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

from service.console import EXIT_USAGE, err, fail
from service.settings import OTHER_USERS

# The file descriptor that pg_dump inherits.
STANDARD_OUTPUT: Final = 1
# The permissions of a file that only its owner can read.
PRIVATE: Final = stat.S_IRUSR | stat.S_IWUSR


@contextmanager
def new_file(name: str, content: str) -> Iterator[Path | None]:
    """Yield a temporary file that gets its name when the block is done; never overwrite another file.

    Args:
        name: the file's name; for -, standard output, None is yielded. A file behind it becomes private too.
        content: a noun for the content, for the warning that others can read it.
    """
    if name == "-":
        output = os.fstat(STANDARD_OUTPUT)
        if stat.S_ISREG(output.st_mode) and output.st_mode & OTHER_USERS:
            try:
                # The shell made the file, with its umask.
                os.fchmod(STANDARD_OUTPUT, PRIVATE)
            except OSError:
                err.print(
                    f"warning: other users can read the file that holds this {content}, and it is not yours: "
                    "let its owner run 'chmod 600' on it now"
                )
        yield None
        return
    path = Path(name).absolute()
    _refuse_existing(path, name)
    try:
        # Only its owner can read it, and its name cannot be guessed.
        descriptor, temporary_name = tempfile.mkstemp(dir=path.parent, prefix=f".{content}-")
    except OSError as error:
        fail(f"cannot write {name}: {error.strerror}")
    os.close(descriptor)
    temporary = Path(temporary_name)
    try:
        yield temporary
        try:
            path.hardlink_to(temporary)
        except OSError as error:
            # Either another process has created it in the meantime, or the file system has no hard links.
            _refuse_existing(path, name)
            try:
                temporary.rename(path)
            except OSError:
                fail(f"cannot write {name}: {error.strerror}")
    finally:
        temporary.unlink(missing_ok=True)
    # The name must survive a power cut too.
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def _refuse_existing(path: Path, name: str) -> None:
    if path.exists():
        fail(f"the file {name} already exists: choose another name", EXIT_USAGE)


def open_file(name: str) -> IO[bytes]:
    """Open a file to read it; - is standard input."""
    try:
        return sys.stdin.buffer if name == "-" else Path(name).open("rb")
    except OSError as error:
        fail(f"cannot read {name}: {error.strerror}")
