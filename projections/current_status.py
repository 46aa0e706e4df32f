"""The view of what every order's status is now: one row an order."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple

from projections.engine import Connection, DecodedEvent

NAME: Final = "current_status"
FOLD_VERSION: Final = 1
TABLES: Final = ("orders", "order_cnotes")

COLUMNS: Final = (
    "order_no",
    "version",
    "position",
    "first_position",
    "status",
    "reported_status",
    "status_since",
    "cnote",
    "first_reported_at",
    "last_reported_at",
    "advanced",
    "repeated",
    "late",
    "refused",
    "unrecognised",
)
_VERSION, _POSITION = COLUMNS.index("version"), COLUMNS.index("position")
_STATUS, _REPORTED_STATUS, _STATUS_SINCE, _CNOTE = 4, 5, 6, 7
_LAST_REPORTED_AT = COLUMNS.index("last_reported_at")
_COUNT: Final = {
    verdict: COLUMNS.index(verdict) for verdict in ("advanced", "repeated", "late", "refused", "unrecognised")
}


class OrderRow(NamedTuple):
    """An order as the view has it, and what is set aside of it; the columns of a read, in their order."""

    order_no: str
    version: int
    position: int
    first_position: int
    status: str | None
    reported_status: str | None
    status_since: datetime | None
    cnote: str | None
    first_reported_at: datetime
    last_reported_at: datetime
    advanced: int
    repeated: int
    late: int
    refused: int
    unrecognised: int
    aside_since: int | None = None
    aside_position: int | None = None
    aside_reason: str | None = None


def fold(events: Iterable[DecodedEvent], rows: dict[str, list[Any]]) -> dict[tuple[str, str], None]:
    """Fold events into the rows of their orders, and return the (cnote, order_no) that they report.

    A row that begins here holds what these events say, to be added to the row of what came before them.
    """
    cnotes: dict[tuple[str, str], None] = {}
    for position, event in events:
        order_no = event.originator_id
        received_at = event.timestamp
        row = rows.get(order_no)
        if row is None:
            rows[order_no] = row = [
                order_no, 0, 0, position, None, None, None, None, received_at, received_at, 0, 0, 0, 0, 0,
            ]  # fmt: skip
        row[_VERSION] = event.originator_version
        row[_POSITION] = position
        row[_STATUS] = event.status
        row[_CNOTE] = event.cnote
        row[_LAST_REPORTED_AT] = received_at
        verdict = event.verdict
        row[_COUNT[verdict]] += 1
        if verdict == "advanced":
            row[_REPORTED_STATUS] = event.reported_status
            row[_STATUS_SINCE] = received_at
        if event.reported_cnote is not None:
            cnotes[event.reported_cnote, order_no] = None
    return cnotes


# What the events say is added to the row that is there before it is proposed: the table's checks look at the
# proposed row, conflict or not. Nobody else writes the view meanwhile.
UPSERT_ORDERS: Final = """
    INSERT INTO orders (
        order_no, version, position, first_position, status, reported_status, status_since, cnote,
        first_reported_at, last_reported_at, advanced, repeated, late, refused, unrecognised)
    SELECT given.order_no, given.version, given.position,
        coalesce(known.first_position, given.first_position),
        given.status,
        coalesce(given.reported_status, known.reported_status),
        coalesce(given.status_since, known.status_since),
        given.cnote,
        coalesce(known.first_reported_at, given.first_reported_at),
        given.last_reported_at,
        given.advanced + coalesce(known.advanced, 0),
        given.repeated + coalesce(known.repeated, 0),
        given.late + coalesce(known.late, 0),
        given.refused + coalesce(known.refused, 0),
        given.unrecognised + coalesce(known.unrecognised, 0)
    FROM unnest(
        $1::text[], $2::bigint[], $3::bigint[], $4::bigint[], $5::text[], $6::text[], $7::timestamptz[],
        $8::text[], $9::timestamptz[], $10::timestamptz[], $11::bigint[], $12::bigint[], $13::bigint[],
        $14::bigint[], $15::bigint[]
    ) AS given (
        order_no, version, position, first_position, status, reported_status, status_since, cnote,
        first_reported_at, last_reported_at, advanced, repeated, late, refused, unrecognised)
    LEFT JOIN orders AS known ON known.order_no = given.order_no
    ON CONFLICT (order_no) DO UPDATE SET
        version = excluded.version,
        position = excluded.position,
        status = excluded.status,
        reported_status = excluded.reported_status,
        status_since = excluded.status_since,
        cnote = excluded.cnote,
        last_reported_at = excluded.last_reported_at,
        advanced = excluded.advanced,
        repeated = excluded.repeated,
        late = excluded.late,
        refused = excluded.refused,
        unrecognised = excluded.unrecognised
"""

INSERT_CNOTES: Final = """
    INSERT INTO order_cnotes (cnote, order_no) SELECT * FROM unnest($1::text[], $2::text[])
    ON CONFLICT DO NOTHING
"""


async def apply(connection: Connection, events: Sequence[DecodedEvent]) -> None:
    """Add what these events say to the rows of their orders."""
    rows: dict[str, list[Any]] = {}
    cnotes = fold(events, rows)
    await connection.execute(UPSERT_ORDERS, *zip(*rows.values(), strict=True))
    if cnotes:
        await connection.execute(INSERT_CNOTES, *zip(*cnotes, strict=True))


async def copy(connection: Connection, events: Sequence[DecodedEvent], carried: dict[str, Any]) -> None:
    """Write events in stream order into empty tables; the last order may go on in the next call."""
    rows: dict[str, list[Any]] = carried.setdefault("rows", {})
    # The airway bills of the order that goes on, so that none is written twice.
    cnotes: dict[tuple[str, str], None] = carried.setdefault("cnotes", {})
    known = dict(cnotes)
    found = fold(events, rows)
    going_on = events[-1][1].originator_id if events else None
    complete = [row for order_no, row in rows.items() if order_no != going_on]
    cnotes.clear()
    cnotes.update({pair: None for pair in (*known, *found) if pair[1] == going_on})
    for row in complete:
        del rows[row[0]]
    if complete:
        await connection.copy_records_to_table("orders", records=complete, columns=COLUMNS)
    new = [pair for pair in found if pair not in known]
    if new:
        await connection.copy_records_to_table("order_cnotes", records=new, columns=("cnote", "order_no"))


ORDERS_BY_NUMBER: Final = """
    SELECT known.order_no, known.version, known.position, known.first_position, known.status,
        known.reported_status, known.status_since, known.cnote, known.first_reported_at, known.last_reported_at,
        known.advanced, known.repeated, known.late, known.refused, known.unrecognised,
        aside.since_version, aside.position, aside.reason
    FROM current_status.orders AS known LEFT JOIN current_status.set_aside AS aside USING (order_no)
    WHERE known.order_no = ANY($1)
"""

ORDERS_PAGE: Final = """
    SELECT known.order_no, known.version, known.position, known.first_position, known.status,
        known.reported_status, known.status_since, known.cnote, known.first_reported_at, known.last_reported_at,
        known.advanced, known.repeated, known.late, known.refused, known.unrecognised,
        aside.since_version, aside.position, aside.reason
    FROM current_status.orders AS known LEFT JOIN current_status.set_aside AS aside USING (order_no)
    WHERE known.first_position < $1
      AND ($2::text IS NULL OR known.status = $2)
      AND ($3::text IS NULL
           OR known.order_no IN (SELECT order_no FROM current_status.order_cnotes WHERE cnote = $3))
    ORDER BY known.first_position DESC
    LIMIT $4
"""

WHOLLY_SET_ASIDE: Final = """
    SELECT since_version, position, reason FROM current_status.set_aside WHERE order_no = $1
"""


async def orders_by_number(connection: Connection, order_nos: Sequence[str]) -> dict[str, OrderRow]:
    """Return those of the given orders that the view has."""
    return {row[0]: OrderRow(*row) for row in await connection.fetch(ORDERS_BY_NUMBER, order_nos)}


async def orders_page(
    connection: Connection, before: int, status: str | None, cnote: str | None, limit: int
) -> list[OrderRow]:
    """Return orders first reported below a position, newest first, by status and by any cnote of theirs."""
    return [OrderRow(*row) for row in await connection.fetch(ORDERS_PAGE, before, status, cnote, limit)]


async def is_set_aside(connection: Connection, order_no: str) -> bool:
    """Tell whether an order that has no row was set aside at its very first event."""
    return await connection.fetchrow(WHOLLY_SET_ASIDE, order_no) is not None
