"""The quarantine is bounded and readable, and its entries can be retried as ordinary events or discarded."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from projections.postgres import Connection
from service.database.connections import POOL_CONNECTIONS_MAX, POOL_SETTINGS
from service.event_log import store
from service.ingest.quarantine import SHARED_MAX
from tests.support.client import Client, serving_client
from tests.support.commands import call_command
from tests.support.databases import wait_for_locked
from tests.support.waiting import PATIENCE_SECONDS

HOURLY_MAX = 5
KEEP_AGAIN = """
    INSERT INTO quarantine (body, reason, received_at, last_seen_at) VALUES ($1, 'x', now(), now())
    RETURNING quarantine_id
"""
# A body that an older parser could not read and the current one can.
LEARNED = b'{"order_no":"KOM1","cnote":"AWB1","status":"Dikirim","more":1.10}'


@pytest.fixture
async def client(dsn: str) -> AsyncIterator[Client]:
    """A client of a service whose quarantine accepts few bodies an hour."""
    async with serving_client(dsn, quarantine_hourly_max=HOURLY_MAX) as client:
        yield client


async def quarantined(client: Client, connection: Connection, body: bytes = LEARNED) -> int:
    """Make an entry with a body that the current parser can read."""
    entry: int = (await client.raw(b"[%d]" % len(body)))["quarantine_id"]
    await connection.execute("UPDATE quarantine SET body = $1 WHERE quarantine_id = $2", body, entry)
    return entry


async def test_a_flood_of_unparseable_bodies_is_refused(client: Client, connection: Connection) -> None:
    """Above the hourly limit, new unparseable bodies get 503, while known bodies and valid reports get 200."""
    for number in range(HOURLY_MAX):
        await client.raw(b"junk %d" % number)
    for number in range(3):
        async with client.session.put(client.url("/webhook"), data=b"more %d" % number) as answer:
            assert answer.status == 503
            assert answer.headers["Retry-After"]
            assert "too many unparseable bodies" in (await answer.json(content_type=None))["detail"]
    assert (await client.raw(b"junk 0"))["outcome"] == "quarantined"
    assert (await client.webhook("KOM1"))["outcome"] == "advanced"
    assert await connection.fetchval("SELECT count(*) FROM quarantine") == HOURLY_MAX
    assert await connection.fetchval("SELECT times_seen FROM quarantine WHERE body = 'junk 0'") == 2
    # The database counts the bodies of the last hour, so every process applies the same limit.
    await connection.execute("UPDATE quarantine SET received_at = received_at - interval '61 minutes'")
    assert (await client.raw(b"more 0"))["outcome"] == "quarantined"


async def test_many_at_once_share_an_entry_or_stay_near_the_cap(client: Client, connection: Connection) -> None:
    """Equal bodies that arrive together share one entry, which counts them."""
    receipts = await asyncio.gather(*(client.raw(b"same") for _ in range(40)))
    assert len({receipt["quarantine_id"] for receipt in receipts}) == 1
    assert await connection.fetchval("SELECT times_seen FROM quarantine") == 40


async def test_a_retried_entry_becomes_an_ordinary_event(client: Client, connection: Connection) -> None:
    """A retried entry becomes an event with its body and address, and the entry and the event refer to each
    other.
    """
    await client.webhook("KOM1", "Diajukan")
    entry = await quarantined(client, connection)
    before = await connection.fetchval("SELECT now()")
    receipt = await client.post(f"/quarantine/{entry}/retry", 200)
    assert receipt.pop("quarantine_id") == entry
    assert (receipt["outcome"], receipt["version"], receipt["status"]) == ("advanced", 2, "in_transit")
    _, event = (await client.get("/orders/KOM1/events"))["events"]
    assert event["data"]["quarantine_id"] == entry
    assert event["data"]["body"] == LEARNED.decode()
    assert event["data"]["remote"] == "127.0.0.1"
    assert datetime.fromisoformat(event["data"]["timestamp"]) >= before - timedelta(seconds=1)
    shown = await client.get(f"/quarantine/{entry}")
    assert (shown["state"], shown["order_no"], shown["version"]) == ("retried", "KOM1", 2)
    assert shown["resolved_at"] is not None
    assert base64.b64decode(shown["body_base64"]) == LEARNED


async def test_an_entry_is_recorded_once_however_often_it_is_retried(
    client: Client, connection: Connection
) -> None:
    """Concurrent and later retries of an entry make one event and return the same receipt."""
    entry = await quarantined(client, connection)
    receipts = await asyncio.gather(*(client.post(f"/quarantine/{entry}/retry", 200) for _ in range(10)))
    receipts.append(await client.post(f"/quarantine/{entry}/retry", 200))
    assert all(receipt == receipts[0] for receipt in receipts)
    assert await connection.fetchval("SELECT count(*) FROM order_events") == 1


async def test_a_body_that_comes_again_after_its_entry_was_resolved_is_kept_anew(
    client: Client, connection: Connection
) -> None:
    """Equal bodies share an open entry only, so what is acknowledged later can still be retried."""
    first = (await client.raw(b"junk"))["quarantine_id"]
    await client.post(f"/quarantine/{first}/discard", 200, {"reason": "a test of ours"})
    second = (await client.raw(b"junk"))["quarantine_id"]
    assert second != first
    assert (await client.get(f"/quarantine/{second}"))["state"] == "open"
    assert (await client.get(f"/quarantine/{first}"))["times_seen"] == 1
    entry = await quarantined(client, connection)
    await client.post(f"/quarantine/{entry}/retry", 200)
    again = await connection.fetchval(KEEP_AGAIN, LEARNED)
    await client.post(f"/quarantine/{again}/retry", 200)
    assert [event["version"] for event in (await client.get("/orders/KOM1/events"))["events"]] == [1, 2]


async def test_a_retry_records_each_body_that_shares_the_entry(client: Client, connection: Connection) -> None:
    """Each of three equal bodies was acknowledged, so a retry of their entry records three events, once."""
    entry = await quarantined(client, connection)
    await connection.execute("UPDATE quarantine SET times_seen = 3")
    receipts = await asyncio.gather(*(client.post(f"/quarantine/{entry}/retry", 200) for _ in range(4)))
    assert all(receipt == receipts[0] for receipt in receipts)
    assert (receipts[0]["outcome"], receipts[0]["version"]) == ("advanced", 1)
    events = (await client.get("/orders/KOM1/events"))["events"]
    assert [event["data"]["verdict"] for event in events] == ["advanced", "repeated", "repeated"]
    assert len({event["data"]["report_id"] for event in events}) == 3
    assert {event["data"]["quarantine_id"] for event in events} == {entry}
    assert (await client.get(f"/quarantine/{entry}"))["version"] == 1


async def test_an_entry_is_shared_by_a_limited_number_of_bodies(client: Client, connection: Connection) -> None:
    """A retry records at most SHARED_MAX events, so further equal bodies get another entry."""
    first = (await client.raw(b"junk"))["quarantine_id"]
    await connection.execute("UPDATE quarantine SET times_seen = $1", SHARED_MAX - 1)
    assert (await client.raw(b"junk"))["quarantine_id"] == first
    second = (await client.raw(b"junk"))["quarantine_id"]
    assert second != first
    assert (await client.raw(b"junk"))["quarantine_id"] == second


async def test_a_still_unparseable_entry_stays_open(client: Client, connection: Connection) -> None:
    """A retry of an unparseable entry gets 422 with the reason, and does not change the entry."""
    entry = (await client.raw(b"not json"))["quarantine_id"]
    before = await client.get(f"/quarantine/{entry}")
    problem = await client.post(f"/quarantine/{entry}/retry", 422)
    assert problem["detail"] == before["reason"]
    assert await client.get(f"/quarantine/{entry}") == before
    assert await connection.fetchval("SELECT count(*) FROM order_events") == 0


async def test_an_entry_is_discarded_with_a_reason(client: Client, connection: Connection) -> None:
    """A discarded entry keeps its discard_reason, and cannot be retried or discarded again."""
    entry = await quarantined(client, connection)
    bodies: list[Any] = [
        {},
        {"reason": ""},
        {"reason": " "},
        {"reason": 1},
        {"reason": "x" * 501},
        {"reason": "\0"},
        [],
        None,
    ]
    for body in bodies:
        await client.post(f"/quarantine/{entry}/discard", 400, body)
    shown = await client.post(f"/quarantine/{entry}/discard", 200, {"reason": "a test of ours"})
    assert (shown["state"], shown["discard_reason"]) == ("discarded", "a test of ours")
    assert shown == await client.get(f"/quarantine/{entry}")
    await client.post(f"/quarantine/{entry}/discard", 409, {"reason": "again"})
    assert "a test of ours" in (await client.post(f"/quarantine/{entry}/retry", 409))["detail"]
    assert await connection.fetchval("SELECT count(*) FROM order_events") == 0


async def test_a_retry_of_a_resolved_entry_does_not_parse_it(client: Client, connection: Connection) -> None:
    """A retry of a discarded or erased entry does not parse its body again."""
    junk = (await client.raw(b"not json"))["quarantine_id"]
    await client.post(f"/quarantine/{junk}/discard", 200, {"reason": "a test of ours"})
    assert "a test of ours" in (await client.post(f"/quarantine/{junk}/retry", 409))["detail"]
    entry = await quarantined(client, connection)
    receipt = await client.post(f"/quarantine/{entry}/retry", 200)
    await connection.execute("SET ROLE order_tracking_owner; CALL erase_order('KOM1', 'asked for'); RESET ROLE")
    assert await client.post(f"/quarantine/{entry}/retry", 200) == receipt


async def test_bodies_are_kept_and_keys_known_while_readers_have_every_connection(
    dsn: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Webhooks, the probe and the check of keys do not wait for readers that hold every pooled connection."""
    # The readers keep their connections until the lock is released.
    monkeypatch.setitem(POOL_SETTINGS, "statement_timeout", "1min")
    async with serving_client(dsn, request_seconds_max=PATIENCE_SECONDS) as client:
        async with connection.transaction():
            await connection.execute("LOCK TABLE timeline.entries")
            path = "/audit/transitions"
            readers = [asyncio.create_task(client.get(path)) for _ in range(2 * POOL_CONNECTIONS_MAX)]
            await wait_for_locked(connection, POOL_CONNECTIONS_MAX)
            assert (await client.raw(b"not json"))["outcome"] == "quarantined"
            await client.get("/readyz")
            await client.get("/transitions")
            assert not any(reader.done() for reader in readers)
        await asyncio.gather(*readers)


async def test_the_list_is_filtered_by_state(client: Client, connection: Connection) -> None:
    """The list can be filtered by state, and the link to the next page keeps the filter."""
    entries = [await quarantined(client, connection, b"%d" % number) for number in range(4)]
    await client.post(f"/quarantine/{entries[1]}/discard", 200, {"reason": "x"})
    page = await client.get("/quarantine?state=open&limit=2")
    assert [entry["quarantine_id"] for entry in page["entries"]] == [entries[3], entries[2]]
    page = await client.get(page["next"])
    assert [entry["quarantine_id"] for entry in page["entries"]] == [entries[0]]
    (discarded,) = (await client.get("/quarantine?state=discarded"))["entries"]
    assert discarded["quarantine_id"] == entries[1]
    await client.get("/quarantine?state=closed", 400)


@pytest.mark.parametrize("entry", ["999999", "0", "-1", "x", "1.5", "99999999999999999999"])
async def test_an_entry_that_is_not_there(client: Client, entry: str) -> None:
    """Every request for a nonexistent entry gets 404."""
    await client.get(f"/quarantine/{entry}", 404)
    await client.post(f"/quarantine/{entry}/retry", 404)
    await client.post(f"/quarantine/{entry}/discard", 404, {"reason": "x"})


async def test_the_same_on_the_command_line(
    client: Client, connection: Connection, owner_dsn: str, tmp_path: Path
) -> None:
    """``list``, ``show``, ``retry`` and ``discard`` work beside a running service, which shows
    their results.
    """

    async def tool(*arguments: str, code: int = 0) -> str:
        done = await asyncio.to_thread(call_command, tmp_path, "quarantine", *arguments, DATABASE_URL=owner_dsn)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    learned = await quarantined(client, connection)
    junk = (await client.raw(b"junk \x1b[31m\xff"))["quarantine_id"]
    listed = await tool("list")
    assert str(learned) in listed
    assert "not JSON" in listed
    assert "junk \\x1b[31m\\xff" in await tool("show", str(junk))
    assert f"{learned}: advanced, version 1 of KOM1" in await tool("retry", "--all", code=1)
    assert "already" not in await tool("retry", str(learned))
    assert "nobody sends this" not in await tool("list")
    await tool("discard", str(junk), "nobody sends this")
    assert "nobody sends this" in await tool("show", str(junk))
    assert "already" in await tool("discard", str(junk), "x", code=1)
    await tool("discard", str(junk), "", code=2)
    await tool("show", "999", code=1)
    await tool("retry", code=2)
    assert str(junk) not in await tool("list", "--state", "open")
    order = await client.get("/orders/KOM1/events")
    assert json.loads(order["events"][0]["data"]["body"]) == json.loads(LEARNED)


async def test_an_entry_that_is_removed_while_it_is_retried(client: Client, connection: Connection) -> None:
    """If the owner removes an entry during its retry, the retry gets 404 and no event is recorded."""
    entry = await quarantined(client, connection)
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute("SELECT pg_advisory_xact_lock($1)", store.APPEND_LOCK)
    retried = asyncio.create_task(client.post(f"/quarantine/{entry}/retry", 404))
    await wait_for_locked(connection)
    await connection.execute("DELETE FROM quarantine")
    await transaction.commit()
    assert (await retried)["title"] == "Unknown entry"
    assert await connection.fetchval("SELECT count(*) FROM order_events") == 0
