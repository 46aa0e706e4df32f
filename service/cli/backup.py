import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final

import typer

from service.cli.console import EXIT_USAGE, database, err, fail
from service.database.connections import connected
from service.maintenance import backup as backups
from service.settings import OTHER_USERS, read_settings

# The file descriptor that pg_dump inherits.
STANDARD_OUTPUT: Final = 1


async def backup(
    file: Annotated[str, typer.Argument(help="A new dump file; - is standard output.", show_default=False)],
) -> None:
    tools = backups.find_tools(read_settings())
    async with database(as_service=False) as dsn, connected(dsn) as connection:
        with _new_file(file) as dump:
            head = await backups.make(connection, dsn, dump, tools)
    err.print(f"backed up: the log up to position {head} or later, and everything else but the views")


@contextmanager
def _new_file(name: str) -> Iterator[Path | None]:
    """Yield a temporary file that gets its name when the block is done; never overwrite another file."""
    if name == "-":
        output = os.fstat(STANDARD_OUTPUT)
        if stat.S_ISREG(output.st_mode) and output.st_mode & OTHER_USERS:
            err.print(
                "warning: other users can read the file that holds this dump: run 'chmod 600' on it now, and "
                "'umask 077' before your next backup"
            )
        yield None
        return
    path = Path(name).absolute()
    _refuse_existing(path, name)
    try:
        # Only its owner can read it, and its name cannot be guessed.
        descriptor, temporary_name = tempfile.mkstemp(dir=path.parent, prefix=".backup-")
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
