"""Legal states and settings of a server that must neither lose, double nor refuse a report."""

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from structlog.testing import capture_logs

from projections.postgres import Connection
from service.database.connections import (
    DedicatedConnection,
    StorageUnavailableError,
    UnsupportedServerError,
    connect,
)
from service.database.embedded_postgres import EmbeddedPostgres
from service.database.schema import prepare_database
from service.ingest.idempotency import IdempotencyKey
from service.ingest.recorder import Recorder
from service.maintenance.check import check_database
from service.projecting.locks import HOLD_VIEW_LOCK
from tests.support.client import serving_client
from tests.support.databases import FAST_SETTINGS, TestServer, wait_for_locked
from tests.support.folders import copied_folder
from tests.support.recording import EQUAL, locked_log, logged_events, make_recorder, rebuilt
from tests.support.relay import pooler_of
from tests.support.reports import report
from tests.support.waiting import PATIENCE_SECONDS, until_async

TRANSACTION_TIMEOUT_MAJOR = 17  # the first version that has it
NOTIFY_PAGES_MIN = "64"  # the smallest notification queue: 512 KB


@pytest.fixture
def small_queue_dsn(state_template: Path) -> Iterator[str]:
    """The DSN of a server with the smallest notification queue."""
    settings = {**FAST_SETTINGS, "max_notify_queue_pages": NOTIFY_PAGES_MIN}
    with copied_folder(state_template) as copy, EmbeddedPostgres(copy, settings=settings) as server:
        yield server.dsn


async def fill_notification_queue(connection: Connection) -> None:
    # A transaction's equal payloads are sent once.
    fill = "SELECT pg_notify('unrelated', n || repeat('x', 7900)) FROM generate_series(1, 16) AS n"
    with suppress(asyncpg.ProgramLimitExceededError):
        while True:
            await connection.execute(fill)


async def test_a_full_notification_queue_refuses_no_report(small_queue_dsn: str) -> None:
    """A listener that idles in a transaction fills the queue; reports are recorded, judged and projected."""
    listener, other = await connect(small_queue_dsn), await connect(small_queue_dsn)
    await listener.add_listener("unrelated", lambda *_: None)
    await listener.execute("BEGIN; SELECT 1")
    await fill_notification_queue(other)
    async with serving_client(small_queue_dsn) as client:
        with capture_logs() as logs:
            receipts = [await client.webhook("KOM1", status) for status in ("Diajukan", "Dikirim", "Diantar")]
        assert [receipt["outcome"] for receipt in receipts] == ["advanced"] * 3
        events = [log["event"] for log in logs if "history" not in log["event"]]
        assert [event.startswith("the notification queue is full") for event in events] == [True]
        order = await client.get(f"/orders/KOM1?after_position={receipts[-1]['position']}")
        assert (order["status"], order["version"]) == ("out_for_delivery", 3)
    await listener.close()
    await other.close()


@asynccontextmanager
async def recorder_with(dsn: str, **settings: str) -> AsyncIterator[Recorder]:
    dedicated = DedicatedConnection(lambda: connect(dsn, **settings))
    yield make_recorder(dedicated)
    await dedicated.close()


async def test_a_report_in_doubt_is_recorded_once_in_any_isolation(dsn: str, connection: Connection) -> None:
    """In repeatable read, the first look for a doubtful commit may miss it. It is recorded once anyway."""
    async with recorder_with(dsn, default_transaction_isolation="repeatable read") as recorder:
        await recorder.record(report("KOM0"))
        async with locked_log(dsn) as holder:
            recording = asyncio.create_task(recorder.record(report("KOM1")))
            await wait_for_locked(holder)
            # The statement stays in the queue for the lock, as behind a TCP connection that was cut.
            # It is committed when the lock is free, after the recorder has begun its second transaction.
            await cut_client(recorder)
            await wait_for_locked(holder, 2)
        receipt = await recording
    events = await logged_events(connection)
    assert [event.report_id for _, event in events].count(receipt["report_id"]) == 1
    assert len(events) == 2


async def cut_client(recorder: Recorder) -> None:
    """Close the recorder's connection on its own side alone."""
    connection = recorder._dedicated._connection  # noqa: SLF001
    assert connection is not None
    transport = connection._transport  # type: ignore[attr-defined]  # noqa: SLF001
    transport.abort()


async def test_the_operators_defaults_do_not_reach_the_service(owner_dsn: str, dsn: str) -> None:
    """The service's connections write and read committed rows, whatever the database's defaults are."""
    connection = await connect(owner_dsn)
    name = await connection.fetchval("SELECT current_database()")
    await connection.execute(f"""
        ALTER DATABASE "{name}" SET default_transaction_isolation = 'serializable';
        ALTER DATABASE "{name}" SET default_transaction_read_only = on;
    """)
    await connection.close()
    async with recorder_with(dsn) as recorder:
        receipt = await recorder.record(report("KOM1"))
    assert receipt["version"] == 1
    connection = await connect(dsn)
    assert await connection.fetchval("SHOW transaction_isolation") == "read committed"
    await connection.close()


async def test_a_stall_costs_only_the_reports_whose_own_time_is_over(dsn: str) -> None:
    """While the append lock is held for longer than a report's time, no report is refused earlier."""
    seconds_max = 0.5
    dedicated = DedicatedConnection(lambda: connect(dsn))
    recorder = make_recorder(dedicated, seconds_max=seconds_max)
    loop = asyncio.get_running_loop()

    async def wait_of_refused(number: int) -> float | None:
        began = loop.time()
        try:
            await recorder.record(report(f"KOM{number}"))
        except StorageUnavailableError:
            return loop.time() - began
        return None

    tasks = []
    async with locked_log(dsn):
        for number in range(60):
            tasks.append(asyncio.create_task(wait_of_refused(number)))
            await asyncio.sleep(0.01)
    waits = await asyncio.gather(*tasks)
    await dedicated.close()
    refused = [wait for wait in waits if wait is not None]
    assert refused
    assert min(refused) >= seconds_max
    assert None in waits


async def test_a_pooler_that_drops_settings_is_refused(dsn: str) -> None:
    """Without its settings, the service would write to other schemas, so it does not start."""
    async with pooler_of(dsn) as pooler:
        assert await prepare_database(pooler.dsn)
    async with pooler_of(dsn, drops_settings=True) as pooler:
        with pytest.raises(UnsupportedServerError, match="connect to PostgreSQL itself") as caught:
            await prepare_database(pooler.dsn)
        assert "role" in str(caught.value)
        assert "plan_cache_mode" in str(caught.value)
        (wrong,) = await check_database(pooler.dsn)
        assert (wrong.kind, "PgBouncer" in wrong.text) == ("WRONG", True)


async def test_a_database_of_another_encoding_is_refused(server: TestServer, empty_dsn: str) -> None:
    """A database in another encoding than UTF8 could not hold every report."""
    connection = await connect(empty_dsn)
    name = f"latin_{uuid4().hex}"
    await connection.execute(f"CREATE DATABASE {name} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    try:
        with pytest.raises(UnsupportedServerError, match="has the encoding LATIN1: create one"):
            await connect(server.dsn_of(name))
    finally:
        await connection.execute(f"DROP DATABASE {name}")
        await connection.close()


async def test_a_silently_dropped_connection_delays_no_report(dsn: str) -> None:
    """A connection that a firewall dropped while it was idle is replaced before the next report uses it."""
    async with pooler_of(dsn) as pooler:
        dedicated = DedicatedConnection(lambda: connect(pooler.dsn), idle_seconds_max=0.0)
        recorder = make_recorder(dedicated, seconds_max=PATIENCE_SECONDS)
        await recorder.record(report("KOM1"))
        pooler.silence()
        receipt = await recorder.record(report("KOM1", "Diterima"))
        assert (receipt["version"], receipt["outcome"]) == (2, "advanced")
        assert dedicated.times_opened == 2
        await dedicated.close()


async def test_of_several_servers_the_one_that_answered_last_is_asked_first(dsn: str) -> None:
    """A server that accepts a connection and says nothing costs only its own time, and only once."""
    (socket_folder,) = re.findall(r"(?<=host=)[^&]+", dsn)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        hosts = f"host=127.0.0.1,{socket_folder}&port={port},5432"
        with_silent = dsn.replace(f"host={socket_folder}&port=5432", hosts)
        async with serving_client(with_silent) as client:
            assert (await client.webhook("KOM1"))["outcome"] == "advanced"
        silent.settimeout(0)
        # Connections that were opened at first, at the same time, asked both servers.
        silent.accept()[0].close()
        with suppress(BlockingIOError):
            while True:
                silent.accept()[0].close()
        await (await connect(with_silent)).close()
        with pytest.raises(BlockingIOError):
            silent.accept()


async def test_the_error_names_each_server(dsn: str) -> None:
    """If no server answers, the error says why for each of them."""
    nowhere = f"postgresql://user@127.0.0.1:1,localhost:2/{dsn.partition('///')[2].partition('?')[0]}"
    with pytest.raises(StorageUnavailableError, match=r"127\.0\.0\.1:1: .*; localhost:2: "):
        await connect(nowhere)


async def test_an_operators_timeouts_do_not_end_a_rebuild(owner_dsn: str, dsn: str) -> None:
    """A rebuild waits for a view's lock for as long as it takes, whatever the database's defaults are."""
    connection = await connect(owner_dsn)
    name = await connection.fetchval("SELECT current_database()")
    version = connection.get_server_version().major
    newer = ["transaction_timeout"] if version >= TRANSACTION_TIMEOUT_MAJOR else []
    for setting in ("statement_timeout", "lock_timeout", "idle_session_timeout", *newer):
        await connection.execute(f"ALTER DATABASE \"{name}\" SET {setting} = '300ms'")
    async with recorder_with(dsn) as recorder:
        await recorder.record(report("KOM1"))
    await connection.execute(HOLD_VIEW_LOCK, "timeline")
    rebuilding = asyncio.create_task(rebuilt(dsn))
    await wait_for_locked(connection)
    await asyncio.sleep(0.6)
    await connection.close()
    assert await rebuilding == EQUAL
    assert await rebuilt(dsn, verify=True) == EQUAL


WAITING_FOR_STANDBY = """
    SELECT pid, query_start FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND datname = current_database()
"""


async def require_standby(connection: Connection, name: str) -> None:
    await connection.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{name}'")
    await connection.execute("SELECT pg_reload_conf()")
    # Commits wait as soon as the checkpointer has read the setting, which it does before this checkpoint.
    await connection.execute("CHECKPOINT")

    async def is_in_force() -> bool:
        return bool(await connection.fetchval("SHOW synchronous_standby_names") == name)

    await until_async(is_in_force)


@pytest.mark.parametrize(("key", "messages"), [(None, "notice"), ("k1", "notice"), (None, "error")])
async def test_a_cancelled_wait_for_a_standby_is_no_confirmation(
    state_template: Path, key: str | None, messages: str
) -> None:
    """If an administrator cancels a commit's wait for its standby, the report waits for the standby again."""
    with copied_folder(state_template) as copy, EmbeddedPostgres(copy, settings=FAST_SETTINGS) as server:
        operator = await connect(server.dsn, synchronous_commit="local")
        await require_standby(operator, "missing")
        await operator.execute(f"ALTER DATABASE order_tracking SET client_min_messages = {messages}")
        async with recorder_with(server.dsn) as recorder:
            claim = IdempotencyKey(key) if key is not None else None
            recording = asyncio.create_task(recorder.record(report("KOM1"), claim))
            seen: set[Any] = set()

            async def waits_anew() -> bool:
                assert not recording.done()
                return bool({*await operator.fetch(WAITING_FOR_STANDBY)} - seen)

            for _ in range(2):
                await until_async(waits_anew)
                seen |= {*await operator.fetch(WAITING_FOR_STANDBY)}
                for pid, _ in seen:
                    await operator.execute("SELECT pg_cancel_backend($1)", pid)
            await until_async(waits_anew)
            await require_standby(operator, "")
            receipt = await recording
        assert (receipt["outcome"], receipt["version"]) == ("advanced", 1)
        assert await operator.fetchval("SELECT count(*) FROM order_events") == 1
        await operator.close()


SEQUENCE = "order_events_notification_id_seq"


async def test_a_sequence_behind_the_log_appends_nothing(dsn: str, connection: Connection) -> None:
    """After a cut-over without the sequence, no event gets a position that readers have passed.

    Webhooks get 503 with the statement that ends it, until it is run.
    """
    async with serving_client(dsn) as client:
        for number in range(3):
            await client.webhook(f"KOM{number}")
        await connection.execute(f"SELECT setval('{SEQUENCE}', 1)")
        body = b'{"order_no": "KOM9", "status": "Dikirim"}'
        assert await client.status("PUT", "/webhook", body) == 503
        keyed = {"webhook-id": "key-1"}
        assert await client.status("PUT", "/webhook", body, keyed) == 503
        assert (await client.get("/readyz", status=503))["cause"] == "unusable"
        (wrong,) = [finding.text for finding in await check_database(dsn) if "sequence" in finding.text]
        statement = wrong.partition("as its owner, ")[2]
        with pytest.raises(UnsupportedServerError, match="at 1, behind its table's 3"):
            await prepare_database(dsn)
        # It gave no position in the meantime.
        assert await connection.fetchval("SELECT pg_sequence_last_value($1::regclass)", SEQUENCE) == 1
        await connection.execute(statement)
        assert (await client.webhook("KOM9", "Dikirim"))["position"] == 4
        assert (await client.raw(body, **keyed))["position"] == 5

        async def is_ready() -> bool:
            return await client.status("GET", "/readyz") == 200

        await until_async(is_ready)


async def test_a_sequence_that_gives_numbers_in_advance_is_refused(dsn: str, connection: Connection) -> None:
    """With a cache, each connection has its own numbers, so positions would not rise."""
    await connection.execute(f"ALTER SEQUENCE {SEQUENCE} CACHE 20 INCREMENT 2")
    with pytest.raises(UnsupportedServerError, match="increment 2 and cache 20") as refused:
        await prepare_database(dsn)
    await connection.execute(str(refused.value).partition("as its owner, ")[2])
    await prepare_database(dsn)


async def test_a_start_without_durable_commits_says_so(
    owner_dsn: str, dsn: str, connection: Connection
) -> None:
    """If the service's commits do not wait for the disk, its log and the check name the setting."""
    database = owner_dsn.partition("///")[2].partition("?")[0]
    await connection.execute(f"ALTER DATABASE {database} SET synchronous_commit = off")
    with capture_logs() as logs:
        async with serving_client(dsn):
            pass
    assert "synchronous_commit is off" in {log.get("setting") for log in logs if log["log_level"] == "warning"}
    wrong = {finding.text for finding in await check_database(dsn) if finding.kind == "WRONG"}
    assert "synchronous_commit is off" in wrong


async def test_a_quarantine_sequence_behind_its_table_is_named(dsn: str, connection: Connection) -> None:
    """An unparseable body gets 503 and the check names the statement that ends it."""
    async with serving_client(dsn) as client:
        for text in (b"one", b"two", b"more"):
            await client.raw(text)
        await connection.execute("SELECT setval('quarantine_quarantine_id_seq', 1)")
        assert await client.status("PUT", "/webhook", b"three") == 503
        assert (await client.get("/readyz", status=503))["cause"] == "unusable"
        (wrong,) = [finding.text for finding in await check_database(dsn) if "sequence" in finding.text]
        await connection.execute(wrong.partition("as its owner, ")[2])
        assert (await client.raw(b"three"))["outcome"] == "quarantined"


async def test_a_quarantined_body_without_its_standby_is_not_acknowledged(state_template: Path) -> None:
    """If an administrator cancels the wait for the standby, the sender gets 503 and tries again."""
    with copied_folder(state_template) as copy, EmbeddedPostgres(copy, settings=FAST_SETTINGS) as server:
        operator = await connect(server.dsn, synchronous_commit="local")
        async with serving_client(server.dsn) as client:
            await client.get("/readyz")
            await require_standby(operator, "missing")
            sending = asyncio.create_task(client.status("PUT", "/webhook", b"not json"))

            async def is_cancelled() -> bool:
                waiting = await operator.fetch(WAITING_FOR_STANDBY)
                for pid, _ in waiting:
                    await operator.execute("SELECT pg_cancel_backend($1)", pid)
                return bool(waiting)

            await until_async(is_cancelled)
            assert await sending == 503
            assert (await client.get("/readyz", status=503))["cause"] == "replication_wait"
        await operator.close()
