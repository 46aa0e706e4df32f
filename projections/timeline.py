"""The view of what was reported of every order: one row an event, for the timeline and the audit alike."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple

from projections.engine import Connection, DecodedEvent

NAME: Final = "timeline"
FOLD_VERSION: Final = 1
# Larger pages gain no throughput and make webhooks wait: 2,000 took their p99 from 2.3 to 3 times.
PAGE_EVENTS_MAX: Final = 300
# Under load a page is then what several commits brought, for the price of one.
REST_SECONDS: Final = 0.01
TABLES: Final = ("entries",)

COLUMNS: Final = (
    "order_no",
    "version",
    "position",
    "verdict",
    "previous_status",
    "recognised",
    "status",
    "reported_status",
    "reported_cnote",
    "skipped",
    "reason",
    "received_at",
    "occurred_at",
    "repeats",
)


def fold(events: Iterable[DecodedEvent]) -> list[tuple[Any, ...]]:
    """Return the row of each event; nothing of one event depends on another."""
    return [
        (
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
            event.timestamp,
            event.occurred_at,
            event.repeats,
        )
        for position, event in events
    ]


async def apply(connection: Connection, events: Sequence[DecodedEvent]) -> None:
    """Add the rows of these events."""
    await connection.copy_records_to_table("entries", records=fold(events), columns=COLUMNS)


async def copy(connection: Connection, events: Sequence[DecodedEvent], _carried: dict[str, Any]) -> None:
    """Write events into the empty table; there is nothing to carry."""
    if events:
        await apply(connection, events)


class Entry(NamedTuple):
    """One entry of an order's timeline, its mere repeats folded into it."""

    version: int
    verdict: str
    status: str | None
    previous_status: str | None
    recognised: str | None
    reported_status: str
    reported_cnote: str | None
    skipped: list[str]
    reason: str | None
    received_at: datetime
    occurred_at: datetime | None
    repeats: int
    last_repeated_at: datetime | None


ENTRIES_PAGE: Final = """
    WITH page AS (
        SELECT version, verdict, status, previous_status, recognised, reported_status, reported_cnote, skipped,
            reason, received_at, occurred_at
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
    SELECT page.*, coalesce(repeated.times, 0), repeated.last_at
    FROM page LEFT JOIN repeated USING (version)
    ORDER BY page.version
"""

# The newest entries below a version. Their repeats are counted, and the next move is looked up, up to the one
# that is known.
NEWEST_ENTRIES: Final = """
    WITH page AS (
        SELECT version, verdict, previous_status, recognised, status, reported_status, reported_cnote, skipped,
            received_at, occurred_at
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
    SELECT page.*, onward.received_at, coalesce(repeated.times, 0), repeated.last_at
    FROM page LEFT JOIN repeated USING (version)
    LEFT JOIN LATERAL (
        SELECT later.received_at FROM timeline.entries AS later
        WHERE page.verdict = 'advanced' AND later.order_no = $1 AND later.version > page.version
          AND later.version <= $3 AND later.verdict = 'advanced'
        ORDER BY later.version LIMIT 1
    ) AS onward ON true
    ORDER BY page.version
"""

COUNTS: Final = """
    SELECT verdict, CASE verdict WHEN 'advanced' THEN status END AS reached, count(*), min(received_at)
    FROM timeline.entries WHERE order_no = $1 AND version <= $2
    GROUP BY verdict, reached
"""

RECENT_BY_MINUTE: Final = """
    WITH recent AS MATERIALIZED (
        SELECT received_at, verdict FROM timeline.entries ORDER BY position DESC LIMIT $2
    )
    SELECT date_trunc('minute', received_at), verdict, count(*),
        CASE WHEN (SELECT count(*) FROM recent) >= $2 THEN (SELECT min(received_at) FROM recent) END
    FROM recent WHERE received_at >= $1
    GROUP BY 1, 2
"""

LATEST_REFUSED: Final = """
    SELECT entry.order_no, entry.version, entry.recognised, entry.previous_status, entry.received_at
    FROM unnest($1::text[]) AS known (order_no)
    JOIN LATERAL (
        SELECT * FROM timeline.entries
        WHERE entries.order_no = known.order_no AND verdict = 'refused' ORDER BY version DESC LIMIT 1
    ) AS entry ON true
    ORDER BY entry.received_at DESC
"""

SET_ASIDE: Final = "SELECT since_version, position, reason FROM timeline.set_aside WHERE order_no = $1"

TRANSITIONS_PAGE: Final = """
    SELECT position, order_no, version, verdict, previous_status, recognised, reported_status, reason, skipped,
        received_at
    FROM timeline.entries
    WHERE position > $1
      AND ($2::text IS NULL OR verdict = $2)
      AND ($3::text IS NULL OR order_no = $3)
      AND ($4::text IS NULL OR previous_status = $4)
      AND ($5::text IS NULL OR recognised = $5)
      AND ($6::timestamptz IS NULL OR received_at >= $6)
      AND ($7::timestamptz IS NULL OR received_at < $7)
    ORDER BY position
    LIMIT $8
"""


STATUS: Final = """
    SELECT status FROM timeline.entries WHERE order_no = $1 ORDER BY version DESC LIMIT 1
"""


class PlacedEntry(NamedTuple):
    """An entry among those around it; ``left_at`` is when the order left the status that the entry brought."""

    version: int
    verdict: str
    previous_status: str | None
    recognised: str | None
    status: str | None
    reported_status: str
    reported_cnote: str | None
    skipped: list[str]
    received_at: datetime
    occurred_at: datetime | None
    left_at: datetime | None
    repeats: int
    last_repeated_at: datetime | None


class Reached(NamedTuple):
    """How many of an order's reports had a verdict and brought a status, and when the first of them came."""

    verdict: str
    status: str | None
    times: int
    first_at: datetime


class Minute(NamedTuple):
    """Reports of one verdict in a minute; ``begin`` is from when on they are counted, where that is less."""

    minute: datetime
    verdict: str
    reports: int
    begin: datetime | None


class Contradiction(NamedTuple):
    """The last refused report of an order."""

    order_no: str
    version: int
    recognised: str | None
    previous_status: str | None
    received_at: datetime


class Transition(NamedTuple):
    """One report and the verdict on it, as the audit shows it."""

    position: int
    order_no: str
    version: int
    verdict: str
    previous_status: str | None
    recognised: str | None
    reported_status: str
    reason: str | None
    skipped: list[str]
    received_at: datetime


class SetAside(NamedTuple):
    """From where on an order is set aside in this view, and why."""

    since_version: int
    position: int
    reason: str


async def entries_page(connection: Connection, order_no: str, after: int, limit: int) -> list[Entry]:
    """Return an order's entries with versions above ``after``, oldest first."""
    return [Entry(*row) for row in await connection.fetch(ENTRIES_PAGE, order_no, after, limit)]


async def newest_entries(
    connection: Connection, order_no: str, below: int, known: int, limit: int
) -> list[PlacedEntry]:
    """Return an order's last entries with versions below one, oldest first, as of the version that is known."""
    return [PlacedEntry(*row) for row in await connection.fetch(NEWEST_ENTRIES, order_no, below, known, limit)]


async def reached(connection: Connection, order_no: str, version: int) -> list[Reached]:
    """Return what an order's reports came to, up to a version."""
    return [Reached(*row) for row in await connection.fetch(COUNTS, order_no, version)]


async def recent_by_minute(connection: Connection, since: datetime, reports_max: int) -> list[Minute]:
    """Return the reports since a time by minute and verdict, counted from the last one back."""
    return [Minute(*row) for row in await connection.fetch(RECENT_BY_MINUTE, since, reports_max)]


async def latest_refused(connection: Connection, order_nos: Sequence[str]) -> list[Contradiction]:
    """Return the last refused report of each of these orders that has one, the latest first."""
    return [Contradiction(*row) for row in await connection.fetch(LATEST_REFUSED, order_nos)]


async def status_of(connection: Connection, order_no: str) -> tuple[bool, str | None]:
    """Return whether the view has an order, and its status as of its last entry."""
    row = await connection.fetchrow(STATUS, order_no)
    return (True, row[0]) if row is not None else (False, None)


async def set_aside(connection: Connection, order_no: str) -> SetAside | None:
    """Return from where on an order is set aside, None where it is not."""
    row = await connection.fetchrow(SET_ASIDE, order_no)
    return SetAside(*row) if row is not None else None


async def transitions_page(  # noqa: PLR0913 - each is a filter of the audit
    connection: Connection,
    *,
    after: int,
    verdict: str | None,
    order_no: str | None,
    previous_status: str | None,
    recognised: str | None,
    since: datetime | None,
    until: datetime | None,
    limit: int,
) -> list[Transition]:
    """Return verdicts at positions above ``after``, in the order of the log; None leaves a filter out."""
    rows = await connection.fetch(
        TRANSITIONS_PAGE, after, verdict, order_no, previous_status, recognised, since, until, limit
    )
    return [Transition(*row) for row in rows]
