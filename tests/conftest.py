"""What tests that touch data stand on: one real PostgreSQL, and a clone of a template for each test."""

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest

from service.app import prepare_database
from service.database import Connection, connect
from service.embedded_postgres import EmbeddedPostgres
from service.http_server import allow_open_files
from service.schema import OWNER_ROLE, SERVICE_ROLE, as_role

# Of 500 slow senders each has a file at both ends.
allow_open_files()

TEMPLATE = "template_with_schema"
DATABASE = "/order_tracking?"


def make_folder() -> Path:
    """A folder that PostgreSQL's own user can reach too, as pytest's own are not when root runs them."""
    folder = Path(tempfile.mkdtemp(prefix="order-tracking-test-"))
    folder.chmod(0o711)
    return folder


def dsn_of(server_dsn: str, database: str) -> str:
    return server_dsn.replace(DATABASE, f"/{database}?")


@pytest.fixture(scope="session")
def server() -> Iterator[EmbeddedPostgres]:
    """The server of the whole run. TEST_PG_BINDIR chooses another PostgreSQL than the wheel's."""
    folder = make_folder()
    bindir = os.environ.get("TEST_PG_BINDIR")
    server = EmbeddedPostgres(
        folder,
        bindir=Path(bindir) if bindir else None,
        # Many small databases: what is measured elsewhere with fsync on is here only waited for.
        settings={
            "fsync": "off",
            "full_page_writes": "off",
            "min_wal_size": "80MB",
            "max_connections": "200",
        },
    )
    server.start()
    asyncio.run(_make_template(server.dsn))
    yield server
    server.stop()
    shutil.rmtree(folder, ignore_errors=True)


async def _make_template(dsn: str) -> None:
    await _administer(dsn, f'CREATE DATABASE "{TEMPLATE}"')
    await prepare_database(dsn_of(dsn, TEMPLATE))


async def _administer(dsn: str, statement: str) -> None:
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


@contextmanager
def database(server: EmbeddedPostgres, template: str = TEMPLATE) -> Iterator[str]:
    """A database of one test's own."""
    name = f"test_{uuid4().hex}"
    asyncio.run(_administer(server.dsn, f'CREATE DATABASE "{name}" TEMPLATE "{template}"'))
    if template == TEMPLATE:
        # A database's own grants do not come with its template.
        grant = f'GRANT CREATE ON DATABASE "{name}" TO {OWNER_ROLE}'
        asyncio.run(_administer(server.dsn, grant))
    yield dsn_of(server.dsn, name)
    asyncio.run(_administer(server.dsn, f'DROP DATABASE "{name}" WITH (FORCE)'))


@pytest.fixture
def empty_dsn(server: EmbeddedPostgres) -> Iterator[str]:
    """A database with nothing in it."""
    with database(server, "template1") as dsn:
        yield dsn


@pytest.fixture
def owner_dsn(server: EmbeddedPostgres) -> Iterator[str]:
    """A database with the schema applied, to be entered as whoever applied it."""
    with database(server) as dsn:
        yield dsn


@pytest.fixture
def dsn(owner_dsn: str) -> str:
    """The same database, entered by the service's own role."""
    return as_role(owner_dsn, SERVICE_ROLE)


@pytest.fixture
async def connection(owner_dsn: str) -> AsyncIterator[Connection]:
    """A connection to this test's database that may do anything."""
    connection = await connect(owner_dsn)
    yield connection
    await connection.close()
