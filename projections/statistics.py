"""The view of how orders move in general: counters, none of them about a single order."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from itertools import groupby
from typing import Any, Final, NamedTuple

from projections.engine import Connection, DecodedEvent

NAME: Final = "statistics"
FOLD_VERSION: Final = 1
TABLES: Final = ("statuses", "moves", "days", "unrecognised")
# Nobody waits for a counter: larger pages, and a rest between them that spares the webhooks.
PAGE_EVENTS_MAX: Final = 2_000
REST_SECONDS: Final = 0.1

# Times are counted in buckets, each a tenth wider than the one before: a percentile is exact to 5 in 100.
BUCKET_GROWTH: Final = 1.1
PERCENTILES: Final = (0.5, 0.9, 0.99)
UNRECOGNISED_SHOWN_MAX: Final = 100
# Of an order that has no status yet; a key cannot be null.
NO_STATUS: Final = ""


@dataclass
class Counts:
    """What some events add to the counters."""

    statuses: dict[str, int] = field(default_factory=dict)
    moves: dict[tuple[str, str, int], int] = field(default_factory=dict)
    days: dict[tuple[date, str], int] = field(default_factory=dict)
    unrecognised: dict[str, tuple[int, datetime]] = field(default_factory=dict)


def bucket_of(time: timedelta) -> int:
    """Return the bucket of a time: 0 below a second, then 1, 2, 3, ..."""
    seconds = time.total_seconds()
    return 0 if seconds < 1 else 1 + int(math.log(seconds, BUCKET_GROWTH))


def seconds_of(bucket: int) -> float:
    """Return the middle of a bucket, in seconds."""
    return 0.5 if bucket == 0 else BUCKET_GROWTH ** (bucket - 0.5)


def fold(events: Iterable[DecodedEvent], counts: Counts) -> None:
    """Count events; each tells by itself what it adds."""
    statuses, moves, days, unrecognised = counts.statuses, counts.moves, counts.days, counts.unrecognised
    for _, event in events:
        before, after = event.previous_status or NO_STATUS, event.status or NO_STATUS
        if event.originator_version == 1:
            statuses[after] = statuses.get(after, 0) + 1
        elif before != after:
            statuses[before] = statuses.get(before, 0) - 1
            statuses[after] = statuses.get(after, 0) + 1
        if event.verdict == "advanced" and event.previous_since is not None:
            move = (before, after, bucket_of(event.timestamp - event.previous_since))
            moves[move] = moves.get(move, 0) + 1
        day = (event.timestamp.date(), event.verdict)
        days[day] = days.get(day, 0) + 1
        if event.verdict == "unrecognised":
            reports, last = unrecognised.get(event.reported_status, (0, event.timestamp))
            unrecognised[event.reported_status] = (reports + 1, max(last, event.timestamp))


ADD_TO_COUNTERS: Final = """
    WITH given_statuses AS (
        INSERT INTO statuses AS known (status, orders)
        SELECT * FROM json_to_recordset($1) AS given (status text, orders bigint)
        ON CONFLICT (status) DO UPDATE SET orders = known.orders + excluded.orders
    ), given_moves AS (
        INSERT INTO moves AS known (previous_status, status, bucket, times)
        SELECT * FROM json_to_recordset($2)
            AS given (previous_status text, status text, bucket integer, times bigint)
        ON CONFLICT (previous_status, status, bucket) DO UPDATE SET times = known.times + excluded.times
    ), given_days AS (
        INSERT INTO days AS known (day, verdict, reports)
        SELECT * FROM json_to_recordset($3) AS given (day date, verdict text, reports bigint)
        ON CONFLICT (day, verdict) DO UPDATE SET reports = known.reports + excluded.reports
    )
    INSERT INTO unrecognised AS known (reported_status, reports, last_received_at)
    SELECT * FROM json_to_recordset($4)
        AS given (reported_status text, reports bigint, last_received_at timestamptz)
    ON CONFLICT (reported_status) DO UPDATE SET
        reports = known.reports + excluded.reports,
        last_received_at = greatest(known.last_received_at, excluded.last_received_at)
"""


async def apply(connection: Connection, events: Sequence[DecodedEvent]) -> None:
    """Add what these events count."""
    counts = Counts()
    fold(events, counts)
    await connection.execute(
        ADD_TO_COUNTERS,
        [{"status": status, "orders": orders} for status, orders in counts.statuses.items()],
        [
            {"previous_status": before, "status": after, "bucket": bucket, "times": times}
            for (before, after, bucket), times in counts.moves.items()
        ],
        [
            {"day": day, "verdict": verdict, "reports": reports}
            for (day, verdict), reports in counts.days.items()
        ],
        [
            {"reported_status": reported, "reports": reports, "last_received_at": last}
            for reported, (reports, last) in counts.unrecognised.items()
        ],
    )


async def copy(connection: Connection, events: Sequence[DecodedEvent], carried: dict[str, Any]) -> None:
    """Count events, and write the counters into the empty tables once there are no more."""
    counts: Counts = carried.setdefault("counts", Counts())
    if events:
        fold(events, counts)
        return
    records: dict[str, list[tuple[Any, ...]]] = {
        "statuses": [*counts.statuses.items()],
        "moves": [(*move, times) for move, times in counts.moves.items()],
        "days": [(*day, reports) for day, reports in counts.days.items()],
        "unrecognised": [(reported, *told) for reported, told in counts.unrecognised.items()],
    }
    for table, rows in records.items():
        await connection.copy_records_to_table(table, records=rows)


class Move(NamedTuple):
    """How often orders went from one status to another, and how long they had been in the first, in seconds."""

    previous_status: str
    status: str
    times: int
    seconds: tuple[float, ...]  # by PERCENTILES


class Statistics(NamedTuple):
    """All counters, as of one position of the log."""

    position: int
    statuses: list[tuple[str | None, int]]
    moves: list[Move]
    days: list[tuple[date, dict[str, int]]]
    unrecognised: list[tuple[str, int, datetime]]


POSITION: Final = "SELECT position FROM statistics.projection"
STATUSES: Final = "SELECT nullif(status, ''), orders FROM statistics.statuses WHERE orders > 0"
MOVES: Final = """
    SELECT previous_status, status, bucket, times FROM statistics.moves ORDER BY previous_status, status, bucket
"""
DAYS: Final = "SELECT day, verdict, reports FROM statistics.days WHERE day >= $1 ORDER BY day, verdict"
UNRECOGNISED: Final = """
    SELECT reported_status, reports, last_received_at FROM statistics.unrecognised
    ORDER BY reports DESC, reported_status LIMIT $1
"""


async def read(connection: Connection, since: date) -> Statistics:
    """Return every counter, and the days from one on, in a snapshot."""
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        position: int = await connection.fetchval(POSITION)
        statuses = [tuple(row) for row in await connection.fetch(STATUSES)]
        moves = await connection.fetch(MOVES)
        days = await connection.fetch(DAYS, since)
        unrecognised = [tuple(row) for row in await connection.fetch(UNRECOGNISED, UNRECOGNISED_SHOWN_MAX)]
    return Statistics(
        position,
        statuses,
        [
            Move(before, after, sum(times for *_, times in rows), _percentiles([row[2:] for row in rows]))
            for (before, after), group in groupby(moves, key=lambda row: (row[0], row[1]))
            if (rows := [tuple(row) for row in group])
        ],
        [
            (day, {verdict: reports for _, verdict, reports in rows})
            for day, rows in groupby(days, key=lambda row: row[0])
        ],
        unrecognised,
    )


def _percentiles(buckets: Sequence[tuple[int, int]]) -> tuple[float, ...]:
    """Return the time below which each of PERCENTILES of the times lies."""
    total = sum(times for _, times in buckets)
    found = []
    for share in PERCENTILES:
        rank, seen = math.ceil(share * total), 0
        for bucket, times in buckets:
            seen += times
            if seen >= rank:
                found.append(round(seconds_of(bucket), 1))
                break
    return tuple(found)
