"""Orders over HTTP: current status, state as of an earlier version or time, timeline, and recorded events."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from operator import attrgetter, itemgetter
from typing import Final, Literal

from aiohttp import hdrs, web
from pydantic import Field
from typing_extensions import TypedDict  # pydantic cannot read typing's own before Python 3.12

from domain.logged import DecodedEvent
from domain.statuses import Status
from projections import current_status, timeline
from projections.current_status import CurrentOrder, FoundOrder
from projections.order_list import (
    LAST_PLACE,
    ListedOrder,
    ListPlace,
    OrdersFilter,
    Sort,
    orders_page,
    updated_page,
)
from projections.parked import Parked
from projections.timeline import TimelineEntry, TimelineHead, WholeTimeline
from projections.windows import POSITION_MAX
from service.api.freshness import wait_for
from service.api.resumption import place_after, refuse_another_event
from service.batcher import Batcher
from service.database.connections import READER, ConnectionPool, DedicatedConnection
from service.database.log_identity import LogIdentity
from service.event_log import store
from service.event_log.codec import (
    StatusReported,
    UndecodableEventError,
    decode_event,
    read_status_reported,
)
from service.event_log.store import RecordedEvent
from service.http.access import has_scope
from service.http.budgets import Budgets
from service.http.csv_export import csv_heading, csv_line
from service.http.endpoints import CSV, Endpoint, Tag
from service.http.pagination import Page, csv_headers, csv_response, cut_page, list_response
from service.http.parameters import (
    PAGE_ROWS_DEFAULT,
    Duration,
    LastReport,
    Limit,
    LogId,
    Position,
    Query,
    SortedCursor,
    Statuses,
    TableQuery,
    Text,
    Time,
    Version,
    ViewQuery,
    order_path,
    parse_order_no,
)
from service.http.problems import ProblemError, ProblemType, bad_parameter, order_parked, unavailable
from service.http.responses import REVALIDATED, STREAM_HEADERS, has_etag, json_response, response
from service.http.streaming import ResponseStream, begin_stream, refuse_old_version
from service.projecting.position import ViewPositions

# The maximum number of single-order reads that share one query, and that wait for one.
READS_BATCH_MAX: Final = 256
READS_QUEUE_MAX: Final = 16_384
# The maximum number of timelines that share one query, and of an order's reports in it. A timeline of more
# reports is read separately, with a connection of the pool, so that it delays no other. A batch has at most
# 64 * 33 rows: less than 10 ms of the processor.
TIMELINES_BATCH_MAX: Final = 64
TIMELINE_REPORTS_MAX: Final = 32
# The maximum number of events that are decoded at a time to compute an order's earlier state: webhooks wait.
HISTORY_EVENTS_MAX: Final = 500
# How many such reads run at a time. Each takes a connection, and a share of the processor.
FOLDS_AT_A_TIME: Final = 2
# Lists that are sent whole take turns to read, so that many of them delay no webhook.
EXPORTS_AT_A_TIME: Final = 2
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND: Final = timedelta(microseconds=1)
CSV_HEADERS: Final = {**STREAM_HEADERS, **csv_headers("orders")}


class OrderPage(TypedDict):
    """A page of orders."""

    orders: list[CurrentOrder]
    next: str | None


class Timeline(TypedDict):
    """A page of an order's timeline."""

    order_no: str
    status: Status | None
    parked: Parked | None
    entries: list[TimelineEntry]
    next: str | None


class OrderEvent(TypedDict):
    """One recorded event of an order; ``data`` is null if this release does not know it."""

    version: int
    position: int
    type: str
    recorded_at: datetime
    data: StatusReported | None


class OrderEventPage(TypedDict):
    """A page of an order's events."""

    events: list[OrderEvent]
    next: str | None


class OrdersQuery(TableQuery):
    """The filters of a list of orders."""

    # Each order of the list has its own kind of key.
    cursor: SortedCursor | None = Field(  # type: ignore[assignment]
        default=None, description="from the `next` of the previous page"
    )
    sort: Sort = Field(
        default="first",
        description="newest first by the `first` report, so that pages never shift, or by the last (`updated`)",
    )
    status: Statuses | None = Field(
        default=None, description="orders with this status, or with one of several, separated by commas"
    )
    settled: bool | None = Field(default=None, description="orders whose status is settled, or is not")
    search: Text | None = Field(
        default=None,
        description="the beginning of the order number, or of an airway bill that was ever reported for it",
    )
    cnote: Text | None = Field(default=None, description="an airway bill that was ever reported for the order")
    verdict: Literal["refused"] | None = Field(
        default=None, description="`refused`: orders with at least one refused report"
    )
    updated_after: Time | None = Field(default=None, description="the last report was at or after this time")
    updated_before: Time | None = Field(default=None, description="the last report was before this time")
    unmoved_for: Duration | None = Field(
        default=None, description="the order is not settled and has had no report for this long"
    )

    @property
    def first_place(self) -> int | ListPlace:
        """The key that the page begins at, in the order of the list.

        Raises:
            ProblemError: 400, the cursor is of another order.
        """
        if self.cursor is None:
            return POSITION_MAX if self.sort == "first" else LAST_PLACE
        if isinstance(self.cursor, int) and self.sort == "first":
            return self.cursor
        if isinstance(self.cursor, tuple) and self.sort == "updated":
            return min(ListPlace(*self.cursor), LAST_PLACE)
        raise bad_parameter("cursor", "it must be a cursor from an earlier response with the same sort")

    def to_filter(self, now: datetime) -> OrdersFilter:
        """Return the filter of the list."""
        return OrdersFilter(
            statuses=self.status,
            settled=self.settled,
            cnote=self.cnote,
            search=self.search,
            has_refused=True if self.verdict else None,
            updated_after=self.updated_after,
            updated_before=self.updated_before,
            unmoved_since=now - self.unmoved_for if self.unmoved_for is not None else None,
        )


class AllOrdersQuery(OrdersQuery):
    """The filters of a list of orders that is sent whole unless it has a limit."""

    limit: Limit | None = Field(  # type: ignore[assignment]
        default=None, description="the most orders to return; by default all, in one response"
    )


class OrderQuery(ViewQuery):
    """One order, now or as of an earlier version or time."""

    version: Version | None = Field(default=None, description="the order as of this version")
    as_of: Time | None = Field(default=None, description="the order as of this time")


class OrderEventsQuery(Query):
    """A page of an order's events after a version."""

    after_version: Position = Field(default=0, description="begin after this version of the order")
    last: LastReport = None
    log: LogId = None
    limit: Limit = Field(default=PAGE_ROWS_DEFAULT, description="the maximum number of events of the page")


class OrdersApi:
    """Serves orders.

    Args:
        pool: the connections for all reads except batched ones.
        make_connection: returns a dedicated connection; batched reads of orders and of timelines each have one.
        positions: how far each view has come.
        budgets: the budgets of reads of earlier states and of long responses.
        log: the log's id.
    """

    tag = Tag("orders", "Each order's current status, earlier states, timeline and recorded events.")

    def __init__(
        self,
        pool: ConnectionPool,
        make_connection: Callable[[], DedicatedConnection],
        positions: ViewPositions,
        budgets: Budgets,
        log: LogIdentity,
    ) -> None:
        self._pool = pool
        self._orders_connection = make_connection()
        self._timelines_connection = make_connection()
        self._positions = positions
        self._log = log
        self._folds = budgets.folds
        self._streams = budgets.streams
        self._export_turns = asyncio.Semaphore(EXPORTS_AT_A_TIME)
        self._fold_turns = asyncio.Semaphore(FOLDS_AT_A_TIME)
        self._reads: Batcher[str, FoundOrder] = Batcher(
            self._find_orders,
            batch_items_max=READS_BATCH_MAX,
            queue_items_max=READS_QUEUE_MAX,
            seconds_max=pool.seconds_max,
        )
        self._timelines: Batcher[str, WholeTimeline | None] = Batcher(
            self._find_timelines,
            batch_items_max=TIMELINES_BATCH_MAX,
            queue_items_max=READS_QUEUE_MAX,
            seconds_max=pool.seconds_max,
        )

    @Endpoint("GET", "/orders", OrderPage, query=OrdersQuery)
    async def list_orders(self, request: web.Request, query: OrdersQuery) -> web.Response:
        """List orders, newest first by their first report, so that pages never shift, or by their last one."""
        return list_response(query, "orders", await self._orders(query, query.limit), request.path)

    @Endpoint(
        "GET",
        "/orders.csv",
        str,
        query=AllOrdersQuery,
        media=CSV,
        problems=(ProblemType.HTTP_VERSION, ProblemType.OVER_BUDGET),
    )
    async def export_orders(self, request: web.Request, query: AllOrdersQuery) -> web.StreamResponse:
        """List orders as CSV, newest first by their first report or their last one: all, or at most `limit`."""
        if query.limit is not None:
            page = await self._orders(query, query.limit)
            return csv_response(query, "orders", page, "/orders.csv", CurrentOrder)
        refuse_old_version(request)
        place, filters = query.first_place, query.to_filter(datetime.now(UTC))
        await wait_for(self._positions, query.after_position, current_status.VIEW.name)
        if request.method == hdrs.METH_HEAD:
            return (await begin_stream(request, CSV_HEADERS, self._log.log_id)).response
        with self._streams.hold(READER.get()):
            return await self._all_orders(request, place, filters)

    @Endpoint(
        "GET",
        "/orders/{order_no}",
        CurrentOrder,
        query=OrderQuery,
        problems=(
            *(ProblemType.UNKNOWN_ORDER, ProblemType.NO_SUCH_VERSION),
            *(ProblemType.PARKED, ProblemType.OVER_BUDGET),
        ),
        has_etag=True,
    )
    async def get_order(self, request: web.Request, query: OrderQuery) -> web.Response:
        """Get one order, now or as of an earlier version or time."""
        order_no = parse_order_no(request)
        if query.version is not None or query.as_of is not None:
            with self._folds.hold(READER.get()):
                order = await self._order_as_of(order_no, query)
        else:
            await wait_for(self._positions, query.after_position, current_status.VIEW.name)
            found = await self._reads.submit(order_no)
            if found.order is None:
                raise _missing_order(order_no, found.parked_position)
            _refuse_beyond_parking(query, found.parked_position)
            order = found.order
        # An order is parked and unparked without a new version. After lost commits, a version may come again.
        last = (order["last_reported_at"] - EPOCH) // MICROSECOND
        etag = f'"{order["version"]}-{last}{"-parked" if order["parked"] else ""}"'
        headers = {"ETag": etag, "Cache-Control": REVALIDATED}
        if has_etag(request, etag):
            return response(status=304, headers=headers)
        return json_response(order, headers=headers)

    @Endpoint(
        "GET",
        "/orders/{order_no}/timeline",
        Timeline,
        query=TableQuery,
        problems=(ProblemType.UNKNOWN_ORDER, ProblemType.PARKED),
    )
    async def get_timeline(self, request: web.Request, query: TableQuery) -> web.Response:
        """Get an order's timeline, oldest entry first. Mere repeats are counted, not listed."""
        order_no = parse_order_no(request)
        head, page = await self._timeline(order_no, query)
        members = {"order_no": order_no, "status": head.status, "parked": head.parked}
        return list_response(query, "entries", page, order_path(order_no, "timeline"), **members)

    @Endpoint(
        "GET",
        "/orders/{order_no}/timeline.csv",
        str,
        query=TableQuery,
        problems=(ProblemType.UNKNOWN_ORDER, ProblemType.PARKED),
        media=CSV,
    )
    async def export_timeline(self, request: web.Request, query: TableQuery) -> web.Response:
        """Get an order's timeline as CSV, oldest entry first."""
        order_no = parse_order_no(request)
        _, page = await self._timeline(order_no, query)
        return csv_response(query, "entries", page, order_path(order_no, "timeline.csv"), TimelineEntry)

    @Endpoint(
        "GET",
        "/orders/{order_no}/events",
        OrderEventPage,
        query=OrderEventsQuery,
        problems=(ProblemType.UNKNOWN_ORDER,),
    )
    async def list_order_events(self, request: web.Request, query: OrderEventsQuery) -> web.Response:
        """List an order's recorded events, by version."""
        after = query.after_version
        order_no, log_id = parse_order_no(request), self._log.log_id
        async with self._pool.connection() as connection:
            rows = await store.read_stream(connection, order_no, after, query.limit)
            if not rows and not await store.read_stream(connection, order_no, 0, 1):
                raise _missing_order(order_no, None)
            if query.last is not None and after:
                found = await store.read_stream(connection, order_no, after - 1, 1)
                is_there = found and found[0].version == after
                refuse_another_event(query.last, found[0] if is_there else None, version=after)
            # A page may also end early, at its limit in bytes.
            has_more = rows and await store.read_stream(connection, order_no, rows[-1].version, 1)
        with_bodies = has_scope(request, "read:bodies")
        events = [_to_order_event(event, with_bodies=with_bodies) for event in rows]
        place = place_after(log_id, rows[-1].report_id, after_version=rows[-1].version) if has_more else {}
        return list_response(query, "events", Page(events, place), order_path(order_no, "events"))

    async def _orders(self, query: OrdersQuery, limit: int) -> Page:
        place, filters = query.first_place, query.to_filter(datetime.now(UTC))
        await wait_for(self._positions, query.after_position, current_status.VIEW.name)
        rows, reached = await self._orders_page(place, filters, limit + 1)
        page = cut_page(rows, limit, _key(place), reached)
        return Page([order for _, order in page.items], page.next_place)

    async def _timeline(self, order_no: str, query: TableQuery) -> tuple[TimelineHead, Page]:
        await wait_for(self._positions, query.after_position, timeline.VIEW.name)
        whole = await self._timelines.submit(order_no) if query.cursor is None else None
        if whole is not None:
            head, rows = whole
        else:
            async with self._pool.connection() as connection:
                head = await timeline.read_head(connection, order_no)
                rows = await timeline.entries_page(connection, order_no, query.cursor or 0, query.limit + 1)
        _refuse_beyond_parking(query, head.parked_position)
        if not head.is_known:
            raise _missing_order(order_no, head.parked_position)
        return head, cut_page(rows, query.limit, itemgetter("version"))

    async def _orders_page(
        self, place: int | ListPlace, filters: OrdersFilter, limit: int
    ) -> tuple[Sequence[ListedOrder], int | ListPlace | None]:
        async with self._pool.connection() as connection:
            if isinstance(place, ListPlace):
                return await updated_page(connection, place, filters, limit)
            return await orders_page(connection, place, filters, limit)

    async def _all_orders(
        self, request: web.Request, place: int | ListPlace, filters: OrdersFilter
    ) -> web.StreamResponse:
        stream = await begin_stream(request, CSV_HEADERS, self._log.log_id)
        await stream.write(csv_heading(CurrentOrder))
        reached: int | ListPlace | None = place
        while reached is not None:
            await stream.wait()
            reached = await self._send_orders(stream, reached, filters)
        return stream.response

    async def _send_orders(
        self, stream: ResponseStream, place: int | ListPlace, filters: OrdersFilter
    ) -> int | ListPlace | None:
        """Send orders after a place, each on a line, and return the place to continue at; None at the end."""
        limit = stream.batch_max
        key = _key(place)
        async with self._export_turns:
            rows, reached = await self._orders_page(place, filters, limit)
            lines = [(number, csv_line(CurrentOrder, row.order)) for number, row in enumerate(rows)]
        last_written = await stream.write_some(lines)
        if last_written is not None:
            return key(rows[last_written])
        return key(rows[-1]) if len(rows) == limit else reached

    async def _find_orders(self, order_nos: list[str], dues: Sequence[float]) -> Sequence[FoundOrder]:
        async with asyncio.timeout_at(dues[-1]), self._orders_connection.connection() as connection:
            return await current_status.find_orders(connection, order_nos)

    async def _find_timelines(
        self, order_nos: list[str], dues: Sequence[float]
    ) -> Sequence[WholeTimeline | None]:
        async with asyncio.timeout_at(dues[-1]), self._timelines_connection.connection() as connection:
            return await timeline.find_timelines(connection, order_nos, TIMELINE_REPORTS_MAX)

    @asynccontextmanager
    async def _fold_turn(self) -> AsyncIterator[None]:
        """Wait for a turn to read a whole order, which may be long, so that other readers are not delayed."""
        try:
            async with asyncio.timeout(self._pool.seconds_max):
                await self._fold_turns.acquire()
        except TimeoutError:
            raise self._folds.refusal("other reads of earlier states are running") from None
        try:
            yield
        finally:
            self._fold_turns.release()

    async def _order_as_of(self, order_no: str, query: OrderQuery) -> CurrentOrder:
        """Fold an order's events up to a version or a time."""
        if query.version is not None and query.as_of is not None:
            detail = "give either version or as_of, not both"
            raise ProblemError(ProblemType.BAD_PARAMETER, detail, parameter="as_of")
        rows = current_status.VIEW.new_rows()
        version = 0
        async with self._fold_turn(), self._pool.connection() as connection:
            while events := await store.read_stream(connection, order_no, version, HISTORY_EVENTS_MAX):
                earlier = [*takewhile(lambda item: _is_within(query, item), map(_decode, events))]
                current_status.fold(earlier, rows)
                if earlier:
                    _, last = earlier[-1]
                    version = last.originator_version
                if len(earlier) < len(events):
                    break
            else:
                if version == 0:
                    raise _missing_order(order_no, None)
        order = rows[current_status.ORDERS.name].get(order_no)
        if order is None or (query.version is not None and query.version != version):
            detail = f"{order_no} had no report at that version or time"
            raise ProblemError(ProblemType.NO_SUCH_VERSION, detail, order_no=order_no)
        return current_status.to_order(order)


def _key(place: int | ListPlace) -> Callable[[ListedOrder], int | ListPlace]:
    """Return the function that returns an order's key, in the same order of the list as a place."""
    return attrgetter("place" if isinstance(place, ListPlace) else "first_position")


def _decode(event: RecordedEvent) -> DecodedEvent:
    try:
        return event.position, decode_event(event.order_no, event.version, event.topic, event.state)
    except UndecodableEventError as error:
        detail = f"version {event.version} of {event.order_no} cannot be decoded: {error}"
        raise unavailable(detail) from None


def _is_within(query: OrderQuery, item: DecodedEvent) -> bool:
    _, event = item
    if query.version is not None:
        return event.originator_version <= query.version
    return query.as_of is not None and event.timestamp <= query.as_of


def _to_order_event(event: RecordedEvent, *, with_bodies: bool) -> OrderEvent:
    return {
        "version": event.version,
        "position": event.position,
        "type": event.topic,
        "recorded_at": event.recorded_at,
        "data": read_status_reported(event.topic, event.state, with_bodies=with_bodies),
    }


def _missing_order(order_no: str, parked_position: int | None) -> ProblemError:
    """Return the problem for an order without a row: it has no report, or was parked at its first event."""
    if parked_position is not None:
        detail = f"{order_no} is parked from its first event on; see GET /projections"
        return order_parked(detail, order_no=order_no)
    return ProblemError(ProblemType.UNKNOWN_ORDER, f"{order_no} has no report", order_no=order_no)


def _refuse_beyond_parking(query: ViewQuery, parked_position: int | None) -> None:
    """Refuse a read after ``parked_position`` or later: the view lacks the order's events from there on.

    Raises:
        ProblemError: 503.
    """
    if parked_position is not None and (query.after_position or 0) >= parked_position:
        detail = f"the order is parked from position {parked_position} on: a replay rebuilds the view"
        raise order_parked(detail, position=parked_position)
