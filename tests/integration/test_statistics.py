"""The counts of reports by hour and by minute: their days in a time zone, and their rebuild in any order."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from structlog.testing import capture_logs

from domain.order import NEW_ORDER, Report, decide
from domain.statuses import STANDARD_VOCABULARY
from projections.postgres import Connection
from projections.statistics import (
    MINUTES_KEPT,
    read_minutes,
    read_statistics,
)
from projections.timeline import WORDS_MAX, read_unrecognised
from projections.views import VIEWS
from service.app import Service
from service.event_log import store
from service.features.settings import Settings
from service.projecting.projector import SELECT_VIEW
from tests.support.client import serving_client
from tests.support.recording import EQUAL, rebuilt, record
from tests.support.reports import NOW, report

RECOGNISE = STANDARD_VOCABULARY.recognise
(VIEW,) = (view for view in VIEWS if view.name == "statistics")
(TIMELINE,) = (view for view in VIEWS if view.name == "timeline")
MINUTE = timedelta(minutes=1)
BEYOND = WORDS_MAX + 1
LAP = MINUTES_KEPT * MINUTE


def arriving(order_no: str, age: timedelta) -> Report:
    """Return a report that arrived this long before NOW."""
    return report(order_no, received_at=NOW - age)


@asynccontextmanager
async def running(dsn: str, **settings: Any) -> AsyncIterator[Service]:
    service = Service(Settings(**settings), dsn)
    await service.start()
    try:
        yield service
    finally:
        await service.stop()


async def test_the_last_minutes_are_equal_after_a_rebuild(dsn: str, connection: Connection) -> None:
    """Whatever the order of the reports, a slot has all reports of its latest minute, and no others."""
    # The log has the orders in this order, and a rebuild reads them by their numbers.
    reports = [
        *(arriving("F", LAP), arriving("B", timedelta()), arriving("A", 2 * LAP), arriving("E", timedelta())),
        *(arriving("C", LAP), arriving("D", timedelta(seconds=-59)), arriving("H", MINUTE)),
        *(arriving("G", LAP + MINUTE), arriving("I", 2 * LAP - MINUTE)),
    ]
    async with running(dsn) as service:
        for one in reports:
            await record(service, one)
        for _ in range(2):
            rows = await read_minutes(connection, NOW - 2 * LAP)
            assert {(row.minute, row.verdict): row.reports for row in rows} == {
                (NOW, "advanced"): 3,
                (NOW - MINUTE, "advanced"): 1,
                (NOW - 2 * LAP + MINUTE, "advanced"): 1,
            }
            assert await rebuilt(dsn, verify=True) == EQUAL
            assert await rebuilt(dsn) == EQUAL


async def test_a_burst_hides_no_minute(connection: Connection) -> None:
    """A burst of tens of thousands of reports in one minute leaves the other minutes of the hour countable."""
    before, burst = (decide(NEW_ORDER, arriving("A", age)) for age in (59 * MINUTE, timedelta()))
    async with connection.transaction():
        await connection.execute(SELECT_VIEW, VIEW.name)
        await VIEW.apply(connection, [(1, before)])
        for first in range(0, 30_000, 2_000):
            await VIEW.apply(connection, [(first + number, burst) for number in range(2_000)])
    minutes = await read_minutes(connection, NOW - 59 * MINUTE)
    assert sorted(minutes) == [(NOW - 59 * MINUTE, "advanced", 1), (NOW, "advanced", 30_000)]
    assert await connection.fetchval("SELECT count(*) FROM statistics.minutes") == 2


@pytest.mark.parametrize(
    ("zone", "days"),
    [
        ("UTC", {date(2026, 1, 30): 1, date(2026, 1, 31): 3}),
        ("Asia/Jakarta", {date(2026, 1, 30): 1, date(2026, 1, 31): 1, date(2026, 2, 1): 2}),
        ("Asia/Jayapura", {date(2026, 1, 31): 1, date(2026, 2, 1): 3}),
        ("America/New_York", {date(2026, 1, 30): 1, date(2026, 1, 31): 3}),
    ],
)
async def test_days_are_those_of_the_time_zone(
    dsn: str, connection: Connection, zone: str, days: dict[date, int]
) -> None:
    """A report counts on the day of its time in the zone, up to today. The rows are the same in any zone."""
    times = [
        datetime.fromisoformat(f"2026-01-{time}:00+00:00") for time in ("30T16:59", "31T15:00", "31T17:00")
    ]
    now = datetime(2026, 1, 31, 23, 59, 59, tzinfo=UTC)
    async with running(dsn, timezone=zone) as service:
        # The clock of another process may be a day ahead.
        for time in (*times, now, now + timedelta(days=1)):
            await record(service, report(f"KOM{time}", received_at=time))
    counters = await read_statistics(connection, ZoneInfo(zone), now, 3, RECOGNISE)
    assert counters["timezone"] == zone
    assert {day["day"]: day["reports"]["advanced"] for day in counters["days"]} == days
    hours = await connection.fetchval("SELECT array_agg(hour ORDER BY hour) FROM statistics.hours")
    assert hours[:-1] == [time.replace(minute=0, second=0) for time in (*times, now)]


async def test_a_day_of_23_hours_ends_at_its_midnight(connection: Connection) -> None:
    """On a day without its third hour, the last hour belongs to that day, and the next one to the next day."""
    zone = ZoneInfo("Europe/Berlin")
    async with connection.transaction():
        await connection.execute(SELECT_VIEW, VIEW.name)
        times = [
            datetime(2026, 3, day, hour, tzinfo=UTC) for day, hour in ((28, 22), (28, 23), (29, 21), (29, 22))
        ]
        await VIEW.apply(
            connection,
            [(n, decide(NEW_ORDER, report(f"KOM{n}", received_at=time))) for n, time in enumerate(times)],
        )
    counters = await read_statistics(connection, zone, datetime(2026, 3, 30, 9, tzinfo=UTC), 3, RECOGNISE)
    assert [(day["day"].day, day["reports"]["advanced"]) for day in counters["days"]] == [
        (28, 1),
        (29, 2),
        (30, 1),
    ]


async def test_the_setting_selects_the_days_of_the_api(dsn: str) -> None:
    """GET /statistics names the time zone of the settings, and its last day is today there."""
    for zone in ("Pacific/Kiritimati", "Pacific/Pago_Pago"):
        async with serving_client(dsn, timezone=zone) as client:
            receipt = await client.webhook("KOM1", "Dikirim")
            today = {datetime.now(ZoneInfo(zone)).date().isoformat()}
            counters = await client.get(f"/statistics?days=1&after_position={receipt['position']}")
            today.add(datetime.now(ZoneInfo(zone)).date().isoformat())
        assert counters["timezone"] == zone
        (day,) = counters["days"]
        assert day["day"] in today


async def test_a_word_that_cannot_be_counted_parks_its_order_alone(dsn: str, connection: Connection) -> None:
    """In a rebuild, which sums up the whole log, an event that the view cannot store parks only its order."""
    words = [report("A", "word"), report("B", "nul \x00"), report("C", "word")]
    await store.append(connection, [decide(NEW_ORDER, one) for one in words])
    with capture_logs() as logs:
        assert await rebuilt(dsn, views=[TIMELINE]) == [("timeline", 1, 0)]
    assert [log["event"] for log in logs] == [
        "an event cannot be added to a view: the rebuild begins again",
        "order parked",
    ]
    parked = await connection.fetch("SELECT order_no, reason FROM timeline.parked_orders")
    assert [order_no for order_no, _ in parked] == ["B"]
    assert parked[0]["reason"].startswith("UntranslatableCharacterError")
    (word,) = await read_unrecognised(connection, RECOGNISE)
    assert (word["reported_status"], word["reports"]) == ("word", 2)


async def test_a_rebuild_counts_more_words_than_it_sums_up(dsn: str, connection: Connection) -> None:
    """A rebuild writes its sums each time that they have WORDS_MAX words, and counts all of them."""
    events = [decide(NEW_ORDER, report(f"KOM{number}", f"word {number}")) for number in range(BEYOND)]
    repeats = [decide(NEW_ORDER, report(f"MOK{number}", f"word {number}")) for number in range(BEYOND)]
    for batch in (events, repeats):
        await store.append(connection, batch)
    await rebuilt(dsn, views=[TIMELINE])
    counted = await connection.fetch("SELECT reports, count(*) FROM timeline.unrecognised GROUP BY reports")
    assert [*map(tuple, counted)] == [(2, BEYOND)]
