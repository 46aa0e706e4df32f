"""Orders over HTTP: current status, state as of an earlier version or time, timeline, and recorded events."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from itertools import takewhile
from operator import itemgetter
from typing import Final

from aiohttp import web
from pydantic import Field
from typing_extensions import TypedDict  # pydantic cannot read typing's own before Python 3.12

from domain.statuses import Status
from domain.transitions import Verdict
from projections import current_status, order_list, timeline
from projections.current_status import CurrentOrder, FoundOrder
from projections.engine import DecodedEvent, Projector
from projections.order_list import OrdersFilter
from projections.parked import Parked
from projections.timeline import TimelineEntry, TimelineHead
from projections.windows import POSITION_MAX
from service.api.freshness import wait_for
from service.api.resumption import place_after, refuse_another_event
from service.batcher import Batcher
from service.database.connections import READER, ConnectionPool, DedicatedConnection
from service.event_log import store
from service.event_log.codec import (
    StatusReported,
    UndecodableEventError,
    decode_event,
    read_status_reported,
)
from service.event_log.store import RecordedEvent
from service.http.access import has_scope
from service.http.budgets import Budget
from service.http.endpoints import CSV, Endpoint, Tag
from service.http.pagination import Page, csv_response, cut_page, list_response
from service.http.parameters import (
    PAGE_ROWS_DEFAULT,
    Duration,
    LastReport,
    Limit,
    Position,
    Query,
    TableQuery,
    Text,
    Time,
    Version,
    ViewQuery,
    order_path,
    parse_order_no,
)
from service.http.problems import ProblemError, ProblemType, order_parked, unavailable
from service.http.responses import REVALIDATED, has_etag, json_response, response

# The maximum number of single-order reads that share one query, and that wait for one.
READS_BATCH_MAX: Final = 256
READS_QUEUE_MAX: Final = 16_384
# The maximum number of events that are decoded at a time to compute an order's earlier state: webhooks wait.
HISTORY_EVENTS_MAX: Final = 500
# How many such reads run at a time. Each takes a connection, and a share of the processor.
FOLDS_AT_A_TIME: Final = 2


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

    status: Status | None = Field(default=None, description="orders with this status")
    cnote: Text | None = Field(default=None, description="an airway bill that was ever reported for the order")
    verdict: Verdict | None = Field(default=None, description="orders with at least one report of this verdict")
    updated_after: Time | None = Field(default=None, description="the last report was at or after this time")
    updated_before: Time | None = Field(default=None, description="the last report was before this time")
    unmoved_for: Duration | None = Field(
        default=None, description="the order is not settled and has had no report for this long"
    )


class OrderQuery(ViewQuery):
    """One order, now or as of an earlier version or time."""

    version: Version | None = Field(default=None, description="the order as of this version")
    as_of: Time | None = Field(default=None, description="the order as of this time")


class OrderEventsQuery(Query):
    """A page of an order's events after a version."""

    after_version: Position = Field(default=0, description="begin after this version of the order")
    last: LastReport = None
    limit: Limit = Field(default=PAGE_ROWS_DEFAULT, description="the maximum number of events of the page")


class OrdersApi:
    """Serves orders.

    Args:
        pool: the connections for all reads except batched ones.
        dedicated: the connection for batched reads of single orders.
        projectors: the projectors by the names of their views.
        folds: the budget of reads of earlier states.
    """

    tag = Tag("orders", "Each order's current status, earlier states, timeline and recorded events.")

    def __init__(
        self,
        pool: ConnectionPool,
        dedicated: DedicatedConnection,
        projectors: Mapping[str, Projector],
        folds: Budget,
    ) -> None:
        self._pool = pool
        self._dedicated = dedicated
        self._projectors = projectors
        self._folds = folds
        self._fold_turns = asyncio.Semaphore(FOLDS_AT_A_TIME)
        self._reads: Batcher[str, FoundOrder] = Batcher(
            self._find_orders,
            batch_items_max=READS_BATCH_MAX,
            queue_items_max=READS_QUEUE_MAX,
            seconds_max=pool.seconds_max,
        )

    @Endpoint("GET", "/orders", OrderPage, query=OrdersQuery)
    async def list_orders(self, request: web.Request, query: OrdersQuery) -> web.Response:
        """List orders, newest first by their first report, so that pages never shift."""
        return list_response(query, "orders", await self._orders(query), request.path)

    @Endpoint("GET", "/orders.csv", str, query=OrdersQuery, media=CSV)
    async def export_orders(self, _request: web.Request, query: OrdersQuery) -> web.Response:
        """List orders as CSV, newest first by their first report."""
        return csv_response(query, "orders", await self._orders(query), "/orders.csv", CurrentOrder)

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
            await wait_for(self._projectors, query.after_position, current_status.VIEW.name)
            found = await self._reads.submit(order_no)
            if found.order is None:
                raise _missing_order(order_no, found.parked_position)
            _refuse_beyond_parking(query, found.parked_position)
            order = found.order
        # An order is parked and unparked without a new version. After lost commits, a version may come again.
        last = order["last_reported_at"].timestamp() * 1e6
        etag = f'"{order["version"]}-{last:.0f}{"-parked" if order["parked"] else ""}"'
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
        order_no = parse_order_no(request)
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
        place = place_after(rows[-1].report_id, after_version=rows[-1].version) if has_more else {}
        return list_response(query, "events", Page(events, place), order_path(order_no, "events"))

    async def _orders(self, query: OrdersQuery) -> Page:
        await wait_for(self._projectors, query.after_position, current_status.VIEW.name)
        before = POSITION_MAX if query.cursor is None else query.cursor
        unmoved_since = datetime.now(UTC) - query.unmoved_for if query.unmoved_for is not None else None
        filters = OrdersFilter(
            query.status, query.cnote, query.verdict, query.updated_after, query.updated_before, unmoved_since
        )
        async with self._pool.connection() as connection:
            window = await order_list.orders_page(connection, before, filters, query.limit + 1)
        page = cut_page(window.rows, query.limit, itemgetter(0), window.reached)
        return Page([order for _, order in page.items], page.next_place)

    async def _timeline(self, order_no: str, query: TableQuery) -> tuple[TimelineHead, Page]:
        await wait_for(self._projectors, query.after_position, timeline.VIEW.name)
        async with self._pool.connection() as connection:
            head = await timeline.read_head(connection, order_no)
            rows = await timeline.entries_page(connection, order_no, query.cursor or 0, query.limit + 1)
        _refuse_beyond_parking(query, head.parked_position)
        if not head.is_known:
            raise _missing_order(order_no, head.parked_position)
        return head, cut_page(rows, query.limit, itemgetter("version"))

    async def _find_orders(self, order_nos: list[str], due: float) -> Sequence[FoundOrder]:
        async with asyncio.timeout_at(due), self._dedicated.connection() as connection:
            return await current_status.find_orders(connection, order_nos)

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
        rows: dict[str, current_status.Row] = {}
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
        if order_no not in rows or (query.version is not None and query.version != version):
            detail = f"{order_no} had no report at that version or time"
            raise ProblemError(ProblemType.NO_SUCH_VERSION, detail, order_no=order_no)
        return current_status.to_order(rows[order_no])


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
