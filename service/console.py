"""Shared by all commands: output, exit codes, error messages, signals, and access to the database."""

import asyncio
import gc
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from datetime import datetime
from functools import partial, wraps
from inspect import iscoroutine
from typing import Any, Final, NoReturn

import asyncpg
import structlog
import typer
import uvloop
from rich.console import Console
from rich.table import Table

from service.database.connections import (
    DedicatedConnection,
    StorageUnavailableError,
    connect,
)
from service.database.embedded_postgres import EmbeddedPostgres, has_data, running_dsn
from service.database.schema import service_dsn
from service.errors import OperatorError
from service.event_log.codec import UndecodableEventError
from service.http.times import to_rfc3339
from service.projecting.projector import OutdatedViewError
from service.projecting.rebuild import RebuildRunningError
from service.settings import CoreSettings, SettingsError

EXIT_FAILURE: Final = 1
EXIT_USAGE: Final = 2
# The width of a table in a pipe or a file.
PIPED_COLUMNS: Final = 200
# New objects between two collections. The default, a few hundred, costs 5 % of the time under load.
GC_OBJECTS: Final = 50_000


def printable(text: str) -> str:
    """Return a text with every unprintable character escaped, so that a terminal does not act on it."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


class _PlainConsole(Console):
    """A console for text of senders: none of it is markup or emoji, and the terminal acts on none of it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, soft_wrap=True, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print texts, escaped as ``printable`` does, or tables, whose cells ``show_table`` escapes."""
        super().print(*(printable(one) if isinstance(one, str) else one for one in objects), **options)


out = _PlainConsole(width=None if sys.stdout.isatty() else PIPED_COLUMNS)
err = _PlainConsole(stderr=True)


def show(line: str) -> None:
    """Print a line."""
    out.print(line)


def fail(message: object, code: int = EXIT_FAILURE) -> NoReturn:
    """Print an error as one line and exit."""
    err.print(" ".join(str(message).splitlines()), style="red")
    raise typer.Exit(code)


@contextmanager
def friendly_errors() -> Iterator[None]:
    """Exit with one line instead of a traceback for every error that an operator can fix."""
    try:
        yield
    except SettingsError as error:
        fail(error, EXIT_USAGE)
    except RebuildRunningError:
        fail("a replay or a backup is already running: try again when it has finished")
    except StorageUnavailableError as error:
        fail(f"the database cannot be used: {error}")
    except asyncpg.LockNotAvailableError:
        fail("the old tables are still being read, perhaps by a dump: try again when that has finished")
    except (asyncpg.PostgresError, asyncpg.InterfaceError, UnicodeError) as error:
        fail(f"the database rejected the command: {str(error).partition(chr(10))[0]}")
    except UndecodableEventError as error:
        fail(f"the log holds an event that cannot be decoded: {error}")
    except (OperatorError, OutdatedViewError) as error:
        fail(error)


def runnable(command: Callable[..., Any]) -> Callable[..., None]:
    """Return a function that runs a command, or the coroutine that it returns, and then exits.

    The exit code is the command's result, 0 for None. An error that an operator can fix is printed as one line.
    """

    @wraps(command)
    def run(**options: Any) -> None:
        with friendly_errors():
            result = command(**options)
            code = uvloop.run(result) if iscoroutine(result) else result
        raise typer.Exit(code or 0)

    return run


@asynccontextmanager
async def database(
    settings: CoreSettings, *, as_service: bool = True, may_create: bool = False
) -> AsyncIterator[str]:
    """Yield the DSN of the configured database; start the embedded one for the block if no service runs it.

    Args:
        settings: the settings.
        as_service: whether to connect as the service's own role instead of the configured one.
        may_create: whether to create an embedded database that does not exist yet.
    """
    # A command's standard output holds its result alone.
    structlog.configure(logger_factory=lambda *_: structlog.PrintLogger(sys.stderr))
    with ExitStack() as stack:
        dsn = settings.own_dsn or running_dsn(settings.state_dir)
        if not dsn:
            if not may_create and not has_data(settings.state_dir):
                fail(
                    f"there is no database in {settings.state_dir} yet: run 'serve' to create one, "
                    "or set ORDER_TRACKING_STATE_DIR or ORDER_TRACKING_DATABASE_URL to an existing one"
                )
            server = EmbeddedPostgres(settings.state_dir, bindir=settings.pg_bindir)
            stack.callback(server.stop)
            # In a thread, so that Ctrl-C interrupts the start.
            await asyncio.to_thread(server.start)
            dsn = server.dsn
        yield await service_dsn(dsn) if as_service else dsn


@asynccontextmanager
async def dedicated(dsn: str) -> AsyncIterator[DedicatedConnection]:
    """Yield a dedicated connection, and close it at the end of the block."""
    connection = DedicatedConnection(partial(connect, dsn))
    try:
        yield connection
    finally:
        await connection.close()


def tune_gc() -> None:
    """Collect garbage less often, and never visit the objects that live as long as the process."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_OBJECTS)


@contextmanager
def stop_event(*signals: signal.Signals) -> Iterator[asyncio.Event]:
    """Yield an event that each of the signals sets instead of its usual effect."""
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    with ExitStack() as stack:
        for number in signals:
            loop.add_signal_handler(number, stopped.set)
            stack.callback(loop.remove_signal_handler, number)
        yield stopped


async def completes(work: Awaitable[object], *interruptions: Awaitable[object]) -> bool:
    """Wait until the work or one of the interruptions is done; return whether the work is done.

    The others are cancelled. If the work failed, its error is raised.
    """
    tasks = [asyncio.ensure_future(one) for one in (work, *interruptions)]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    is_done = tasks[0].done()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    if is_done:
        tasks[0].result()
    return is_done


def show_table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> None:
    """Print a table. Long cells are wrapped, not cut off; None becomes a dash, and times are to the second."""
    table = Table(title=title and printable(title))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(_format, row))
    out.print(table)


def _format(value: object) -> str:
    if isinstance(value, datetime):
        return to_rfc3339(value, "seconds")
    return "-" if value is None else printable(str(value))
