"""Erasure: it empties bodies and addresses, changes nothing else, and holds up no webhook."""

import asyncio
import json
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest
from structlog.testing import capture_logs

from domain.order import NEW_ORDER, Order, decide
from projections.postgres import Connection
from projections.views import VIEWS
from service.app import Service
from service.database.connections import ConnectionPool, connect, connected
from service.database.operations import Actor
from service.event_log import store
from service.event_log.follow import Memory
from service.features.settings import Settings
from service.maintenance.check import check_database
from service.maintenance.erasure import Erased, erase_order, find_left, settle
from service.maintenance.retention import Retention
from service.projecting.projector import apply_erasures, view_state
from tests.support.client import Client
from tests.support.recording import EQUAL, dedicated_connection, make_recorder, rebuilt, record, running
from tests.support.reports import report
from tests.support.waiting import condition, until_async

AS_OWNER = "SET ROLE order_tracking_owner"
BY = Actor("cli", "tester")
ERASE = "CALL erase_order('KOM1', 'asked for')"


async def test_an_erasure_waits_for_no_lock_of_maintenance(client: Client, owner_dsn: str) -> None:
    """During a VACUUM or a CREATE INDEX CONCURRENTLY, an erasure ends, and webhooks are recorded."""
    await client.webhook("KOM1")
    maintenance, owner = await connect(owner_dsn), await connect(owner_dsn)
    # The lock that both of them take.
    await maintenance.execute("BEGIN; LOCK TABLE order_events IN SHARE UPDATE EXCLUSIVE MODE")
    await owner.execute(AS_OWNER)
    erasing = asyncio.create_task(owner.execute(ERASE))
    receipt = await client.webhook("KOM1", "Diterima")
    assert receipt["version"] == 2
    await erasing
    await maintenance.close()
    await owner.close()
    (first, *_) = (await client.get("/orders/KOM1/events"))["events"]
    assert (first["data"]["body"], first["data"]["remote"]) == ("", None)


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE order_events SET state = convert_to('{}', 'UTF8')",
        "UPDATE order_events SET state = erased(state), topic = 'other'",
        "UPDATE order_events SET state = erased(state), originator_version = 9",
        "UPDATE order_events SET state = erased(state), recorded_at = now()",
        """UPDATE order_events SET state = convert_to(
            (convert_from(erased(state), 'UTF8')::jsonb || '{"verdict": "late"}')::text, 'UTF8')""",
        "DELETE FROM order_events",
        "TRUNCATE order_events CASCADE",
    ],
)
async def test_the_trigger_lets_only_an_erasure_pass(
    client: Client, connection: Connection, change: str
) -> None:
    """The log's owner can change an event in no other way."""
    await client.webhook("KOM1")
    before = await connection.fetch("TABLE order_events")
    await connection.execute(AS_OWNER)
    with pytest.raises(asyncpg.IntegrityConstraintViolationError, match="events are immutable"):
        await connection.execute(change)
    await connection.execute("RESET ROLE")
    assert await connection.fetch("TABLE order_events") == before


async def test_another_role_cannot_erase_by_an_update(client: Client, connection: Connection) -> None:
    """A role with the right to update the log, but no member of its owner, cannot empty a body."""
    await client.webhook("KOM1")
    await connection.execute("BEGIN; CREATE ROLE stranger; GRANT SELECT, UPDATE ON order_events TO stranger")
    await connection.execute("SET ROLE stranger")
    with pytest.raises(asyncpg.IntegrityConstraintViolationError, match="events are immutable"):
        await connection.execute("UPDATE order_events SET state = erased(state)")
    await connection.execute("ROLLBACK")


async def test_a_late_retry_after_an_erasure_gets_its_receipt(client: Client, connection: Connection) -> None:
    """The same key and status get the first receipt again, so what was erased is not recorded once more."""
    body = b'{"order_no": "KOM1", "status": "Dikirim", "buyer": "Budi"}'
    first = await client.raw(body, **{"webhook-id": "key-1"})
    await connection.execute(f"SET ROLE order_tracking_owner; {ERASE}; RESET ROLE")
    assert await client.raw(body, **{"webhook-id": "key-1"}) == first
    other = await client.raw(body.replace(b"Dikirim", b"Diterima"), **{"webhook-id": "key-1"})
    assert (other["version"], other["outcome"]) == (2, "advanced")
    assert (
        await connection.fetchval(
            "SELECT count(*) FROM order_events WHERE convert_from(state, 'UTF8') ~ 'Budi'"
        )
        == 1
    )


# Each of three orders, one of them while the next words arrive.
ERASURES = 50
HAS_ORDER = "SELECT EXISTS (SELECT FROM order_events WHERE originator_id = $1)"
WORD = "Kurir: rumah Budi, 0812-3456"
IS_CLEAN = """
    SELECT NOT EXISTS (
        SELECT FROM order_events WHERE convert_from(state, 'UTF8') ~ 'Budi'
        UNION ALL SELECT FROM quarantine WHERE convert_from(body, 'UTF8') ~ 'Budi'
        UNION ALL SELECT FROM timeline.entries WHERE reported_status ~ 'Budi'
        UNION ALL SELECT FROM timeline.unrecognised WHERE reported_status ~ 'Budi'
        UNION ALL SELECT FROM held_orders WHERE last_error ~ 'Budi'
        UNION ALL SELECT FROM subscriptions WHERE responses::text ~ 'Budi')
"""


async def erase(owner_dsn: str, dsn: str, order_no: str) -> Erased:
    """Erase an order as the command does."""
    async with connected(owner_dsn) as owner, connected(dsn) as service:
        erased = await erase_order(owner, order_no, "asked for", BY)
        assert await settle(owner, service, [order_no]) == []
    return erased


async def test_an_unknown_word_is_erased_everywhere(
    client: Client, connection: Connection, dsn: str, owner_dsn: str
) -> None:
    """A word outside the vocabulary may be any text: it leaves the log and the views, which still match."""
    for order_no in ("KOM1", "KOM1", "KOM2"):
        await client.webhook(order_no, WORD)
    await client.webhook("KOM1", "Kata lain")
    last = (await client.webhook("KOM1", "Dikirim"))["position"]
    await client.get(f"/statistics?after_position={last}")
    await client.get(f"/orders/KOM1/timeline?after_position={last}")
    assert (await erase(owner_dsn, dsn, "KOM1")).events == 4
    entries = (await client.get("/orders/KOM1/timeline"))["entries"]
    assert [entry["reported_status"] for entry in entries] == ["", "", "", "Dikirim"]
    words = (await client.get("/statistics"))["unrecognised"]
    assert {(word["reported_status"], word["reports"]) for word in words} == {(WORD, 1)}
    assert await rebuilt(dsn, verify=True) == EQUAL
    # The last erasure twice, which changes nothing.
    for _ in range(2):
        await erase(owner_dsn, dsn, "KOM2")
        assert await connection.fetchval(IS_CLEAN)
        assert await rebuilt(dsn, verify=True) == EQUAL


async def test_open_entries_of_the_order_are_erased(
    client: Client, connection: Connection, owner_dsn: str
) -> None:
    """Unparseable bodies that name the order are emptied, however they spell it; others with it are found."""
    await client.webhook("KOM/1")
    bodies = (
        b'{"order_no":"KOM/1","state":"x","buyer":"Budi"}',
        rb'{"order_no":"KOM\/1","state":"x","buyer":"Budi"}',
        rb'{"order_no":"\u004bOM/1","state":"x","buyer":"Budi"}',
        b'{"order_no":"KOM/11","state":"x"}',
        b"KOM/1 not JSON",
        b'{"order_no":"KOM2"}',
    )
    ids = [(await client.raw(body))["quarantine_id"] for body in bodies]
    async with connected(owner_dsn) as owner:
        erased = await erase_order(owner, "KOM/1", "asked for", BY)
        assert erased.entries == 3
        assert await find_left(owner, "KOM/1") == ids[3:5]
    entry = await client.get(f"/quarantine/{ids[1]}")
    assert (entry["state"], entry["body_base64"], entry["remote"]) == ("discarded", None, None)
    assert await connection.fetchval("SELECT entries FROM erasures") == 3
    (operation, *_) = (await client.get("/audit/operations"))["operations"]
    assert (operation["action"], operation["subject"], operation["actor"]) == (
        "order_erased",
        "KOM/1",
        "tester",
    )


async def test_reports_that_arrive_after_an_erasure_stay(client: Client, dsn: str, owner_dsn: str) -> None:
    """A word that is recorded after the erasure of the log, and before that of the views, is in both."""
    await client.webhook("KOM1", WORD)
    async with connected(owner_dsn) as owner, connected(dsn) as service:
        await erase_order(owner, "KOM1", "asked for", BY)
        last = (await client.webhook("KOM1", WORD))["position"]
        await settle(owner, service, ["KOM1"])
    entries = (await client.get(f"/orders/KOM1/timeline?after_position={last}"))["entries"]
    assert [entry["reported_status"] for entry in entries] == ["", WORD]
    assert await rebuilt(dsn, verify=True) == EQUAL
    await erase(owner_dsn, dsn, "KOM1")
    assert await rebuilt(dsn, verify=True) == EQUAL


async def test_words_that_arrive_during_erasures(
    client: Client, dsn: str, owner_dsn: str, connection: Connection
) -> None:
    """Under load, no view keeps an erased word, whichever of the two it heard of first."""
    words = [f"Kurir {number}: rumah Budi" for number in range(ERASURES)]

    async def report_words() -> None:
        for number, word in enumerate(words):
            await asyncio.gather(*(client.webhook(f"KOM{number}-{copy}", word) for copy in range(3)))

    reporting = asyncio.create_task(report_words())
    async with connected(owner_dsn) as owner, connected(dsn) as service:
        for number in range(ERASURES):
            while not await connection.fetchval(HAS_ORDER, f"KOM{number}-0"):  # noqa: ASYNC110 - of the server
                await asyncio.sleep(0)
            await erase_order(owner, f"KOM{number}-0", "asked for", BY)
        await reporting
        orders = [f"KOM{number}-{copy}" for number in range(ERASURES) for copy in (1, 2)]
        for order_no in orders:
            await erase_order(owner, order_no, "asked for", BY)
        assert await settle(owner, service, orders) == []
    assert await connection.fetchval(IS_CLEAN)
    await client.get(f"/statistics?after_position={3 * ERASURES}")
    assert await connection.fetchval(IS_CLEAN)
    assert await rebuilt(dsn, verify=True) == EQUAL


async def test_a_view_notes_no_erasure_that_memory_may_lack(dsn: str, owner_dsn: str) -> None:
    """An erasure that is committed while a view applies others waits for the view's next step."""
    async with dedicated_connection(dsn) as held:
        recorder = make_recorder(held)
        for order_no in ("KOM1", "KOM2"):
            await recorder.record(report(order_no, WORD))
    async with connected(owner_dsn) as owner, connected(dsn) as service:
        await erase_order(owner, "KOM1", "asked for", BY)
        await service.execute("SET search_path TO timeline")
        state = await view_state(service)
        await erase_order(owner, "KOM2", "asked for", BY)
        for view in VIEWS:
            await service.execute(f"SET search_path TO {view.name}")
            await apply_erasures(service, view, state)
            assert (await view_state(service)).erasure_id == state.newest_erasure_id


async def test_the_time_of_another_orders_word_stays(
    client: Client, dsn: str, owner_dsn: str, connection: Connection
) -> None:
    """Only the order with a word's last report takes the time of that report with it."""
    for order_no in ("KOM1", "KOM2", "KOM1", "KOM3"):
        last = (await client.webhook(order_no, WORD))["position"]
    await client.get(f"/orders/KOM1/timeline?after_position={last}")
    times = await connection.fetch("SELECT received_at FROM timeline.entries ORDER BY position")
    last_time = "SELECT last_received_at FROM timeline.unrecognised WHERE reported_status = $1"
    for order_no, reports in (("KOM1", 4), ("KOM3", 2)):
        await erase(owner_dsn, dsn, order_no)
        assert await connection.fetchval(last_time, WORD) == times[reports - 1][0]
        assert await rebuilt(dsn, verify=True) == EQUAL


async def test_a_view_that_is_behind_or_has_a_parked_order_is_erased(
    dsn: str, owner_dsn: str, connection: Connection
) -> None:
    """With no service, the erasure writes the views itself. What they read later from the log is erased."""
    async with running(Settings(), dsn) as service:
        await record(service, report("KOM1", WORD))
        await record(service, report("KOM2", WORD))
    broken = "INSERT INTO order_events (originator_id, originator_version, topic, state)"
    await connection.execute(f"{broken} VALUES ('KOM1', 2, 'order.future', '{{}}')")
    async with running(Settings(), dsn) as service:
        await until_async(condition(lambda: service.core.positions["timeline"].reach.position == 3))
    await store.append(connection, [Order.new("KOM3").report(report("KOM3", WORD))])
    for order_no in ("KOM1", "KOM2", "KOM3"):
        await erase(owner_dsn, dsn, order_no)
    assert await connection.fetchval(IS_CLEAN)
    async with running(Settings(), dsn) as service:
        await record(service, report("KOM4"))
    assert await connection.fetchval(IS_CLEAN)
    found = await rebuilt(dsn, verify=True)
    assert [view.differences for view in found] == [0, 0, 0]


async def test_a_process_that_is_told_late_of_a_commit_keeps_nothing(dsn: str, owner_dsn: str) -> None:
    """An event that is erased before its own process remembers it does not enter memory."""
    async with dedicated_connection(dsn) as held:
        memory = Memory(held)
        recorder = make_recorder(held)
        await recorder.record(report("KOM1", WORD))
        async with connected(owner_dsn) as owner:
            await erase_order(owner, "KOM1", "asked for", BY)
        await memory.hear_in_time()
        memory.remember([decide(NEW_ORDER, report("KOM1", WORD))], [1])
        assert memory.recall(0, 1) == ()
        memory.remember([decide(NEW_ORDER, report("KOM2", WORD))], [2])
        assert [event.originator_id for _, event in memory.recall(1, 1)] == ["KOM2"]


async def test_erasures_that_a_failover_lost_are_forgotten(
    client: Client, owner_dsn: str, dsn: str, connection: Connection
) -> None:
    """If another erasure has the id of the last one that was read, memory starts again."""
    for order_no in ("KOM1", "KOM2"):
        await client.webhook(order_no, WORD)
    async with dedicated_connection(dsn) as held, connected(owner_dsn) as owner:
        memory = Memory(held)
        await memory.hear_in_time()
        before = memory.erasures.up_to
        await erase_order(owner, "KOM1", "asked for", BY)
        await memory.hear_in_time(at_once=True)
        assert [one["order_no"] for one in memory.erasures.after(before) or ()] == ["KOM1"]
        memory.remember([decide(NEW_ORDER, report("KOM2", WORD))], [2])
        await connection.execute("DELETE FROM erasures; ALTER TABLE erasures ALTER erasure_id RESTART")
        await erase_order(owner, "KOM2", "asked for", BY)
        await memory.hear_in_time(at_once=True)
        assert memory.recall(1, 1) == ()
        assert memory.erasures.after(before) is None
        assert [memory.erasures.has_erased(order_no, 1) for order_no in ("KOM1", "KOM2")] == [False, True]


async def test_a_late_retry_of_an_erased_word_adds_nothing(
    client: Client, connection: Connection, owner_dsn: str
) -> None:
    """The key of a report whose word is erased gets the first receipt again, so that the word stays erased."""
    body = f'{{"order_no":"KOM1","status":"{WORD}"}}'.encode()
    first = await client.raw(body, **{"webhook-id": "key-1"})
    async with connected(owner_dsn) as owner:
        await erase_order(owner, "KOM1", "asked for", BY)
    again = await client.raw(body, **{"webhook-id": "key-1"})
    assert (again["version"], again["reported_status"]) == (first["version"], "")
    assert await connection.fetchval("SELECT count(*) FROM order_events") == 1


async def test_followers_learn_of_an_erasure(client: Client, owner_dsn: str) -> None:
    """Erasures have a feed of their own, and a live stream gets an event without an id."""
    for order_no in ("KOM1", "KOM2", "KOM3"):
        await client.webhook(order_no)
    async with (
        connected(owner_dsn) as owner,
        client.reading("/events/stream?after=0") as log,
        client.reading("/orders/KOM2/stream?after=0") as order,
    ):
        assert await log.positions(3) == [1, 2, 3]
        assert await order.positions(1) == [2]
        for order_no in ("KOM1", "KOM2"):
            await erase_order(owner, order_no, "asked for", BY)
        for reader, order_nos in ((log, ["KOM1", "KOM2"]), (order, ["KOM2"])):
            for order_no in order_nos:
                message = await reader.message()
                assert (message["event"], "id" in message) == ("order_erased", False)
                erasure = json.loads(message["data"])
                assert (erasure["order_no"], erasure["version"], erasure["events"]) == (order_no, 1, 1)
        # Memory does not have the erased bodies any more.
        async with client.reading("/events/stream?after=0") as later:
            data = [json.loads((await later.message())["data"])["data"] for _ in range(3)]
        assert [bool(one["body"]) for one in data] == [False, False, True]
    page = await client.get("/erasures?limit=1")
    assert [one["order_no"] for one in page["erasures"]] == ["KOM1"]
    rest = await client.get(page["next"])
    assert ([one["order_no"] for one in rest["erasures"]], rest["next"]) == (["KOM2"], None)
    last = rest["erasures"][0]["erasure_id"]
    assert await client.get(f"/erasures?after={last}") == {"erasures": [], "next": None}
    assert (await client.get(f"/erasures?after={last + 1}", 410))["type"] == "/problems/beyond-the-head"


async def test_old_bodies_of_settled_orders_are_erased(
    dsn: str, owner_dsn: str, connection: Connection
) -> None:
    """The retention erases by the log's own times, counts, and leaves what is unsettled or newer."""
    now = datetime.now(UTC)
    service = Service(Settings(port=0, body_retention_days=30), dsn, owner_dsn)
    await service.start()
    try:
        assert service.core.retention is not None
        old, recent = now - timedelta(days=31), now - timedelta(days=29)
        reports = [
            report(order_no, status, received_at=at)
            for order_no, at, statuses in (
                ("SETTLED", old, ("Dikirim", "Diterima")),
                ("UNSETTLED", old, ("Dikirim",)),
                ("RECENT", recent, ("Dikirim", "Diterima")),
            )
            for status in statuses
        ]
        for one in reports:
            await record(service, one)
        # A new entry that names an old order waits for an operator.
        entry = "INSERT INTO quarantine (body, reason, received_at, last_seen_at, named_order_no)"
        values = "VALUES ('x', 'not JSON', $1, $1, 'SETTLED')"
        for seen_at in (old, now):
            await connection.execute(f"{entry} {values}", seen_at)
            await connection.execute("UPDATE quarantine SET times_seen = 1000")
        assert await service.core.retention.erase_due(now) == 1
        assert await bodies(connection) == {"SETTLED": False, "UNSETTLED": True, "RECENT": True}
        states = await connection.fetch("SELECT state, body IS NULL FROM quarantine ORDER BY quarantine_id")
        assert [tuple(row) for row in states] == [("discarded", True), ("open", False)]
        assert await service.core.retention.erase_due(now) == 0
        # A report that comes later has its own time; an order that is settled later is found then.
        await record(service, report("UNSETTLED", "Diterima", received_at=old + timedelta(hours=1)))
        assert await service.core.retention.erase_due(now + timedelta(days=2)) == 2
        assert await bodies(connection) == {"SETTLED": False, "UNSETTLED": False, "RECENT": False}
        assert service.core.retention.erased_orders == 3
    finally:
        await service.stop()
    # A new process does not erase again.
    again = Retention(service.core.pool, owner_dsn, dsn, 30)
    await service.core.pool.open()
    reasons = await connection.fetch("SELECT DISTINCT actor, via, reason FROM operations")
    assert [tuple(row) for row in reasons] == [
        ("retention", "service", "ORDER_TRACKING_BODY_RETENTION_DAYS is 30")
    ]
    assert again.erased_orders == 0


async def test_an_unreadable_order_does_not_stop_the_retention(
    dsn: str, owner_dsn: str, connection: Connection
) -> None:
    """An order whose last event cannot be decoded is logged, and the next one is erased."""
    now = datetime.now(UTC)
    service = Service(Settings(port=0), dsn)
    await service.start()
    try:
        for order_no, days in (("KOM1", 33), ("KOM2", 32)):
            await record(service, report(order_no, "Diterima", received_at=now - timedelta(days=days)))
        await connection.execute(
            """INSERT INTO order_events (originator_id, originator_version, topic, state)
            VALUES ('KOM1', 2, 'order.future', '{}')"""
        )
        with capture_logs() as lines:
            assert await Retention(service.core.pool, owner_dsn, dsn, 30).erase_due(now) == 1
    finally:
        await service.stop()
    (line,) = [line for line in lines if line["event"] == "an order could not be erased"]
    assert line["order_no"] == "KOM1"


async def bodies(connection: Connection) -> dict[str, bool]:
    """Return whether the events of each order have bodies."""
    rows = await connection.fetch(
        """SELECT originator_id, bool_and(convert_from(state, 'UTF8')::jsonb ->> 'body' <> '')
        FROM order_events GROUP BY originator_id"""
    )
    return dict([tuple(row) for row in rows])


async def test_the_retention_says_that_it_may_not_erase(dsn: str) -> None:
    """With the service's own role, nothing is erased, and the error names the setting and the grant."""
    pool = ConnectionPool(dsn, 3.0)
    with pytest.raises(PermissionError, match="GRANT order_tracking_owner"):
        await Retention(pool, dsn, dsn, 30).erase_due(datetime.now(UTC))
    findings = [finding.text for finding in await check_database(dsn, retention_days=30)]
    assert any("may not erase" in text for text in findings)
