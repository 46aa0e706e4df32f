"""Filtered lists of orders, newest first by their first report, so that pages never shift, or by their last."""

from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from domain.statuses import SETTLED, Status
from domain.transitions import Verdict
from projections.current_status import CurrentOrder, to_order
from projections.postgres_errors import Connection
from projections.windows import BLOCK_POSITIONS, POSITION_MAX, WALKED_ROWS_MAX, Window

Sort = Literal["first", "updated"]

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND: Final = timedelta(microseconds=1)
# The index of statuses has this text for an order without a status, since an index on null has no order.
NO_STATUS: Final = ""
_LAST_CHARACTER: Final = "\U0010ffff"
_SURROGATES: Final = range(0xD800, 0xE000)


class Place(NamedTuple):
    """A place in the list by last report. Reports may have equal times, so a position breaks ties.

    Attributes:
        microseconds: the time of the last report, in microseconds since 1970.
        position: the position of the last report.
    """

    microseconds: int
    position: int

    @property
    def time(self) -> datetime:
        """The time of the last report."""
        return EPOCH + self.microseconds * MICROSECOND


def place_at(time: datetime, position: int = 0) -> Place:
    """Return a place; with the position 0, it is before every order that was last reported at this time."""
    return Place((time - EPOCH) // MICROSECOND, position)


LAST_PLACE: Final = place_at(datetime.max.replace(tzinfo=UTC), POSITION_MAX)
FIRST_PLACE: Final = place_at(EPOCH)


class OrdersFilter(NamedTuple):
    """A filter of orders. None selects everything.

    Args:
        statuses: the current status is one of these.
        settled: whether the current status is settled; an order without a status is not.
        cnote: an airway bill that was ever reported for the order.
        search: the beginning of the order number, or of an airway bill that was ever reported for the order.
        verdict: a verdict that at least one report of the order has; of the unrecognised reports, only those
            count that were not judged again.
        updated_after: the last report was at or after this time.
        updated_before: the last report was before this time.
        first_reported_after: the first report was at or after this time.
        first_reported_before: the first report was before this time.
        unmoved_since: the order is not settled, and the last report was at or before this time.
    """

    statuses: tuple[Status, ...] | None = None
    settled: bool | None = None
    cnote: str | None = None
    search: str | None = None
    verdict: Verdict | None = None
    updated_after: datetime | None = None
    updated_before: datetime | None = None
    first_reported_after: datetime | None = None
    first_reported_before: datetime | None = None
    unmoved_since: datetime | None = None


class ListedOrder(NamedTuple):
    """An order, and the position of its first event."""

    first_position: int
    order: CurrentOrder

    @property
    def place(self) -> Place:
        """The place in the list by last report."""
        return place_at(self.order["last_reported_at"], self.order["position"])


class UpdatedWindow(NamedTuple):
    """The rows of a page by last report, and the place that the walk has reached; None at the list's end."""

    rows: Sequence[ListedOrder]
    reached: Place | None


class StuckOrder(NamedTuple):
    """An order that is not settled and has had no report for a long time."""

    order_no: str
    cnote: str | None
    status: Status | None
    last_reported_at: datetime
    position: int

    @property
    def place(self) -> Place:
        """The place in the list by last report."""
        return place_at(self.last_reported_at, self.position)


class Count(NamedTuple):
    """The number of orders that a filter selects. If it is not exact, there may be more."""

    orders: int
    is_exact: bool


# Selects from the orders of a walk. It is planned for each call, so the planner removes a filter that is null.
# The limited subqueries keep it from replacing the look-up of each walked row by a scan for the filter. In the
# list by last report, an order that was reported since the walk has left its place, and is skipped.
SELECTED: Final = """
    FROM unnest($1::bigint[]) AS walked (first_position)
    CROSS JOIN LATERAL (
        SELECT * FROM current_status.orders WHERE orders.first_position = walked.first_position LIMIT 1
    ) AS orders
    LEFT JOIN (
        SELECT order_no, since_version, position AS parked_position, reason FROM current_status.parked_orders
    ) AS parked USING (order_no)
    WHERE ($2::text[] IS NULL OR coalesce(status, '') = ANY ($2))
      AND ($3::text IS NULL OR (
          SELECT true FROM current_status.order_cnotes AS reported
          WHERE reported.cnote = $3 AND reported.order_no = orders.order_no LIMIT 1))
      AND ($4::text IS NULL OR starts_with(orders.order_no, $4) OR (
          SELECT true FROM current_status.order_cnotes AS reported
          WHERE reported.order_no = orders.order_no AND reported.cnote >= $4
            AND ($5::text IS NULL OR reported.cnote < $5) LIMIT 1))
      AND ($6::text IS NULL OR CASE $6
               WHEN 'advanced' THEN advanced > 0 WHEN 'repeated' THEN repeated > 0
               WHEN 'late' THEN late > 0 WHEN 'refused' THEN refused > 0
               WHEN 'unrecognised' THEN unrecognised > rejudgements END)
      AND ($7::timestamptz IS NULL OR last_reported_at >= $7)
      AND ($8::timestamptz IS NULL OR last_reported_at < $8)
      AND ($9::timestamptz IS NULL OR first_reported_at >= $9)
      AND ($10::timestamptz IS NULL OR first_reported_at < $10)
      AND (last_reported_at, position) < ($11::timestamptz, $12::bigint)
"""
PAGES: Final[dict[Sort, str]] = {
    "first": f"SELECT * {SELECTED} ORDER BY walked.first_position DESC LIMIT $13",
    "updated": f"SELECT * {SELECTED} ORDER BY last_reported_at DESC, position DESC LIMIT $13",
}
COUNT: Final = f"SELECT count(*) FROM (SELECT {SELECTED} LIMIT $13) AS selected"

# A walk follows an index in the order of the list, and may end early. The keys that it returns lead to the next
# one. The index is that of all orders, or of those with a status or a verdict that few orders have.
RANGES: Final[dict[Sort, str]] = {
    "first": "first_position BETWEEN $1 AND $2",
    "updated": "(last_reported_at, position) < ($1, $2) AND last_reported_at >= $3",
}
ENDS: Final[dict[Sort, str]] = {
    "first": "ORDER BY first_position DESC LIMIT $3",
    "updated": "ORDER BY last_reported_at DESC, position DESC LIMIT $4",
}
WALKED: Final = "SELECT first_position, last_reported_at, position FROM current_status.orders"
# The parameter with the statuses.
STATUSES_PARAMETER: Final[dict[Sort, int]] = {"first": 4, "updated": 5}
WALK_ORDERS: Final[dict[Sort, str]] = {
    sort: f"{WALKED} WHERE {condition} {ENDS[sort]}" for sort, condition in RANGES.items()
}
# The verdicts that few orders have, each with indexes of the orders that fit its condition.
RARE_VERDICTS: Final[dict[Verdict, str]] = {
    "repeated": "repeated > 0",
    "late": "late > 0",
    "refused": "refused > 0",
    "unrecognised": "unrecognised > rejudgements",
}
WALK_VERDICTS: Final[dict[tuple[Sort, Verdict], str]] = {
    (sort, verdict): f"{WALKED} WHERE {condition} AND {RANGES[sort]} {ENDS[sort]}"
    for sort in RANGES
    for verdict, condition in RARE_VERDICTS.items()
}


# PostgreSQL merges the parts of the statuses, and each part has a limit in case that it prefers to sort them.
@cache
def walk_statuses(sort: Sort, number: int) -> str:
    """Return the walk of the orders with so many statuses, each of which has its part of an index."""
    of_part = f"coalesce(status, '') = (${STATUSES_PARAMETER[sort]}::text[])[{{part}}]"
    return _merge(f"{WALKED} WHERE {of_part} AND {RANGES[sort]}", ENDS[sort], number)


@cache
def walk_stuck(number: int) -> str:
    """Return the walk of orders with so many statuses, last reported at or before a time, oldest first."""
    part = """
        SELECT order_no, cnote, status, last_reported_at, position FROM current_status.orders
        WHERE coalesce(status, '') = ($1::text[])[{part}] AND last_reported_at <= $2
          AND (last_reported_at, position) > ($3, $4)
    """
    return _merge(part, "ORDER BY last_reported_at, position LIMIT $5", number)


def _merge(part: str, end: str, number: int) -> str:
    parts = (f"({part.format(part=one + 1)} {end})" for one in range(number))
    return f"SELECT * FROM ({' UNION ALL '.join(parts)}) AS merged {end}"


# These walks are of use if they come to their end.
WALK_CNOTE: Final = """
    SELECT first_position
    FROM (
        SELECT order_no FROM current_status.order_cnotes WHERE cnote = $1 ORDER BY order_no LIMIT $2
    ) AS reported
    CROSS JOIN LATERAL (
        SELECT first_position FROM current_status.orders WHERE orders.order_no = reported.order_no LIMIT 1
    ) AS orders
"""
# The end of the prefix is null if no text is greater than all texts that begin with it.
WALK_SEARCH: Final = """
    SELECT first_position
    FROM (
        (SELECT order_no FROM current_status.orders
         WHERE order_no >= $1 AND ($2::text IS NULL OR order_no < $2) ORDER BY order_no LIMIT $3)
        UNION
        (SELECT order_no FROM current_status.order_cnotes
         WHERE cnote >= $1 AND ($2::text IS NULL OR cnote < $2) ORDER BY cnote, order_no LIMIT $3)
    ) AS found
    CROSS JOIN LATERAL (
        SELECT first_position FROM current_status.orders WHERE orders.order_no = found.order_no LIMIT 1
    ) AS orders
    LIMIT $3
"""

# The statuses that orders have, one index look-up each. A newer release may have written further ones.
STATUSES_PRESENT: Final = """
    WITH RECURSIVE present (status) AS (
        (SELECT coalesce(status, '') FROM current_status.orders ORDER BY coalesce(status, '') LIMIT 1)
        UNION ALL
        SELECT (SELECT coalesce(orders.status, '') FROM current_status.orders
                WHERE coalesce(orders.status, '') > present.status ORDER BY coalesce(orders.status, '') LIMIT 1)
        FROM present WHERE present.status IS NOT NULL
    )
    SELECT status FROM present WHERE status IS NOT NULL
"""

# The first and the last block that can have orders with such reports, and the time before which all of their
# orders were last reported.
SPAN: Final = """
    SELECT min(block), max(block), max(latest) FROM current_status.blocks
    WHERE block BETWEEN $1 AND $2
      AND ($3::timestamptz IS NULL OR latest >= $3)
      AND ($4::timestamptz IS NULL OR earliest < $4)
      AND ($5::timestamptz IS NULL OR newest >= $5)
      AND ($6::timestamptz IS NULL OR earliest < $6)
"""


class _Criteria(NamedTuple):
    """The parameters $2 to $10 of SELECTED."""

    statuses: list[str] | None
    cnote: str | None
    search: str | None
    search_end: str | None
    verdict: Verdict | None
    updated_after: datetime | None
    updated_before: datetime | None
    first_reported_after: datetime | None
    first_reported_before: datetime | None

    @property
    def is_by_update(self) -> bool:
        return self.updated_after is not None or self.updated_before is not None

    @property
    def is_by_time(self) -> bool:
        first = (self.first_reported_after, self.first_reported_before)
        return self.is_by_update or first != (None, None)


# Keys of walked rows, and the key to continue the walk at; None at its end.
Key: TypeAlias = "int | Place"
Walked: TypeAlias = tuple[list[int], "Key | None"]


async def orders_page(
    connection: Connection, before: int, orders_filter: OrdersFilter, limit: int
) -> Window[ListedOrder]:
    """Return at most ``limit`` orders that were first reported below a position, newest first."""
    rows, reached = await _page(connection, "first", before, orders_filter, limit)
    return Window(rows, reached)


async def updated_page(
    connection: Connection, before: Place, orders_filter: OrdersFilter, limit: int
) -> UpdatedWindow:
    """Return at most ``limit`` orders that are before a place in the list by last report, newest first.

    An order that is reported moves to the front of the list.
    """
    return UpdatedWindow(*await _page(connection, "updated", before, orders_filter, limit))


async def count_orders(connection: Connection, orders_filter: OrdersFilter, maximum: int) -> Count:
    """Count the orders that a filter selects: up to a maximum, and in one walk."""
    criteria = await _criteria(connection, orders_filter)
    orders = 0
    reached: Key | None = None
    async for walked in _walk(connection, "updated", LAST_PLACE, criteria, maximum + 1):
        positions, reached = walked
        orders += await connection.fetchval(COUNT, positions, *criteria, *_bound(LAST_PLACE), maximum + 1)
        if orders > maximum:
            return Count(maximum, is_exact=False)
    return Count(orders, is_exact=reached is None)


async def find_by_cnote(connection: Connection, cnote: str, limit: int) -> list[CurrentOrder]:
    """Return at most ``limit`` orders for which an airway bill was reported, newest first."""
    positions = _positions(await connection.fetch(WALK_CNOTE, cnote, WALKED_ROWS_MAX))
    criteria = await _criteria(connection, OrdersFilter(cnote=cnote))
    rows = await _fetch(connection, "first", positions, criteria, LAST_PLACE, limit)
    return [row.order for row in rows]


async def stuck_orders(
    connection: Connection, since: datetime, limit: int, after: Place = FIRST_PLACE
) -> list[StuckOrder]:
    """Return orders that are not settled and had no report after ``since``, longest unreported first.

    Args:
        connection: a connection.
        since: the time.
        limit: the most orders to return.
        after: the place of the previous page's last order.
    """
    statuses = [status for status in await _present_statuses(connection) if status not in SETTLED]
    if not statuses:
        return []
    rows = await connection.fetch(walk_stuck(len(statuses)), statuses, since, *_bound(after), limit)
    return [StuckOrder(*row) for row in rows]


def prefix_end(prefix: str) -> str | None:
    """Return the least text that is greater than all texts with a prefix; None if every greater text has it."""
    kept = prefix.rstrip(_LAST_CHARACTER)
    if not kept:
        return None
    following = ord(kept[-1]) + 1
    return kept[:-1] + chr(_SURROGATES.stop if following in _SURROGATES else following)


async def _page(
    connection: Connection, sort: Sort, before: Key, orders_filter: OrdersFilter, limit: int
) -> tuple[list[ListedOrder], Any]:
    criteria = await _criteria(connection, orders_filter)
    place = before if isinstance(before, Place) else LAST_PLACE
    rows: list[ListedOrder] = []
    reached: Key | None = None
    async for walked in _walk(connection, sort, before, criteria, limit):
        positions, reached = walked
        rows += await _fetch(connection, sort, positions, criteria, place, limit - len(rows))
        if len(rows) >= limit:
            break
    return rows, reached


async def _fetch(  # noqa: PLR0913, PLR0917 - the parts of a page
    connection: Connection,
    sort: Sort,
    positions: Sequence[int],
    criteria: _Criteria,
    before: Place,
    limit: int,
) -> list[ListedOrder]:
    rows = await connection.fetch(PAGES[sort], positions, *criteria, *_bound(before), limit)
    return [ListedOrder(row["first_position"], to_order(row)) for row in rows]


async def _walk(
    connection: Connection, sort: Sort, before: Key, criteria: _Criteria, limit: int
) -> AsyncIterator[Walked]:
    """Yield first positions of orders that may match, and the key to continue at; None at the end."""
    if criteria.statuses == []:
        return
    rare = await _rare(connection, sort, criteria)
    if rare is not None:
        yield [position for position in rare if isinstance(before, Place) or position < before], None
        return
    step = _walk_first if sort == "first" else _walk_updated
    walked = 0
    reached: Any = before
    while reached is not None and walked < WALKED_ROWS_MAX:
        # A first walk, which is short, is enough where most orders match.
        rows_max = min(limit, WALKED_ROWS_MAX) if walked == 0 else WALKED_ROWS_MAX
        rows = await step(connection, reached, criteria, rows_max)
        reached = None
        if len(rows) == rows_max:
            last = rows[-1]
            reached = last[0] if sort == "first" else place_at(last[1], last[2])
        walked += len(rows)
        yield _positions(rows), reached


async def _walk_first(connection: Connection, before: int, criteria: _Criteria, rows_max: int) -> Sequence[Any]:
    first, last = 0, before - 1
    if criteria.is_by_time:
        first_block, last_block, _ = await _span(connection, first, last, criteria)
        if first_block is None:
            return ()
        first = max(first, first_block * BLOCK_POSITIONS)
        last = min(last, (last_block + 1) * BLOCK_POSITIONS - 1)
    statement, statuses = _choose_walk("first", criteria)
    return await connection.fetch(statement, first, last, rows_max, *statuses)


async def _walk_updated(
    connection: Connection, before: Place, criteria: _Criteria, rows_max: int
) -> Sequence[Any]:
    earliest = max(filter(None, (criteria.updated_after, criteria.first_reported_after)), default=EPOCH)
    ends = [before]
    if criteria.updated_before is not None:
        ends.append(place_at(criteria.updated_before))
    if criteria.first_reported_after is not None or criteria.first_reported_before is not None:
        first_block, _, latest = await _span(connection, 0, POSITION_MAX, criteria)
        if first_block is None:
            return ()
        ends.append(place_at(latest))
    statement, statuses = _choose_walk("updated", criteria)
    return await connection.fetch(statement, *_bound(min(ends)), earliest, rows_max, *statuses)


def _choose_walk(sort: Sort, criteria: _Criteria) -> tuple[str, list[list[str]]]:
    """Return the walk of the part with a rare verdict, else with the statuses, else of the whole list."""
    if criteria.verdict in RARE_VERDICTS:
        return WALK_VERDICTS[sort, criteria.verdict], []
    if criteria.statuses is not None:
        return walk_statuses(sort, len(criteria.statuses)), [criteria.statuses]
    return WALK_ORDERS[sort], []


async def _span(connection: Connection, first: int, last: int, criteria: _Criteria) -> Any:
    blocks = first // BLOCK_POSITIONS, last // BLOCK_POSITIONS
    # An order that was last reported before a time was first reported before it.
    (row,) = await connection.fetch(SPAN, *blocks, *criteria[-4:-2], *criteria[-2:])
    return row


async def _rare(connection: Connection, sort: Sort, criteria: _Criteria) -> list[int] | None:
    """Return the first positions of all orders that a filter can select if they are few, else None."""
    walks: list[Callable[[int], Any]] = []
    if criteria.cnote is not None:
        walks.append(lambda limit: connection.fetch(WALK_CNOTE, criteria.cnote, limit))
    if criteria.search is not None:
        prefix = (criteria.search, criteria.search_end)
        walks.append(lambda limit: connection.fetch(WALK_SEARCH, *prefix, limit))
    # The walk by last report has these times as its range already.
    if sort == "first" and criteria.is_by_update:
        by_update = criteria._replace(verdict=None, first_reported_after=None, first_reported_before=None)
        walks.append(lambda limit: _walk_updated(connection, LAST_PLACE, by_update, limit))
    for walk in walks:
        positions = _positions(await walk(WALKED_ROWS_MAX + 1))
        if len(positions) <= WALKED_ROWS_MAX:
            return positions
    return None


async def _criteria(connection: Connection, orders_filter: OrdersFilter) -> _Criteria:
    statuses: list[str] | None = None
    if orders_filter.statuses is not None:
        statuses = [*dict.fromkeys(orders_filter.statuses)]
    settled = orders_filter.settled
    updated_before = orders_filter.updated_before
    if orders_filter.unmoved_since is not None:
        # It is exclusive.
        until = orders_filter.unmoved_since + MICROSECOND
        updated_before = min(until, updated_before or until)
        if settled:
            statuses = []
        settled = False
    if settled is not None:
        if statuses is None:
            statuses = [*SETTLED] if settled else await _present_statuses(connection)
        statuses = [status for status in statuses if (status in SETTLED) == settled]
    search = orders_filter.search
    return _Criteria(
        statuses,
        orders_filter.cnote,
        search,
        None if search is None else prefix_end(search),
        orders_filter.verdict,
        orders_filter.updated_after,
        updated_before,
        orders_filter.first_reported_after,
        orders_filter.first_reported_before,
    )


async def _present_statuses(connection: Connection) -> list[str]:
    return [status for (status,) in await connection.fetch(STATUSES_PRESENT)]


def _bound(place: Place) -> tuple[datetime, int]:
    return place.time, place.position


def _positions(rows: Sequence[Any]) -> list[int]:
    return [row[0] for row in rows]
