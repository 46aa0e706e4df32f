"""Erasure: it empties bodies and addresses, changes nothing else, and holds up no webhook."""

import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from structlog.testing import capture_logs

import projections.erasure
from projections.postgres import Connection
from service.app import Service
from service.database.connections import ConnectionPool, connect, connected
from service.database.operations import Actor
from service.features.settings import Settings
from service.maintenance import erasure
from service.maintenance.check import check_database
from service.maintenance.erasure import erase_order, find_left
from service.maintenance.retention import Retention
from tests.support.client import Client
from tests.support.recording import EQUAL, rebuilt, record
from tests.support.reports import report

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


WORD = "Kurir: rumah Budi, 0812-3456"
IS_CLEAN = """
    SELECT NOT EXISTS (
        SELECT FROM order_events WHERE convert_from(state, 'UTF8') ~ 'Budi'
        UNION ALL SELECT FROM quarantine WHERE convert_from(body, 'UTF8') ~ 'Budi'
        UNION ALL SELECT FROM timeline.entries WHERE reported_status ~ 'Budi'
        UNION ALL SELECT FROM statistics.unrecognised WHERE reported_status ~ 'Budi')
"""


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
    async with connected(owner_dsn) as owner, connected(dsn) as service:
        erased = await erase_order(owner, service, "KOM1", "asked for", BY)
        assert (erased.events, erased.has_old_views) == (4, False)
        entries = (await client.get("/orders/KOM1/timeline"))["entries"]
        assert [entry["reported_status"] for entry in entries] == ["", "", "", "Dikirim"]
        words = (await client.get("/statistics"))["unrecognised"]
        assert {(word["reported_status"], word["reports"]) for word in words} == {(WORD, 1)}
        assert await rebuilt(dsn, verify=True) == EQUAL
        await erase_order(owner, service, "KOM2", "asked for", BY)
        assert await connection.fetchval(IS_CLEAN)
        assert await rebuilt(dsn, verify=True) == EQUAL
        # A second erasure changes nothing.
        await erase_order(owner, service, "KOM2", "asked again", BY)
    assert await rebuilt(dsn, verify=True) == EQUAL


async def test_open_entries_of_the_order_are_erased(
    client: Client, connection: Connection, dsn: str, owner_dsn: str
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
    async with connected(owner_dsn) as owner, connected(dsn) as service:
        erased = await erase_order(owner, service, "KOM/1", "asked for", BY)
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


async def test_reports_that_arrive_during_an_erasure_stay(
    client: Client, dsn: str, owner_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A word that is recorded after the erasure of the log, and before that of the views, is in both."""
    await client.webhook("KOM1", WORD)
    between = projections.erasure.erase_words

    async def later(*arguments: Any) -> bool:
        last = (await client.webhook("KOM1", WORD))["position"]
        await client.get(f"/statistics?after_position={last}")
        await client.get(f"/orders/KOM1/timeline?after_position={last}")
        return await between(*arguments)

    monkeypatch.setattr(erasure, "erase_words", later)
    async with connected(owner_dsn) as owner, connected(dsn) as service:
        await erase_order(owner, service, "KOM1", "asked for", BY)
        entries = (await client.get("/orders/KOM1/timeline"))["entries"]
        assert [entry["reported_status"] for entry in entries] == ["", WORD]
        assert await rebuilt(dsn, verify=True) == EQUAL
        monkeypatch.undo()
        await erase_order(owner, service, "KOM1", "asked for", BY)
    assert await rebuilt(dsn, verify=True) == EQUAL


async def test_a_late_retry_of_an_erased_word_adds_nothing(
    client: Client, connection: Connection, dsn: str, owner_dsn: str
) -> None:
    """The key of a report whose word is erased gets the first receipt again, so that the word stays erased."""
    body = f'{{"order_no":"KOM1","status":"{WORD}"}}'.encode()
    first = await client.raw(body, **{"webhook-id": "key-1"})
    async with connected(owner_dsn) as owner, connected(dsn) as service:
        await erase_order(owner, service, "KOM1", "asked for", BY)
    again = await client.raw(body, **{"webhook-id": "key-1"})
    assert (again["version"], again["reported_status"]) == (first["version"], "")
    assert await connection.fetchval("SELECT count(*) FROM order_events") == 1


async def test_followers_learn_of_an_erasure(client: Client, dsn: str, owner_dsn: str) -> None:
    """Erasures have a feed of their own, and a live stream gets an event without an id."""
    for order_no in ("KOM1", "KOM2", "KOM3"):
        await client.webhook(order_no)
    async with (
        connected(owner_dsn) as owner,
        connected(dsn) as service,
        client.reading("/events/stream?after=0") as log,
        client.reading("/orders/KOM2/stream?after=0") as order,
    ):
        assert await log.positions(3) == [1, 2, 3]
        assert await order.positions(1) == [2]
        for order_no in ("KOM1", "KOM2"):
            await erase_order(owner, service, order_no, "asked for", BY)
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
