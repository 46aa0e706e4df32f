"""The list of orders: its filter, its rows, their number, and the links to the next page and to the CSV."""

from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime, timedelta
from operator import attrgetter
from typing import Annotated, Any, Final, Literal, NamedTuple
from urllib.parse import urlencode
from zoneinfo import ZoneInfo

from aiohttp import web
from pydantic import BeforeValidator, Field

from domain.statuses import SETTLED
from projections import current_status, statistics
from projections.current_status import CurrentOrder
from projections.order_list import (
    LAST_PLACE,
    Count,
    ListedOrder,
    ListPlace,
    OrdersFilter,
    count_orders,
    find_by_cnote,
    updated_page,
)
from projections.postgres import Connection
from service.features.pages.i18n import Language
from service.features.pages.overview import STUCK_DAYS
from service.http.pagination import cut_page
from service.http.parameters import Position, Query, SortedCursor, Statuses, Text
from service.http.problems import bad_parameter
from service.http.times import to_rfc3339

ROWS_SHOWN_MAX: Final = 50
# If few of the walked orders match, a page walks on so often, as long as a reader likes to wait.
WALKS_MAX: Final = 5
# Counting stops here, and the page shows "1,000+".
COUNTED_MAX: Final = 1_000
# A day is converted to times, and the next day too.
YEARS: Final = range(1970, 9_999)
ONE_DAY: Final = timedelta(days=1)
# A form sends one parameter for each chosen status.
REPEATED: Final = "status"


def _parse_day(value: Any) -> Any:
    try:
        day = date.fromisoformat(str(value))
    except ValueError:
        raise ValueError("it must be a date, such as 2026-01-31") from None
    if day.year not in YEARS:
        raise ValueError("it is out of range")
    return day


Day = Annotated[date, BeforeValidator(_parse_day)]


class CommonQuery(Query):
    """The parameters of every page. A page that updates itself sends the last event's position."""

    lang: Language | None = None
    after_position: Position | None = None


class OrdersPageQuery(CommonQuery):
    """A search by order number or airway bill, which may open the only order that it finds, or filters."""

    q: Text | None = None
    search: Text | None = None
    status: Statuses | None = None
    settled: bool | None = None
    verdict: Literal["refused"] | None = None
    stuck: Literal["1"] | None = None
    # Days of the last report; both are included.
    from_day: Day | None = Field(default=None, alias="from")
    to_day: Day | None = Field(default=None, alias="to")
    cursor: SortedCursor | None = None

    @property
    def is_filtered(self) -> bool:
        """Whether the list lacks some orders."""
        chosen = (self.q, self.search, self.status, self.settled, self.verdict, self.stuck)
        return (*chosen, self.from_day, self.to_day) != (None,) * 8

    @property
    def first_place(self) -> ListPlace:
        """The place that the page begins at.

        Raises:
            ProblemError: 400, the cursor is of another list.
        """
        if self.cursor is None:
            return LAST_PLACE
        if isinstance(self.cursor, int):
            raise bad_parameter("cursor", "it must be a cursor from an earlier response")
        return min(ListPlace(*self.cursor), LAST_PLACE)

    def to_filter(self, now: datetime, zone: ZoneInfo) -> OrdersFilter:
        """Return the filter of the list, whose days are those of a time zone."""
        return OrdersFilter(
            statuses=self.status,
            settled=self.settled,
            search=self.search or self.q,
            has_refused=True if self.verdict else None,
            updated_after=_midnight(self.from_day, zone) if self.from_day is not None else None,
            updated_before=_midnight(self.to_day + ONE_DAY, zone) if self.to_day is not None else None,
            unmoved_since=now - timedelta(days=STUCK_DAYS) if self.stuck else None,
        )


class OrderList(NamedTuple):
    """A page of the list, the number of all its orders, and the paths of the next page and of the CSV."""

    orders: Sequence[CurrentOrder]
    total: Count
    next_page: str | None
    csv: str

    @property
    def is_cut(self) -> bool:
        """Whether the page ended before it was full, because too few of the searched orders matched."""
        return self.next_page is not None and len(self.orders) < ROWS_SHOWN_MAX


async def read_list(connection: Connection, query: OrdersPageQuery, now: datetime, zone: ZoneInfo) -> OrderList:
    """Read a page of the list, newest change first, and count its orders."""
    filters = query.to_filter(now, zone)
    rows: list[ListedOrder] = []
    place = query.first_place
    for _ in range(WALKS_MAX):
        walked, reached = await updated_page(connection, place, filters, ROWS_SHOWN_MAX + 1 - len(rows))
        rows += walked
        if reached is None or len(rows) > ROWS_SHOWN_MAX:
            break
        place = reached
    page = cut_page(rows, ROWS_SHOWN_MAX, attrgetter("place"), reached)
    # The following pages are those of the search alone, which opens no order.
    same = query.model_copy(update={"search": filters.search, "q": None})
    return OrderList(
        orders=[row.order for row in page.items],
        total=await _count(connection, filters),
        next_page=page.next_path("/track", same),
        csv=_csv_path(filters),
    )


async def find_exactly(connection: Connection, q: str) -> OrderList | None:
    """Return the orders with this number or airway bill; if there are none, try again without outer spaces."""
    for text in dict.fromkeys((q, q.strip())):
        ((by_number, _),) = await current_status.find_orders(connection, [text])
        found = [by_number, *await find_by_cnote(connection, text, ROWS_SHOWN_MAX)]
        if orders := {order["order_no"]: order for order in found if order is not None}:
            shown = [*orders.values()][:ROWS_SHOWN_MAX]
            total = Count(len(shown), is_exact=len(orders) < ROWS_SHOWN_MAX)
            return OrderList(shown, total, None, _csv_path(OrdersFilter(search=text)))
    return None


def canonical_path(request: web.Request) -> str | None:
    """Return the path that a form should have had: without empty fields, and with one list of statuses.

    None if the request's own path is that.
    """
    parameters: dict[str, list[str]] = {}
    for name, value in request.query.items():
        if value:
            parameters.setdefault(name, []).append(value)
    pairs = [
        (name, value)
        for name, values in parameters.items()
        for value in ([",".join(values)] if name == REPEATED else values)
    ]
    if pairs == [*request.query.items()]:
        return None
    return f"/track?{urlencode(pairs)}" if pairs else "/track"


async def _count(connection: Connection, filters: OrdersFilter) -> Count:
    """Count the orders of a filter: by the statistics if it is by status alone, else up to COUNTED_MAX."""
    if filters._replace(statuses=None, settled=None) != OrdersFilter():
        return await count_orders(connection, filters, COUNTED_MAX)
    counts = await statistics.count_by_status(connection)
    return Count(sum(_selected(counts.items(), filters)), is_exact=True)


def _selected(counts: Iterable[tuple[Any, int]], filters: OrdersFilter) -> Iterable[int]:
    return (
        orders
        for status, orders in counts
        if (filters.statuses is None or status in filters.statuses)
        and filters.settled in {None, status in SETTLED}
    )


def _csv_path(filters: OrdersFilter) -> str:
    """Return the path of all orders of a filter as CSV. They are by first report, so that none is missed."""
    parameters = {
        "search": filters.search,
        "status": ",".join(filters.statuses) if filters.statuses else None,
        "settled": None if filters.settled is None else str(filters.settled).lower(),
        "verdict": "refused" if filters.has_refused else None,
        "updated_after": filters.updated_after and to_rfc3339(filters.updated_after),
        "updated_before": filters.updated_before and to_rfc3339(filters.updated_before),
        "unmoved_for": f"P{STUCK_DAYS}D" if filters.unmoved_since is not None else None,
    }
    chosen = {name: value for name, value in parameters.items() if value is not None}
    return f"/orders.csv?{urlencode(chosen)}" if chosen else "/orders.csv"


def _midnight(day: date, zone: ZoneInfo) -> datetime:
    """Return the beginning of a day in a time zone, in UTC."""
    return datetime(day.year, day.month, day.day, tzinfo=zone).astimezone(UTC)
