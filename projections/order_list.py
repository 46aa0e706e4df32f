"""A filtered list of orders, newest first by their first report."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple

from domain.statuses import Status
from domain.transitions import Verdict
from projections.current_status import UNSETTLED, VIEW, CurrentOrder, to_order
from projections.postgres_errors import Connection
from projections.windows import WALKED_ROWS_MAX, Span, Window, narrow


class OrdersFilter(NamedTuple):
    """A filter of orders. None selects everything.

    Args:
        status: the current status.
        cnote: an airway bill that was ever reported for the order.
        verdict: a verdict that at least one report of the order has; of the unrecognised reports, only those
            count that were not judged again.
        updated_after: the last report was at or after this time.
        updated_before: the last report was before this time.
        unmoved_since: the order is not settled, and the last report was at or before this time.
    """

    status: Status | None = None
    cnote: str | None = None
    verdict: Verdict | None = None
    updated_after: datetime | None = None
    updated_before: datetime | None = None
    unmoved_since: datetime | None = None

    @property
    def first_reported_before(self) -> datetime | None:
        """A time before which each selected order was first reported, since it was last reported before it."""
        ends = [self.updated_before] if self.updated_before is not None else []
        if self.unmoved_since is not None:
            ends.append(self.unmoved_since + timedelta(microseconds=1))
        return min(ends, default=None)


class ListedOrder(NamedTuple):
    """An order, and the position of its first event, by which the list is ordered."""

    first_position: int
    order: CurrentOrder


# Orders by first position. It is planned for each call, so the planner removes a filter that is null. The
# limited subqueries keep it from replacing the look-up of each walked row by a scan for the filter.
PAGE: Final = f"""
    SELECT *
    FROM unnest($1::bigint[]) AS walked (position)
    CROSS JOIN LATERAL (
        SELECT * FROM current_status.orders WHERE orders.first_position = walked.position LIMIT 1
    ) AS orders
    LEFT JOIN (
        SELECT order_no, since_version, position AS parked_position, reason FROM current_status.parked_orders
    ) AS parked USING (order_no)
    WHERE ($2::text IS NULL OR status = $2)
      AND ($3::text IS NULL OR (
          SELECT true FROM current_status.order_cnotes AS reported
          WHERE reported.cnote = $3 AND reported.order_no = orders.order_no LIMIT 1))
      AND ($4::text IS NULL OR CASE $4
               WHEN 'advanced' THEN advanced > 0 WHEN 'repeated' THEN repeated > 0
               WHEN 'late' THEN late > 0 WHEN 'refused' THEN refused > 0
               WHEN 'unrecognised' THEN unrecognised > rejudgements END)
      AND ($5::timestamptz IS NULL OR last_reported_at >= $5)
      AND ($6::timestamptz IS NULL OR last_reported_at < $6)
      AND ($7::timestamptz IS NULL OR last_reported_at <= $7 AND {UNSETTLED})
    ORDER BY orders.first_position DESC
    LIMIT $8
"""

# Each walk has an index whose order it follows. The walks in the order of the list may end early.
WALK_ORDERS: Final = """
    SELECT first_position FROM current_status.orders
    WHERE first_position BETWEEN $1 AND $2 ORDER BY first_position DESC LIMIT $3
"""
WALK_STATUS: Final = """
    SELECT first_position FROM current_status.orders
    WHERE status = $4 AND first_position BETWEEN $1 AND $2 ORDER BY first_position DESC LIMIT $3
"""
# The verdicts that few orders have, each with an index of the orders that fit its condition.
RARE_VERDICTS: Final[dict[Verdict, str]] = {
    "repeated": "repeated > 0",
    "late": "late > 0",
    "refused": "refused > 0",
    "unrecognised": "unrecognised > rejudgements",
}
WALK_VERDICTS: Final[dict[Verdict, str]] = {
    verdict: f"""
        SELECT first_position FROM current_status.orders
        WHERE {condition} AND first_position BETWEEN $1 AND $2 ORDER BY first_position DESC LIMIT $3
    """
    for verdict, condition in RARE_VERDICTS.items()
}
# The other walks are of use if they come to their end.
WALK_CNOTE: Final = """
    SELECT first_position
    FROM (
        SELECT order_no FROM current_status.order_cnotes WHERE cnote = $1 ORDER BY order_no LIMIT $2
    ) AS reported
    CROSS JOIN LATERAL (
        SELECT first_position FROM current_status.orders WHERE orders.order_no = reported.order_no LIMIT 1
    ) AS orders
"""
WALK_UPDATED: Final = """
    SELECT first_position FROM current_status.orders
    WHERE ($1::timestamptz IS NULL OR last_reported_at >= $1)
      AND ($2::timestamptz IS NULL OR last_reported_at < $2)
    ORDER BY last_reported_at LIMIT $3
"""
WALK_UNMOVED: Final = f"""
    SELECT first_position FROM current_status.orders
    WHERE last_reported_at <= $1 AND {UNSETTLED} ORDER BY last_reported_at LIMIT $2
"""


async def orders_page(
    connection: Connection, before: int, orders_filter: OrdersFilter, limit: int
) -> Window[ListedOrder]:
    """Return at most ``limit`` orders that were first reported below a position, newest first."""
    rare = await _rare(connection, orders_filter)
    if rare is not None:
        positions = [position for position in rare if position < before]
        return Window(await _fetch(connection, positions, orders_filter, limit), None)
    rows: list[ListedOrder] = []
    walked = 0
    reached: int | None = before
    until = orders_filter.first_reported_before
    while reached is not None and len(rows) < limit and walked < WALKED_ROWS_MAX:
        span = await narrow(connection, VIEW.name, Span(0, reached - 1), orders_filter.updated_after, until)
        if span is None:
            return Window(rows, None)
        # A first walk, which is short, is enough where most orders match.
        rows_max = limit if walked == 0 else WALKED_ROWS_MAX
        positions = await _walk(connection, span, orders_filter, rows_max)
        rows += await _fetch(connection, positions, orders_filter, limit - len(rows))
        reached = positions[-1] if len(positions) == rows_max else None
        walked += len(positions)
    return Window(rows, reached)


async def find_by_cnote(connection: Connection, cnote: str, limit: int) -> list[CurrentOrder]:
    """Return at most ``limit`` orders for which an airway bill was reported, newest first."""
    positions = _positions(await connection.fetch(WALK_CNOTE, cnote, WALKED_ROWS_MAX))
    rows = await _fetch(connection, positions, OrdersFilter(cnote=cnote), limit)
    return [row.order for row in rows]


async def _fetch(
    connection: Connection, positions: Sequence[int], orders_filter: OrdersFilter, limit: int
) -> list[ListedOrder]:
    rows = await connection.fetch(PAGE, positions, *orders_filter, limit)
    return [ListedOrder(row["first_position"], to_order(row)) for row in rows]


async def _walk(connection: Connection, span: Span, orders_filter: OrdersFilter, rows_max: int) -> list[int]:
    """Walk the part of the list with a rare verdict, else with the status, else the whole list."""
    walk, arguments = WALK_ORDERS, []
    if orders_filter.verdict in WALK_VERDICTS:
        walk = WALK_VERDICTS[orders_filter.verdict]
    elif orders_filter.status is not None:
        walk, arguments = WALK_STATUS, [orders_filter.status]
    return _positions(await connection.fetch(walk, *span, rows_max, *arguments))


async def _rare(connection: Connection, orders_filter: OrdersFilter) -> list[int] | None:
    """Return the first positions of all orders that a filter selects if they are few, else None."""
    _, cnote, _, updated_after, updated_before, unmoved_since = orders_filter
    walks: list[tuple[Any, ...]] = []
    if cnote is not None:
        walks.append((WALK_CNOTE, cnote))
    if unmoved_since is not None:
        walks.append((WALK_UNMOVED, unmoved_since))
    if updated_after is not None or updated_before is not None:
        walks.append((WALK_UPDATED, updated_after, updated_before))
    for walk in walks:
        positions = _positions(await connection.fetch(*walk, WALKED_ROWS_MAX + 1))
        if len(positions) <= WALKED_ROWS_MAX:
            return positions
    return None


def _positions(rows: Sequence[Any]) -> list[int]:
    return [position for (position,) in rows]
