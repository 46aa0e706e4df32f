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
