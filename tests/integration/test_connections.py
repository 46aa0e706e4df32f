"""Connections whose server freezes: none waits for longer than its limit, and no user can forget the limit."""

import ast
import asyncio
import gc
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import asyncpg
import pytest
from structlog.testing import capture_logs

from projections.postgres import Connection
from service.database import connections
from service.database.connections import DedicatedConnection, LimitedConnection, connect
from service.database.embedded_postgres import NAME, EmbeddedPostgres
from tests.faults.processes import suspend
from tests.faults.standby import PORT, free_address
from tests.support.client import serving_client
from tests.support.databases import FAST_SETTINGS
from tests.support.folders import ROOT, copied_folder
from tests.support.waiting import condition, until_async

OPENS = {"connect", "create_pool", "Pool"}
SILENT = "the database does not respond, so its connections are closed"
SESSIONS = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND application_name = 'order-tracking' AND pid <> pg_backend_pid()
"""


@contextmanager
def frozen(server: EmbeddedPostgres) -> Iterator[None]:
    """Suspend every process of a server for the length of the block."""
    assert server.pid is not None
    stopped = suspend(server.pid)
    try:
        yield
    finally:
        for pid in reversed(stopped):
            os.kill(pid, signal.SIGCONT)


@pytest.fixture
async def freezing(state_template: Path) -> AsyncIterator[EmbeddedPostgres]:
    """Run a server that a test may suspend, since no other test uses it."""
    with copied_folder(state_template) as copy, EmbeddedPostgres(copy, settings=FAST_SETTINGS) as server:
        yield server


def open_connections() -> list[Connection]:
    return [one for one in gc.get_objects() if isinstance(one, asyncpg.Connection) and not one.is_closed()]


async def test_every_connection_of_a_service_is_limited(dsn: str, connection: Connection) -> None:
    """Each session of a running service has a limit for a statement, or a watch. The server has no others."""
    async with serving_client(dsn) as client:
        receipt = await client.webhook("KOM1")
        await client.get(f"/orders/KOM1?after_position={receipt['position']}")
        await client.get(f"/orders/KOM1/timeline?after_position={receipt['position']}")
        await client.raw(b"{}")

        async def are_known() -> bool:
            known = [one for one in open_connections() if one is not connection]
            assert all(isinstance(one, LimitedConnection) for one in known)
            assert all(one.is_watched or one.statement_seconds_max for one in known)  # type: ignore[attr-defined]
            return len(known) >= 10 and await connection.fetchval(SESSIONS) == len(known)

        await until_async(are_known)


def test_no_other_module_opens_connections() -> None:
    """The class above is complete: only ``connections`` calls what opens a connection to PostgreSQL."""
    found = set()
    for package in ("domain", "projections", "service"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and node.attr in OPENS and isinstance(node.value, ast.Name):
                    found |= {path.name} if node.value.id in {"asyncpg", "psycopg"} else set()
    assert found == {"connections.py"}


async def test_a_frozen_server_is_left_at_the_limit_of_a_statement(
    freezing: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit belongs to the connection: its user gives none. It is closed without a cancel request, which
    would wait for the server too, and the next use opens another one. The log names the server once.
    """
    monkeypatch.setattr(connections, "STATEMENT_MARGIN_SECONDS", 0.2)
    monkeypatch.setattr(connections, "_silent_until", {})
    dedicated = [DedicatedConnection(lambda: connect(freezing.dsn, statement_timeout="1s")) for _ in range(3)]

    async def use(one: DedicatedConnection) -> object:
        async with one.connection() as connection:
            return await connection.fetchval("SELECT 1")

    assert [await use(one) for one in dedicated] == [1, 1, 1]
    before = asyncio.all_tasks()
    with frozen(freezing), capture_logs() as logs:
        results = await asyncio.gather(*(use(one) for one in dedicated), return_exceptions=True)
        assert [type(result) for result in results] == [TimeoutError] * 3
        assert open_connections() == []
        # No task is left that waits for the server.
        await until_async(condition(lambda: asyncio.all_tasks() <= before))
    assert [log["event"] for log in logs] == [SILENT]
    assert [await use(one) for one in dedicated] == [1, 1, 1]
    for one in dedicated:
        await one.close()


async def test_a_cancelled_statement_closes_its_connection(
    freezing: EmbeddedPostgres,
) -> None:
    """Whoever cancels a statement of a frozen server waits for nothing, not even in ``close``."""
    connection = await connect(freezing.dsn, statement_timeout="10s")
    with frozen(freezing):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await connection.execute("SELECT 1")
        await connection.close()
        assert connection.is_closed()


async def test_a_statement_that_may_take_long_ends_when_its_server_freezes(
    freezing: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection without a limit is watched: a slow statement goes on, and a frozen server is left."""
    monkeypatch.setattr(connections, "WATCH_SECONDS", 0.1)
    monkeypatch.setattr(connections, "CONNECT_SECONDS_MAX", 0.3)
    connection = await connect(freezing.dsn)
    assert await connection.fetchval("SELECT 1 FROM pg_sleep(1.5)") == 1
    with frozen(freezing), pytest.raises(asyncpg.ConnectionDoesNotExistError):
        await connection.fetchval("SELECT 1")
    assert connection.is_closed()


async def test_a_host_that_vanishes_is_noticed_by_this_side(state_template: Path) -> None:
    """Over TCP, each connection has keepalives of its own, and a limit for what is not acknowledged."""
    address = free_address(Random())
    settings = {**FAST_SETTINGS, "listen_addresses": address}
    with copied_folder(state_template) as copy, EmbeddedPostgres(copy, settings=settings):
        connection = await connect(f"postgresql://{NAME}@{address}:{PORT}/{NAME}")
        end = connection._transport.get_extra_info("socket")  # type: ignore[attr-defined]  # noqa: SLF001
        assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        for name, value in connections.SOCKET_OPTIONS.items():
            assert end.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) == value
        await connection.close()
