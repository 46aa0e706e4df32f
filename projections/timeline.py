"""The view of all reports: one row for each event, for both the timelines and the audit.

It also counts the words outside the vocabulary, which only this view has: so an erasure changes one view.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from operator import itemgetter
from typing import Any, Final, NamedTuple, cast

from typing_extensions import TypedDict  # pydantic cannot read typing's own before Python 3.12

from domain.logged import DecodedEvent
from domain.statuses import STATUSES, Label, Recognise, Status, status_label
from domain.transitions import VERDICTS, Verdict
from projections.parked import Parked
from projections.postgres import Connection
from projections.table import MAX, MIN, SUM, Column, Rows, Table
from projections.view import View
from projections.windows import BLOCK_POSITIONS


class TimelineEntry(TypedDict):
    """One entry of a timeline, with the number of reports that only repeated it.

    ``status`` is the order's status after the report. ``recognised`` is the status that was reported;
    ``status_label`` is its label. ``rejudges`` is the version of the report that this entry judges again, and
    ``reported_at`` when that report arrived; both are null if the entry is a report.
    """

    version: int
    verdict: Verdict
    status: Status | None
    previous_status: Status | None
    reported_status: str
    recognised: Status | None
    status_label: Label | None
    reported_cnote: str | None
    skipped: list[Status]
    reason: str | None
    received_at: datetime
    occurred_at: datetime | None
    repeats: int
    last_repeated_at: datetime | None
    rejudges: int | None
    reported_at: datetime | None


class PlacedEntry(TimelineEntry):
    """An entry on an order's page, with the time when the order left the entry's status."""

    left_at: datetime | None


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


# A sender may invent any number of words outside the vocabulary.
WORDS_MAX: Final = 10_000
WORDS_LISTED_MAX: Final = 100

ENTRIES: Final = Table(
    "entries",
    (
        Column("order_no", "text"),
        Column("version", "bigint"),
        Column("position", "bigint"),
        Column("verdict", "text"),
        Column("previous_status", "text"),
        Column("recognised", "text"),
        Column("status", "text"),
        Column("reported_status", "text"),
        Column("reported_cnote", "text"),
        Column("skipped", "text[]"),
        Column("reason", "text"),
        Column("received_at", "timestamptz"),
        Column("occurred_at", "timestamptz"),
        Column("repeats", "bigint"),
        Column("rejudges", "bigint"),
        Column("reported_at", "timestamptz"),
        Column("kind", "smallint"),
    ),
)
BLOCKS: Final = Table(
    "blocks",
    (
        Column("block", "bigint"),
        Column("earliest", "timestamptz", MIN),
        Column("latest", "timestamptz", MAX),
    ),
    key=("block",),
)
WORDS: Final = Table(
    "unrecognised",
    (
        Column("reported_status", "text"),
        Column("reports", "bigint", SUM),
        Column("rejudged", "bigint", SUM),
        Column("last_received_at", "timestamptz", MAX),
    ),
    key=("reported_status",),
    rows_max=WORDS_MAX,
)

# A verdict, the status before the report, and the reported status, as one number: with an index on it, the
# audit finds every combination of the three.
_PLACES: Final[dict[Status | None, int]] = {
    None: 0,
    **{status: n for n, status in enumerate(STATUSES, start=1)},
}
KINDS: Final[dict[tuple[Verdict, Status | None, Status | None], int]] = {
    (verdict, before, reported): (number * len(_PLACES) + _PLACES[before]) * len(_PLACES) + _PLACES[reported]
    for number, verdict in enumerate(VERDICTS)
    for before in _PLACES
    for reported in _PLACES
}

# Of an event with a verdict or status that this release does not know. Every filter looks at these too.
UNKNOWN_KIND: Final = -1


def fold(events: Iterable[DecodedEvent], rows: Rows) -> None:
    """Add one row for each event, the earliest and latest arrival by block, and the words by their text."""
    entries, blocks, words = rows["entries"], rows["blocks"], rows["unrecognised"]
    for position, event in events:
        received_at = event.timestamp
        entries[position] = (
            event.originator_id,
            event.originator_version,
            position,
            event.verdict,
            event.previous_status,
            event.recognised,
            event.status,
            event.reported_status,
            event.reported_cnote,
            event.skipped,
            event.reason,
            received_at,
            event.occurred_at,
            event.repeats,
            event.rejudges,
            event.reported_at,
            KINDS.get((event.verdict, event.previous_status, event.recognised), UNKNOWN_KIND),
        )
        number = position // BLOCK_POSITIONS
        block = blocks.get(number)
        if block is None:
            blocks[number] = {"block": number, "earliest": received_at, "latest": received_at}
        elif received_at > block["latest"]:
            block["latest"] = received_at
        elif received_at < block["earliest"]:
            block["earliest"] = received_at
        if event.verdict != "unrecognised" and event.rejudges is None:
            continue
        word = words.get(event.reported_status)
        if word is None:
            word = words[event.reported_status] = WORDS.blank | {"reported_status": event.reported_status}
        if event.rejudges is not None:
            word["rejudged"] += 1
        else:
            word["reports"] += 1
            word["last_received_at"] = max(word["last_received_at"] or received_at, received_at)


# An erased word is empty. Its counters move with it, as if the log had always had it empty. The time of a word
# changes only if its last report is erased.
ERASE: Final = """
    WITH erased AS (
        SELECT * FROM unnest($1::text[], $2::bigint[]) AS erased (order_no, last_version)
    ), words AS (
        SELECT reported_status, count(*) AS reports, max(received_at) AS last_received_at
        FROM entries JOIN erased USING (order_no)
        WHERE version <= last_version AND verdict = 'unrecognised' AND reported_status <> ''
        GROUP BY reported_status
    ), emptied AS (
        UPDATE entries SET reported_status = '' FROM erased
        WHERE entries.order_no = erased.order_no AND version <= last_version
          AND verdict = 'unrecognised' AND reported_status <> ''
    ), added AS (
        INSERT INTO unrecognised AS counted (reported_status, reports, rejudged, last_received_at)
        SELECT '', sum(reports), 0, max(last_received_at) FROM words HAVING count(*) > 0
        ON CONFLICT (reported_status) DO UPDATE
        SET reports = counted.reports + excluded.reports,
            last_received_at = greatest(counted.last_received_at, excluded.last_received_at)
    )
    UPDATE unrecognised AS counted SET reports = counted.reports - words.reports
    FROM words WHERE counted.reported_status = words.reported_status
    RETURNING counted.reported_status, counted.last_received_at <= words.last_received_at
"""
REMOVE_UNUSED_WORDS: Final = "DELETE FROM unrecognised WHERE reports <= 0 AND rejudged = 0"
RENEW_TIMES: Final = """
    UPDATE unrecognised AS counted
    SET last_received_at = (
        SELECT max(received_at) FROM entries
        WHERE kind = ANY($2::smallint[]) AND verdict = 'unrecognised'
          AND reported_status = counted.reported_status)
    WHERE reported_status = ANY($1::text[])
"""
UNRECOGNISED_KINDS: Final = [
    UNKNOWN_KIND,
    *(kind for (verdict, _, _), kind in KINDS.items() if verdict == "unrecognised"),
]


async def erase(connection: Connection, last_versions: Mapping[str, int]) -> None:
    """Empty the words outside the vocabulary in the entries of orders, each up to a version."""
    words = await connection.fetch(ERASE, [*last_versions], [*last_versions.values()])
    await connection.execute(REMOVE_UNUSED_WORDS)
    await connection.execute(RENEW_TIMES, [word for word, is_last in words if is_last], UNRECOGNISED_KINDS)


VIEW: Final = View(
    name="timeline",
    fold_version=4,
    tables=(ENTRIES, BLOCKS, WORDS),
    fold=fold,
    erase=erase,
    # Larger batches gain no throughput and delay webhooks, as for current_status.
    batch_events_max=300,
    idle_seconds=0.01,
)


class TimelineHead(NamedTuple):
    """The top of an order's timeline.

    Attributes:
        is_known: whether the view has an entry for the order.
        status: the order's status after its last entry.
        parked: since which version the order is parked, and why; None if it is not parked.
        parked_position: the position from which the order is parked, None if it is not parked.
    """

    is_known: bool
    status: Status | None
    parked: Parked | None
    parked_position: int | None


HEAD: Final = """
    SELECT last.verdict IS NOT NULL, last.status, parked.since_version, parked.reason, parked.position
    FROM (SELECT $1::text AS order_no) AS requested
    LEFT JOIN LATERAL (
        SELECT verdict, status FROM timeline.entries
        WHERE entries.order_no = requested.order_no ORDER BY version DESC LIMIT 1
    ) AS last ON true
    LEFT JOIN timeline.parked_orders AS parked ON parked.order_no = requested.order_no
"""

# The members of an entry that are columns. The statements count its repeats.
ENTRY_COLUMNS: Final = tuple(
    name for name in TimelineEntry.__annotations__ if name in ENTRIES.names and name != "repeats"
)
ENTRY_COLUMNS_SQL: Final = ", ".join(ENTRY_COLUMNS)

# For each of some orders: its oldest rows up to a limit, repeats too, or one row of nulls if it has none; each
# with the order's index among the requested ones, from 1, and the parking of the order.
FIRST_ROWS: Final = f"""
    SELECT requested.number, parked.since_version, parked.reason, parked.position, first.repeats,
        {", ".join(f"first.{name}" for name in ENTRY_COLUMNS)}
    FROM unnest($1::text[]) WITH ORDINALITY AS requested (order_no, number)
    LEFT JOIN timeline.parked_orders AS parked ON parked.order_no = requested.order_no
    LEFT JOIN LATERAL (
        SELECT * FROM timeline.entries
        WHERE entries.order_no = requested.order_no ORDER BY entries.version LIMIT $2
    ) AS first ON true
"""

# A page of an order's entries, oldest first, each with its number of repeats and the time of the last one.
ENTRIES_PAGE: Final = f"""
    WITH page AS (
        SELECT {ENTRY_COLUMNS_SQL}
        FROM timeline.entries
        WHERE order_no = $1 AND version > $2 AND repeats IS NULL
        ORDER BY version
        LIMIT $3
    ), repeated AS (
        SELECT repeats AS version, count(*) AS times, max(received_at) AS last_at
        FROM timeline.entries
        WHERE order_no = $1 AND repeats = ANY(ARRAY(SELECT version FROM page))
        GROUP BY repeats
    )
    SELECT page.*, coalesce(repeated.times, 0) AS repeats, repeated.last_at AS last_repeated_at
    FROM page LEFT JOIN repeated USING (version)
    ORDER BY page.version
"""

# The newest entries below a version, as of another version: later repeats and moves are ignored.
NEWEST_ENTRIES: Final = f"""
    WITH page AS (
        SELECT {ENTRY_COLUMNS_SQL}
        FROM timeline.entries
        WHERE order_no = $1 AND version < $2 AND repeats IS NULL
        ORDER BY version DESC
        LIMIT $4
    ), repeated AS (
        SELECT repeats AS version, count(*) AS times, max(received_at) AS last_at
        FROM timeline.entries
        WHERE order_no = $1 AND repeats = ANY(ARRAY(SELECT version FROM page)) AND version <= $3
        GROUP BY repeats
    )
    SELECT page.*, next_move.reached_at AS left_at, coalesce(repeated.times, 0) AS repeats,
        repeated.last_at AS last_repeated_at
    FROM page LEFT JOIN repeated USING (version)
    LEFT JOIN LATERAL (
        SELECT coalesce(later.reported_at, later.received_at) AS reached_at FROM timeline.entries AS later
        WHERE page.verdict = 'advanced' AND later.order_no = $1 AND later.version > page.version
          AND later.version <= $3 AND later.verdict = 'advanced'
        ORDER BY later.version LIMIT 1
    ) AS next_move ON true
    ORDER BY page.version
"""

# The number of an order's reports by verdict and, if advanced, by status, and when the first of them arrived. A
# rejudgement reaches a status too, but is not a report.
COUNTS: Final = """
    SELECT verdict, CASE verdict WHEN 'advanced' THEN status END AS reached,
        count(*) FILTER (WHERE rejudges IS NULL), min(coalesce(reported_at, received_at))
    FROM timeline.entries WHERE order_no = $1 AND version <= $2
    GROUP BY verdict, reached
"""

# An order's latest status changes, latest first.
LATEST_ADVANCES: Final = """
    SELECT version, status, coalesce(reported_at, received_at) FROM timeline.entries
    WHERE order_no = $1 AND verdict = 'advanced'
    ORDER BY version DESC
    LIMIT $2
"""

UNRECOGNISED: Final = """
    SELECT reported_status, reports, rejudged, last_received_at FROM timeline.unrecognised
    WHERE reports > rejudged AND reported_status <> ''
    ORDER BY reports - rejudged DESC, reported_status LIMIT $1
"""


async def read_unrecognised(connection: Connection, recognise: Recognise) -> list[UnrecognisedString]:
    """Return the most frequent strings with reports that were not recognised and not judged again."""
    rows = await connection.fetch(UNRECOGNISED, WORDS_LISTED_MAX)
    return [
        cast("UnrecognisedString", {**row, "recognised": recognise(row["reported_status"])}) for row in rows
    ]


async def read_head(connection: Connection, order_no: str) -> TimelineHead:
    """Return the top of an order's timeline."""
    (row,) = await connection.fetch(HEAD, order_no)
    is_known, status, since_version, reason, position = row
    parked: Parked | None = None
    if since_version is not None:
        parked = {"view": VIEW.name, "since_version": since_version, "reason": reason}
    return TimelineHead(is_known, status, parked, position)


class WholeTimeline(NamedTuple):
    """A timeline: its top, and all its entries, oldest first."""

    head: TimelineHead
    entries: list[TimelineEntry]


async def find_timelines(
    connection: Connection, order_nos: Sequence[str], reports_max: int
) -> list[WholeTimeline | None]:
    """Return these orders' timelines in the same order, None for each order of too many reports.

    Args:
        connection: the connection.
        order_nos: the numbers of the orders; a number may be repeated.
        reports_max: the maximum number of an order's reports, repeats included: it bounds an order's cost.
    """
    numbers = {order_no: number for number, order_no in enumerate(dict.fromkeys(order_nos))}
    rows: list[list[Any]] = [[] for _ in numbers]
    for row in await connection.fetch(FIRST_ROWS, list(numbers), reports_max + 1):
        rows[row[0] - 1].append(row)
    timelines = [_to_timeline(of_order) if len(of_order) <= reports_max else None for of_order in rows]
    return [timelines[numbers[order_no]] for order_no in order_nos]


_version: Final = itemgetter("version")
# The place of an entry's columns in a row of FIRST_ROWS.
ENTRY_START: Final = 5


def _to_timeline(rows: list[Any]) -> WholeTimeline:
    """Return the timeline in all rows of an order, which FIRST_ROWS returned."""
    parked: Parked | None = None
    _, since_version, parked_reason, position, _, first_version, *_ = rows[0]
    if since_version is not None:
        parked = {"view": VIEW.name, "since_version": since_version, "reason": parked_reason}
    if first_version is None:
        return WholeTimeline(
            TimelineHead(is_known=False, status=None, parked=parked, parked_position=position), []
        )
    # The statement reads them in this order, but does not promise it.
    rows.sort(key=_version)
    entries: dict[int, TimelineEntry] = {}
    for row in rows:
        entry: Any = dict(zip(ENTRY_COLUMNS, row[ENTRY_START:], strict=True))
        repeats = row["repeats"]
        if repeats is None:
            entry |= {"repeats": 0, "last_repeated_at": None, "status_label": status_label(entry["recognised"])}
            entries[entry["version"]] = entry
        elif (repeated := entries.get(repeats)) is not None:
            repeated["repeats"] += 1
            last, received_at = repeated["last_repeated_at"], entry["received_at"]
            repeated["last_repeated_at"] = received_at if last is None else max(last, received_at)
    status = rows[-1]["status"]
    head = TimelineHead(is_known=True, status=status, parked=parked, parked_position=position)
    return WholeTimeline(head, [*entries.values()])


async def entries_page(connection: Connection, order_no: str, after: int, limit: int) -> list[TimelineEntry]:
    """Return an order's entries with versions above ``after``, oldest first."""
    rows = await connection.fetch(ENTRIES_PAGE, order_no, after, limit)
    return [cast("TimelineEntry", {**row, "status_label": status_label(row["recognised"])}) for row in rows]


async def newest_entries(
    connection: Connection, order_no: str, below: int, as_of: int, limit: int
) -> list[PlacedEntry]:
    """Return an order's last entries with versions below ``below``, oldest first, as of version ``as_of``."""
    rows = await connection.fetch(NEWEST_ENTRIES, order_no, below, as_of, limit)
    return [cast("PlacedEntry", {**row, "status_label": status_label(row["recognised"])}) for row in rows]


class Reached(NamedTuple):
    """The number of an order's reports with a verdict and, if advanced, a status; when the first arrived."""

    verdict: Verdict
    status: Status | None
    times: int
    first_at: datetime


async def reached_statuses(connection: Connection, order_no: str, version: int) -> list[Reached]:
    """Return the number of an order's reports up to a version, by verdict and, if advanced, by status."""
    return [Reached(*row) for row in await connection.fetch(COUNTS, order_no, version)]


class Advance(NamedTuple):
    """A status change: the version that brought it, the new status, and when its report arrived."""

    version: int
    status: Status
    received_at: datetime


async def latest_advances(connection: Connection, order_no: str, limit: int) -> list[Advance]:
    """Return an order's latest status changes, latest first."""
    return [Advance(*row) for row in await connection.fetch(LATEST_ADVANCES, order_no, limit)]
