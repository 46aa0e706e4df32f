"""Reads by time of a log whose clocks are set forward and back: each finds all that it promises."""

import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import pairwise
from typing import Any, Final
from urllib.parse import quote

import aiohttp
import pytest

from projections.postgres import Connection
from service.event_log import times
from service.features.settings import Settings
from service.listening import serving
from tests.support.client import Client
from tests.support.recording import dedicated_connection, record
from tests.support.reports import report
from tests.support.waiting import until_async

START: Final = datetime(2026, 1, 1, tzinfo=UTC)
APPEND_AT: Final = """
    INSERT INTO order_events (originator_id, originator_version, topic, state, recorded_at)
    VALUES ($1, 1, '', '', $2) RETURNING notification_id
"""
DRAW: Final = "SELECT nextval('order_events_notification_id_seq')"


def stepped_times(count: int, seed: int) -> list[datetime]:
    """Return the times of a clock that mostly runs, and now and then steps by up to 400 days."""
    choose, clock, found = random.Random(seed), START, []
    for _ in range(count):
        clock += timedelta(seconds=choose.randrange(1, 60))
        if choose.random() < 0.1:
            clock += timedelta(days=choose.randrange(-400, 400))
        found.append(clock)
    return found


@pytest.mark.parametrize("seed", range(4))
async def test_a_start_by_time_skips_no_event(
    connection: Connection, dsn: str, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """It begins at the first event whose time is not before, whether none, some or all blocks are summed up."""
    monkeypatch.setattr(times, "BLOCK_POSITIONS", 16)
    choose, clock = random.Random(seed), stepped_times(200, seed)
    positions = [0]
    for number, at in enumerate(clock):
        for _ in range(choose.choice((0, 0, 0, 1, 40))):
            await connection.execute(DRAW)
        positions.append(await connection.fetchval(APPEND_AT, f"KOM{number}", at))

    async def check() -> None:
        for time in (*choose.sample(clock, 20), START - timedelta(days=9_000), START + timedelta(days=90_000)):
            first = next((number for number, at in enumerate(clock) if at >= time), len(clock))
            assert await times.position_before(connection, time) == positions[first]

    await check()
    async with dedicated_connection(dsn) as held:
        assert await times.add_blocks(held) == 1
        await check()
        while await times.add_blocks(held):
            pass
    await check()
    blocks = await connection.fetchval("SELECT count(*) FROM log_times")
    assert blocks == positions[-1] // 16
    await connection.fetchval(APPEND_AT, "AFTER", START + timedelta(days=90_000))
    assert await times.position_before(connection, START + timedelta(days=90_000)) == positions[-1]


async def test_the_service_sums_up_its_log(
    owner_dsn: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A running service adds each block that is full, also those from before its start."""
    monkeypatch.setattr(times, "BLOCK_POSITIONS", 2)
    monkeypatch.setattr(times, "POLL_SECONDS", 0.02)
    for number in range(5):
        await connection.fetchval(APPEND_AT, f"KOM{number}", START + number * timedelta(days=1))

    async def latest(blocks: int) -> list[datetime]:
        found = await connection.fetch("SELECT latest FROM log_times ORDER BY block")
        return [at for (at,) in found] if len(found) >= blocks else []

    async with serving(Settings(port=0), owner_dsn) as (_, service):
        assert await until_async(partial(latest, 2)) == [START, START + timedelta(days=2)]
        await record(service, report("NEXT"))
        assert (await until_async(partial(latest, 3)))[2] == START + timedelta(days=4)


Event = dict[str, Any]


def orders_where(is_within: Callable[[datetime, datetime], bool]) -> Any:
    """Return a function that finds the orders whose last time is within, by a time."""

    def find(events: list[Event], time: datetime) -> set[str]:
        by_order: dict[str, list[datetime]] = {}
        for event in events:
            by_order.setdefault(event["order_no"], []).append(event["time"])
        return {order_no for order_no, ats in by_order.items() if is_within(ats[-1], time)}

    return find


def positions_where(is_within: Callable[[datetime, datetime], bool]) -> Any:
    return lambda events, time: {str(one["position"]) for one in events if is_within(one["time"], time)}


SINCE, BEFORE = datetime.__ge__, datetime.__lt__
# What each list must have, by its parameter.
LISTS: Final[dict[str, dict[str, Any]]] = {
    "/orders": {
        "updated_after": orders_where(SINCE),
        "updated_before": orders_where(BEFORE),
    },
    "/audit/transitions": {"since": positions_where(SINCE), "until": positions_where(BEFORE)},
}
AS_OF: Final = ("/orders/{order_no}", "as_of")


async def test_every_read_by_time_finds_what_the_log_has(dsn: str) -> None:
    """Every parameter that is a time selects by each event's own time, wherever the event lies in the log."""
    clock = stepped_times(150, 1)
    async with serving(Settings(port=0), dsn) as (port, service), aiohttp.ClientSession() as session:
        client = Client(session, port)
        for word in ("Diajukan", "Dikirim", "Dikirim", "Diterima", "Dijemput"):
            ats = [clock.pop(0) for _ in range(30)]
            await record(service, *(report(f"KOM{n}", word, received_at=at) for n, at in enumerate(ats)))
        events = [
            {**event, "time": datetime.fromisoformat(event["data"]["timestamp"])}
            for event in await client.walk("/events", "events")
        ]
        assert any(later["time"] < earlier["time"] for earlier, later in pairwise(events))
        paths = (await client.get("/openapi.json"))["paths"]
        by_time = {
            (path.removesuffix(".csv"), parameter["name"])
            for path, operations in paths.items()
            for operation in operations.values()
            for parameter in operation.get("parameters", ())
            if '"date-time"' in str(parameter).replace("'", '"')
        }
        assert by_time == {AS_OF, *((path, name) for path, names in LISTS.items() for name in names)}
        for time in random.Random(1).sample([event["time"] for event in events], 15):
            text = quote(time.isoformat())
            for path, names in LISTS.items():
                key = "order_no" if path == "/orders" else "position"
                for name, expected in names.items():
                    listed = await client.walk(f"{path}?{name}={text}", path.rpartition("/")[2])
                    assert {str(one[key]) for one in listed} == expected(events, time), (path, name)
            for order_no in ("KOM0", "KOM7"):
                known = [one for one in events if one["order_no"] == order_no and one["time"] <= time]
                order = await client.get(f"/orders/{order_no}?as_of={text}", 200 if known else 404)
                if known:
                    assert order["version"] == len(known)
