"""The fixtures of all tests: one real PostgreSQL server, cloned databases, and real services."""

import asyncio
import gc
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import uuid4

import coverage
import pytest

from projections.postgres import Connection
from service.database.connections import connect
from service.database.embedded_postgres import EmbeddedPostgres
from service.database.schema import SERVICE_ROLE, as_role, prepare_database
from service.features import SWITCHED
from service.http.server import raise_open_files_limit
from tests.support import leftovers
from tests.support.client import Client, serving_client
from tests.support.databases import FAST_SETTINGS, TestServer
from tests.support.folders import copied_folder, temporary_folder
from tests.support.processes import RunningService, measured_service, running_service

# Some tests hold hundreds of connections, with both ends in one process.
raise_open_files_limit()


def pytest_configure(config: pytest.Config) -> None:
    """Give the run its own temporary directory, and its child processes default signals."""
    leftovers.begin(config)


def pytest_collection_finish() -> None:
    """Exclude the imported modules from garbage collection, so that a collection after each test is quick."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run if it left processes, files or changes behind.

    The measured coverage is saved here: pytest-xdist kills a worker whose exit takes long, and all of its
    coverage would be lost.
    """
    leftovers.end(session)
    if (measured := coverage.Coverage.current()) is not None:
        measured.save()


@pytest.fixture(autouse=True)
def _collected_garbage(request: pytest.FixtureRequest) -> Iterator[None]:
    """Collect garbage after each test, so that an unclosed resource fails the test that left it."""
    yield
    # Tests without an event loop, a database or a service open no resources.
    if "state_template" in request.fixturenames or request.node.get_closest_marker("asyncio") is not None:
        gc.collect()


@pytest.fixture(autouse=True)
def _own_state_dir(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test its own folder for the key of the history, which a service of this process may make."""
    folder = tmp_path_factory.getbasetemp() / f"state-{uuid4().hex}"
    monkeypatch.setenv("ORDER_TRACKING_STATE_DIR", str(folder))


@pytest.fixture(scope="module")
def all_features() -> Iterator[None]:
    """Switch every feature on in a module's tests, also for the processes that they start."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("ORDER_TRACKING_FEATURES", ",".join(SWITCHED))
        yield


@pytest.fixture(scope="session")
def state_template() -> Iterator[Path]:
    """Make a state folder whose database has the schema. Tests get copies of it."""
    with temporary_folder() as folder:
        with EmbeddedPostgres(folder / "state", settings=FAST_SETTINGS) as server:
            asyncio.run(prepare_database(server.dsn))
        yield folder / "state"


@pytest.fixture(scope="session")
def server(state_template: Path) -> Iterator[TestServer]:
    """Run the PostgreSQL server of the tests. TEST_PG_BINDIR selects another PostgreSQL than the
    embedded one.
    """
    with temporary_folder() as folder, copied_folder(state_template) as copy:
        bindir = os.environ.get("TEST_PG_BINDIR")
        server = TestServer(folder / "state", Path(bindir)) if bindir else TestServer(copy, None)
        server.start()
        yield server
        server.stop()


@pytest.fixture
def empty_dsn(server: TestServer) -> Iterator[str]:
    """Return the DSN of an empty database."""
    with server.database("template1") as dsn:
        yield dsn


@pytest.fixture
def owner_dsn(server: TestServer) -> Iterator[str]:
    """Return the DSN of a database with the schema, for the role that applied the schema."""
    with server.database() as dsn:
        yield dsn


@pytest.fixture
def dsn(owner_dsn: str) -> str:
    """Return the DSN of the same database for the service's own role."""
    return as_role(owner_dsn, SERVICE_ROLE)


@pytest.fixture
async def connection(owner_dsn: str) -> AsyncIterator[Connection]:
    """Return a connection to this test's database with all rights."""
    connection = await connect(owner_dsn)
    yield connection
    await connection.close()


@pytest.fixture
async def client(dsn: str) -> AsyncIterator[Client]:
    """Return a client of an application that serves this test's database."""
    async with serving_client(dsn) as client:
        yield client


@pytest.fixture
def state_dir(state_template: Path) -> Iterator[Path]:
    """Return the test's own state folder, in which a service has already run."""
    with copied_folder(state_template) as copy:
        yield copy


@pytest.fixture
def service(state_dir: Path) -> Iterator[RunningService]:
    """Run a service process for this test alone."""
    with running_service(state_dir) as service:
        yield service


@pytest.fixture(scope="session")
def shared_service(state_template: Path) -> Iterator[RunningService]:
    """Run a service process for tests that neither stop it nor count all of its events."""
    with copied_folder(state_template) as copy, measured_service(copy) as service:
        yield service
