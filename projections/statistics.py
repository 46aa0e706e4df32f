"""The view of how orders move in general: counters over all orders, none about a single order."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from itertools import groupby
from typing import Final, NamedTuple, cast
from zoneinfo import ZoneInfo

from typing_extensions import TypedDict  # pydantic cannot read typing's own before Python 3.12

from domain.statuses import STATUSES, Label, Recognise, Status, status_label
from domain.transitions import VERDICTS, Verdict
from projections.current_status import Counts
from projections.engine import DecodedEvent, View
from projections.postgres import Connection

# Durations are counted in buckets, each a tenth wider than the previous one: percentiles are accurate to 5 %.
BUCKET_GROWTH: Final = 1.1
UNRECOGNISED_LISTED_MAX: Final = 100
# The number of slots for minutes. The count of a later minute replaces that of an earlier one in the same slot,
# so the table never grows. Two hours, so that a clock that is fast by less than an hour hides no recent minute.
MINUTES_KEPT: Final = 120
# The most words outside the vocabulary that a rebuild sums up in memory. A sender may invent any number.
WORDS_GATHERED_MAX: Final = 10_000
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
    timezone: str
    statuses: list[StatusCount]
    moves: list[Move]
    days: list[DailyReports]
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
    ), added_hours AS (
        INSERT INTO hours AS present (hour, verdict, reports)
        SELECT * FROM json_to_recordset($3) AS added (hour timestamptz, verdict text, reports bigint)
        ON CONFLICT (hour, verdict) DO UPDATE SET reports = present.reports + excluded.reports
    ), added_minutes AS (
        INSERT INTO minutes AS present (slot, verdict, minute, reports)
        SELECT * FROM json_to_recordset($5)
            AS added (slot smallint, verdict text, minute timestamptz, reports bigint)
        ON CONFLICT (slot, verdict) DO UPDATE SET
            minute = excluded.minute,
            reports = excluded.reports
                + CASE present.minute WHEN excluded.minute THEN present.reports ELSE 0 END
        WHERE present.minute <= excluded.minute
    )
    INSERT INTO unrecognised AS present (reported_status, reports, rejudged, last_received_at)
    SELECT * FROM json_to_recordset($4)
        AS added (reported_status text, reports bigint, rejudged bigint, last_received_at timestamptz)
    ON CONFLICT (reported_status) DO UPDATE SET
        reports = present.reports + excluded.reports,
        rejudged = present.rejudged + excluded.rejudged,
        last_received_at = greatest(present.last_received_at, excluded.last_received_at)
"""


@dataclass
class Additions:
    """The numbers that some events add to the counters."""

    statuses: dict[str, int] = field(default_factory=dict)
    moves: dict[tuple[str, str, int], int] = field(default_factory=dict)
    hours: dict[tuple[datetime, str], int] = field(default_factory=dict)
    # By slot and verdict: the latest minute of the slot, and its reports.
    minutes: dict[tuple[int, str], tuple[datetime, int]] = field(default_factory=dict)
    unrecognised: dict[str, Word] = field(default_factory=dict)

    @property
    def is_full(self) -> bool:
        """Whether they have so many words that they must be written now. The calendar limits all else."""
        return len(self.unrecognised) >= WORDS_GATHERED_MAX

    def add(self, events: Iterable[DecodedEvent]) -> None:
        """Count events. Each event alone determines what it adds.

        A slot of minutes has the count of its latest minute: the result does not depend on the order of the
        events.
        """
        statuses, moves = self.statuses, self.moves
        hours, minutes, unrecognised = self.hours, self.minutes, self.unrecognised
        for _, event in events:
            before, after = event.previous_status or NO_STATUS, event.status or NO_STATUS
            if event.originator_version == 1:
                statuses[after] = statuses.get(after, 0) + 1
            elif before != after:
                statuses[before] = statuses.get(before, 0) - 1
                statuses[after] = statuses.get(after, 0) + 1
            if event.verdict == "advanced" and event.previous_since is not None:
                move = (before, after, to_bucket(event.reached_at - event.previous_since))
                moves[move] = moves.get(move, 0) + 1
            if event.rejudges is not None:
                # It is not a report.
                unrecognised.setdefault(event.reported_status, Word()).rejudged += 1
                continue
            minute = event.timestamp.astimezone(UTC).replace(second=0, microsecond=0)
            hour = (minute.replace(minute=0), event.verdict)
            hours[hour] = hours.get(hour, 0) + 1
            slot = (to_slot(minute), event.verdict)
            latest, reports = minutes.get(slot, (minute, 0))
            if minute >= latest:
                minutes[slot] = (minute, reports + 1 if minute == latest else 1)
            if event.verdict == "unrecognised":
                unrecognised.setdefault(event.reported_status, Word()).add_report(event.timestamp)

    async def write(self, connection: Connection) -> None:
        """Add the numbers to the counters, and begin again."""
        await connection.execute(
            ADD_TO_COUNTERS,
            [{"status": status, "orders": orders} for status, orders in self.statuses.items()],
            [
                {"previous_status": before, "status": after, "bucket": bucket, "times": times}
                for (before, after, bucket), times in self.moves.items()
            ],
            [
                {"hour": hour, "verdict": verdict, "reports": reports}
                for (hour, verdict), reports in self.hours.items()
            ],
            [{"reported_status": reported, **vars(word)} for reported, word in self.unrecognised.items()],
            [
                {"slot": slot, "verdict": verdict, "minute": minute, "reports": reports}
                for (slot, verdict), (minute, reports) in self.minutes.items()
            ],
        )
        for counts in (self.statuses, self.moves, self.hours, self.minutes, self.unrecognised):
            counts.clear()


async def apply(connection: Connection, events: Sequence[DecodedEvent]) -> None:
    """Add the numbers of these events to the counters."""
    additions = Additions()
    additions.add(events)
    await additions.write(connection)


VIEW: Final = View(
    name="statistics",
    fold_version=4,
    tables=("statuses", "moves", "hours", "minutes", "unrecognised"),
    apply=apply,
    # No reader waits for a counter: large batches and a long pause leave more resources to webhooks.
    batch_events_max=2_000,
    idle_seconds=0.1,
    gather=Additions,
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
UNRECOGNISED: Final = """
    SELECT reported_status, reports, rejudged, last_received_at FROM statistics.unrecognised
    WHERE reports > rejudged AND reported_status <> ''
    ORDER BY reports - rejudged DESC, reported_status LIMIT $1
"""


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


async def read_unrecognised(connection: Connection, recognise: Recognise) -> list[UnrecognisedString]:
    """Return the most frequent strings with reports that were not recognised and not judged again."""
    rows = await connection.fetch(UNRECOGNISED, UNRECOGNISED_LISTED_MAX)
    return [
        cast("UnrecognisedString", {**row, "recognised": recognise(row["reported_status"])}) for row in rows
    ]


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
