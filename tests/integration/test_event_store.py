"""The log: the library's recorder tests and application, and positions in commit order."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import asyncpg
import pytest
from eventsourcing.application import Application
from eventsourcing.persistence import AggregateRecorder, ApplicationRecorder, DatetimeAsISO, JSONTranscoder
from eventsourcing.tests import persistence as library

from domain.order import NEW_ORDER, Order
from projections.postgres import Connection
from service.database.connections import DedicatedConnection, connect
from service.event_log import store
from service.event_log.codec import decode_event
from service.event_log.store import VersionTakenError
from tests.integration.recorder_facade import AggregateFacade, ApplicationFacade, LogInThread
from tests.support.databases import TestServer, wait_for_locked
from tests.support.reports import report


class _OnOurLog(library.RecorderTestCase):
    """The library's test cases, run on our log, with order numbers as ids."""

    @pytest.fixture(autouse=True)
    def _log(self, server: TestServer) -> Iterator[None]:
        self.server = server
        self.logs: list[tuple[LogInThread, Any]] = []
        yield
        for log, context in self.logs:
            log.close()
            context.__exit__(None, None, None)

    def new_log(self) -> LogInThread:
        context = self.server.database()
        log = LogInThread(context.__enter__())
        self.logs.append((log, context))
        return log

    def new_originator_id(self) -> str:
        return f"KOM-{uuid4()}"


class TestAggregateRecorder(_OnOurLog, library.AggregateRecorderTestCase):
    """Our log passes the library's tests of an aggregate recorder."""

    def create_recorder(self) -> AggregateRecorder:
        return AggregateFacade(self.new_log())


class TestApplicationRecorder(_OnOurLog, library.ApplicationRecorderTestCase[ApplicationRecorder]):
    """Our log passes the library's tests of an application recorder."""

    def create_recorder(self) -> ApplicationRecorder:
        return ApplicationFacade(self.new_log())


class TestNonInterleaving(_OnOurLog, library.NonInterleavingNotificationIDsBaseCase):
    """Concurrent appends never interleave their positions."""

    def create_recorder(self) -> ApplicationRecorder:
        return ApplicationFacade(self.new_log())


class Orders(Application[str]):
    """The library's application, with the name that selects our table."""

    name = "order"

    def register_transcodings(self, transcoder: Any) -> None:
        transcoder.register(DatetimeAsISO())


@contextmanager
def library_application(dsn: str) -> Iterator[Orders]:
    parts = urlsplit(dsn)
    query = parse_qs(parts.query)
    application = Orders(
        {
            "PERSISTENCE_MODULE": "eventsourcing.postgres",
            "ORIGINATOR_ID_TYPE": "text",
            "POSTGRES_DBNAME": parts.path.removeprefix("/"),
            "POSTGRES_HOST": query["host"][0],
            "POSTGRES_PORT": "5432",
            "POSTGRES_USER": query["user"][0],
            "POSTGRES_PASSWORD": "none",
        }
    )
    try:
        yield application
    finally:
        application.close()


@pytest.fixture
async def held(dsn: str) -> AsyncIterator[DedicatedConnection]:
    held = DedicatedConnection(lambda: connect(dsn))
    yield held
    await held.close()


async def test_an_order_of_ours_is_read_by_the_library_and_one_of_its_by_us(dsn: str) -> None:
    """Table, bytes and positions equal the library's: each side continues an order of the other."""
    connection = await connect(dsn)
    try:
        ours = Order.new("KOM/1 ü")
        ours.report(report("KOM/1 ü", "Diajukan"))
        ours.report(report("KOM/1 ü", "Dikirim"))
        assert (await store.append(connection, ours.pending_events)).positions == [1, 2]  # type: ignore[arg-type]

        def go_on_in_the_library() -> tuple[Order, list[int]]:
            with library_application(dsn) as application:
                order: Order = application.repository.get("KOM/1 ü")
                order.report(report("KOM/1 ü", "Diterima"))
                recordings = application.save(order)
                theirs = Order.new("KOM2")
                theirs.report(report("KOM2", "Batal"))
                application.save(theirs)
                ids = [recording.notification.id for recording in recordings]
                return application.repository.get("KOM/1 ü"), ids

        read, ids = await asyncio.to_thread(go_on_in_the_library)
        assert (read.version, read.state.status, ids) == (3, "delivered", [3])

        logged = await store.read_log(connection, 2, 10)
        events = [decode_event(*entry[1:5]) for entry in logged]
        assert [(e.originator_id, e.originator_version, e.status) for e in events] == [
            ("KOM/1 ü", 3, "delivered"),
            ("KOM2", 1, "cancelled"),
        ]
        states = await store.order_states(connection, ["KOM2", "KOM/1 ü", "new"])
        assert [states[order_no].version for order_no in ("KOM2", "KOM/1 ü", "new")] == [1, 3, 0]
    finally:
        await connection.close()


async def test_the_bytes_in_the_table_are_those_of_the_librarys_transcoder(connection: Connection) -> None:
    """The bytes in the table equal those of the library's JSONTranscoder for the same state."""
    order = Order.new("KOM1")
    event = order.report(report("KOM1"))
    await store.append(connection, [event])
    (logged,) = await store.read_log(connection, 0, 1)
    transcoder = JSONTranscoder()
    transcoder.register(DatetimeAsISO())
    state = {k: v for k, v in vars(event).items() if k not in {"originator_id", "originator_version"}}
    assert logged.state == transcoder.encode(state)
    assert logged.topic == "order.status_reported"


async def test_a_version_that_is_taken_refuses_the_whole_append(connection: Connection) -> None:
    """If one version of an append exists already, the whole append is refused."""
    first = Order.new("KOM1").report(report("KOM1"))
    await store.append(connection, [first])
    stale = Order.new("KOM1").report(report("KOM1"))
    fresh = Order.new("KOM2").report(report("KOM2"))
    with pytest.raises(VersionTakenError):
        await store.append(connection, [fresh, stale])
    assert [event.order_no for event in await store.read_log(connection, 0, 10)] == ["KOM1"]


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE order_events SET state = ''",
        "DELETE FROM order_events",
        "TRUNCATE order_events CASCADE",
        "INSERT INTO order_events VALUES ('KOM2', 1, '', '', 7, now())",
    ],
)
async def test_the_database_itself_refuses_to_change_the_log(connection: Connection, statement: str) -> None:
    """Even the owner cannot change or remove an event, or choose a position."""
    await store.append(connection, [Order.new("KOM1").report(report("KOM1"))])
    await connection.execute("SET session_replication_role = replica")
    with pytest.raises(asyncpg.PostgresError):
        await connection.execute(statement)
    assert len(await store.read_log(connection, 0, 10)) == 1


async def test_a_lost_answer_is_looked_for_by_report_id(connection: Connection) -> None:
    """An event counts as appended only if its report_id is equal, not only its version."""
    event = Order.new("KOM1").report(report("KOM1"))
    assert await store.find_appended(connection, [event]) is None
    appended = await store.append(connection, [event])
    assert await store.find_appended(connection, [event]) == appended
    other = Order.new("KOM1").report(report("KOM1"))
    assert await store.find_appended(connection, [other]) is None


async def test_no_connection_appends_while_the_log_is_locked(dsn: str, held: DedicatedConnection) -> None:
    """While a connection holds the append lock, no other connection can append."""
    other = await connect(dsn)
    async with held.transaction(store.BEGIN_LOCKED) as connection:
        await store.take_append_lock(connection)
        event = Order.new("KOM1").report(report("KOM1"))
        waiting = asyncio.create_task(store.append(other, [event]))
        await wait_for_locked(connection)
        assert not waiting.done()
        assert await store.order_states(connection, ["KOM1"]) == {"KOM1": NEW_ORDER}
    assert (await waiting).positions == [1]
    await other.close()


WRITERS = 4
APPENDS_EACH = 150


async def tail_while_writing(dsn: str, append_statement: str) -> tuple[int, int]:
    """Tail the log while several writers append.

    Return the number of events that the tail read, and the number of all events.
    """
    finished = asyncio.Event()

    async def write(number: int) -> None:
        connection = await connect(dsn)
        for i in range(APPENDS_EACH):
            ids = [f"W{number}-{i}-{k}" for k in range(5)]
            await connection.fetch(append_statement, ids, [1] * 5, ["t"] * 5, [b"{}"] * 5, 1, [], [], [], [])
        await connection.close()

    async def tail() -> int:
        connection = await connect(dsn)
        position, seen = 0, 0
        while True:
            is_last = finished.is_set()
            page = await store.read_log(connection, position, 1_000)
            if page:
                position = page[-1].position
                seen += len(page)
            elif is_last:
                await connection.close()
                return seen

    tailing = asyncio.create_task(tail())
    await asyncio.gather(*(write(number) for number in range(WRITERS)))
    finished.set()
    return await tailing, WRITERS * APPENDS_EACH * 5


async def test_position_order_is_commit_order(dsn: str) -> None:
    """A reader that tails the log while several connections append misses no event."""
    seen, written = await tail_while_writing(dsn, store.APPEND)
    assert seen == written


async def test_without_the_lock_a_tailing_reader_misses_events(dsn: str) -> None:
    """The test above can fail: if the statement takes no lock, a later commit overtakes a slow one."""
    unlocked = store.APPEND.replace("pg_advisory_xact_lock($5)", "pg_sleep(random() * 0.005 + $5::bigint * 0)")
    # The position is drawn before the pause, so the order of commits differs from that of positions.
    unlocked = unlocked.replace("RETURNING", "RETURNING pg_sleep(random() * 0.005) IS NULL,")
    seen, written = await tail_while_writing(dsn, unlocked)
    assert seen < written
