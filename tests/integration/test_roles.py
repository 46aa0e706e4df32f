"""The database's own rules: the rights of each role, erasure, and the findings of ``check``."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import asyncpg
import pytest

from domain.order import Order
from projections.postgres import Connection
from projections.views import VIEWS
from service.database.connections import DedicatedConnection, connect
from service.database.schema import OWNER_ROLE, SERVICE_ROLE, as_role, prepare_database, service_dsn
from service.event_log import store
from service.event_log.follow import Log
from service.features.settings import Settings
from service.listening import serving
from service.maintenance.check import check_database
from service.projecting.replay import rebuild_views
from tests.support.client import Client
from tests.support.reports import report

LOGGED = ("order_events", "idempotency_keys", "quarantine", "api_keys", "erasures", "schema_version")


@asynccontextmanager
async def acting(owner_dsn: str, role: str) -> AsyncIterator[Connection]:
    """Open a connection with the service's own login, or one that acts as another role."""
    dsn = await service_dsn(owner_dsn) if role == SERVICE_ROLE else as_role(owner_dsn, role)
    connection = await connect(dsn)
    yield connection
    await connection.close()


async def fill(connection: Connection) -> None:
    """Insert an event, keys and a quarantine entry, so that a permitted statement changes some row."""
    await store.append(connection, [Order.new("KOM1").report(report("KOM1"))])
    await connection.execute(
        "INSERT INTO quarantine (body, reason, received_at, last_seen_at) VALUES ('x', 'y', now(), now())"
    )
    await connection.execute("INSERT INTO idempotency_keys VALUES ('KOM1', 'k', 1, '')")
    await connection.execute(
        "INSERT INTO api_keys (name, scope, secret_sha256) VALUES ('a', 'read', sha256(''))"
    )


INSERT = "INSERT INTO order_events (originator_id, originator_version, topic, state"
# The test server runs without these settings, for speed.
NOT_DURABLE = {"fsync is off", "full_page_writes is off"}


async def wrong(dsn: str) -> list[str]:
    """Return the problems that ``check`` finds, except the settings that the tests turn off."""
    found = [finding.text for finding in await check_database(dsn) if finding.kind == "WRONG"]
    return [text for text in found if text not in NOT_DURABLE]


CHANGES = [
    *(f"DELETE FROM {table}" for table in LOGGED),  # noqa: S608 - our names
    *(f"TRUNCATE {table} CASCADE" for table in LOGGED),
    *(f"DROP TABLE {table} CASCADE" for table in LOGGED),
    *(f"ALTER TABLE {table} ADD COLUMN more text" for table in LOGGED),
    "UPDATE order_events SET state = ''",
    "UPDATE order_events SET recorded_at = now()",
    "UPDATE idempotency_keys SET version = 1",
    "UPDATE schema_version SET version = 1",
    "INSERT INTO schema_version VALUES (99)",
    "INSERT INTO erasures (order_no, reason, events, entries) VALUES ('KOM1', 'x', 0, 0)",
    f"{INSERT}, recorded_at) VALUES ('KOM2', 1, '', '', '2020-01-01')",
    f"{INSERT}, notification_id) OVERRIDING SYSTEM VALUE VALUES ('KOM2', 1, '', '', 7)",
    "SELECT setval(pg_get_serial_sequence('order_events', 'notification_id'), 1)",
    "ALTER TABLE order_events DISABLE TRIGGER ALL",
    "DROP TRIGGER order_events_immutable ON order_events",
    "CREATE OR REPLACE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
    "CREATE OR REPLACE FUNCTION lock_order_events() RETURNS void LANGUAGE plpgsql AS 'BEGIN END'",
    "CREATE RULE silent AS ON INSERT TO order_events DO INSTEAD NOTHING",
    "CREATE TABLE public.order_events_2 (x int)",
    "BEGIN; LOCK TABLE order_events IN ACCESS EXCLUSIVE MODE",
    "SET session_replication_role = replica",
    "CALL erase_order('KOM1', 'because')",
    "CREATE SCHEMA order_tracking_owner",
    "CREATE SCHEMA of_mine",
    "SELECT make_view_schema('order_tracking_owner')",
    "SELECT make_view_schema('order_tracking')",
    "SELECT swap_view_schemas('public')",
    "UPDATE quarantine SET body = ''",
    "UPDATE quarantine SET reason = ''",
    "UPDATE api_keys SET secret_sha256 = sha256('other')",
    "UPDATE api_keys SET scope = 'admin'",
    "INSERT INTO view_names VALUES ('public')",
]


FORBIDDEN = {
    SERVICE_ROLE: (*CHANGES, f"SET ROLE {OWNER_ROLE}", "SET ROLE order_tracking"),
}


@pytest.mark.parametrize("role", FORBIDDEN)
async def test_a_role_cannot_make_forbidden_changes(owner_dsn: str, connection: Connection, role: str) -> None:
    """The server refuses each statement for a missing privilege, and no row changes."""
    await fill(connection)
    before = await everything(connection)
    async with acting(owner_dsn, role) as acting_connection:
        for statement in FORBIDDEN[role]:
            try:
                await acting_connection.execute(statement)
            except (asyncpg.InsufficientPrivilegeError, asyncpg.GeneratedAlwaysError):
                await acting_connection.execute("ROLLBACK")
            else:
                pytest.fail(f"{role} may {statement}")
            assert await everything(connection) == before, statement


async def everything(connection: Connection) -> list[str]:
    return [str(await connection.fetchval(f"SELECT array_agg({table}::text) FROM {table}")) for table in LOGGED]  # noqa: S608 - our own names


@pytest.mark.parametrize(
    "statement",
    ["UPDATE order_events SET state = ''", "DELETE FROM order_events", "TRUNCATE order_events CASCADE"],
)
async def test_not_even_the_owner_changes_an_event(
    owner_dsn: str, connection: Connection, statement: str
) -> None:
    """The triggers also hold for the owner, and during a restore."""
    await fill(connection)
    async with acting(owner_dsn, OWNER_ROLE) as owner:
        with pytest.raises(asyncpg.IntegrityConstraintViolationError):
            await owner.execute(statement)
    await connection.execute("SET session_replication_role = replica")
    with pytest.raises(asyncpg.IntegrityConstraintViolationError):
        await connection.execute(statement)


async def test_the_service_owns_the_views_and_nothing_of_the_log(connection: Connection) -> None:
    """The owner owns the log's tables, and the service owns the views' tables."""
    owners = await connection.fetch(
        "SELECT schemaname, tableowner FROM pg_tables "
        "WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"
    )
    assert {tuple(row) for row in owners} == {
        ("public", OWNER_ROLE),
        *((view.name, SERVICE_ROLE) for view in VIEWS),
    }


async def test_the_service_can_take_the_append_lock(dsn: str) -> None:
    """The service can take the append lock without the right to LOCK TABLE."""
    held = DedicatedConnection(lambda: connect(dsn))
    async with held.transaction(store.BEGIN_LOCKED) as connection:
        await store.take_append_lock(connection)
        locks = await connection.fetch(
            "SELECT mode FROM pg_locks "
            "WHERE relation = 'public.order_events'::regclass AND pid = pg_backend_pid()"
        )
        assert ("RowExclusiveLock",) in {tuple(lock) for lock in locks}
    await held.close()


async def test_erasure_removes_the_senders_data_and_is_recorded(owner_dsn: str, connection: Connection) -> None:
    """Erasure removes an order's bodies and addresses, and keeps its verdicts, its views and the log's
    protection.
    """
    body = {"order_no": "KOM1", "status": "Dikirim", "cnote": "AWB1", "buyer": "Siti", "text": '\u0000 "q" é'}
    dsn = await service_dsn(owner_dsn)
    async with serving(Settings(port=0), dsn) as (port, _), aiohttp.ClientSession() as session:
        client = Client(session, port)
        await client.webhook(**body)
        await client.webhook("KOM2", buyer="Budi")
        odd = await client.raw(b"not json")
        # Simulate a body that a later release of the parser can read.
        await connection.execute(
            "UPDATE quarantine SET body = $1", b'{"order_no":"KOM1","status":"Diterima","buyer":"Siti"}'
        )
        last = await client.session.post(f"http://127.0.0.1:{port}/quarantine/{odd['quarantine_id']}/retry")
        at = f"after_position={(await last.json())['position']}"
        before = await client.get(f"/orders/KOM1/timeline?{at}")
        async with acting(owner_dsn, OWNER_ROLE) as owner:
            await owner.execute("CALL public.erase_order('KOM1', 'asked for by the buyer')")
            with pytest.raises(asyncpg.NoDataFoundError):
                await owner.execute("CALL public.erase_order('KOM77', 'a slip of the pen')")
        assert await client.get("/orders/KOM1/timeline") == before
        events = (await client.get("/orders/KOM1/events"))["events"]
        assert [(event["data"]["body"], event["data"]["remote"]) for event in events] == [("", None)] * 2
        assert [event["data"]["status"] for event in events] == ["in_transit", "delivered"]
        assert "Budi" in json.dumps(await client.get("/orders/KOM2/events"))
        entry = await client.get(f"/quarantine/{odd['quarantine_id']}")
        assert (entry["state"], entry["remote"], entry["body_base64"]) == ("retried", None, None)
        # The next report of the order is decided from the remaining fields.
        assert (await client.webhook("KOM1", "Diterima"))["outcome"] == "repeated"
    everything_left = json.dumps(
        [str(row) for row in await connection.fetch("SELECT state, * FROM order_events")]
    )
    assert "Siti" not in everything_left
    held = DedicatedConnection(lambda: connect(dsn))
    rebuilt = await rebuild_views(dsn, VIEWS, Log(held), lambda _done, _total: None, verify=True)
    await held.close()
    assert [one.differences for one in rebuilt] == [0, 0, 0]
    recorded = await connection.fetch("SELECT order_no, erased_by, reason, events, entries FROM erasures")
    assert [tuple(row) for row in recorded] == [("KOM1", "order_tracking", "asked for by the buyer", 2, 1)]
    with pytest.raises(asyncpg.IntegrityConstraintViolationError):
        await connection.execute("DELETE FROM order_events")
    assert not await wrong(owner_dsn)


async def test_a_database_of_one_role_works_and_check_reports_the_risks(empty_dsn: str) -> None:
    """A single role without the right to create roles can serve and rebuild, and ``check`` reports
    the risks.
    """
    admin = await connect(empty_dsn)
    name = await admin.fetchval("SELECT current_database()")
    await admin.execute(
        f"DROP ROLE IF EXISTS lonely; CREATE ROLE lonely LOGIN; ALTER DATABASE {name} OWNER TO lonely"
    )
    try:
        dsn = empty_dsn.replace("user=order_tracking", "user=lonely")
        assert await prepare_database(dsn) == dsn
        async with serving(Settings(port=0), dsn) as (port, _), aiohttp.ClientSession() as session:
            client = Client(session, port)
            receipt = await client.webhook("KOM1")
            await client.get(f"/orders/KOM1?after_position={receipt['position']}")
        held = DedicatedConnection(lambda: connect(dsn))
        await rebuild_views(dsn, VIEWS, Log(held), lambda _done, _total: None)
        await held.close()
        assert not await wrong(dsn)
        findings = await check_database(dsn)
        (note,) = [finding.text for finding in findings if "not protected" in finding.text]
        assert "owns the log" in note
        assert "may change or remove events" in note
    finally:
        await admin.execute(
            f"ALTER DATABASE {name} OWNER TO order_tracking; REASSIGN OWNED BY lonely TO order_tracking"
        )
        await admin.execute("DROP OWNED BY lonely; DROP ROLE lonely")
        await admin.close()


async def test_check_finds_the_log_protected_with_three_roles(owner_dsn: str) -> None:
    """With the owner's and with the service's DSN, ``check`` reports that the service can only add events."""
    for dsn in (owner_dsn, await service_dsn(owner_dsn)):
        texts = [finding.text for finding in await check_database(dsn)]
        assert f"the service runs as {SERVICE_ROLE}" in texts
        assert "the service can add to the log, but neither change nor remove events" in texts


async def test_check_finds_triggers_that_a_restore_left_weaker(owner_dsn: str, connection: Connection) -> None:
    """A trigger that is enabled, but not ENABLE ALWAYS, is reported as wrong."""
    await connection.execute("ALTER TABLE order_events ENABLE TRIGGER order_events_immutable")
    (fault,) = await wrong(owner_dsn)
    assert fault == (
        "the schema differs from this release's: state of trigger order_events_immutable of order_events is "
        "'not ENABLE ALWAYS' instead of 'ENABLE ALWAYS'"
    )


async def test_a_restored_database_gets_its_own_grant_again(owner_dsn: str, connection: Connection) -> None:
    """A missing grant on the database, which no dump contains, is reported by ``check`` and added
    by a start.
    """
    name = await connection.fetchval("SELECT current_database()")
    await connection.execute(f'REVOKE CREATE ON DATABASE "{name}" FROM {OWNER_ROLE}')
    assert await wrong(owner_dsn)
    await prepare_database(owner_dsn)
    assert not await wrong(owner_dsn)
