"""Projections apply each event once, in one process at a time, and a rebuild gives the same rows."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from domain.order import Order
from domain.statuses import ALIASES, Vocabulary
from projections import current_status, timeline
from projections.postgres import Connection
from projections.views import VIEWS
from service.app import Service
from service.database.connections import DedicatedConnection, LimitedConnection, connect
from service.event_log import store
from service.event_log.codec import MAPPER, decode_event
from service.event_log.follow import Log
from service.event_log.snapshot import snapshot
from service.features.settings import Settings
from service.maintenance.rejudgement import PendingReports, find_pending, log_batches, rejudge
from service.projecting.locks import HOLD_REBUILD_LOCK
from service.projecting.projector import BATCH_ATTEMPTS_MAX, OutdatedViewError
from service.projecting.rebuild import RebuildRunningError
from service.projecting.replay import Rebuilder, unpark_order_in_views
from tests.support.databases import WAITING_FOR_LOCKS, wait_for_locked
from tests.support.recording import EQUAL, caught_up, dedicated_connection, make_recorder, rebuilt, record
from tests.support.reports import NOW, report
from tests.support.waiting import condition, until_async


@pytest.fixture
async def service(dsn: str) -> AsyncIterator[Service]:
    service = Service(Settings(), dsn)
    await service.start()
    yield service
    await service.stop()


async def insert_raw(connection: Connection, order_no: str, version: int, topic: str, state: bytes) -> int:
    """Append an event that this release did not write."""
    position: int = await connection.fetchval(
        "INSERT INTO order_events (originator_id, originator_version, topic, state) VALUES ($1, $2, $3, $4) "
        "RETURNING notification_id",
        order_no,
        version,
        topic,
        state,
    )
    return position


async def rows_of(connection: Connection, table: str) -> list[tuple[Any, ...]]:
    return sorted(map(tuple, await connection.fetch(f"TABLE {table}")), key=repr)


async def test_the_views_follow_the_log_behind_the_commit(service: Service, connection: Connection) -> None:
    """Recorded reports appear in both views once the views reach their position."""
    await record(
        service,
        report("KOM1", "Diajukan", "A1"),
        report("KOM1", "Dikirim", "A1"),
        report("KOM1", "dikirim", "A1"),
        report("KOM1", "Dipacking", "A2"),
        report("KOM1", "mystery"),
        report("KOM1", "Batal"),
    )
    ((order, parked_position),) = await current_status.find_orders(connection, ["KOM1"])
    assert parked_position is None
    assert order == {
        "order_no": "KOM1",
        "cnote": "A1",
        "status": "in_transit",
        "status_label": {"id": "Dikirim", "en": "In transit"},
        "reported_status": "Dikirim",
        "settled": False,
        "version": 6,
        "position": 6,
        "status_since": NOW,
        "first_reported_at": NOW,
        "last_reported_at": NOW,
        "submitted_at": NOW,
        "picked_up_at": None,
        "shipped_at": NOW,
        "delivered_at": None,
        "delivery_attempts": 0,
        "counts": {"advanced": 2, "repeated": 1, "late": 1, "refused": 1, "unrecognised": 1},
        "rejudgements": 0,
        "parked": None,
    }
    assert await rows_of(connection, "current_status.order_cnotes") == [("A1", "KOM1"), ("A2", "KOM1")]
    entries = await timeline.entries_page(connection, "KOM1", 0, 10)
    assert [(entry["version"], entry["verdict"], entry["repeats"]) for entry in entries] == [
        (1, "advanced", 0),
        (2, "advanced", 1),
        (4, "late", 0),
        (5, "unrecognised", 0),
        (6, "refused", 0),
    ]
    assert entries[1]["skipped"] == ["packed", "picked_up"]


# Ends the statements that wait for a lock, as a server does that shuts down.
CANCEL_WAITING = """
    SELECT pg_cancel_backend(pid) FROM pg_locks
    WHERE NOT granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""
STATUS_STRINGS = [*(alias for aliases in ALIASES.values() for alias in aliases), "mystery", "RETUR_DITERIMA"]
REPORTS = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.sampled_from(STATUS_STRINGS),
        st.sampled_from([None, "AWB1", "AWB2"]),
        st.integers(-5, 5),
    ),
    min_size=1,
    max_size=40,
)


# Random reports seldom contradict an order twice.
EVERY_VERDICT_TWICE = [
    (0, status, cnote, 0)
    for status, cnote in [
        ("Diajukan", "AWB1"), ("Diajukan", "AWB1"), ("Diajukan", "AWB2"), ("mystery", None),
        ("mystery", None), ("Batal", "AWB2"), ("Dipacking", "AWB2"), ("Dipacking", None),
        ("Diterima", "AWB1"), ("Diterima", "AWB1"),
    ]
]  # fmt: skip


async def test_live_and_rebuilt_views_are_equal_row_for_row(
    service: Service, dsn: str, connection: Connection
) -> None:
    """For any reports, the live views equal a rebuild, and each order's row equals the fold of its events."""

    async def try_one(reports: list[tuple[int, str, str | None, int]]) -> None:
        prefix = str(uuid4())
        positions = [
            (
                await service.core.recorder.record(
                    report(f"{prefix}/{order}", status, cnote, NOW + timedelta(seconds=seconds))
                )
            )["position"]
            for order, status, cnote, seconds in reports
        ]
        await caught_up(service, positions[-1] or 0)
        await rejudge_all()
        assert await rebuilt(dsn, verify=True) == EQUAL
        for order_no in {f"{prefix}/{order}" for order, *_ in reports}:
            stream = await store.read_stream(connection, order_no, 0, 1_000)
            events = [(entry.position, decode_event(*entry[1:5])) for entry in stream]
            folded = current_status.VIEW.new_rows()
            current_status.fold(events, folded)
            ((live, _),) = await current_status.find_orders(connection, [order_no])
            assert live == current_status.to_order(folded["orders"][order_no])

    async def rejudge_all() -> None:
        """Judge every report with the unknown word again, by another process."""
        async with dedicated_connection(dsn) as to_read, dedicated_connection(dsn) as to_append:
            recorder = make_recorder(to_append, recognise=Vocabulary({"mystery": "in_transit"}).recognise)
            pending = PendingReports(Vocabulary({"mystery": "in_transit"}).recognise)
            async with snapshot(lambda: connect(dsn)) as whole:
                async for one in find_pending(log_batches(whole, lambda _count: None), pending):
                    await rejudge(recorder, one)
            await caught_up(service, await Log(to_read).head())

    loop = asyncio.get_running_loop()

    @settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
    @given(REPORTS)
    @example(EVERY_VERDICT_TWICE)
    def try_many(reports: list[tuple[int, str, str | None, int]]) -> None:
        asyncio.run_coroutine_threadsafe(try_one(reports), loop).result()

    await asyncio.to_thread(try_many)
    assert await rebuilt(dsn) == EQUAL


async def test_a_milestone_keeps_its_first_time_in_later_batches(
    service: Service, dsn: str, connection: Connection
) -> None:
    """An order reaches milestones again in later batches: the row has the first times, live and rebuilt."""
    statuses = (
        *("Diajukan", "Dijemput", "Bermasalah", "Dijemput", "Dikirim", "Diantar", "Bermasalah", "Dikirim"),
        *("Diantar", "Diterima", "Retur", "Hilang", "Dikirim", "Diterima"),
    )
    for second, status in enumerate(statuses):
        await record(service, report("KOM1", status, received_at=NOW + timedelta(seconds=second)))
    ((order, _),) = await current_status.find_orders(connection, ["KOM1"])
    assert order is not None
    names = ("submitted_at", "picked_up_at", "shipped_at", "delivered_at")
    assert [order[name].second - NOW.second for name in names] == [0, 1, 4, 9]  # type: ignore[literal-required]
    assert order["delivery_attempts"] == 2
    assert await rebuilt(dsn, verify=True) == EQUAL


async def test_nothing_is_copied_under_a_view_lock(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """While PostgreSQL waits for the data of a COPY, no timeout ends a process that is suspended."""

    async def refuse(*_arguments: object, **_options: object) -> None:
        raise AssertionError("a live batch is copied")

    monkeypatch.setattr(LimitedConnection, "copy_records_to_table", refuse)
    await record(service, *(report(f"KOM{number}") for number in range(2 * timeline.VIEW.batch_events_max)))


async def test_two_processes_project_each_event_once(dsn: str, connection: Connection) -> None:
    """With several processes, each event adds one timeline row, and the counts are right."""
    services = [Service(Settings(), dsn) for _ in range(3)]
    for service in services:
        await service.start()
    try:
        receipts = await asyncio.gather(
            *(services[number % 3].core.recorder.record(report(f"KOM{number % 7}")) for number in range(300))
        )
        head = max(receipt["position"] or 0 for receipt in receipts)
        for service in services:
            await caught_up(service, head)
        assert await connection.fetchval("SELECT count(*) FROM timeline.entries") == 300
        assert await rebuilt(dsn, verify=True) == EQUAL
    finally:
        for service in services:
            await service.stop()


async def test_a_projector_whose_backend_is_killed_goes_on(service: Service, connection: Connection) -> None:
    """If a projector loses its connection, its view misses no event and applies none twice."""
    for number in range(5):
        await service.core.recorder.record(report(f"KOM{number}"))
        await connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    await record(service, report("LAST"))
    assert await connection.fetchval("SELECT count(*) FROM timeline.entries") == 6


# As a later release that knows another topic.
LATER_TOPICS = {Order.StatusReported.TOPIC, "order.not_known_yet"}


async def test_an_undecodable_event_parks_its_order(
    service: Service, dsn: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An undecodable event parks its order, other orders continue, and a replay that can decode it unparks the
    order.
    """
    await record(service, report("KOM1", "Diajukan"), report("KOM2", "Diajukan"))
    alien = Order.new("KOM1").report(report("KOM1", "Dikirim"))
    state = MAPPER.to_stored_event(alien).state
    aside = await insert_raw(connection, "KOM1", 2, "order.not_known_yet", state)
    await caught_up(service, aside)
    later = await record(service, report("KOM2", "Dikirim"))
    assert await connection.fetchval("SELECT count(*) FROM timeline.entries WHERE position > $1", aside) == 1
    ((order, parked_position),) = await current_status.find_orders(connection, ["KOM1"])
    assert order is not None
    assert order["parked"] is not None
    assert (order["version"], order["parked"]["since_version"], parked_position) == (1, 2, aside)
    assert (await timeline.read_head(connection, "KOM1")).parked_position == aside
    assert [one.parked for one in await rebuilt(dsn)] == [1, 1, 1]
    assert [one.differences for one in await rebuilt(dsn, verify=True)] == [0, 0, 0]

    monkeypatch.setattr("service.event_log.codec.TOPICS", LATER_TOPICS)
    assert await rebuilt(dsn) == EQUAL
    await caught_up(service, later)
    ((order, _),) = await current_status.find_orders(connection, ["KOM1"])
    assert order is not None
    assert (order["version"], order["parked"]) == (2, None)


async def test_an_event_that_a_fold_cannot_handle_parks_its_order(
    service: Service, dsn: str, connection: Connection
) -> None:
    """An event with an unknown verdict parks its order in one view only, and a rebuild still swaps."""
    await record(service, report("KOM1", "Diajukan"))
    state = json.loads((await store.read_log(connection, 0, 1))[0].state)
    state["verdict"] = "postponed"
    position = await insert_raw(
        connection, "KOM1", 2, Order.StatusReported.TOPIC, json.dumps(state, separators=(",", ":")).encode()
    )
    after = await record(service, report("KOM2", "Diajukan"), report("KOM2", "Dikirim"))
    assert after > position
    assert [row[0] for row in await connection.fetch("SELECT order_no FROM current_status.parked_orders")] == [
        "KOM1"
    ]
    assert await connection.fetchval("SELECT count(*) FROM timeline.parked_orders") == 0
    assert [(one.name, one.parked) for one in await rebuilt(dsn)] == [
        ("current_status", 1),
        ("timeline", 0),
        ("statistics", 0),
    ]
    (order, _), _ = await current_status.find_orders(connection, ["KOM1", "KOM2"])
    assert order is not None
    assert order["parked"] is not None
    assert (order["version"], order["parked"]["since_version"]) == (1, 2)
    assert await connection.fetchval("SELECT count(*) FROM current_status.orders") == 2


async def test_one_parked_order_is_resumed_without_a_rebuild(
    service: Service, dsn: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release that can apply the event at fault applies the order's waiting events, and no other order's."""
    await record(service, report("KOM1", "Diajukan"), report("KOM2", "Diajukan"))
    alien = Order.new("KOM1").report(report("KOM1", "Dikirim"))
    state = MAPPER.to_stored_event(alien).state
    for order_no in ("KOM1", "KOM2"):
        await insert_raw(connection, order_no, 2, "order.not_known_yet", state)
    again = MAPPER.to_stored_event(replace(alien, originator_version=3)).state
    at = await insert_raw(connection, "KOM1", 3, Order.StatusReported.TOPIC, again)
    await caught_up(service, at)

    async def resumed(order_no: str) -> list[tuple[bool, int | None]]:
        held = DedicatedConnection(lambda: connect(dsn))
        results = await unpark_order_in_views(dsn, VIEWS, Log(held), order_no)
        await held.close()
        return [(one.was_parked, one.parked and one.parked["since_version"]) for one in results]

    assert await resumed("KOM3") == [(False, None)] * len(VIEWS)
    assert await resumed("KOM1") == [(True, 2)] * len(VIEWS)
    monkeypatch.setattr("service.event_log.codec.TOPICS", LATER_TOPICS)
    assert await resumed("KOM1") == [(True, None)] * len(VIEWS)
    (order, _), (other, _) = await current_status.find_orders(connection, ["KOM1", "KOM2"])
    assert order is not None
    assert other is not None
    assert (order["version"], order["parked"]) == (3, None)
    assert other["parked"] is not None
    later = await record(service, report("KOM1", "Diterima"))
    await caught_up(service, later)
    assert await resumed("KOM2") == [(True, None)] * len(VIEWS)
    assert await rebuilt(dsn, verify=True) == EQUAL


async def test_a_connection_that_died_in_silence_is_left(
    service: Service, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend that stops responding delays its view only by the time limit of one step."""
    monkeypatch.setattr("service.projecting.projector.STEP_SECONDS_MAX", 0.5)
    # The first append on a connection ends with a commit too; the second is one statement.
    for _ in range(2):
        await record(service, report("KOM1"))

    async def idle_projector() -> int:
        # Between two batches, the last statement of a projecting connection was a commit, and it holds no lock.
        pid: int | None = await connection.fetchval(
            "SELECT pid FROM pg_stat_activity "
            "WHERE datname = current_database() AND query = 'COMMIT' AND state = 'idle' LIMIT 1"
        )
        return pid or 0

    pid = await until_async(idle_projector)
    os.kill(pid, signal.SIGSTOP)
    try:
        await record(service, report("KOM1", "Diterima"))
    finally:
        os.kill(pid, signal.SIGCONT)
    assert await connection.fetchval("SELECT count(*) FROM timeline.entries") == 3


async def nobody_waits(connection: Connection) -> bool:
    waiting: int = await connection.fetchval(WAITING_FOR_LOCKS)
    return waiting == 0


async def test_a_failure_of_the_server_parks_no_order(
    service: Service, dsn: str, connection: Connection
) -> None:
    """A locked table of a view delays the view, and does not park any order, however often a step fails."""
    async with connection.transaction():
        await connection.execute("LOCK TABLE current_status.orders, timeline.entries IN ACCESS EXCLUSIVE MODE")
        receipt = await service.core.recorder.record(report("KOM1"))
        # The steps of the views fail, and are retried. More failures of events would park the order.
        for _ in range(BATCH_ATTEMPTS_MAX + 1):
            await wait_for_locked(connection, 2)
            await connection.execute(CANCEL_WAITING)
            await until_async(lambda: nobody_waits(connection))
    await caught_up(service, receipt["position"] or 0)
    assert await connection.fetchval("SELECT count(*) FROM current_status.parked_orders") == 0
    assert await rebuilt(dsn, verify=True) == EQUAL


async def test_a_view_whose_position_is_lost_is_rebuilt_at_start(dsn: str, connection: Connection) -> None:
    """A view that has lost its position is rebuilt at the next start."""
    await store.append(connection, [Order.new("KOM1").report(report("KOM1"))])
    await connection.execute("DELETE FROM current_status.projection")
    service = Service(Settings(), dsn)
    await service.start()
    try:
        await caught_up(service, 1)
    finally:
        await service.stop()
    assert await rebuilt(dsn, verify=True) == EQUAL


async def test_a_view_of_another_definition_is_rebuilt_at_start(dsn: str, connection: Connection) -> None:
    """A view with an outdated definition is rebuilt at the next start, while reports are accepted."""
    await store.append(connection, [Order.new("KOM1").report(report("KOM1"))])
    await connection.execute("UPDATE timeline.projection SET definition = 'of an earlier release'")
    await connection.execute("ALTER TABLE timeline.entries DROP COLUMN reason")
    service = Service(Settings(), dsn)
    await service.start()
    try:
        await record(service, report("KOM1", "Diterima"))
        assert [entry["version"] for entry in await timeline.entries_page(connection, "KOM1", 0, 10)] == [1, 2]
        assert not service.core.positions["timeline"].is_outdated
    finally:
        await service.stop()
    assert await rebuilt(dsn, verify=True) == EQUAL


async def test_an_older_process_does_not_write_a_newer_view(service: Service, connection: Connection) -> None:
    """A process with an older definition does not write to a newer view, and still records webhooks."""
    await connection.execute("UPDATE current_status.projection SET definition = 'of a later release'")
    with pytest.raises(OutdatedViewError):
        await service.core.views.movers["current_status"].step()
    receipt = await service.core.recorder.record(report("KOM1"))
    assert receipt["version"] == 1
    assert await connection.fetchval("SELECT position FROM current_status.projection") == 0


async def test_two_releases_do_not_rebuild_a_view_in_turns(
    service: Service, dsn: str, connection: Connection
) -> None:
    """The process that starts later rebuilds the view; a running one of another release leaves it alone."""
    await record(service, report("KOM1"))
    newer = replace(next(view for view in VIEWS if view.name == "timeline"), fold_version=1_000)
    dedicated = DedicatedConnection(lambda: connect(dsn, search_path="timeline"))
    await Rebuilder(dsn, [newer], {"timeline": dedicated}, service.core.log).rebuild_if_outdated(newer)
    await dedicated.close()
    view = service.core.positions["timeline"]

    def is_outdated() -> bool:
        view.wake.set()
        return view.is_outdated

    await until_async(condition(is_outdated))
    await service.core.views.rebuilder.rebuild_if_outdated(view.view)
    assert await connection.fetchval("SELECT definition FROM timeline.projection") == newer.definition


async def test_another_definitions_view_is_not_written_to_be_verified(
    service: Service, dsn: str, connection: Connection
) -> None:
    """A verification refuses to write to a view with another definition, and the error names the command to
    run.
    """
    await record(service, report("KOM1"))
    await connection.execute(
        "UPDATE current_status.projection SET definition = 'of a later release', position = 0; "
        "DELETE FROM current_status.orders"
    )
    with pytest.raises(OutdatedViewError, match="run 'replay' to rebuild it"):
        await rebuilt(dsn, verify=True)
    assert await rows_of(connection, "current_status.orders") == []


async def test_an_outdated_view_stays_outdated_during_failures(
    service: Service, connection: Connection
) -> None:
    """A view stays marked as outdated while its definition cannot be read."""
    view = service.core.positions["current_status"]
    await connection.execute("UPDATE current_status.projection SET definition = 'of a later release'")

    def is_outdated() -> bool:
        view.wake.set()
        return view.is_outdated

    await until_async(condition(is_outdated))
    await connection.execute("ALTER TABLE current_status.projection RENAME TO moved_away")
    for _ in range(3):
        with pytest.raises(asyncpg.UndefinedTableError):
            await service.core.views.movers["current_status"].step()
        assert view.is_outdated
    await connection.execute("ALTER TABLE current_status.moved_away RENAME TO projection")


async def test_a_difference_is_found(service: Service, dsn: str, connection: Connection) -> None:
    """A verification finds a row that was changed by hand."""
    await record(service, report("KOM1"))
    await connection.execute("UPDATE current_status.orders SET cnote = 'forged'")
    assert [(one.name, one.differences) for one in await rebuilt(dsn, verify=True)] == [
        ("current_status", 2),
        ("timeline", 0),
        ("statistics", 0),
    ]
    assert await rebuilt(dsn) == EQUAL
    assert await rebuilt(dsn, verify=True) == EQUAL


async def test_only_one_rebuild_runs_at_a_time(dsn: str, connection: Connection) -> None:
    """A second rebuild is refused while another process runs one."""
    await connection.execute(HOLD_REBUILD_LOCK)
    with pytest.raises(RebuildRunningError):
        await rebuilt(dsn, waits=False)


async def test_a_swap_disturbs_neither_readers_nor_reports_nor_a_dump(
    service: Service, dsn: str, connection: Connection
) -> None:
    """Rebuilds swap views while prepared statements read, reports arrive and a dump holds the tables.

    No read fails or sees a row or a position go back, and at the end the views equal a rebuild. The test takes
    about 5 s for several swaps.
    """
    await record(service, *(report(f"KOM{number}") for number in range(200)))
    finished = asyncio.Event()
    reads = 0

    async def read() -> None:
        nonlocal reads
        reader = await connect(dsn)
        position = 0
        versions: dict[str, int] = {}
        while not finished.is_set():
            found = await current_status.find_orders(reader, [f"KOM{n}" for n in range(200)])
            orders = [order for order, _ in found if order is not None]
            entries = await timeline.entries_page(reader, "KOM1", 0, 10)
            reads += 1
            assert len(orders) == 200
            assert entries
            at = await reader.fetchval("SELECT position FROM timeline.projection")
            assert at >= position
            position = at
            for order in orders:
                assert order["version"] >= versions.get(order["order_no"], 0)
                versions[order["order_no"]] = order["version"]
        await reader.close()

    async def report_on() -> int:
        number = 0
        while not finished.is_set():
            await service.core.recorder.record(report(f"KOM{number % 200}", "Diterima"))
            number += 1
        return number

    async def dump() -> None:
        # Like pg_dump: one long transaction with a lock on every table.
        holder = await connect(dsn)
        while not finished.is_set():
            async with holder.transaction(isolation="repeatable_read"):
                await holder.fetch("SELECT 1 FROM timeline.entries, current_status.orders LIMIT 1")
                # A swap must wait for this transaction.
                await asyncio.sleep(0.1)
        await holder.close()

    background = [asyncio.create_task(work()) for work in (read, read, report_on, dump)]
    try:
        for _ in range(4):
            assert await rebuilt(dsn) == EQUAL
    finally:
        finished.set()
        await asyncio.gather(*background)
    head = await store.head_position(connection)
    await caught_up(service, head)
    assert reads
    assert await rebuilt(dsn, verify=True) == EQUAL
    leftover = await connection.fetch("SELECT nspname FROM pg_namespace WHERE nspname ~ '_(next|old)$'")
    assert leftover == []


async def test_an_order_longer_than_a_page_is_rebuilt_whole(
    service: Service, dsn: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row and the cnotes of an order are complete even if the order spans several batches of a rebuild."""
    await record(
        service,
        *(report(f"KOM{n % 3}", cnote=f"AWB{n % 2}") for n in range(30)),
        *(report("HOT", cnote=f"AWB{n % 3}") for n in range(50)),
    )
    monkeypatch.setattr("service.event_log.snapshot.BATCH_EVENTS_MAX", 7)
    before = await rows_of(connection, "current_status.orders")
    assert await rebuilt(dsn) == EQUAL
    assert await rows_of(connection, "current_status.orders") == before
    assert await rebuilt(dsn, verify=True) == EQUAL


async def test_a_view_is_written_by_its_projection_alone(connection: Connection) -> None:
    """The schema refuses a row whose counts do not add up to its version."""
    with pytest.raises(asyncpg.CheckViolationError):
        await connection.execute(
            "INSERT INTO current_status.orders (order_no, version, position, first_position, "
            "first_reported_at, last_reported_at, delivery_attempts, advanced, repeated, late, refused, "
            "unrecognised, rejudgements) VALUES ('KOM1', 2, 1, 1, now(), now(), 0, 0, 0, 0, 0, 1, 0)"
        )
