"""A log is moved with every row, byte and number, or not at all, and the old database is marked."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import asyncpg
import pytest

from projections.postgres import Connection
from projections.views import VIEWS
from service.database.connections import UnsupportedServerError, connect, connected
from service.database.embedded_postgres import EmbeddedPostgres
from service.database.log_identity import read_log_id
from service.database.schema import SERVICE_ROLE, SchemaError, as_role, prepare_database, service_dsn
from service.event_log import store
from service.maintenance.move import NOT_COPIED, TABLES, Moved, MoveError, move_log
from tests.support.databases import TestServer
from tests.support.folders import temporary_folder

pytestmark = pytest.mark.usefixtures("all_features")

OLD_BINDIR: Final = Path("/usr/lib/postgresql/15/bin")
ROWS: Final = "SELECT * FROM public.{} ORDER BY 1, 2"
SEQUENCES: Final = "SELECT sequencename, last_value FROM pg_sequences WHERE schemaname = 'public'"
DEFINITION: Final = "SELECT definition FROM {}.projection"
APPEND: Final = """
    INSERT INTO order_events (originator_id, originator_version, topic, state) VALUES ('KOM9', 1, '', '')
    RETURNING notification_id
"""
# Positions and versions have gaps, some bytes are not UTF-8, and times have microseconds.
FILL: Final = r"""
    UPDATE log_identity SET log_id = gen_random_uuid();
    INSERT INTO order_events (notification_id, originator_id, originator_version, topic, state, recorded_at)
    OVERRIDING SYSTEM VALUE VALUES
        (2, 'KOM1', 1, 'status',
            convert_to('{"a": "\u0000 \ud800 é", "b" : 1.10}', 'UTF8'), '2026-01-01 00:00:00.000001'),
        (3, 'KOM/2 "x"', 1, 'another', '\x00ff80', '2026-01-01 12:00'),
        (7, 'KOM1', 2, 'status', '', '1999-12-31'),
        (9, 'KOM1', 5, 'status', convert_to(E'line\nbreak\u2028', 'UTF8'), '2026-01-02');
    INSERT INTO log_times VALUES (0, '2026-01-02'), (1, '-infinity');
    INSERT INTO idempotency_keys VALUES ('KOM1', 'a key', 1, '\xff00'), ('KOM1', 'Key', 5, '');
    INSERT INTO api_keys (name, scope, secret_sha256, expires_at, revoked_at) VALUES
        ('one', 'read', sha256('1'), NULL, NULL), ('two', 'admin', sha256('2'), now(), now());
    INSERT INTO sessions (session_sha256, key_name) VALUES (sha256('s'), 'one');
    INSERT INTO operations (via, actor, action, subject) VALUES ('cli', NULL, 'key_created', 'one');
    INSERT INTO handled_contradictions VALUES ('KOM1', 2, 1);
    INSERT INTO revoked_shares VALUES ('a', now());
    INSERT INTO erasures (order_no, reason, events, entries) VALUES ('KOM1', 'asked', 1, 0);
    INSERT INTO quarantine
        (body, reason, state, received_at, last_seen_at, resolved_at, discard_reason, order_no, version)
    VALUES ('\x00fe', 'r', 'open', now(), now(), NULL, NULL, NULL, NULL),
        (NULL, 'r', 'discarded', now(), now(), now(), 'erased', NULL, NULL),
        ('deleted', 'r', 'open', now(), now(), NULL, NULL, NULL, NULL);
    DELETE FROM quarantine WHERE quarantine_id = 3;
    INSERT INTO subscriptions
        (url, verdicts, statuses, include, secret, log_id, position, responses)
    SELECT 'https://shop.example', '{advanced}', '{}', '{"a b", "c,d"}', 'whsec_s', log_id, 7, '[5]'
    FROM log_identity;
    INSERT INTO held_orders (subscription_id, order_no, version, position, held_since, attempts)
    SELECT subscription_id, 'KOM1', 2, 7, now(), 3 FROM subscriptions;
    INSERT INTO history_trees VALUES (1, 'header', now());
    INSERT INTO history_tiles VALUES (1, 0, 0, sha256('a') || sha256('b'));
    INSERT INTO history_salts VALUES (0, substr(sha256('s'), 1, 16));
    INSERT INTO history_commitments VALUES (2, sha256('c'), NULL);
    INSERT INTO history_checkpoints VALUES (1, 2, 'note');
    SELECT setval('order_events_notification_id_seq', 12);
"""


@pytest.fixture
def target_dsn(server: TestServer) -> Iterator[str]:
    """Return the DSN of a second database with the schema, for the role that applied the schema."""
    with server.database() as dsn:
        yield dsn


async def move(source: Connection, target: Connection) -> Moved:
    """Move the log, without a progress bar."""
    return await move_log(source, target, "db2.example:5432", lambda *_: None)


async def content(connection: Connection) -> dict[str, Any]:
    """Return every row of every table that is moved, the log's id, and the last number of each sequence."""
    names = [name for name, *_ in await connection.fetch(TABLES, NOT_COPIED)]
    rows = {name: await connection.fetch(ROWS.format(name)) for name in names}
    identity = await connection.fetchval("SELECT log_id FROM log_identity")
    return {**rows, "log_id": identity, "sequences": {*await connection.fetch(SEQUENCES)}}


async def assert_is_moved(connection: Connection, before: dict[str, Any]) -> None:
    """Check that a database has a moved log, with outdated views, and gives the next position."""
    assert await content(connection) == before
    for view in VIEWS:
        assert await connection.fetchval(DEFINITION.format(view.name)) == ""
    assert await connection.fetchval("SELECT current_user") == "order_tracking"
    assert await connection.fetchval(APPEND) == 13


async def test_everything_is_moved(connection: Connection, owner_dsn: str, target_dsn: str) -> None:
    """Each row of each table, each sequence and the log's id is as before. A new table must be filled here.

    No service can start on the old database, and no connection of a running one is accepted.
    """
    await connection.execute(FILL)
    before = await content(connection)
    assert all(before.values())
    async with connected(target_dsn) as target:
        moved = await move(connection, target)
        await assert_is_moved(target, before)
    assert (moved.head, moved.rows["order_events"], moved.rows["quarantine"]) == (9, 4, 2)
    assert {*moved.rows} | {"log_id", "sequences"} == {*before}
    message = "the log was moved to db2.example:5432: set ORDER_TRACKING_DATABASE_URL to that database"
    for refused in (prepare_database, service_dsn):
        with pytest.raises(SchemaError, match=message):
            await refused(owner_dsn)
    with pytest.raises(UnsupportedServerError, match=message):
        await read_log_id(connection)


@pytest.mark.long
@pytest.mark.parametrize("direction", ["15 to 18", "18 to 15"])
async def test_a_log_moves_between_major_versions(
    connection: Connection, empty_dsn: str, direction: str
) -> None:
    """The oldest supported version and the newest one take each other's data."""
    if not OLD_BINDIR.exists():
        pytest.skip("this machine has no PostgreSQL 15")
    with temporary_folder() as folder, EmbeddedPostgres(folder, bindir=OLD_BINDIR) as old:
        await prepare_database(old.dsn)
        async with connected(old.dsn) as oldest, connected(empty_dsn) as empty:
            assert await oldest.fetchval("SHOW server_version_num") < "160000"
            source, target = (oldest, empty) if direction == "15 to 18" else (connection, oldest)
            await source.execute(FILL)
            before = await content(source)
            await move(source, target)
            await assert_is_moved(target, before)


async def test_a_target_with_data_is_refused(connection: Connection, target_dsn: str) -> None:
    """The refusal names each table with rows. Neither database is changed."""
    await connection.execute(FILL)
    async with connected(target_dsn) as target:
        await target.execute("INSERT INTO operations (via, action, subject) VALUES ('cli', 'key_created', 'x')")
        await target.execute(APPEND)
        before = await content(target)
        with pytest.raises(MoveError, match=r"not empty \(rows of operations, order_events\): name a database"):
            await move(connection, target)
        assert await content(target) == before
    await read_log_id(connection)


async def test_a_database_in_use_is_refused(
    connection: Connection, owner_dsn: str, target_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that writes, or that only is there, may be a service that would go on recording."""
    monkeypatch.setattr("service.maintenance.move.LIMIT_LOCKS", "SET LOCAL lock_timeout = '100ms'")
    monkeypatch.setattr("service.maintenance.move.LOCK_SECONDS_MAX", 0.1)
    await connection.execute(FILL)
    async with connected(target_dsn) as target, connected(owner_dsn) as other:
        with pytest.raises(MoveError, match="1 other sessions are connected to the database: stop every"):
            await move(connection, target)
        async with other.transaction():
            await other.execute(APPEND)
            with pytest.raises(MoveError, match="another session writes to the database"):
                await move(connection, target)
            await other.execute(f"SELECT pg_advisory_xact_lock({0x534348454D41})")
        with pytest.raises(MoveError, match="the target is the source itself"):
            await move(connection, other)
    await read_log_id(connection)


async def test_a_role_without_rights_is_refused(connection: Connection, target_dsn: str) -> None:
    """The service's role may not choose positions, and the error names the role that may."""
    await connection.execute(FILL)
    service = await connect(as_role(target_dsn, SERVICE_ROLE))
    await service.execute("SET SESSION AUTHORIZATION order_tracking_service")
    with pytest.raises(MoveError, match="the role order_tracking_service of the target may not choose"):
        await move(connection, service)
    service.terminate()
    await read_log_id(connection)


async def test_a_move_that_breaks_off_changes_nothing(connection: Connection, target_dsn: str) -> None:
    """If a connection is lost during the copy, both databases are as before, and the move can be repeated."""
    await connection.execute(FILL)
    before = await content(connection)
    async with connected(target_dsn) as target:
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
            await move_log(connection, target, "", lambda *_: target.terminate())
    async with connected(target_dsn) as target:
        assert await store.head_position(target) == 0
        await move(connection, target)
        await assert_is_moved(target, before)


async def test_a_move_that_ended_between_the_commits_is_finished(
    connection: Connection, target_dsn: str
) -> None:
    """The target has everything, but the source has no mark yet: the next attempt only marks it."""
    await connection.execute(FILL)
    async with connected(target_dsn) as target:
        await move(connection, target)
        await connection.execute("UPDATE log_identity SET moved_to = NULL")
        assert await move(connection, target) == Moved(9, {})
        with pytest.raises(UnsupportedServerError, match="was moved"):
            await read_log_id(connection)
        await connection.execute("UPDATE log_identity SET moved_to = NULL")
        await target.execute(APPEND)
        with pytest.raises(MoveError, match="the same log, up to position 13 instead of 9"):
            await move(connection, target)
