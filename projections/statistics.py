"""The view of how orders move in general: counters over all orders, none about a single order."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from itertools import groupby
from typing import Final, cast

from typing_extensions import TypedDict  # pydantic cannot read typing's own before Python 3.12

from domain.statuses import STATUSES, Label, Recognise, Status, status_label
from domain.transitions import VERDICTS
from projections.current_status import Counts
from projections.engine import DecodedEvent, View
from projections.postgres_errors import Connection

# Durations are counted in buckets, each a tenth wider than the previous one: percentiles are accurate to 5 %.
BUCKET_GROWTH: Final = 1.1
UNRECOGNISED_LISTED_MAX: Final = 100
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


class Day(TypedDict):
    """The number of reports on one day in UTC, by verdict."""

    day: date
    reports: Counts


class UnrecognisedString(TypedDict):
    """A status string that was outside the vocabulary when it was reported, in some reports until now.

    ``rejudged`` is the number of its reports that were judged again. ``recognised`` is the status that the
    string means by now, null if it is still outside the vocabulary.
    """

    reported_status: str
    reports: int
    rejudged: int
    recognised: Status | None
    last_received_at: datetime


class Statistics(TypedDict):
    """All counters as of one position of the log."""

    position: int
    statuses: list[StatusCount]
    moves: list[Move]
    days: list[Day]
    unrecognised: list[UnrecognisedString]


@dataclass
class Word:
    """The numbers that some events add to a word outside the vocabulary."""

    reports: int = 0
    rejudged: int = 0
    last_received_at: datetime | None = None

    def add_report(self, received_at: datetime) -> None:
        """Count a report with this word."""
        self.reports += 1
        self.last_received_at = max(self.last_received_at or received_at, received_at)


@dataclass
class Additions:
    """The numbers that some events add to the counters."""

    statuses: dict[str, int] = field(default_factory=dict)
    moves: dict[tuple[str, str, int], int] = field(default_factory=dict)
    days: dict[tuple[date, str], int] = field(default_factory=dict)
    unrecognised: dict[str, Word] = field(default_factory=dict)


def to_bucket(duration: timedelta) -> int:
    """Return the bucket of a duration: 0 below a second, then 1, 2, 3 and so on."""
    seconds = duration.total_seconds()
    return 0 if seconds < 1 else 1 + int(math.log(seconds, BUCKET_GROWTH))


def to_seconds(bucket: int) -> float:
    """Return the middle of a bucket, in seconds."""
    return 0.5 if bucket == 0 else BUCKET_GROWTH ** (bucket - 0.5)


def fold(events: Iterable[DecodedEvent], additions: Additions) -> None:
    """Count events. Each event alone determines what it adds."""
    statuses, moves = additions.statuses, additions.moves
    days, unrecognised = additions.days, additions.unrecognised
    for _, event in events:
        before, after = event.previous_status or NO_STATUS, event.status or NO_STATUS
        if event.originator_version == 1:
            statuses[after] = statuses.get(after, 0) + 1
        elif before != after:
            statuses[before] = statuses.get(before, 0) - 1
            statuses[after] = statuses.get(after, 0) + 1
        if event.rejudges is not None:
            # It is not a report, and its order had reached the status at some earlier time.
            unrecognised.setdefault(event.reported_status, Word()).rejudged += 1
            continue
        if event.verdict == "advanced" and event.previous_since is not None:
            move = (before, after, to_bucket(event.timestamp - event.previous_since))
            moves[move] = moves.get(move, 0) + 1
        day = (event.timestamp.date(), event.verdict)
        days[day] = days.get(day, 0) + 1
        if event.verdict == "unrecognised":
            unrecognised.setdefault(event.reported_status, Word()).add_report(event.timestamp)


ADD_TO_COUNTERS: Final = """
    WITH added_statuses AS (
        INSERT INTO statuses AS present (status, orders)
        SELECT * FROM json_to_recordset($1) AS added (status text, orders bigint)
        ON CONFLICT (status) DO UPDATE SET orders = present.orders + excluded.orders
    ), added_moves AS (
        INSERT INTO moves AS present (previous_status, status, bucket, times)
        SELECT * FROM json_to_recordset($2)
            AS added (previous_status text, status text, bucket integer, times bigint)
        ON CONFLICT (previous_status, status, bucket) DO UPDATE SET times = present.times + excluded.times
    ), added_days AS (
        INSERT INTO days AS present (day, verdict, reports)
        SELECT * FROM json_to_recordset($3) AS added (day date, verdict text, reports bigint)
        ON CONFLICT (day, verdict) DO UPDATE SET reports = present.reports + excluded.reports
    )
    INSERT INTO unrecognised AS present (reported_status, reports, rejudged, last_received_at)
    SELECT * FROM json_to_recordset($4)
        AS added (reported_status text, reports bigint, rejudged bigint, last_received_at timestamptz)
    ON CONFLICT (reported_status) DO UPDATE SET
        reports = present.reports + excluded.reports,
        rejudged = present.rejudged + excluded.rejudged,
        last_received_at = greatest(present.last_received_at, excluded.last_received_at)
"""


async def apply(connection: Connection, events: Sequence[DecodedEvent]) -> None:
    """Add the numbers of these events to the counters."""
    additions = Additions()
    fold(events, additions)
    await connection.execute(
        ADD_TO_COUNTERS,
        [{"status": status, "orders": orders} for status, orders in additions.statuses.items()],
        [
            {"previous_status": before, "status": after, "bucket": bucket, "times": times}
            for (before, after, bucket), times in additions.moves.items()
        ],
        [
            {"day": day, "verdict": verdict, "reports": reports}
            for (day, verdict), reports in additions.days.items()
        ],
        [{"reported_status": reported, **vars(word)} for reported, word in additions.unrecognised.items()],
    )


VIEW: Final = View(
    name="statistics",
    fold_version=2,
    tables=("statuses", "moves", "days", "unrecognised"),
    apply=apply,
    # No reader waits for a counter: large batches and a long pause leave more resources to webhooks.
    batch_events_max=2_000,
    idle_seconds=0.1,
)

POSITION: Final = "SELECT position FROM statistics.projection"
STATUS_COUNTS: Final = "SELECT nullif(status, '') AS status, orders FROM statistics.statuses WHERE orders > 0"
MOVES: Final = """
    SELECT previous_status, status, bucket, times FROM statistics.moves ORDER BY previous_status, status, bucket
"""
DAYS: Final = "SELECT day, verdict, reports FROM statistics.days WHERE day >= $1 ORDER BY day, verdict"
UNRECOGNISED: Final = """
    SELECT reported_status, reports, rejudged, last_received_at FROM statistics.unrecognised
    WHERE reports > rejudged AND reported_status <> ''
    ORDER BY reports - rejudged DESC, reported_status LIMIT $1
"""


async def read_statistics(connection: Connection, since: date, recognise: Recognise) -> Statistics:
    """Return all counters in one snapshot.

    Args:
        connection: a connection.
        since: the first day.
        recognise: the present vocabulary.
    """
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        position: int = await connection.fetchval(POSITION)
        statuses = await connection.fetch(STATUS_COUNTS)
        moves = await connection.fetch(MOVES)
        days = await connection.fetch(DAYS, since)
        unrecognised = await connection.fetch(UNRECOGNISED, UNRECOGNISED_LISTED_MAX)
    ranks: dict[str | None, int] = {None: -1, **{status: rank for rank, status in enumerate(STATUSES)}}
    return {
        "position": position,
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
            {"day": day, "reports": _to_counts({row["verdict"]: row["reports"] for row in rows})}
            for day, rows in groupby(days, key=lambda row: row["day"])
        ],
        "unrecognised": [
            cast("UnrecognisedString", {**row, "recognised": recognise(row["reported_status"])})
            for row in unrecognised
        ],
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
