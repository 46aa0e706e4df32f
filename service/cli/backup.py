"""``backup`` and ``restore``."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Any

import typer

from service.cli.console import MISUSED, connected, end, err, run_with_database
from service.maintenance import backup as backups
from service.settings import read_settings


def _file(dash: str) -> Any:
    return typer.Argument(help=f"The dump's file; - is standard {dash}.", show_default=False)


def backup(file: Annotated[str, _file("output")]) -> None:
    async def work(dsn: str) -> int:
        async with connected(dsn) as connection:
            with _new_file(file) as dump:
                head = await backups.make(connection, dsn, dump, read_settings().pg_bindir)
        err.print(
            f"backed up: the log up to position {head} at least, and whatever else there is", markup=False
        )
        return 0

    run_with_database(work, as_service=False)


def restore(file: Annotated[str, _file("input")]) -> None:
    async def work(dsn: str) -> int:
        async with connected(dsn) as connection:
            with _opened(file) as dump:
                head = await backups.restore(connection, dsn, dump, read_settings().pg_bindir)
        err.print(f"restored: the log ends with position {head}", markup=False)
        err.print(
            "'check' says whether all is in order, 'replay --verify' whether the views are what the log says"
        )
        return 0

    run_with_database(work, as_service=False, may_make=True)


def _opened(name: str) -> IO[bytes]:
    try:
        return sys.stdin.buffer if name == "-" else Path(name).open("rb")
    except OSError as error:
        end(f"{name}: {error.strerror}")


@contextmanager
def _new_file(name: str) -> Iterator[Path | None]:
    """Make a file that has its name only once it is whole, and whose name nobody else took meanwhile."""
    if name == "-":
        yield None
        return
    path = Path(name).absolute()
    _refuse_taken(path, name)
    try:
        # For its owner alone, and by a name that nobody can have guessed.
        handle, made = tempfile.mkstemp(dir=path.parent, prefix=".backup-")
    except OSError as error:
        end(f"{name}: {error.strerror}")
    os.close(handle)
    new = Path(made)
    try:
        yield new
        _refuse_taken(path, name)
        try:
            path.hardlink_to(new)
        except OSError as error:
            # Taken in this very moment, or there are no hard links here.
            _refuse_taken(path, name)
            try:
                new.rename(path)
            except OSError:
                end(f"{name}: {error.strerror}")
    finally:
        new.unlink(missing_ok=True)
    # Its name survives a power cut as well.
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def _refuse_taken(path: Path, name: str) -> None:
    if path.exists():
        end(f"there is a file {name} already", MISUSED)
