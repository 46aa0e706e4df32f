"""``backup`` and ``restore``."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Any

import typer

from service import backup as backups
from service.backup import BackupError
from service.commands.console import MISUSED, connected, end, err, run_with_database
from service.settings import read_settings


def _file(dash: str) -> Any:
    return typer.Argument(help=f"The dump's file; - is standard {dash}.", show_default=False)


def backup(file: Annotated[str, _file("output")]) -> None:
    """Write a dump of the whole database, while the service goes on."""

    async def work(dsn: str) -> int:
        async with connected(dsn) as connection:
            with _new_file(file) as dump:
                head = await backups.make(connection, dsn, dump, read_settings().pg_bindir)
        err.print(f"backed up: the log up to position {head}, and whatever else there is", markup=False)
        return 0

    with _plain_errors():
        run_with_database(work, as_service=False)


def restore(file: Annotated[str, _file("input")]) -> None:
    """Make an empty database what it was when a dump was written."""

    async def work(dsn: str) -> int:
        async with connected(dsn) as connection:
            with _opened(file) as dump:
                head = await backups.restore(connection, dsn, dump, read_settings().pg_bindir)
        err.print(f"restored: the log ends with position {head}", markup=False)
        err.print(
            "'check' says whether all is in order, 'replay --verify' whether the views are what the log says"
        )
        return 0

    with _plain_errors():
        run_with_database(work, as_service=False, may_make=True)


@contextmanager
def _plain_errors() -> Iterator[None]:
    try:
        yield
    except BackupError as error:
        end(str(error))
    except FileExistsError as error:
        end(f"there is a file {error.filename} already", MISUSED)
    except OSError as error:
        end(f"{error.filename or 'the dump'}: {error.strerror}")


def _opened(name: str) -> IO[bytes]:
    return sys.stdin.buffer if name == "-" else Path(name).open("rb")


@contextmanager
def _new_file(name: str) -> Iterator[Path | None]:
    """Make a file that has its name only once it is whole, and whose name nobody else took meanwhile."""
    if name == "-":
        yield None
        return
    path = Path(name).absolute()
    if path.exists():
        raise FileExistsError(None, None, name)
    try:
        # For its owner alone, and by a name that nobody can have guessed.
        handle, made = tempfile.mkstemp(dir=path.parent, prefix=".backup-")
    except OSError as error:
        raise OSError(error.errno, error.strerror, name) from None
    os.close(handle)
    new = Path(made)
    try:
        yield new
        try:
            path.hardlink_to(new)
        except FileExistsError:
            raise FileExistsError(None, None, name) from None
        except OSError:
            # No hard links here.
            new.rename(path)
    finally:
        new.unlink(missing_ok=True)
    # Its name survives a power cut as well.
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
