"""The view of how orders move in general: counters over all orders, none about a single order."""

import math
from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime, time, timedelta
from itertools import groupby
from typing import Any, Final, NamedTuple, cast
from zoneinfo import ZoneInfo

from typing_extensions import TypedDict  # pydantic cannot read typing's own before Python 3.12

from domain.logged import DecodedEvent
from domain.statuses import STATUSES, Label, Recognise, Status, status_label
from domain.transitions import VERDICTS, Verdict
from projections.current_status import Counts
from projections.postgres import Connection
from projections.table import MAX, SUM, Column, Merge, Row, Rows, Table
from projections.timeline import UnrecognisedString, read_unrecognised
from projections.view import View

# Durations are counted in buckets, each a tenth wider than the previous one: percentiles are accurate to 5 %.
BUCKET_GROWTH: Final = 1.1
# The number of slots for minutes. The count of a later minute replaces that of an earlier one in the same slot,
# so the table never grows. Two hours, so that a clock that is fast by less than an hour hides no recent minute.
MINUTES_KEPT: Final = 120
# The calendar and the vocabulary limit the rows of most tables, so that a rebuild can write each row once: its
# snapshot keeps every earlier version of a row, and each further write would search through all of them.
CALENDAR_ROWS_MAX: Final = 500_000
# Stands for an order without a status, since a key cannot be null.
NO_STATUS: Final = ""


class StatusCount(TypedDict):
    """The number of orders with a status; null stands for orders without one."""

    status: Status | None
    status_label: Label | None
    orders: int


# The class syntax does not allow the keyword "from".
Move = TypedDict(
    "Move",
    {
        "from": Status,
        "to": Status,
        "times": int,
        "seconds_p50": float,
        "seconds_p90": float,
        "seconds_p99": float,
    },
)
Move.__doc__ = "How often orders moved from one status to another, and how long they had been in the first."


class DailyReports(TypedDict):
    """The number of reports on one day in the shop's time zone, by verdict."""

    day: date
    reports: Counts


class Statistics(TypedDict):
    """All counters as of one position of the log; the unrecognised strings as of a moment of the timelines."""

    position: int
    timezone: str
    statuses: list[StatusCount]
    moves: list[Move]
    days: list[DailyReports]
    unrecognised: list[UnrecognisedString]


def to_bucket(duration: timedelta) -> int:
    """Return the bucket of a duration: 0 below a second, then 1, 2, 3 and so on."""
    seconds = duration.total_seconds()
    return 0 if seconds < 1 else 1 + int(math.log(seconds, BUCKET_GROWTH))


def to_seconds(bucket: int) -> float:
    """Return the middle of a bucket, in seconds."""
    return 0.5 if bucket == 0 else BUCKET_GROWTH ** (bucket - 0.5)


def to_slot(minute: datetime) -> int:
    """Return the slot of a minute, from 0 to MINUTES_KEPT - 1."""
    return int(minute.timestamp()) // 60 % MINUTES_KEPT


STATUS_COUNTERS: Final = Table(
    "statuses",
    (Column("status", "text"), Column("orders", "bigint", SUM)),
    key=("status",),
)
MOVE_COUNTERS: Final = Table(
    "moves",
    (
        Column("previous_status", "text"),
        Column("status", "text"),
        Column("bucket", "integer"),
        Column("times", "bigint", SUM),
    ),
    key=("previous_status", "status", "bucket"),
    rows_max=CALENDAR_ROWS_MAX,
)
HOUR_COUNTERS: Final = Table(
    "hours",
    (Column("hour", "timestamptz"), Column("verdict", "text"), Column("reports", "bigint", SUM)),
    key=("hour", "verdict"),
    rows_max=CALENDAR_ROWS_MAX,
)
# A slot has the count of its latest minute.
OF_LATEST_MINUTE: Final = Merge(
    """
    CASE WHEN present.minute > batch.minute THEN {present}
         WHEN present.minute = batch.minute THEN {batch} + {present}
         ELSE {batch} END
    """,
    blank=0,
)
MINUTE_COUNTERS: Final = Table(
    "minutes",
    (
        Column("slot", "smallint"),
        Column("verdict", "text"),
        Column("minute", "timestamptz", MAX),
        Column("reports", "bigint", OF_LATEST_MINUTE),
    ),
    key=("slot", "verdict"),
)


def fold(events: Iterable[DecodedEvent], rows: Rows) -> None:
    """Count events. Each event alone determines what it adds, so the result does not depend on their order."""
    statuses, moves, hours = rows["statuses"], rows["moves"], rows["hours"]
    minutes = rows["minutes"]
    for _, event in events:
        before, after = event.previous_status or NO_STATUS, event.status or NO_STATUS
        if event.originator_version == 1:
            _count(statuses, STATUS_COUNTERS, (after,), 1)
        elif before != after:
            _count(statuses, STATUS_COUNTERS, (before,), -1)
            _count(statuses, STATUS_COUNTERS, (after,), 1)
        verdict, received_at = event.verdict, event.timestamp
        if verdict == "advanced" and event.previous_since is not None:
            bucket = to_bucket(event.reached_at - event.previous_since)
            _count(moves, MOVE_COUNTERS, (before, after, bucket), 1)
        if event.rejudges is not None:
            # It is not a report.
            continue
        minute = received_at.astimezone(UTC).replace(second=0, microsecond=0)
        _count(hours, HOUR_COUNTERS, (minute.replace(minute=0), verdict), 1)
        _count_minute(minutes, minute, verdict)


def _count(rows: dict[Any, Row], table: Table, key: tuple[object, ...], times: int) -> None:
    """Add to the last column of a row, whose other columns are the key."""
    row = rows.get(key)
    if row is None:
        row = rows[key] = dict(zip(table.names, (*key, 0), strict=True))
    row[table.names[-1]] += times


def _count_minute(rows: dict[Any, Row], minute: datetime, verdict: Verdict) -> None:
    slot = to_slot(minute)
    row = rows.get((slot, verdict))
    if row is None or minute > row["minute"]:
        rows[slot, verdict] = {"slot": slot, "verdict": verdict, "minute": minute, "reports": 1}
    elif minute == row["minute"]:
        row["reports"] += 1


VIEW: Final = View(
    name="statistics",
    fold_version=5,
    tables=(STATUS_COUNTERS, MOVE_COUNTERS, HOUR_COUNTERS, MINUTE_COUNTERS),
    fold=fold,
    # No reader waits for a counter: large batches and a long pause leave more resources to webhooks.
    batch_events_max=2_000,
    idle_seconds=0.1,
)

POSITION: Final = "SELECT position FROM statistics.projection"
STATUS_COUNTS: Final = "SELECT nullif(status, '') AS status, orders FROM statistics.statuses WHERE orders > 0"
MOVES: Final = """
    SELECT previous_status, status, bucket, times FROM statistics.moves ORDER BY previous_status, status, bucket
"""
# The number of reports by day, counted from 1, and by verdict. $1 has the midnights at which the days begin, $2
# is the end of the last one: only the caller decides when a day begins, by its own time zone database.
DAYS: Final = """
    SELECT width_bucket(hour, $1::timestamptz[]) AS day, verdict, sum(reports)::bigint AS reports
    FROM statistics.hours WHERE hour >= ($1::timestamptz[])[1] AND hour < $2
    GROUP BY 1, 2 ORDER BY 1, 2
"""
# The number of reports by minute and verdict since a time, of the last MINUTES_KEPT minutes.
MINUTES: Final = "SELECT minute, verdict, reports FROM statistics.minutes WHERE minute >= $1"


async def count_by_status(connection: Connection) -> dict[str | None, int]:
    """Return the exact number of orders with each status, None for no status."""
    return {row["status"]: row["orders"] for row in await connection.fetch(STATUS_COUNTS)}


class Minute(NamedTuple):
    """The number of reports with one verdict in a minute."""

    minute: datetime
    verdict: Verdict
    reports: int


async def read_minutes(connection: Connection, since: datetime) -> list[Minute]:
    """Return the number of reports by minute and verdict since a time, at most MINUTES_KEPT minutes ago."""
    return [Minute(*row) for row in await connection.fetch(MINUTES, since)]


async def read_statistics(
    connection: Connection, zone: ZoneInfo, now: datetime, days_max: int, recognise: Recognise
) -> Statistics:
    """Return all counters in one snapshot.

    Args:
        connection: a connection outside any transaction.
        zone: the time zone of the days. Its offsets from UTC must be whole hours, because hours are counted.
        now: the time whose day is the last one.
        days_max: the number of days to look back, the last one included.
        recognise: the present vocabulary.
    """
    last = now.astimezone(zone).date()
    dates = [last - timedelta(days=ago) for ago in reversed(range(days_max))]
    *midnights, end = (datetime.combine(day, time(), zone) for day in (*dates, last + timedelta(days=1)))
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        position: int = await connection.fetchval(POSITION)
        statuses = await connection.fetch(STATUS_COUNTS)
        moves = await connection.fetch(MOVES)
        days = await connection.fetch(DAYS, midnights, end)
        unrecognised = await read_unrecognised(connection, recognise)
    ranks: dict[str | None, int] = {None: -1, **{status: rank for rank, status in enumerate(STATUSES)}}
    return {
        "position": position,
        "timezone": zone.key,
        # In the vocabulary's order; statuses that this release does not have come last.
        "statuses": [
            {"status": status, "status_label": status_label(status), "orders": orders}
            for status, orders in sorted(statuses, key=lambda row: ranks.get(row["status"], len(ranks)))
        ],
        "moves": [
            _to_move(before, after, [(row["bucket"], row["times"]) for row in rows])
            for (before, after), rows in groupby(moves, key=lambda row: (row["previous_status"], row["status"]))
        ],
        "days": [
            {"day": dates[number - 1], "reports": _to_counts({row["verdict"]: row["reports"] for row in rows})}
            for number, rows in groupby(days, key=lambda row: row["day"])
        ],
        "unrecognised": unrecognised,
    }


def _to_counts(reports: dict[str, int]) -> Counts:
    return cast("Counts", {verdict: reports.get(verdict, 0) for verdict in VERDICTS})


def _to_move(before: Status, after: Status, buckets: Sequence[tuple[int, int]]) -> Move:
    return {
        "from": before,
        "to": after,
        "times": sum(times for _, times in buckets),
        "seconds_p50": _percentile(buckets, 0.5),
        "seconds_p90": _percentile(buckets, 0.9),
        "seconds_p99": _percentile(buckets, 0.99),
    }


def _percentile(buckets: Sequence[tuple[int, int]], share: float) -> float:
    """Return the time in seconds below which a share of the times lies; buckets are in ascending order."""
    rank, seen = math.ceil(share * sum(times for _, times in buckets)), 0
    for bucket, times in buckets:
        seen += times
        if seen >= rank:
            return round(to_seconds(bucket), 1)
    raise ValueError("no durations were counted")
