"""A backup of the whole database, and its restore, by PostgreSQL's own pg_dump and pg_restore.

Roles belong to the server and are in no dump of a database: a restore makes them first, then everything else in
one transaction, triggers included, so that what was immutable is so from the first moment on.
"""

import asyncio
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

import asyncpg

from service.database.connections import Connection
from service.database.embedded_postgres import EmbeddedPostgresError, wheel_bindir
from service.database.schema import IS_APPLIED, ROLES_SQL, SCHEMA_LOCK, VIEWS, apply_schema
from service.event_log import store as event_store

# Whole words, as a tool answers when asked for its version: "pg_dump (PostgreSQL) 18.1".
_MAJOR: Final = re.compile(r"\(PostgreSQL\) (\d+)")
# In what PGOPTIONS holds.
_TO_ESCAPE: Final = re.compile(r"([ \\])")
# Where Debian and Ubuntu keep the tools of each version.
PACKAGED_BINDIR: Final = "/usr/lib/postgresql/{major}/bin"

# What is no session setting in a connection URL, beside all that begins with ssl, gss and keepalives.
LIBPQ_PARAMETERS: Final = frozenset({
    "host", "hostaddr", "port", "dbname", "user", "passfile", "connect_timeout", "client_encoding", "options",
    "application_name", "tcp_user_timeout", "target_session_attrs", "load_balance_hosts", "channel_binding",
    "require_auth", "requirepeer", "krbsrvname",
})  # fmt: skip

IS_EMPTY: Final = """
    SELECT NOT EXISTS (
        SELECT FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
        WHERE nspname NOT IN ('pg_catalog', 'information_schema') AND nspname NOT LIKE 'pg\\_toast%'
          AND NOT EXISTS (SELECT FROM pg_depend WHERE objid = pg_class.oid AND deptype = 'e')
    )
"""
# As a rebuild holds it: the one waits for the other.
HOLD_REBUILD_LOCK: Final = "SELECT pg_advisory_lock(hashtextextended('rebuild', 0))"
BE_PATIENT: Final = "SET statement_timeout = 0; SET idle_session_timeout = 0"
HOLD_SCHEMA_LOCK: Final = "SELECT pg_advisory_lock($1)"


class BackupError(Exception):
    """No backup was made, or none was restored; the message is one line that says why."""


async def make(connection: Connection, dsn: str, file: Path | None, bindir: Path | None) -> int:
    """Write a dump of the whole database, as it is at one moment, while webhooks go on.

    Args:
        connection: to the database.
        dsn: of the same, by a role that may read everything in it.
        file: where to; None: to standard output.
        bindir: where the tools are; None: wherever those of the server's version are found.

    Returns:
        The position of the log up to which it certainly goes.

    Raises:
        BackupError: there is nothing to back up, or pg_dump is not to be had, or failed.
    """
    if not await connection.fetchval(IS_APPLIED):
        raise BackupError("the database has no schema yet: there is nothing to back up")
    head = await event_store.head_position(connection)
    tool, _ = _tool("pg_dump", connection.get_server_version().major, bindir)
    # Neither what a rebuild has half made, nor a rebuild that swaps tables under the dump.
    await connection.execute(BE_PATIENT)
    await connection.execute(HOLD_REBUILD_LOCK)
    unfinished = [f"--exclude-schema={view.name}_{end}" for view in VIEWS for end in ("next", "old")]
    to = [f"--file={file}"] if file is not None else []
    await _run([tool, "--format=custom", *unfinished, *to], dsn)
    return head


async def restore(connection: Connection, dsn: str, file: IO[bytes], bindir: Path | None) -> int:
    """Make an empty database what it was when a dump was written, and bring it to this release's schema.

    Args:
        connection: to the database.
        dsn: of the same, by a role that may make roles, or has all of them.
        file: the dump.
        bindir: where the tools are; None: wherever those of the server's version are found.

    Returns:
        The position that the log ends with.

    Raises:
        BackupError: something is in the database already, or the dump cannot be restored; nothing was.
        SchemaError: it is restored, and is of a newer release.
    """
    server_major = connection.get_server_version().major
    tool, major = _tool("pg_restore", server_major, bindir)
    # A service that starts meanwhile waits, and then finds the schema. This connection is idle for as long.
    await connection.execute(BE_PATIENT)
    await connection.execute(HOLD_SCHEMA_LOCK, SCHEMA_LOCK)
    if not await connection.fetchval(IS_EMPTY):
        raise BackupError(
            "the database is not empty: a backup is restored into an empty one, such as one that "
            "'serve' would make in another ORDER_TRACKING_STATE_DIR"
        )
    await connection.execute(ROLES_SQL)
    try:
        await _check(tool, file)
        await _run([tool, "--exit-on-error", "--single-transaction"], dsn, stdin=file)
    except BackupError as error:
        # A newer one sets what an older server does not know.
        hint = (
            f"; {tool} is of PostgreSQL {major}, the server of {server_major}" if major != server_major else ""
        )
        raise BackupError(f"{error}{hint}; nothing was restored") from None
    if not await connection.fetchval(IS_APPLIED):
        raise BackupError("what was restored is no backup of this service: empty the database again")
    try:
        await apply_schema(connection)
        # What the planner knows of the tables is in no dump.
        await connection.execute("ANALYZE")
        return await event_store.head_position(connection)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
        raise BackupError(f"everything is restored, but then: {error}; 'migrate' does the rest") from error


async def _check(tool: Path, file: IO[bytes]) -> None:
    """Look whether a dump is one of this service, where it can be read twice."""
    if not file.seekable():
        return
    process = await asyncio.create_subprocess_exec(
        str(tool), "--list", stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    listed, _ = await _ended(process)
    file.seek(0)
    if process.returncode == 0 and b" TABLE public order_events " not in listed:
        raise BackupError("this is the dump of something else")


def _tool(name: str, server_major: int, bindir: Path | None) -> tuple[Path, int]:
    """Find a tool of the server's version, else of a newer one; return it with its version."""
    found: dict[int, Path] = {}
    for folder in _folders(name, server_major) if bindir is None else iter([bindir]):
        try:
            done = subprocess.run(  # noqa: S603 (a program of PostgreSQL's)
                [folder / name, "--version"], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.SubprocessError):
            continue
        if (major := _MAJOR.search(done.stdout)) is not None:
            found.setdefault(int(major[1]), folder / name)
        if server_major in found:
            break
    newest = max(found, default=0)
    if newest < server_major:
        raise BackupError(
            f"there is no {name} of PostgreSQL {server_major} or newer: "
            "set ORDER_TRACKING_PG_BINDIR to the folder of one"
        )
    best = server_major if server_major in found else newest
    return found[best], best


def _folders(name: str, server_major: int) -> Iterator[Path]:
    yield Path(PACKAGED_BINDIR.format(major=server_major))
    if (on_path := shutil.which(name)) is not None:
        yield Path(on_path).parent
    try:
        yield wheel_bindir()
    except EmbeddedPostgresError:
        return


async def _run(command: list[str | Path], dsn: str, stdin: IO[bytes] | None = None) -> None:
    address, secret = for_tools(dsn)
    process = await asyncio.create_subprocess_exec(
        *map(str, command),
        "--no-password",
        f"--dbname={address}",
        stdin=stdin or subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, **secret},
    )
    _, told = await _ended(process)
    if process.returncode:
        said = told.decode(errors="replace").strip().splitlines()
        said = said or [f"{Path(command[0]).name} ended with status {process.returncode}"]
        raise BackupError(next((line for line in said if "error:" in line), said[-1]))


async def _ended(process: asyncio.subprocess.Process) -> tuple[bytes, bytes]:
    """Return what a tool has said once it has ended; ended with us, it would go on by itself."""
    try:
        return await process.communicate()
    except BaseException:
        process.kill()
        await process.wait()
        raise


def for_tools(dsn: str) -> tuple[str, dict[str, str]]:
    """Return a DSN as other users of this machine may see it, and what goes with it by the environment.

    Raises:
        BackupError: it has a secret that there is no way for but a command line.
    """
    parts = urlsplit(dsn)
    address, _, host = parts.netloc.rpartition("@")
    user = address.partition(":")[0]
    environment = {"PGPASSWORD": unquote(parts.password)} if parts.password else {}
    kept: list[tuple[str, str]] = []
    options = []
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name == "password":
            environment["PGPASSWORD"] = value
        elif name == "sslpassword":
            raise BackupError(
                "the URL has an sslpassword, which would be seen: use a key without one, or pg_dump"
            )
        elif name in LIBPQ_PARAMETERS or name.startswith(("ssl", "gss", "keepalives")):
            kept.append((name, value))
        else:
            # Any other is a setting of the session to the service's own driver.
            escaped = _TO_ESCAPE.sub(r"\\\1", value)
            options.append(f"-c {name}={escaped}")
    if options:
        environment["PGOPTIONS"] = " ".join(options)
    query = urlencode(kept, quote_via=quote)
    return f"{parts.scheme}://{user}{'@' if user else ''}{host}{parts.path}?{query}", environment
