"""An exported log is imported with every position, version and byte, or not at all."""

import os
import re
from collections.abc import AsyncGenerator, Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import orjson
import psycopg
import pytest

from projections.postgres_errors import Connection
from service.database.connections import connect, connected
from service.database.log_identity import read_log_id
from service.database.schema import SCHEMA_VERSION, SERVICE_ROLE, VIEWS, as_role
from service.database.sequences import NUMBERED, advance, last_number
from service.event_log import store
from service.maintenance.transfer import Moved, export_log, import_log
from service.maintenance.transfer_file import (
    BATCH_ROWS_MAX,
    LINE_BYTES_MAX,
    TABLES,
    LogReader,
    LogWriter,
    TransferError,
    read_lines,
)
from tests.support.client import serving_client
from tests.support.databases import TestServer
from tests.support.waiting import until_async

# The columns of the schema public that hold data, without those that PostgreSQL computes.
COLUMNS: Final = """
    SELECT relname::text, array_agg(attname::text)
    FROM pg_class JOIN pg_attribute ON attrelid = pg_class.oid
    WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' AND attnum > 0 AND NOT attisdropped
        AND attgenerated = ''
    GROUP BY relname
"""
ROWS: Final = "SELECT * FROM {} ORDER BY 1, 2"
DEFINITION: Final = "SELECT definition FROM {}.projection"
APPEND: Final = (
    "INSERT INTO order_events (originator_id, originator_version, topic, state) VALUES ('X', %s, '', '')"
)
# The log's id is in the header.
LEFT_OUT: Final = {
    *("sessions", "schema_version", "view_names", "log_identity", "log_times"),
    # They have secrets, and two services must not deliver the same events.
    *("subscriptions", "held_orders"),
}
# Positions and versions have gaps, some bytes are not UTF-8, and times have microseconds.
FILL: Final = r"""
    INSERT INTO order_events (notification_id, originator_id, originator_version, topic, state, recorded_at)
    OVERRIDING SYSTEM VALUE VALUES
        (2, 'KOM1', 1, 'status',
            convert_to('{"a": "\u0000 \ud800 é", "b" : 1.10}', 'UTF8'), '2026-01-01 00:00:00.000001'),
        (3, 'KOM/2 "x"', 1, 'another', '\x00ff80', '2026-01-01 12:00'),
        (7, 'KOM1', 2, 'status', '', '1999-12-31'),
        (9, 'KOM1', 5, 'status', convert_to(E'line\nbreak\u2028', 'UTF8'), '2026-01-02');
    INSERT INTO idempotency_keys VALUES ('KOM1', 'a key', 1, '\xff00'), ('KOM1', 'Key', 5, '');
    INSERT INTO api_keys (name, scope, secret_sha256, expires_at, revoked_at) VALUES
        ('one', 'read', sha256('1'), NULL, NULL), ('two', 'admin', sha256('2'), now(), now());
    INSERT INTO sessions (session_sha256, key_name) VALUES (sha256('s'), 'one');
    INSERT INTO operations (via, actor, action, subject) VALUES ('cli', NULL, 'key_created', 'one');
    INSERT INTO handled_contradictions VALUES ('KOM1', 2, 1);
    INSERT INTO erasures (order_no, reason, events, entries) VALUES ('KOM1', 'asked', 1, 0);
    INSERT INTO quarantine
        (body, reason, state, received_at, last_seen_at, resolved_at, discard_reason, order_no, version)
    VALUES ('\x00fe', 'r', 'open', now(), now(), NULL, NULL, NULL, NULL),
        (NULL, 'r', 'discarded', now(), now(), now(), 'erased', NULL, NULL),
        ('text', 'r', 'retried', now(), now(), now(), NULL, 'KOM1', 5),
        ('deleted', 'r', 'open', now(), now(), NULL, NULL, NULL, NULL);
    DELETE FROM quarantine WHERE quarantine_id = 4;
    SELECT setval('order_events_notification_id_seq', 12);
"""


@pytest.fixture
def target_dsn(server: TestServer) -> Iterator[str]:
    """Return the DSN of a second database with the schema, for the role that applied the schema."""
    with server.database() as dsn:
        yield dsn


async def export_to(
    file: Path, connection: Connection, progress: Callable[[int, int], None] | None = None
) -> Moved:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        return await export_log(connection, LogWriter(descriptor, str(file)), progress or (lambda *_: None))
    finally:
        os.close(descriptor)


async def import_from(file: Path, connection: Connection) -> Moved:
    with file.open("rb") as opened:
        reader = LogReader(read_lines(opened, str(file)))
        return await import_log(connection, reader, await reader.read_header(), lambda *_: None)


async def content(connection: Connection) -> dict[str, Any]:
    """Return every row of the moved tables, and the last number of each sequence."""
    rows = {table.name: await connection.fetch(ROWS.format(table.name)) for table in TABLES}
    return rows | {numbered.sequence: await last_number(connection, numbered) for numbered in NUMBERED}


async def is_empty(connection: Connection) -> bool:
    rows = await content(connection)
    return not any(rows[table.name] for table in TABLES)


async def test_every_column_is_moved(connection: Connection) -> None:
    """The file has every column of every table that is not left out. Add a new column to the file too."""
    columns = {name: set(names) for name, names in await connection.fetch(COLUMNS) if name not in LEFT_OUT}
    assert columns == {table.name: {column.sql_name for column in table.columns} for table in TABLES}


async def test_everything_is_moved_byte_for_byte(
    connection: Connection, target_dsn: str, tmp_path: Path
) -> None:
    """Each row, each sequence and the log's id is as before, views are marked outdated, and a second export is
    equal.
    """
    # Test databases are copies of one database.
    await connection.execute("UPDATE log_identity SET log_id = gen_random_uuid()")
    await connection.execute(FILL)
    first, second = tmp_path / "first", tmp_path / "second"
    exported = await export_to(first, connection)
    assert (exported.head, exported.rows["order_events"], exported.rows["quarantine"]) == (9, 4, 3)
    async with connected(target_dsn) as target:
        assert await import_from(first, target) == exported
        assert await read_log_id(target) == await read_log_id(connection)
        assert await content(target) == await content(connection)
        assert await target.fetchval("SELECT current_user") == "order_tracking"
        assert await target.fetchval("SELECT count(*) FROM sessions") == 0
        for view in VIEWS:
            assert await target.fetchval(DEFINITION.format(view.name)) == ""
        await export_to(second, target)
        position = await target.fetchval(
            "INSERT INTO order_events (originator_id, originator_version, topic, state) "
            "VALUES ('KOM9', 1, '', '') RETURNING notification_id"
        )
    assert position == 13
    assert second.read_bytes().splitlines()[1:-1] == first.read_bytes().splitlines()[1:-1]


async def test_a_file_of_an_older_release_has_no_log_id(
    connection: Connection, target_dsn: str, tmp_path: Path
) -> None:
    """The log then has the id of its new database: no reader knows another one."""
    file = tmp_path / "file"
    await connection.execute("UPDATE log_identity SET log_id = gen_random_uuid()")
    await export_to(file, connection)
    line = orjson.loads(file.read_bytes().splitlines()[0])
    del line["log"]
    older = orjson.dumps({**line, "schema_version": 12})
    _, rest = file.read_bytes().split(b"\n", 1)
    file.write_bytes(resealed(lambda data: data)(older + b"\n" + rest))
    async with connected(target_dsn) as target:
        before = await read_log_id(target)
        await import_from(file, target)
        assert await read_log_id(target) == before != await read_log_id(connection)


async def test_no_sequence_goes_backwards(connection: Connection, target_dsn: str, tmp_path: Path) -> None:
    """If the target has given higher numbers than the source, although it is empty, it continues after them."""
    await connection.execute(FILL)
    await export_to(tmp_path / "file", connection)
    async with connected(target_dsn) as target:
        for numbered in NUMBERED:
            await advance(target, numbered, 1_000)
        await import_from(tmp_path / "file", target)
        assert [await last_number(target, numbered) for numbered in NUMBERED] == [1_000] * len(NUMBERED)


async def test_an_export_is_one_snapshot_in_batches(
    owner_dsn: str, connection: Connection, target_dsn: str, tmp_path: Path
) -> None:
    """An event that is recorded during an export is not in it. The export holds no more than a batch."""
    events = BATCH_ROWS_MAX * 2 + 1
    await connection.execute(
        "INSERT INTO order_events (originator_id, originator_version, topic, state) "
        "SELECT 'KOM' || n, 1, 't', '{}' FROM generate_series(1, $1::int) AS n",
        events,
    )
    steps = []

    def record_another(done: int, total: int) -> None:
        steps.append((done, total))
        if len(steps) == 1:
            with psycopg.connect(owner_dsn) as other:
                other.execute(APPEND, (1,))

    exported = await export_to(tmp_path / "file", connection, record_another)
    assert (exported.head, exported.rows["order_events"]) == (events, events)
    assert steps == [(BATCH_ROWS_MAX, events), (2 * BATCH_ROWS_MAX, events), (events, events)]
    async with connected(target_dsn) as target:
        await import_from(tmp_path / "file", target)
        assert await target.fetchval("SELECT count(*) FROM order_events") == events


def replaced(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        assert old in data
        return data.replace(old, new)

    return change


def without_line(number: int) -> Callable[[bytes], bytes]:
    return lambda data: b"".join(
        line for index, line in enumerate(data.splitlines(keepends=True), 1) if index != number
    )


def resealed(change: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """Return a change after which the last line matches the others again, as a forger would make it."""

    def apply(data: bytes) -> bytes:
        *lines, last = change(data).splitlines(keepends=True)
        end = orjson.loads(last)
        end["end"] |= {"lines": len(lines), "sha256": sha256(b"".join(lines)).hexdigest()}
        return b"".join(lines) + orjson.dumps(end) + b"\n"

    return apply


# The file of FILL has its header in line 1, events in lines 2 to 5, keys in 6 and 7, and its end in line 15.
DAMAGES: Final = {
    "empty": (lambda _: b"", r"^line 1 is '', not the header of an exported log"),
    "another file": (lambda _: b'{"a": 1}\n', r"^line 1 is '\{\"a\": 1\}\\n', not the header"),
    "a dump": (lambda _: b"PGDMP\x01\xff\n", r"^line 1 is .*not the header"),
    "header cut": (lambda data: data[:100], r"^line 1: it is cut off"),
    "no tables": (replaced(b'"tables"', b'"table"'), r"^line 1: the header is malformed .*'tables'"),
    "no log id": (replaced(b'"log":', b'"id":'), r"^line 1: the header is malformed .*'log'"),
    "unknown column": (replaced(b'"times_seen",', b'"seen",'), r"^line 1: the header is malformed .*'seen'"),
    "later format": (
        replaced(b'"format_version":1', b'"format_version":2'),
        r"^the file has format version 2, but this release supports at most 1: import the file with release",
    ),
    "later schema": (
        replaced(b'"schema_version":%d' % SCHEMA_VERSION, b'"schema_version":99'),
        rf"^the file has schema version 99, but this release supports at most {SCHEMA_VERSION}: import",
    ),
    "cut in a line": (lambda data: data[:-20], r"^line 16: it is cut off: the file is truncated"),
    "cut after a line": (without_line(16), r"^line 16: it is missing.* the file is truncated"),
    "an event missing": (
        without_line(3),
        r"^line 15: the file has the rows .*'order_events': 3, .* last line says",
    ),
    "an event twice": (
        lambda data: data.replace((line := data.splitlines(keepends=True)[2]), line * 2),
        r"^line 4: position 3 follows position 3",
    ),
    "a byte changed": (
        replaced(b"12:00:00+00:00", b"12:00:01+00:00"),
        r"^line 16: the SHA-256 of the lines before",
    ),
    "not JSON": (replaced(b'{"table":"order_events","position":7', b'{"table"'), r"^line 4: .* is not JSON"),
    "no object": (replaced(b'{"table":"api_keys"', b'["table"]\n{"table":"api_keys"'), r"is not a JSON object"),
    "unknown table": (
        replaced(b'{"table":"api_keys"', b'{"table":"secrets"'),
        r"^line 11: its table is 'secrets'. Expected one of: order_events, ",
    ),
    "another order": (
        replaced(b'{"table":"api_keys"', b'{"table":"order_events"'),
        r"^line 11: a row of order_events follows rows of quarantine",
    ),
    "a member missing": (
        replaced(b',"topic":"another"', b""),
        r"^line 3: its members are .*Expected: position, ",
    ),
    "no number": (replaced(b'"position":7', b'"position":"7"'), r"^line 4: position is '7'. Expected: integer"),
    "too large": (
        replaced(b'"position":7', b'"position":1e30'),
        r"^line 4: position is '1e\+30'. Expected: integer",
    ),
    "null": (replaced(b'"topic":"another"', b'"topic":null'), r"^line 3: topic is 'None'. Expected: text"),
    "no base64": (replaced(b'"AP+A"', b'"!"'), r"^line 3: state is .*Expected: state"),
    "no time": (
        replaced(b'"1999-12-31T00:00:00+00:00"', b'"1999"'),
        r"^line 4: recorded_at is .*Expected: time",
    ),
    "more": (lambda data: data + b"{}\n", r"^line 17: it follows the last line"),
    "another head": (
        resealed(replaced(b'"head":9', b'"head":8')),
        r"^line 16: the last position is 9, but .* 8",
    ),
    "a version twice": (
        resealed(replaced(b'"order_no":"KOM1","version":5,"topic"', b'"order_no":"KOM1","version":2,"topic"')),
        r"^line 5: the database refuses the row .*duplicate key",
    ),
    "no such event": (
        resealed(replaced(b'"key":"Key","version":5', b'"key":"Key","version":6')),
        r"^one of the lines 6 to 7: the database refuses the row",
    ),
    "NUL in a text": (replaced(b'"topic":"another"', b'"topic":"\\u0000"'), r"^line 3: the database refuses"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
async def test_a_damaged_file_imports_nothing(
    connection: Connection, target_dsn: str, tmp_path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    """Each damage is one line that names the line of the file, and the database stays empty and usable."""
    await connection.execute(FILL)
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    await export_to(whole, connection)
    damaged.write_bytes(damage(whole.read_bytes()))
    async with connected(target_dsn) as target:
        with pytest.raises(TransferError, match=message) as error:
            await import_from(damaged, target)
        assert "\n" not in str(error.value)
        assert await is_empty(target)
        await import_from(whole, target)
        assert await content(target) == await content(connection)


@pytest.mark.long
async def test_a_line_without_end_is_refused(tmp_path: Path) -> None:
    """A file that is one endless line, such as a disk image, does not fill the memory."""
    file = tmp_path / "sparse"
    with file.open("wb") as opened:
        opened.truncate(2 * LINE_BYTES_MAX)
    with (
        file.open("rb") as opened,
        pytest.raises(TransferError, match="line 1 is longer than 67,108,864 bytes"),
    ):
        await LogReader(read_lines(opened, "sparse")).read_header()


async def test_an_import_needs_an_empty_database(
    connection: Connection, target_dsn: str, tmp_path: Path
) -> None:
    """The refusal names each table with rows, and what to do."""
    await connection.execute(FILL)
    await export_to(tmp_path / "file", connection)
    async with connected(target_dsn) as target:
        await target.execute("INSERT INTO operations (via, action, subject) VALUES ('cli', 'key_created', 'x')")
        await target.execute(
            "INSERT INTO order_events (originator_id, originator_version, topic, state) VALUES ('X', 1, '', '')"
        )
        before = await content(target)
        with pytest.raises(
            TransferError,
            match=r"not empty \(rows of order_events: 1, operations: 1\): set ORDER_TRACKING_STATE_DIR",
        ):
            await import_from(tmp_path / "file", target)
        assert await content(target) == before


async def test_the_service_may_not_import(connection: Connection, target_dsn: str, tmp_path: Path) -> None:
    """The service's role may not choose positions, and the error names the role that may."""
    await export_to(tmp_path / "file", connection)
    service = await connect(as_role(target_dsn, SERVICE_ROLE))
    await service.execute("SET SESSION AUTHORIZATION order_tracking_service")
    with pytest.raises(TransferError, match="the role order_tracking_service may not choose the positions"):
        await import_from(tmp_path / "file", service)
    service.terminate()


async def test_the_service_may_export(dsn: str, connection: Connection, tmp_path: Path) -> None:
    """An export needs no more rights than the service has."""
    await connection.execute(FILL)
    async with connected(dsn) as service:
        exported = await export_to(tmp_path / "file", service)
    assert exported.head == await store.head_position(connection)


async def test_events_wait_for_an_import(connection: Connection, target_dsn: str, tmp_path: Path) -> None:
    """A service that already runs on the target cannot append in the midst of an import."""
    await connection.execute(FILL)
    await export_to(tmp_path / "file", connection)
    locked: list[bool] = []

    async with connected(target_dsn) as target:
        with (tmp_path / "file").open("rb") as opened:
            reader = LogReader(read_lines(opened, "file"))
            header = await reader.read_header()

            def is_locked(*_: int) -> None:
                with psycopg.connect(target_dsn) as other:
                    row = other.execute("SELECT pg_try_advisory_xact_lock(%s)", (store.APPEND_LOCK,)).fetchone()
                    locked.append(row == (False,))

            await import_log(target, reader, header, is_locked)
    assert locked
    assert all(locked)


async def test_a_running_service_follows_an_import(
    connection: Connection, owner_dsn: str, target_dsn: str, tmp_path: Path
) -> None:
    """A service that runs on the empty target rebuilds its views from the imported log."""
    async with serving_client(owner_dsn) as client:
        await client.webhook("KOM1")
    await export_to(tmp_path / "file", connection)
    async with serving_client(target_dsn) as client:
        assert (await client.get("/orders"))["orders"] == []
        async with connected(target_dsn) as target:
            await import_from(tmp_path / "file", target)

        async def is_served() -> bool:
            paths = ("/orders/KOM1", "/orders/KOM1/timeline")
            return [await client.status("GET", path) for path in paths] == [200, 200]

        await until_async(is_served)
        assert (await client.get("/orders/KOM1/timeline"))["status"] == "in_transit"


async def _lines(*lines: bytes) -> AsyncGenerator[bytes]:
    for line in lines:
        yield line


async def test_a_file_of_an_earlier_schema_is_imported(
    connection: Connection, target_dsn: str, tmp_path: Path
) -> None:
    """Columns that a later release has added get their defaults."""
    await connection.execute(FILL)
    await export_to(tmp_path / "file", connection)
    data = (
        (tmp_path / "file")
        .read_bytes()
        .replace(b',"named_order_no"]', b"]")
        .replace(b',"named_order_no":null', b"")
    )
    data = re.sub(rb'"schema_version":\d+', b'"schema_version":9', data)
    async with connected(target_dsn) as target:
        reader = LogReader(_lines(*resealed(lambda unchanged: unchanged)(data).splitlines(keepends=True)))
        await import_log(target, reader, await reader.read_header(), lambda *_: None)
        assert await content(target) == await content(connection)
