"""Commits that are lost, by a failover to an asynchronous standby or a restore, under a running service.

The lost reports are the operator's choice. Everything that the service does afterwards must follow the log that
is left.
"""

import asyncio
from collections.abc import AsyncIterator
from math import inf

import pytest
from structlog.testing import capture_logs

from projections import current_status
from projections.postgres import Connection
from projections.views import VIEWS
from service.app import Service
from service.database.connections import StorageUnavailableError, connect
from service.event_log import store
from service.event_log.follow import Log
from service.event_log.store import LogWentBackError
from service.features.settings import Settings
from service.ingest.idempotency import IdempotencyKey
from service.maintenance.check import check_database
from service.projecting.replay import rebuild_views
from tests.support.client import Client
from tests.support.databases import TestServer, wait_for_locked
from tests.support.recording import (
    EQUAL,
    caught_up,
    dedicated_connection,
    locked_log,
    logged_events,
    make_recorder,
    rebuilt,
    record,
)
from tests.support.reports import report
from tests.support.waiting import condition, until_async


@pytest.fixture
async def service(dsn: str) -> AsyncIterator[Service]:
    service = Service(Settings(), dsn)
    await service.start()
    yield service
    await service.stop()


async def versions(connection: Connection, order_no: str) -> list[int]:
    return [event.version for event in await store.read_stream(connection, order_no, 0, 100)]


async def test_an_order_goes_on_from_its_last_event_in_the_log(
    server: TestServer, service: Service, dsn: str
) -> None:
    """The next report follows the log's last version and status, not the cached ones."""

    async def is_closed() -> bool:
        connection = service.core.append_connection._connection  # noqa: SLF001
        return connection is None or connection.is_closed()

    await record(service, report("KOM1", "Diajukan"), report("KOM1", "Dipacking"))
    copy = server.copy(dsn)
    await record(service, report("KOM1", "Dijemput"), report("KOM1", "Dikirim"), report("KOM1", "Diantar"))
    server.put_back(dsn, copy)
    # The recorder opens a connection, without an error that would make it read the order again.
    await until_async(is_closed)
    with capture_logs() as logs:
        receipt = await service.core.recorder.record(report("KOM1", "Dijemput"))
    assert (receipt["outcome"], receipt["version"], receipt["status"]) == ("advanced", 3, "picked_up")
    (lost,) = [log for log in logs if log["event"] == "the database has lost acknowledged reports"]
    assert (lost["last_position"], lost["head"], service.core.recorder.losses) == (5, 2, 1)
    connection = await connect(dsn)
    assert await versions(connection, "KOM1") == [1, 2, 3]
    await connection.close()
    assert await rebuilt(dsn, verify=True) == EQUAL


async def test_a_restore_that_cuts_no_connection_is_noticed(
    server: TestServer, service: Service, dsn: str
) -> None:
    """Each append proves what the process has seen, since a restored log need not cut its connections."""
    await record(service, report("KOM1", "Diajukan"), report("KOM1", "Dipacking"))
    dump = await asyncio.to_thread(server.dump, dsn)
    await record(service, report("KOM1", "Dijemput"), report("KOM1", "Dikirim"), report("KOM2", "Diantar"))
    await asyncio.to_thread(server.restore_clean, dsn, dump)
    with capture_logs() as logs:
        receipt = await service.core.recorder.record(report("KOM1", "Dijemput"))
    assert (receipt["outcome"], receipt["version"], receipt["position"]) == ("advanced", 3, 3)
    (lost,) = [log for log in logs if log["event"] == "the database has lost acknowledged reports"]
    assert (lost["last_position"], lost["head"], service.core.recorder.losses) == (5, 2, 1)
    await caught_up(service, 3)
    assert await rebuilt(dsn, verify=True) == EQUAL


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("restore_at", [1, 3 * len(VIEWS)], ids=["before the catch-up", "at its end"])
async def test_a_rebuild_proves_what_it_has_read(
    server: TestServer, dsn: str, restore_at: int, *, verify: bool
) -> None:
    """If a restore replaces the log after a rebuild has read it, the rebuilt views are not used."""
    async with dedicated_connection(dsn) as held, dedicated_connection(dsn) as reading:
        recorder = make_recorder(held)
        for number in range(3):
            await recorder.record(report(f"KOM{number}"))
        dump = await asyncio.to_thread(server.dump, dsn)
        for number in range(5):
            await recorder.record(report(f"LOST{number}"))

        heads = 0

        class Restoring(Log):
            async def head(self) -> int:
                nonlocal dump, heads
                heads += 1
                if heads == 1 < restore_at:
                    # For the catch-up.
                    await recorder.record(report("LOST5"))
                if heads == restore_at:
                    await asyncio.to_thread(server.restore_clean, dsn, dump)
                    dump = b""
                    # As many events as were lost, so that the positions alone show nothing.
                    for number in range(6):
                        await recorder.record(report(f"NEW{number}"))
                return await super().head()

        reader = Restoring(reading)
        with pytest.raises(StorageUnavailableError, match=r"does not have the event \S+ at position [89]"):
            await rebuild_views(dsn, VIEWS, reader, lambda _done, _total: None, verify=verify)
    assert await rebuilt(dsn) == EQUAL
    connection = await connect(dsn)
    found = await current_status.find_orders(connection, ["LOST1", "NEW1"])
    await connection.close()
    assert [one.order["version"] if one.order else None for one in found] == [None, 1]


LOSE_ALL_BUT = """
    ALTER TABLE order_events DISABLE TRIGGER ALL;
    DELETE FROM idempotency_keys WHERE version > 0;
    DELETE FROM order_events WHERE notification_id > {kept};
    SELECT setval('order_events_notification_id_seq', {kept});
"""


async def versions_by_order(connection: Connection) -> list[tuple[str, int]]:
    return [(event.originator_id, event.originator_version) for _, event in await logged_events(connection)]


async def test_a_loss_that_a_keyed_report_finds_is_one_for_the_batch_too(
    dsn: str, connection: Connection
) -> None:
    """A batch proves what its states come from, even if another report has appended to the new log since."""
    async with dedicated_connection(dsn) as held, dedicated_connection(dsn) as waiting:
        recorder = make_recorder(held)
        for status in ("Diajukan", "Dipacking", "Dijemput"):
            await recorder.record(report("X", status))
        await connection.execute(LOSE_ALL_BUT.format(kept=1))
        async with waiting.connection() as second, locked_log(dsn) as first:
            keyed = asyncio.create_task(recorder.record(report("Y", "Diajukan"), IdempotencyKey("key-1")))
            await wait_for_locked(first)
            await second.execute("BEGIN")
            locking = asyncio.create_task(second.execute("SELECT pg_advisory_xact_lock($1)", store.APPEND_LOCK))
            await wait_for_locked(first, 2)
            await first.execute("ROLLBACK")
            await locking
            # The keyed report has found the loss, and waits for the lock again to forget what it has seen.
            await wait_for_locked(second)
            plain = asyncio.create_task(recorder.record(report("X", "Dikirim")))
            await until_async(condition(lambda: recorder._batch_began is not None))  # noqa: SLF001
            await second.execute("ROLLBACK")
            await asyncio.gather(keyed, plain)
            await first.execute("BEGIN")
    assert await versions_by_order(connection) == [("X", 1), ("Y", 1), ("X", 2)]
    assert recorder.losses == 1


async def test_a_commit_that_is_found_late_hides_no_loss(dsn: str, connection: Connection) -> None:
    """A commit in doubt may be found after a later one, which stays the one that the next append proves."""
    async with dedicated_connection(dsn) as held:
        recorder = make_recorder(held)
        await recorder.record(report("Z", "Diajukan"))
        async with locked_log(dsn) as holder:
            plain = asyncio.create_task(recorder.record(report("X", "Diajukan")))
            await wait_for_locked(holder)
            keyed = asyncio.create_task(recorder.record(report("Y", "Diajukan"), IdempotencyKey("key-1")))
            await until_async(condition(lambda: recorder._claim_began is not None))  # noqa: SLF001
            held._connection._transport.abort()  # type: ignore[union-attr]  # noqa: SLF001
            await wait_for_locked(holder, 2)
        positions = {(await each)["position"] for each in (plain, keyed)}
        assert positions == {2, 3}
        await connection.execute(LOSE_ALL_BUT.format(kept=2))
        lost = "Y" if (await keyed)["position"] == 3 else "X"
        receipt = await recorder.record(report(lost, "Dipacking"))
    assert (receipt["version"], receipt["position"], recorder.losses) == (1, 3, 1)


async def test_what_another_process_wrote_is_proved_too(server: TestServer, dsn: str) -> None:
    """A state that was read from the log, not committed by this process, is lost with the log that had it."""
    async with dedicated_connection(dsn) as held, dedicated_connection(dsn) as other_held:
        recorder, other = make_recorder(held), make_recorder(other_held)
        await recorder.record(report("KOM1", "Diajukan"))
        dump = await asyncio.to_thread(server.dump, dsn)
        await other.record(report("KOM2", "Diajukan"))
        states, newest = await recorder._known_states({"KOM2"}, [inf])  # noqa: SLF001
        events = recorder._decide_all([report("KOM2", "Dipacking")], states)  # noqa: SLF001
        await asyncio.to_thread(server.restore_clean, dsn, dump)
        with pytest.raises(LogWentBackError):
            await recorder._append(events, {newest}, [inf])  # noqa: SLF001


async def test_lost_events_are_not_applied_to_the_views(server: TestServer, service: Service, dsn: str) -> None:
    """Lost events in memory do not reach the views, and the next events at their positions do."""
    await record(service, report("KOM1", "Diajukan"))
    copy = server.copy(dsn)
    await record(service, *(report(f"LOST{number}") for number in range(50)))
    server.put_back(dsn, copy)
    # A new connection of each projection, before a report makes the recorder open its own.
    for view in service.core.positions.values():
        view.wake.set()

    async def are_back() -> bool:
        return all(view.reach.position == 1 for view in service.core.positions.values())

    await until_async(are_back)
    position = await record(service, report("KOM1", "Dipacking"), report("KOM2", "Dikirim"))
    assert position <= 4
    connection = await connect(dsn)
    found = await current_status.find_orders(connection, ["KOM1", "KOM2", "LOST1"])
    await connection.close()
    assert [one.order["status"] if one.order else None for one in found] == ["packed", "in_transit", None]
    assert await rebuilt(dsn, verify=True) == EQUAL


async def test_a_view_beyond_the_head_is_rebuilt(service: Service, dsn: str) -> None:
    """A view with events that the log has lost is outdated: readers get 503 until it is rebuilt."""
    await record(service, report("KOM1", "Diajukan"))
    connection = await connect(dsn)
    await connection.execute("UPDATE timeline.projection SET position = 40")
    await connection.execute(
        "UPDATE current_status.projection SET position = 40;"
        "UPDATE current_status.orders SET version = 7, advanced = 7"
    )
    for view in service.core.positions.values():
        view.wake.set()

    async def are_rebuilt() -> bool:
        positions = (
            "SELECT ARRAY[c.position, t.position] FROM current_status.projection c, timeline.projection t"
        )
        return bool(await connection.fetchval(positions) == [1, 1])

    await until_async(are_rebuilt)
    await connection.close()
    assert await rebuilt(dsn, verify=True) == EQUAL


async def test_the_check_reports_a_view_beyond_the_head(dsn: str, connection: Connection) -> None:
    """The check compares each view's position with the head of the log."""
    await connection.execute("UPDATE timeline.projection SET position = 40")
    wrong = [finding.text for finding in await check_database(dsn) if finding.kind == "WRONG"]
    assert "the view timeline has events that the log has lost: run 'replay'" in wrong
    assert not any("current_status" in text for text in wrong)


BEYOND = "/problems/beyond-the-head"


async def test_a_position_beyond_the_head_is_gone(client: Client) -> None:
    """A reader whose position the log has lost gets 410 with the head at once, and can begin again there."""
    receipt = await client.webhook("KOM1")
    head = receipt["position"]
    for path in (
        "/events?after=900",
        "/events/stream?after=900",
        "/orders/KOM1/stream?after=900",
        "/orders/KOM1?after_position=900",
        "/orders/KOM1/timeline?after_position=900",
        "/audit/transitions?after_position=900",
    ):
        problem = await client.get(path, status=410)
        assert (problem["type"], problem["head"], problem["position"]) == (BEYOND, head, 900)
    for path, headers in (("/events/stream", {"Last-Event-ID": "900"}), ("/events.ndjson?after=900", {})):
        assert (await client.get(path, status=410, headers=headers))["type"] == BEYOND
    assert (await client.get(f"/events?after={head}"))["events"] == []


async def test_a_live_reader_of_lost_events_reconnects_and_learns_of_it(
    server: TestServer, dsn: str, client: Client
) -> None:
    """A stream ends when the log has lost events that it sent; the reader's next request gets 410."""
    await client.webhook("KOM1")
    copy = server.copy(dsn)

    async def responds() -> bool:
        # The copy has closed the service's connections.
        return await client.status("GET", "/events") == 200

    await until_async(responds)
    async with client.session.get(client.url("/events/stream?after=0")) as stream:
        for number in range(3):
            receipt = await client.webhook(f"LOST{number}")
        content = b""
        while b"id: %d\n" % receipt["position"] not in content:
            content += await stream.content.readany()
            assert not stream.content.at_eof()
        server.put_back(dsn, copy)
        await stream.content.read()
    headers = {"Last-Event-ID": str(receipt["position"])}
    assert (await client.get("/events/stream", status=410, headers=headers))["head"] == 1


async def test_a_reader_of_a_lost_event_learns_of_it_even_if_another_one_has_its_place(
    server: TestServer, dsn: str, client: Client
) -> None:
    """``next`` names the last report. If the log has another one there by now, the reader gets 410."""
    await client.webhook("KOM1")
    copy = server.copy(dsn)
    for _ in range(4):
        await client.webhook("KOM1")
    log = (await client.get("/events?limit=3"))["next"]
    order = (await client.get("/orders/KOM1/events?limit=3"))["next"]
    assert (await client.get(log))["events"][0]["position"] == 4
    assert (await client.get(order))["events"][0]["version"] == 4
    server.put_back(dsn, copy)
    for _ in range(4):
        await client.webhook("KOM1")
    stream = log.replace("/events?", "/events/stream?").replace("&limit=3", "").replace("limit=3&", "")
    ndjson = log.replace("/events?", "/events.ndjson?")
    for path, member in ((log, "position"), (ndjson, "position"), (stream, "position"), (order, "version")):
        problem = await client.get(path, status=410)
        assert (problem["type"], problem[member]) == ("/problems/another-event", 3), path
        assert f"{member} 3" in problem["detail"]


async def test_the_etag_changes_when_an_order_is_parked(client: Client, connection: Connection) -> None:
    """A client that polls with an entity tag learns that its order is parked."""
    receipt = await client.webhook("KOM1")
    path = f"/orders/KOM1?after_position={receipt['position']}"
    _, headers = await client.get_with_headers(path)
    await connection.execute("INSERT INTO current_status.parked_orders VALUES ('KOM1', 2, 2, 'unreadable')")
    unchanged = {"If-None-Match": headers["ETag"]}
    order = await client.get("/orders/KOM1", headers=unchanged)
    assert order["parked"]["reason"] == "unreadable"


async def test_an_earlier_version_of_a_log_with_a_gap(client: Client, connection: Connection) -> None:
    """Versions are read by their numbers, not by their count."""
    await client.webhook("KOM1", "Diajukan")
    await connection.execute(
        "INSERT INTO order_events (originator_id, originator_version, topic, state) "
        "SELECT originator_id, 6, topic, convert_to(replace(convert_from(state, 'UTF8'), "
        "'\"version\":1', '\"version\":6'), 'UTF8') FROM order_events"
    )
    assert (await client.get("/orders/KOM1?version=6"))["version"] == 6
    await client.get("/orders/KOM1?version=3", status=404)


async def copied(server: TestServer, dsn: str, client: Client) -> str:
    """Copy the database under the service, and wait until the service is connected again."""
    copy = server.copy(dsn)

    async def responds() -> bool:
        return await client.status("GET", "/events") == 200

    await until_async(responds)
    return copy


async def test_a_stream_ends_even_if_the_log_has_grown_beyond_its_loss(
    server: TestServer, dsn: str, client: Client
) -> None:
    """New events at the positions of lost ones are not sent as if they were the next."""
    await client.webhook("KOM1")
    copy = await copied(server, dsn, client)
    async with client.session.get(client.url("/events/stream?after=0")) as stream:
        for number in range(3):
            await client.webhook(f"LOST{number}")
        content = b""
        while b"id: 4\n" not in content:
            content += await stream.content.readany()
            assert not stream.content.at_eof()
        server.put_back(dsn, copy)
        await asyncio.gather(*(client.webhook(f"NEW{number}") for number in range(8)))
        rest = await stream.content.read()
    assert b"NEW" not in rest


async def test_a_read_after_a_lost_position_waits_for_the_view(
    server: TestServer, dsn: str, client: Client
) -> None:
    """The position that a view had before the loss is not taken for the present one."""
    await client.webhook("KOM1")
    copy = await copied(server, dsn, client)
    for number in range(5):
        await client.get(f"/orders/X?after_position={(await client.webhook(f'LOST{number}'))['position']}", 404)
    server.put_back(dsn, copy)
    receipt = await client.webhook("KOM2")
    assert receipt["position"] < 6
    order = await client.get(f"/orders/KOM2?after_position={receipt['position']}")
    assert order["version"] == 1


async def test_the_etag_of_a_lost_version_is_not_that_of_the_next(
    server: TestServer, dsn: str, client: Client
) -> None:
    """A client that has the lost version 2 gets the new one."""
    receipt = await client.webhook("KOM1", "Diajukan")
    copy = await copied(server, dsn, client)
    lost = await client.webhook("KOM1", "Dipacking")
    _, headers = await client.get_with_headers(f"/orders/KOM1?after_position={lost['position']}")
    server.put_back(dsn, copy)
    receipt = await client.webhook("KOM1", "Dibatalkan")
    path = f"/orders/KOM1?after_position={receipt['position']}"
    order = await client.get(path, headers={"If-None-Match": headers["ETag"]})
    assert (order["version"], order["status"]) == (2, "cancelled")
