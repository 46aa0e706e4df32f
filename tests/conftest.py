"""Fixtures of all tests: one real PostgreSQL, cloned databases, real services, and nothing left behind."""

import asyncio
import gc
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from projections.postgres_errors import Connection
from service.database.connections import connect
from service.database.embedded_postgres import EmbeddedPostgres
from service.database.schema import SERVICE_ROLE, as_role, prepare_database
from service.http.server import raise_open_files_limit
from tests.support import leftovers
from tests.support.client import Client, serving_client
from tests.support.databases import FAST_SETTINGS, TestServer
from tests.support.folders import copied_folder, temporary_folder
from tests.support.processes import RunningService, measured_service, running_service

# Some tests hold hundreds of connections, with both ends in one process.
raise_open_files_limit()


def pytest_configure(config: pytest.Config) -> None:
    """Give the run a temporary directory of its own, and its children default signals."""
    leftovers.begin(config)


def pytest_collection_finish() -> None:
    """Set the modules aside, so that collecting the garbage of each test is quick."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run if it left processes, files or changes behind."""
    leftovers.end(session)


@pytest.fixture(autouse=True)
def _collected_garbage(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let an unclosed connection, session or process fail the test that left it, not a later one."""
    yield
    # Tests without an event loop, a database or a service open nothing.
    if "state_template" in request.fixturenames or request.node.get_closest_marker("asyncio") is not None:
        gc.collect()


@pytest.fixture(scope="session")
def state_template() -> Iterator[Path]:
    """A state folder whose database has the schema. Tests get copies."""
    with temporary_folder() as folder:
        with EmbeddedPostgres(folder / "state", settings=FAST_SETTINGS) as server:
            asyncio.run(prepare_database(server.dsn))
        yield folder / "state"


@pytest.fixture(scope="session")
def server(state_template: Path) -> Iterator[TestServer]:
    """The test run's PostgreSQL. TEST_PG_BINDIR chooses another one than the embedded one."""
    with temporary_folder() as folder, copied_folder(state_template) as copy:
        bindir = os.environ.get("TEST_PG_BINDIR")
        server = TestServer(folder / "state", Path(bindir)) if bindir else TestServer(copy, None)
        server.start()
        yield server
        server.stop()


@pytest.fixture
def empty_dsn(server: TestServer) -> Iterator[str]:
    """A database with nothing in it."""
    with server.database("template1") as dsn:
        yield dsn


@pytest.fixture
def owner_dsn(server: TestServer) -> Iterator[str]:
    """A database with the schema, for the role that applied it."""
    with server.database() as dsn:
        yield dsn


@pytest.fixture
def dsn(owner_dsn: str) -> str:
    """The same database, for the service's own role."""
    return as_role(owner_dsn, SERVICE_ROLE)


@pytest.fixture
async def connection(owner_dsn: str) -> AsyncIterator[Connection]:
    """A connection to this test's database that may do anything."""
    connection = await connect(owner_dsn)
    yield connection
    await connection.close()


@pytest.fixture
async def client(dsn: str) -> AsyncIterator[Client]:
    """A client of an application that serves this test's database."""
    async with serving_client(dsn) as client:
        yield client


@pytest.fixture
def state_dir(state_template: Path) -> Iterator[Path]:
    """A test's own state folder, in which a service has run before."""
    with copied_folder(state_template) as copy:
        yield copy


@pytest.fixture
def service(state_dir: Path) -> Iterator[RunningService]:
    """A test's own service process."""
    with running_service(state_dir) as service:
        yield service


@pytest.fixture(scope="session")
def shared_service(state_template: Path) -> Iterator[RunningService]:
    """A service process for tests that neither stop it nor count all of its events."""
    with copied_folder(state_template) as copy, measured_service(copy) as service:
        yield service
