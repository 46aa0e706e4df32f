"""The view of what every order's status is now: one row an order."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple, TypeAlias

from projections.engine import Connection, DecodedEvent

NAME: Final = "current_status"
FOLD_VERSION: Final = 1
# Larger pages gain no throughput and make webhooks wait: 2,000 took their p99 from 2.3 to 3 times.
PAGE_EVENTS_MAX: Final = 300
# Under load a page is then what several commits brought, for the price of one.
REST_SECONDS: Final = 0.01
TABLES: Final = ("orders", "order_cnotes")


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


# What is known of an order, by the names of its columns, and the airway bills that were reported of it.
Row: TypeAlias = dict[str, Any]

COLUMNS: Final = OrderRow._fields[: OrderRow._fields.index("aside_since")]


def fold(events: Iterable[DecodedEvent], rows: dict[str, Row]) -> None:
    """Fold events into the rows of their orders.

    A row that begins here holds what these events say, to be added to the row of what came before them.
    """
    for position, event in events:
        received_at = event.timestamp
        row = rows.get(event.originator_id)
        if row is None:
            row = rows[event.originator_id] = {
                "order_no": event.originator_id,
                "version": 0,
                "position": 0,
                "first_position": position,
                "status": None,
                "reported_status": None,
                "status_since": None,
                "cnote": None,
                "first_reported_at": received_at,
                "last_reported_at": received_at,
                "advanced": 0,
                "repeated": 0,
                "late": 0,
                "refused": 0,
                "unrecognised": 0,
                "cnotes": [],
            }
        row["version"] = event.originator_version
        row["position"] = position
        row["status"] = event.status
        row["cnote"] = event.cnote
        row["last_reported_at"] = received_at
        verdict = event.verdict
        row[verdict] += 1
        if verdict == "advanced":
            row["reported_status"] = event.reported_status
            row["status_since"] = received_at
        if event.reported_cnote is not None and event.reported_cnote not in row["cnotes"]:
            row["cnotes"].append(event.reported_cnote)


# One parameter: an array for each column would be looked through for nested ones, value by value.
# What the events say is added to the row that is there before it is proposed: the table's checks look at the
# proposed row, conflict or not. Nobody else writes the view meanwhile.
ADD_TO_ORDERS: Final = """
    WITH given AS MATERIALIZED (
        SELECT * FROM json_to_recordset($1) AS given (
            order_no text, version bigint, position bigint, first_position bigint, status text,
            reported_status text, status_since timestamptz, cnote text, first_reported_at timestamptz,
            last_reported_at timestamptz, advanced bigint, repeated bigint, late bigint, refused bigint,
            unrecognised bigint, cnotes text[])
    ), noted AS (
        INSERT INTO order_cnotes (cnote, order_no)
        SELECT reported.cnote, given.order_no FROM given, unnest(given.cnotes) AS reported (cnote)
        ON CONFLICT DO NOTHING
    )
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
    FROM given LEFT JOIN orders AS known ON known.order_no = given.order_no
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


async def apply(connection: Connection, events: Sequence[DecodedEvent]) -> None:
    """Add what these events say to the rows of their orders."""
    rows: dict[str, Row] = {}
    fold(events, rows)
    await connection.execute(ADD_TO_ORDERS, list(rows.values()))


async def copy(connection: Connection, events: Sequence[DecodedEvent], carried: dict[str, Any]) -> None:
    """Write events in stream order into empty tables; the last order may go on in the next call."""
    rows: dict[str, Row] = carried
    fold(events, rows)
    going_on = rows.pop(events[-1][1].originator_id) if events else None
    cnotes = [(cnote, row["order_no"]) for row in rows.values() for cnote in row.pop("cnotes")]
    if rows:
        records = [tuple(row.values()) for row in rows.values()]
        await connection.copy_records_to_table("orders", records=records, columns=COLUMNS)
    if cnotes:
        await connection.copy_records_to_table("order_cnotes", records=cnotes, columns=("cnote", "order_no"))
    rows.clear()
    if going_on is not None:
        rows[going_on["order_no"]] = going_on


def order_row(row: Row) -> OrderRow:
    """Return a folded row as a read of the view would."""
    return OrderRow(*(row[column] for column in COLUMNS))


ORDERS_BY_NUMBER: Final = """
    SELECT known.order_no, known.version, known.position, known.first_position, known.status,
        known.reported_status, known.status_since, known.cnote, known.first_reported_at, known.last_reported_at,
        known.advanced, known.repeated, known.late, known.refused, known.unrecognised,
        aside.since_version, aside.position, aside.reason
    FROM current_status.orders AS known LEFT JOIN current_status.set_aside AS aside USING (order_no)
    WHERE known.order_no = ANY($1)
"""

# Every filter that is left out is null, and planned away: this is planned anew each time.
ORDERS_PAGE: Final = """
    SELECT known.order_no, known.version, known.position, known.first_position, known.status,
        known.reported_status, known.status_since, known.cnote, known.first_reported_at, known.last_reported_at,
        known.advanced, known.repeated, known.late, known.refused, known.unrecognised,
        aside.since_version, aside.position, aside.reason
    FROM current_status.orders AS known LEFT JOIN current_status.set_aside AS aside USING (order_no)
    WHERE known.first_position < $1
      AND ($2::text IS NULL OR known.status = $2)
      AND ($3::text IS NULL
           OR known.order_no = ANY (ARRAY(SELECT order_no FROM current_status.order_cnotes WHERE cnote = $3)))
      AND ($4::text IS NULL OR CASE $4
               WHEN 'advanced' THEN known.advanced > 0 WHEN 'repeated' THEN known.repeated > 0
               WHEN 'late' THEN known.late > 0 WHEN 'refused' THEN known.refused > 0
               WHEN 'unrecognised' THEN known.unrecognised > 0 END)
      AND ($5::timestamptz IS NULL OR known.last_reported_at >= $5)
      AND ($6::timestamptz IS NULL OR known.last_reported_at < $6)
      AND ($7::timestamptz IS NULL
           OR known.last_reported_at <= $7
              AND (known.status IS NULL OR known.status NOT IN (
                  'delivered', 'completed', 'returned', 'cancelled', 'lost', 'damaged')))
    ORDER BY known.first_position DESC
    LIMIT $8
"""

STUCK: Final = """
    SELECT order_no, status, last_reported_at FROM current_status.orders
    WHERE last_reported_at <= $1
      AND (status IS NULL
           OR status NOT IN ('delivered', 'completed', 'returned', 'cancelled', 'lost', 'damaged'))
    ORDER BY last_reported_at
    LIMIT $2
"""

WHOLLY_SET_ASIDE: Final = """
    SELECT since_version, position, reason FROM current_status.set_aside WHERE order_no = $1
"""


async def orders_by_number(connection: Connection, order_nos: Sequence[str]) -> dict[str, OrderRow]:
    """Return those of the given orders that the view has."""
    return {row[0]: OrderRow(*row) for row in await connection.fetch(ORDERS_BY_NUMBER, order_nos)}


class OrdersFilter(NamedTuple):
    """What is asked of orders; None leaves it out.

    Args:
        status: that they have now.
        cnote: that was ever reported of them.
        verdict: that at least one report of theirs has.
        updated_after: they were last reported at or after it.
        updated_before: they were last reported before it.
        unmoved_since: they are not settled, and were last reported at or before it.
    """

    status: str | None = None
    cnote: str | None = None
    verdict: str | None = None
    updated_after: datetime | None = None
    updated_before: datetime | None = None
    unmoved_since: datetime | None = None


async def orders_page(connection: Connection, before: int, wanted: OrdersFilter, limit: int) -> list[OrderRow]:
    """Return orders first reported below a position, newest first."""
    return [OrderRow(*row) for row in await connection.fetch(ORDERS_PAGE, before, *wanted, limit)]


class StuckOrder(NamedTuple):
    """An order that is not settled and of which nothing was heard for long."""

    order_no: str
    status: str | None
    last_reported_at: datetime


async def stuck(connection: Connection, since: datetime, limit: int) -> list[StuckOrder]:
    """Return orders that are not settled and were last reported at or before a time, the longest first."""
    return [StuckOrder(*row) for row in await connection.fetch(STUCK, since, limit)]


async def is_set_aside(connection: Connection, order_no: str) -> bool:
    """Tell whether an order that has no row was set aside at its very first event."""
    return await connection.fetchrow(WHOLLY_SET_ASIDE, order_no) is not None
