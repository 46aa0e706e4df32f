"""The view of the current status of every order: one row for each order."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple, cast

from typing_extensions import TypedDict  # pydantic cannot read typing's own before Python 3.12

from domain.logged import DecodedEvent
from domain.statuses import SETTLED, Label, Status, status_label
from domain.transitions import VERDICTS
from projections.parked import Parked
from projections.postgres import Connection
from projections.table import FIRST, LAST_KNOWN, SUM, Column, Rows, Table
from projections.view import View


class Counts(TypedDict):
    """The number of reports with each verdict."""

    advanced: int
    repeated: int
    late: int
    refused: int
    unrecognised: int


class CurrentOrder(TypedDict):
    """One order, now or as of an earlier version or time.

    ``rejudgements`` is the number of its unrecognised reports that were judged again; ``counts`` excludes them.
    """

    order_no: str
    cnote: str | None
    status: Status | None
    status_label: Label | None
    reported_status: str | None
    settled: bool
    version: int
    position: int
    status_since: datetime | None
    first_reported_at: datetime
    last_reported_at: datetime
    submitted_at: datetime | None
    picked_up_at: datetime | None
    shipped_at: datetime | None
    delivered_at: datetime | None
    delivery_attempts: int
    counts: Counts
    rejudgements: int
    parked: Parked | None


# The column of each milestone, by its status: the time of the first report that advanced the order to it. The
# first time stays if the order reaches the status again, so a milestone that you copied never changes.
MILESTONES: Final[dict[Status | None, str]] = {
    "submitted": "submitted_at",
    "picked_up": "picked_up_at",
    "in_transit": "shipped_at",
    "delivered": "delivered_at",
}

ORDERS: Final = Table(
    "orders",
    (
        Column("order_no", "text"),
        Column("version", "bigint"),
        Column("position", "bigint"),
        Column("first_position", "bigint", FIRST),
        Column("status", "text"),
        Column("reported_status", "text", LAST_KNOWN),
        Column("status_since", "timestamptz", LAST_KNOWN),
        Column("cnote", "text"),
        Column("first_reported_at", "timestamptz", FIRST),
        # A batch may have only a rejudgement, which is not a report.
        Column("last_reported_at", "timestamptz", LAST_KNOWN),
        Column("submitted_at", "timestamptz", FIRST),
        Column("picked_up_at", "timestamptz", FIRST),
        Column("shipped_at", "timestamptz", FIRST),
        Column("delivered_at", "timestamptz", FIRST),
        Column("delivery_attempts", "bigint", SUM),
        *(Column(verdict, "bigint", SUM) for verdict in VERDICTS),
        Column("rejudgements", "bigint", SUM),
    ),
    key=("order_no",),
)
CNOTES: Final = Table(
    "order_cnotes", (Column("cnote", "text"), Column("order_no", "text")), key=("cnote", "order_no")
)


def fold(events: Iterable[DecodedEvent], rows: Rows) -> None:
    """Fold events into the rows of their orders, by order number, and of their airway bills."""
    orders, cnotes, blank = rows["orders"], rows["order_cnotes"], ORDERS.blank
    for position, event in events:
        order_no, received_at = event.originator_id, event.timestamp
        row = orders.get(order_no)
        if row is None:
            row = orders[order_no] = blank.copy()
            row["order_no"] = order_no
            row["first_position"] = position
            row["first_reported_at"] = received_at
        row["version"] = event.originator_version
        row["position"] = position
        row["status"] = event.status
        row["cnote"] = event.cnote
        verdict = event.verdict
        if event.rejudges is None:
            row["last_reported_at"] = received_at
            row[verdict] += 1
        else:
            row["rejudgements"] += 1
        if verdict == "advanced":
            row["reported_status"] = event.reported_status
            row["status_since"] = event.reached_at
            milestone = MILESTONES.get(event.status)
            if milestone is not None and row[milestone] is None:
                row[milestone] = event.reached_at
            if event.status == "out_for_delivery":
                row["delivery_attempts"] += 1
        reported = event.reported_cnote
        if reported is not None and (reported, order_no) not in cnotes:
            cnotes[reported, order_no] = {"cnote": reported, "order_no": order_no}


VIEW: Final = View(
    name="current_status",
    fold_version=6,
    tables=(ORDERS, CNOTES),
    fold=fold,
    # Larger batches gain no throughput and delay webhooks: with 2,000 events, their p99 rose from 2.3 times
    # that of a bare handler to 3 times.
    batch_events_max=300,
    idle_seconds=0.01,
)

# The members of an order, in their order, and those that are columns of its row.
MEMBERS: Final = dict.fromkeys(CurrentOrder.__annotations__)
SHOWN: Final = tuple(name for name in MEMBERS if name in ORDERS.names)


def to_order(row: Any) -> CurrentOrder:
    """Return the order in a row of the table orders, whether read or folded."""
    parked: Parked | None = None
    if row.get("since_version") is not None:
        parked = {"view": VIEW.name, "since_version": row["since_version"], "reason": row["reason"]}
    order = {
        **MEMBERS,
        **{name: row[name] for name in SHOWN},
        "status_label": status_label(row["status"]),
        "settled": row["status"] in SETTLED,
        "counts": {verdict: row[verdict] for verdict in VERDICTS},
        "parked": parked,
    }
    return cast("CurrentOrder", order)


# One row for each requested number: the columns of orders and of parked_orders, null if absent.
ORDERS_BY_NUMBER: Final = f"""
    SELECT requested.order_no, {", ".join(f"orders.{name}" for name in ORDERS.names if name != "order_no")},
        since_version, parked.position AS parked_position, reason
    FROM unnest($1::text[]) AS requested (order_no)
    LEFT JOIN current_status.orders USING (order_no)
    LEFT JOIN current_status.parked_orders AS parked USING (order_no)
"""


class FoundOrder(NamedTuple):
    """An order, None if the view lacks it, and the position from which it is parked, None if it is not."""

    order: CurrentOrder | None
    parked_position: int | None


async def find_orders(connection: Connection, order_nos: Sequence[str]) -> list[FoundOrder]:
    """Return the orders with these numbers, one result for each number, in the same order."""
    rows = {row["order_no"]: row for row in await connection.fetch(ORDERS_BY_NUMBER, order_nos)}
    return [
        FoundOrder(to_order(row) if row["version"] is not None else None, row["parked_position"])
        for row in (rows[order_no] for order_no in order_nos)
    ]
