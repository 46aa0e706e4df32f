"""The recorder records each report once, in batches, beside other writers and despite lost connections."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from math import inf
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from domain.order import NEW_ORDER, Arrival, Order, OrderState, Report, decide, evolve
from projections.postgres import Connection
from service.batcher import OverloadedError
from service.database.connections import (
    DedicatedConnection,
    StorageUnavailableError,
    UnsupportedServerError,
    connect,
    end_abandoned,
)
from service.database.schema import SERVICE_ROLE
from service.event_log import store
from service.ingest.idempotency import IdempotencyKey
from service.ingest.recorder import OPENING_SHARE_MIN, Receipt, Recorder, UnrecordableReportError
from tests.support.databases import WAITING_FOR_LOCKS, TestServer, wait_for_locked
from tests.support.recording import locked_log, logged_events, make_recorder
from tests.support.reports import NOW, report
from tests.support.waiting import PATIENCE_SECONDS, until_async

# The time limit of a report. It is generous: only tests of the limit itself set a short one.


async def record(recorder: Recorder, *reports: Report) -> list[Receipt]:
    return list(await asyncio.gather(*(recorder.record(one) for one in reports)))


@pytest.fixture
async def held(dsn: str) -> AsyncIterator[DedicatedConnection]:
    held = DedicatedConnection(lambda: connect(dsn))
    yield held
    await held.close()


@pytest.fixture
def recorder(held: DedicatedConnection) -> Recorder:
    return make_recorder(held)


async def nothing() -> None:
    """Do nothing."""


class CuttingConnection(DedicatedConnection):
    """Fails at its second use: the recorder first reads the orders' states, then appends.

    Args:
        dsn: the database.
        before: awaited before the append.
        after: awaited after the append, before the connection is lost.
    """

    def __init__(
        self, dsn: str, before: Callable[[], Awaitable[None]], after: Callable[[], Awaitable[None]]
    ) -> None:
        super().__init__(lambda: connect(dsn))
        self._steps = iter([None, (before, after)])

    @asynccontextmanager
    async def connection(
        self, seconds_max: float | None = None, *, open_until: float = inf
    ) -> AsyncIterator[Connection]:
        steps = next(self._steps, None)
        async with super().connection(seconds_max, open_until=open_until) as connection:
            if steps is None:
                yield connection
                return
            before, after = steps
            await before()
            yield connection
            await after()
            raise ConnectionResetError("cut after the commit")


def arriving_again(one: Report) -> Report:
    """Return the same report with another arrival."""
    return one._replace(arrival=Arrival(str(uuid4()), NOW))


def assert_judged_in_order(events: Sequence[Order.StatusReported]) -> None:
    """Check that versions have no gaps, and that deciding again in the order of the log gives the
    same events.
    """
    states: dict[str, OrderState] = {}
    for event in events:
        again = Report(
            Arrival(event.report_id, event.timestamp, event.remote),
            event.originator_id,
            event.reported_status,
            event.reported_cnote,
            event.body,
            event.occurred_at,
        )
        assert decide(states.get(event.originator_id, NEW_ORDER), again) == event
        states[event.originator_id] = evolve(NEW_ORDER, event)


async def test_concurrent_reports_share_commits_and_each_gets_its_own_receipt(
    held: DedicatedConnection, connection: Connection
) -> None:
    """A hundred concurrent reports take few commits, and each receipt names its own event."""
    commits: list[int] = []
    recorder = make_recorder(held, on_commit=lambda events, _positions: commits.append(len(events)))
    reports = [report(f"KOM{number % 10}") for number in range(100)]
    receipts = await record(recorder, *reports)
    events = await logged_events(connection)
    assert sum(commits) == 100
    assert len(commits) < 10
    by_id = {event.report_id: (position, event) for position, event in events}
    for one, receipt in zip(reports, receipts, strict=True):
        position, event = by_id[one.arrival.report_id]
        assert receipt == {
            "outcome": event.verdict,
            "report_id": one.arrival.report_id,
            "order_no": one.order_no,
            "version": event.originator_version,
            "position": position,
            "status": event.status,
            "reported_status": one.reported_status,
            "skipped": event.skipped,
            "reason": event.reason,
            "quarantine_id": None,
            "ignored": [],
        }
    assert_judged_in_order([event for _, event in events])


async def test_a_stale_cache_is_refused_by_the_key_and_judged_again(
    dsn: str, recorder: Recorder, connection: Connection
) -> None:
    """If another process has recorded in the meantime, the report is decided from that process's events."""
    await record(recorder, report(status="Dikirim"))
    other_held = DedicatedConnection(lambda: connect(dsn))
    await record(make_recorder(other_held), report(status="Diterima"))
    await other_held.close()
    (receipt,) = await record(recorder, report(status="Diantar"))
    assert (receipt["version"], receipt["outcome"], receipt["status"]) == (3, "late", "delivered")
    assert_judged_in_order([event for _, event in await logged_events(connection)])


@pytest.mark.parametrize("point", ["before it is sent", "after it is committed"])
async def test_a_lost_connection_leaves_one_event(dsn: str, point: str) -> None:
    """If a connection is cut before or after the commit, the recorder reconnects, and each report has one
    event.
    """

    async def cut() -> None:
        await terminate_backends(dsn)

    steps = (cut, nothing) if point == "before it is sent" else (nothing, cut)
    cutting = CuttingConnection(dsn, *steps)
    recorder = make_recorder(cutting)
    one, two = report("KOM1"), report("KOM2", "Diterima")
    receipts = await record(recorder, one, two)
    await cutting.close()
    check = await connect(dsn)
    events = await logged_events(check)
    await check.close()
    assert [event.report_id for _, event in events] == [one.arrival.report_id, two.arrival.report_id]
    assert [receipt["position"] for receipt in receipts] == [position for position, _ in events]


async def terminate_backends(dsn: str, but: "Connection | None" = None) -> None:
    """Terminate every connection to this database except a given one."""
    connection = await connect(dsn.removesuffix(f"&role={SERVICE_ROLE}"))
    kept = [connection.get_server_pid(), but.get_server_pid() if but is not None else 0]
    await connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> ALL($1::int[])",
        kept,
    )
    await connection.close()


async def test_no_database_is_unavailable_within_the_time() -> None:
    """Without a database, a report fails at its time limit and does not hang."""

    async def connect_nowhere() -> Connection:
        raise StorageUnavailableError("nobody listens")

    held = DedicatedConnection(connect_nowhere)
    recorder = make_recorder(held, seconds_max=0.3)
    async with asyncio.timeout(PATIENCE_SECONDS):
        outcomes = await asyncio.gather(*(recorder.record(report()) for _ in range(5)), return_exceptions=True)
    assert all(isinstance(outcome, StorageUnavailableError) for outcome in outcomes)


PAST, FUTURE = 0.0, inf


async def test_a_report_whose_caller_was_answered_is_never_begun(
    recorder: Recorder, connection: Connection
) -> None:
    """A report that is due when its batch is sent is left out, and the later ones of the batch are recorded."""
    late, timely = report("KOM1", "Dikirim"), report("KOM1", "Diterima")
    for _ in range(2):
        outcomes = await recorder._record_batch([late, late, timely], [PAST, PAST, FUTURE])  # noqa: SLF001
        assert [type(outcome) for outcome in outcomes] == [StorageUnavailableError] * 2 + [dict]
    events = [event for _, event in await logged_events(connection)]
    assert [event.report_id for event in events] == [timely.arrival.report_id] * 2
    assert_judged_in_order(events)


async def test_reports_that_are_all_due_are_not_recorded(recorder: Recorder, connection: Connection) -> None:
    """Nothing is sent for a batch whose callers were all answered."""
    due = asyncio.get_running_loop().time() + 1e-6
    with pytest.raises(StorageUnavailableError):
        await recorder._record_batch([report("KOM1"), report("KOM2")], [PAST, due])  # noqa: SLF001
    assert await logged_events(connection) == []


async def test_what_is_committed_is_acknowledged_at_once(recorder: Recorder, connection: Connection) -> None:
    """If a batch is halved, the callers of the first half do not wait for the second, nor share its failure."""
    await connection.execute("""
        CREATE FUNCTION stall() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF NEW.originator_id = 'BAD' THEN RAISE 'no' USING ERRCODE = 'check_violation'; END IF;
            IF NEW.originator_id = 'SLOW' THEN PERFORM pg_advisory_xact_lock(42); END IF;
            RETURN NEW;
        END $$;
        CREATE TRIGGER stall BEFORE INSERT ON order_events FOR EACH ROW EXECUTE FUNCTION stall();
        SELECT pg_advisory_lock(42);
    """)
    order_nos = ("GOOD1", "GOOD2", "BAD", "SLOW")
    *good, bad, slow = (asyncio.create_task(recorder.record(report(order_no))) for order_no in order_nos)
    assert [receipt["version"] for receipt in await asyncio.gather(*good)] == [1, 1]
    assert not slow.done()
    await connection.execute("SELECT pg_advisory_unlock(42)")
    assert (await slow)["version"] == 1
    with pytest.raises(UnsupportedServerError, match="the database rejects reports: no"):
        await bad


async def test_a_commit_in_doubt_is_found_after_its_caller_was_answered(dsn: str) -> None:
    """A report that is due is still found if its append was committed, but not begun again if it was not."""

    async def until_due() -> None:
        await asyncio.sleep(max(0.0, dues[0] - asyncio.get_running_loop().time()))

    cutting = CuttingConnection(dsn, nothing, until_due)
    dues = [asyncio.get_running_loop().time() + 1.0, FUTURE]
    outcomes = await make_recorder(cutting)._record_batch([report("KOM1"), report("KOM2")], dues)  # noqa: SLF001
    await cutting.close()
    assert [type(outcome) for outcome in outcomes] == [dict, dict]
    async with locked_log(dsn) as holder:
        assert len(await logged_events(holder)) == 2


async def test_a_caller_with_little_time_left_opens_no_connection(dsn: str) -> None:
    """While the log is locked, callers that give up do not each leave a backend behind."""
    opened = 0

    async def counted() -> Connection:
        nonlocal opened
        opened += 1
        return await connect(dsn)

    held = DedicatedConnection(counted)
    recorder = make_recorder(held, seconds_max=1.0)
    now = asyncio.get_running_loop().time
    async with locked_log(dsn):
        calls = []
        began = now()
        for number in range(40):
            calls.append(asyncio.create_task(recorder.record(report(f"K{number}"), IdempotencyKey("key"))))
            await asyncio.sleep(0.01)
        spread = now() - began
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(outcome, StorageUnavailableError) for outcome in outcomes)
    # A call opens one only if it has a tenth of a second left, for which it then waits.
    assert opened <= 2 + spread / (OPENING_SHARE_MIN * 1.0)
    await held.close()


async def test_the_server_ends_an_append_whose_client_has_gone(dsn: str, connection: Connection) -> None:
    """An abandoned append does not wait for the lock, where it would hold a backend, and be committed later."""
    other = await connect(dsn)
    await end_abandoned(other, 60.0)
    async with locked_log(dsn) as holder:
        sent = asyncio.create_task(store.append(other, [decide(NEW_ORDER, report("KOM1"))]))
        await wait_for_locked(holder)
        other.terminate()
        with pytest.raises(asyncpg.ConnectionDoesNotExistError):
            await sent

        async def is_gone() -> bool:
            waiting: int = await holder.fetchval(WAITING_FOR_LOCKS)
            return waiting == 0

        await until_async(is_gone)
    assert await logged_events(connection) == []


async def test_a_full_queue_refuses_at_once(held: DedicatedConnection) -> None:
    """Reports above the limit of the queue are refused at once, and the accepted ones are recorded."""
    recorder = make_recorder(held, queue_reports_max=10)
    outcomes = await asyncio.gather(
        *(recorder.record(report(f"KOM{n}")) for n in range(15)), return_exceptions=True
    )
    assert sum(isinstance(outcome, OverloadedError) for outcome in outcomes) == 5
    assert sum(isinstance(outcome, dict) for outcome in outcomes) == 10


async def test_one_report_that_the_database_refuses_does_not_fail_its_neighbours(
    recorder: Recorder, connection: Connection
) -> None:
    """A batch that the database refuses is halved until the invalid report is alone."""
    # PostgreSQL cannot store a NUL character in text. The parser normally refuses it.
    reports = [report(f"KOM{number}") for number in range(9)]
    reports[4] = report("KOM\x00")
    outcomes = await asyncio.gather(*(recorder.record(one) for one in reports), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes].count(UnrecordableReportError) == 1
    assert isinstance(outcomes[4], UnrecordableReportError)
    assert len(await logged_events(connection)) == 8


@pytest.mark.parametrize(
    ("topic", "written", "read"),
    [
        ("order.not_known_yet", "", ""),
        ("order.status_reported", '"status":"in_transit"', '"status":"at_sea"'),
        ("order.status_reported", '"leg":null', '"leg":"in_the_air"'),
    ],
    ids=["an event of its own", "a status of its own", "a leg of its own"],
)
async def test_an_order_that_a_later_release_wrote_does_not_fail_the_others(
    recorder: Recorder, connection: Connection, topic: str, written: str, read: str
) -> None:
    """A report on an order with an undecodable event is refused, and the other reports of its batch are
    recorded.
    """
    await recorder.record(report("OTHER"))
    await connection.execute(
        "INSERT INTO order_events (originator_id, originator_version, topic, state) "
        "SELECT 'KOM3', 1, $1, convert_to(replace(convert_from(state, 'UTF8'), $2, $3), 'UTF8') "
        "FROM order_events",
        topic,
        written,
        read,
    )
    outcomes = await asyncio.gather(
        *(recorder.record(report(f"KOM{number}")) for number in range(9)),
        return_exceptions=True,
    )
    refused = [
        number for number, outcome in enumerate(outcomes) if isinstance(outcome, UnrecordableReportError)
    ]
    assert refused == [3]
    assert sum(isinstance(outcome, dict) for outcome in outcomes) == 8


async def test_a_cancelled_caller_does_not_cancel_other_reports(
    recorder: Recorder, connection: Connection
) -> None:
    """A cancelled caller cancels neither the other callers nor the running commit."""
    calls = [asyncio.create_task(recorder.record(report(f"KOM{n}"))) for n in range(10)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    calls[3].cancel()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes].count(asyncio.CancelledError) == 1
    assert sum(isinstance(outcome, dict) for outcome in outcomes) == 9
    assert_judged_in_order([event for _, event in await logged_events(connection)])


async def test_time_never_goes_back_within_an_order(recorder: Recorder, connection: Connection) -> None:
    """If the clock goes back, a later event of an order does not get an earlier time."""
    await recorder.record(report())
    await recorder.record(report(status="Diterima", received_at=NOW - timedelta(hours=1)))
    assert [event.timestamp for _, event in await logged_events(connection)] == [NOW, NOW]


async def test_an_idempotency_key_gets_the_first_receipt_again(
    recorder: Recorder, connection: Connection
) -> None:
    """A repeated key of the same order and body adds no event; with another order or body it is an ordinary
    report.
    """
    key = IdempotencyKey("key-1")
    first = report()
    receipt = await recorder.record(first, key)
    assert await recorder.record(arriving_again(first), key) == receipt
    other_body = await recorder.record(arriving_again(first)._replace(body="{}"), key)
    other_order = await recorder.record(arriving_again(first)._replace(order_no="KOM2"), key)
    assert (other_body["version"], other_body["outcome"]) == (2, "repeated")
    assert (other_order["order_no"], other_order["version"]) == ("KOM2", 1)
    assert len(await logged_events(connection)) == 3


async def test_a_key_whose_commit_had_no_response_is_found_again(dsn: str) -> None:
    """Concurrent retries with one key make one event, even if the connection is cut."""
    held = DedicatedConnection(lambda: connect(dsn))
    recorder = make_recorder(held)
    first = report()
    async with locked_log(dsn) as holder:
        calls = [
            asyncio.create_task(recorder.record(arriving_again(first), IdempotencyKey("key-1")))
            for _ in range(8)
        ]
        # The connections are cut while the first call waits to append.
        await wait_for_locked(holder)
        await terminate_backends(dsn, but=holder)
    receipts = await asyncio.gather(*calls)
    await held.close()
    check = await connect(dsn)
    assert len(await logged_events(check)) == 1
    await check.close()
    assert len({receipt["report_id"] for receipt in receipts}) == 1


async def run_processes(dsn: str, processes: int, reports: int, order_nos: list[str]) -> list[list[Any]]:
    running = [
        await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.integration.recording_process",
            dsn,
            str(reports),
            *order_nos,
            stdout=asyncio.subprocess.PIPE,
        )
        for _ in range(processes)
    ]
    outputs = await asyncio.gather(*(process.communicate() for process in running))
    assert [process.returncode for process in running] == [0] * processes
    return [json.loads(output) for output, _ in outputs]


@pytest.mark.parametrize("order_nos", [["HOT"], ["A", "B", "C", "D"]], ids=["one hot order", "a few orders"])
async def test_processes_on_the_same_orders(dsn: str, connection: Connection, order_nos: list[str]) -> None:
    """Concurrent processes record every report, without gaps in versions, and none of them starves.

    A process that starves exits with an error, because its reports exceed their time limit.
    """
    results = await run_processes(dsn, 4, 60, order_nos)
    events = await logged_events(connection)
    assert len(events) == 4 * 60
    assert_judged_in_order([event for _, event in events])
    recorded = {(event.originator_id, event.originator_version, event.report_id) for _, event in events}
    receipts = {tuple(version) for versions in results for version in versions}
    assert receipts == recorded


async def test_a_stopped_server_is_left_in_time_and_found_again(
    server: TestServer, held: DedicatedConnection, connection: Connection
) -> None:
    """While the server is stopped, a report fails at its time limit; afterwards the recorder works again.

    If the recorder waited for the stopped server, this test would reach its own time limit.
    """
    await record(make_recorder(held), report())
    backend: int = await connection.fetchval(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    os.kill(backend, signal.SIGSTOP)
    os.kill(server.pid, signal.SIGSTOP)
    try:
        with pytest.raises(StorageUnavailableError):
            await record(make_recorder(held, seconds_max=0.5), report())
    finally:
        os.kill(server.pid, signal.SIGCONT)
        os.kill(backend, signal.SIGCONT)
    (receipt,) = await record(make_recorder(held), report())
    # The backend may have committed the failed report after it continued, or not.
    assert receipt["version"] in {2, 3}
    assert_judged_in_order([event for _, event in await logged_events(connection)])


async def test_a_server_that_cannot_write_is_unavailable_and_nothing_is_refused(
    dsn: str, connection: Connection
) -> None:
    """On a read-only server, such as after a failover, a report gets an unavailable error and is
    not refused.
    """
    held = DedicatedConnection(lambda: connect(dsn, default_transaction_read_only="on"))
    recorder = make_recorder(held, seconds_max=0.4)
    for claim in (None, IdempotencyKey("key-1")):
        with pytest.raises(StorageUnavailableError):
            await recorder.record(report(), claim)
    await held.close()
    assert await logged_events(connection) == []


async def test_a_keyed_report_that_the_database_refuses(recorder: Recorder) -> None:
    """A report with a key is refused like any other if the database cannot store it."""
    with pytest.raises(UnrecordableReportError):
        await recorder.record(report("KOM\x00"), IdempotencyKey("key-1"))


async def test_an_unavailable_lock_does_not_refuse_the_report(dsn: str, connection: Connection) -> None:
    """If the append lock is not available within the server's limit, the report is unavailable, not refused."""
    held = DedicatedConnection(lambda: connect(dsn, lock_timeout="50ms"))
    recorder = make_recorder(held, seconds_max=0.4)
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", store.APPEND_LOCK)
        outcomes = await asyncio.gather(
            *(recorder.record(report(f"KOM{number}")) for number in range(4)), return_exceptions=True
        )
    assert [type(outcome) for outcome in outcomes] == [StorageUnavailableError] * 4
    (receipt,) = await record(recorder, report())
    assert receipt["version"] == 1
    await held.close()


async def test_a_batch_waits_for_one_report_with_a_key(recorder: Recorder) -> None:
    """Reports with keys take turns with the batches, however many of them are waiting."""
    keyed = [asyncio.create_task(recorder.record(report(f"K{n}"), IdempotencyKey("key-1"))) for n in range(50)]
    await asyncio.sleep(0)
    receipt = await recorder.record(report("P1"))
    # It used the connection twice, to read the order's state and to append.
    assert receipt["position"] in {1, 2, 3}
    assert all(receipt["version"] == 1 for receipt in await asyncio.gather(*keyed))


async def test_reports_with_keys_do_not_starve_the_others(recorder: Recorder) -> None:
    """Reports with keys above a small limit are refused at once, and reports without keys are recorded."""
    keyed = [recorder.record(report(f"K{n}"), IdempotencyKey(f"key-{n}")) for n in range(500)]
    plain = [recorder.record(report(f"P{n}")) for n in range(20)]
    outcomes = await asyncio.gather(*keyed, *plain, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes[:500]} == {dict, OverloadedError}
    assert all(isinstance(outcome, dict) for outcome in outcomes[500:])
