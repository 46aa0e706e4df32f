"""Filtered lists of orders, newest first by their first report, so that pages never shift, or by their last."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from domain.statuses import SETTLED, Status
from projections.current_status import CurrentOrder, to_order
from projections.postgres import Connection
from projections.windows import POSITION_MAX, WALKED_ROWS_MAX, Window

Sort = Literal["first", "updated"]

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND: Final = timedelta(microseconds=1)
# The index of statuses has this text for an order without a status, since an index on null has no order.
NO_STATUS: Final = ""
_LAST_CHARACTER: Final = "\U0010ffff"
_SURROGATES: Final = range(0xD800, 0xE000)


class ListPlace(NamedTuple):
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


def place_at(time: datetime, position: int = 0) -> ListPlace:
    """Return a place; with the position 0, it is before every order that was last reported at this time."""
    return ListPlace((time - EPOCH) // MICROSECOND, position)


LAST_PLACE: Final = place_at(datetime.max.replace(tzinfo=UTC), POSITION_MAX)
FIRST_PLACE: Final = place_at(EPOCH)


class OrdersFilter(NamedTuple):
    """A filter of orders. None selects everything.

    Args:
        statuses: the current status is one of these.
        settled: whether the current status is settled; an order without a status is not.
        cnote: an airway bill that was ever reported for the order.
        search: the beginning of the order number, or of an airway bill that was ever reported for the order.
        has_refused: True for the orders with at least one refused report.
        updated_after: the last report was at or after this time.
        updated_before: the last report was before this time.
        unmoved_since: the order is not settled, and the last report was at or before this time.
    """

    statuses: tuple[Status, ...] | None = None
    settled: bool | None = None
    cnote: str | None = None
    search: str | None = None
    has_refused: Literal[True] | None = None
    updated_after: datetime | None = None
    updated_before: datetime | None = None
    unmoved_since: datetime | None = None


class ListedOrder(NamedTuple):
    """An order, and the position of its first event."""

    first_position: int
    order: CurrentOrder

    @property
    def place(self) -> ListPlace:
        """The place in the list by last report."""
        return place_at(self.order["last_reported_at"], self.order["position"])


class UpdatedWindow(NamedTuple):
    """The rows of a page by last report, and the place that the walk has reached; None at the list's end."""

    rows: Sequence[ListedOrder]
    reached: ListPlace | None


class StuckOrder(NamedTuple):
    """An order that is not settled and has had no report for a long time."""

    order_no: str
    cnote: str | None
    status: Status | None
    last_reported_at: datetime
    position: int

    @property
    def place(self) -> ListPlace:
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
      AND ($6::boolean IS NULL OR refused > 0)
      AND ($7::timestamptz IS NULL OR last_reported_at >= $7)
      AND ($8::timestamptz IS NULL OR last_reported_at < $8)
      AND (last_reported_at, position) < ($9::timestamptz, $10::bigint)
"""
PAGES: Final[dict[Sort, str]] = {
    "first": f"SELECT * {SELECTED} ORDER BY walked.first_position DESC LIMIT $11",
    "updated": f"SELECT * {SELECTED} ORDER BY last_reported_at DESC, position DESC LIMIT $11",
}
COUNT: Final = f"SELECT count(*) FROM (SELECT {SELECTED} LIMIT $11) AS selected"

# A walk follows an index in the order of the list, and may end early. The keys that it returns lead to the next
# one. Only the list by last report has indexes of the orders with a status or a refused report.
WALKED: Final = "SELECT first_position, last_reported_at, position FROM current_status.orders"
WALK_FIRST: Final = f"{WALKED} WHERE first_position < $1 ORDER BY first_position DESC LIMIT $2"
RANGE: Final = "(last_reported_at, position) < ($1, $2) AND last_reported_at >= $3"
END: Final = "ORDER BY last_reported_at DESC, position DESC LIMIT $4"
WALK_UPDATED: Final = f"{WALKED} WHERE {RANGE} {END}"
WALK_REFUSED: Final = f"{WALKED} WHERE refused > 0 AND {RANGE} {END}"


# PostgreSQL merges the parts of the statuses, and each part has a limit in case that it prefers to sort them.
@cache
def walk_statuses(number: int) -> str:
    """Return the walk of the orders with so many statuses, each of which has its part of an index."""
    return _merge(f"{WALKED} WHERE coalesce(status, '') = ($5::text[])[{{part}}] AND {RANGE}", END, number)


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


class _Criteria(NamedTuple):
    """The parameters $2 to $8 of SELECTED."""

    statuses: list[str] | None
    cnote: str | None
    search: str | None
    search_end: str | None
    has_refused: Literal[True] | None
    updated_after: datetime | None
    updated_before: datetime | None


# Keys of walked rows, and the key to continue the walk at; None at its end.
Key: TypeAlias = "int | ListPlace"
Walked: TypeAlias = tuple[list[int], "Key | None"]
NO_CRITERIA: Final = _Criteria(None, None, None, None, None, None, None)


async def orders_page(
    connection: Connection, before: int, orders_filter: OrdersFilter, limit: int
) -> Window[ListedOrder]:
    """Return at most ``limit`` orders that were first reported below a position, newest first."""
    rows, reached = await _page(connection, "first", before, orders_filter, limit)
    return Window(rows, reached)


async def updated_page(
    connection: Connection, before: ListPlace, orders_filter: OrdersFilter, limit: int
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
    connection: Connection, since: datetime, limit: int, after: ListPlace = FIRST_PLACE
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
    place = before if isinstance(before, ListPlace) else LAST_PLACE
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
    before: ListPlace,
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
    searched = await _find_few(_searches(connection, criteria))
    if searched is not None:
        yield _before(before, searched), None
        return
    step = _walk_first if sort == "first" else _walk_updated
    # A first walk, which is short, is enough where most orders match.
    rows_max = min(limit, WALKED_ROWS_MAX)
    positions, reached = await step(connection, before, criteria, rows_max)
    yield positions, reached
    if reached is None:
        return
    if sort == "first" and criteria != NO_CRITERIA:
        few = await _find_few([lambda rows_max: _walk_updated(connection, LAST_PLACE, criteria, rows_max)])
        if few is not None:
            yield _before(reached, few), None
            return
    while reached is not None and rows_max < WALKED_ROWS_MAX:
        positions, reached = await step(connection, reached, criteria, WALKED_ROWS_MAX)
        rows_max += len(positions)
        yield positions, reached


async def _walk_first(connection: Connection, before: Any, _criteria: _Criteria, rows_max: int) -> Walked:
    rows = await connection.fetch(WALK_FIRST, before, rows_max)
    return _positions(rows), rows[-1][0] if len(rows) == rows_max else None


async def _walk_updated(connection: Connection, before: Any, criteria: _Criteria, rows_max: int) -> Walked:
    if criteria.updated_before is not None:
        before = min(before, place_at(criteria.updated_before))
    statement, statuses = WALK_UPDATED, []
    if criteria.has_refused:
        statement = WALK_REFUSED
    elif criteria.statuses is not None:
        statement, statuses = walk_statuses(len(criteria.statuses)), [criteria.statuses]
    earliest = criteria.updated_after or EPOCH
    rows = await connection.fetch(statement, *_bound(before), earliest, rows_max, *statuses)
    return _positions(rows), place_at(*rows[-1][1:]) if len(rows) == rows_max else None


def _searches(connection: Connection, criteria: _Criteria) -> Iterator[Callable[[int], Awaitable[Walked]]]:
    """Yield the walks of an order number or an airway bill."""

    async def walk(statement: str, *arguments: Any) -> Walked:
        return _positions(await connection.fetch(statement, *arguments)), None

    if criteria.cnote is not None:
        yield partial(walk, WALK_CNOTE, criteria.cnote)
    if criteria.search is not None:
        yield partial(walk, WALK_SEARCH, criteria.search, criteria.search_end)


async def _find_few(walks: Iterable[Callable[[int], Awaitable[Walked]]]) -> list[int] | None:
    """Return the first positions of all orders that one of these walks selects if they are few, else None."""
    for walk in walks:
        positions, _ = await walk(WALKED_ROWS_MAX + 1)
        if len(positions) <= WALKED_ROWS_MAX:
            return positions
    return None


def _before(key: Key, positions: Sequence[int]) -> list[int]:
    return [position for position in positions if isinstance(key, ListPlace) or position < key]


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
        orders_filter.has_refused,
        orders_filter.updated_after,
        updated_before,
    )


async def _present_statuses(connection: Connection) -> list[str]:
    return [status for (status,) in await connection.fetch(STATUSES_PRESENT)]


def _bound(place: ListPlace) -> tuple[datetime, int]:
    return place.time, place.position


def _positions(rows: Sequence[Any]) -> list[int]:
    return [row[0] for row in rows]
