"""What every command has in common: where it prints, how it ends, and how it comes by the database."""

import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime
from typing import Any, Final, NoReturn

import asyncpg
import typer
import uvloop
from rich.console import Console
from rich.table import Table

from projections.engine import OutdatedViewError
from projections.rebuild import RebuildRunningError
from service.database.connections import (
    Connection,
    StorageUnavailableError,
    UnsupportedServerError,
    connect,
)
from service.database.embedded_postgres import EmbeddedPostgres, EmbeddedPostgresError, has_data, running_dsn
from service.database.schema import SchemaError, service_dsn
from service.event_log.store import UndecodableEventError
from service.maintenance.backup import BackupError
from service.settings import Settings, SettingsError, read_settings

WRONG: Final = 1
MISUSED: Final = 2

# Into a pipe or a file as wide as it takes.
PIPED_COLUMNS: Final = 200
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else PIPED_COLUMNS)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def end(message: str, code: int = WRONG) -> NoReturn:
    err.print(message, markup=False, style="red")
    raise typer.Exit(code)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Say in one line what an operator can mend."""
    try:
        yield
    except SettingsError as error:
        end(str(error), MISUSED)
    except RebuildRunningError:
        end("a replay is running already, or a backup")
    except (StorageUnavailableError, UnsupportedServerError) as error:
        end(f"the database cannot be used: {error}")
    except asyncpg.LockNotAvailableError:
        end("the tables of before are still being read, by a dump perhaps: try again when that has ended")
    except (asyncpg.PostgresError, asyncpg.InterfaceError, UnicodeError) as error:
        end(f"the database refuses this: {str(error).partition(chr(10))[0]}")
    except UndecodableEventError as error:
        end(f"the log holds an event that cannot be read: {error}")
    except (BackupError, SchemaError, EmbeddedPostgresError, OutdatedViewError) as error:
        end(str(error))


@contextmanager
def database(settings: Settings, *, may_make: bool = False) -> Iterator[str]:
    """Yield the database's DSN: the given one, that of a running service, or of one started for the purpose.

    Args:
        settings: that say which.
        may_make: whether an embedded one that is not there yet is made.
    """
    if settings.database_url:
        yield settings.database_url
    elif (dsn := running_dsn(settings.state_dir)) is not None:
        yield dsn
    elif not may_make and not has_data(settings.state_dir):
        end(
            f"there is no database in {settings.state_dir} yet: 'serve' makes one; "
            "ORDER_TRACKING_STATE_DIR or ORDER_TRACKING_DATABASE_URL name another"
        )
    else:
        with EmbeddedPostgres(settings.state_dir, bindir=settings.pg_bindir) as server:
            yield server.dsn


def run_with_database(
    work: Callable[[str], Coroutine[Any, Any, int]], *, as_service: bool = True, may_make: bool = False
) -> NoReturn:
    """Run a piece of work on the configured database, as the service's role or as given; exit as it says."""

    async def run(dsn: str) -> int:
        return await work(await service_dsn(dsn) if as_service else dsn)

    with plain_errors(), database(read_settings(), may_make=may_make) as dsn:
        code = uvloop.run(run(dsn))
    raise typer.Exit(code)


@asynccontextmanager
async def connected(dsn: str) -> AsyncIterator[Connection]:
    connection = await connect(dsn)
    try:
        yield connection
    finally:
        await connection.close()


def make_table(*columns: str) -> Table:
    """A table that folds what is too long for the terminal, and never cuts it."""
    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def time_text(time: datetime | None) -> str:
    return "-" if time is None else time.isoformat(timespec="seconds")
