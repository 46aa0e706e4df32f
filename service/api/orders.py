"""The read API: what is known of orders, how it came about, and by which rules."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import takewhile
from operator import attrgetter
from typing import Final

from aiohttp import web

from projections import current_status, statistics, timeline
from projections.current_status import OrderRow, OrdersFilter, Row, order_row
from projections.engine import DecodedEvent, Projector
from service.api import representations
from service.api.freshness import wait_for
from service.batcher import Batcher
from service.database.connections import HeldConnection, Pool, borrowed
from service.event_log import store as event_store
from service.event_log.store import RecordedEvent
from service.http.endpoints import CSV, JSON, Endpoint
from service.http.pagination import POSITION_MAX, cut, list_answer, table_answer
from service.http.parameters import (
    EventsQuery,
    OrderQuery,
    OrdersQuery,
    Query,
    StatisticsQuery,
    TableQuery,
    TransitionsQuery,
    ViewQuery,
    order_no_of,
    path_of,
)
from service.http.problems import Kind, ProblemError, answer, set_aside, unavailable

# Reads that are gathered into one query, and how many may wait for theirs.
READS_BATCH_MAX: Final = 256
READS_QUEUE_MAX: Final = 16_384
STREAM_PAGE_EVENTS: Final = 1_000


class ReadApi:
    """Answers reads.

    Args:
        pool: for everything but the single order.
        held: the connection on which reads of single orders are gathered.
        projectors: of the views, by name.
        seconds_max: how long a read may take, the wait for a position not included.
    """

    def __init__(
        self,
        pool: Pool,
        held: HeldConnection,
        projectors: dict[str, Projector],
        seconds_max: float,
    ) -> None:
        self._pool = pool
        self._held = held
        self._projectors = projectors
        self._seconds_max = seconds_max
        self._orders: Batcher[str, OrderRow | None] = Batcher(
            self._find_orders,
            batch_items_max=READS_BATCH_MAX,
            queue_items_max=READS_QUEUE_MAX,
            seconds_max=seconds_max,
        )

    @Endpoint("GET", "/orders", representations.Orders, query=OrdersQuery, media=(JSON, CSV))
    async def list_orders(self, request: web.Request, query: OrdersQuery) -> web.Response:
        """A page of orders, the one first reported last first, so that no page shifts while it is read."""
        await wait_for(self._projectors, query.after_position, current_status.NAME)
        before = POSITION_MAX if query.cursor is None else query.cursor
        unmoved_since = datetime.now(UTC) - query.unmoved_for if query.unmoved_for is not None else None
        wanted = OrdersFilter(
            query.status,
            query.cnote,
            query.verdict,
            query.updated_after,
            query.updated_before,
            unmoved_since,
        )
        async with borrowed(self._pool, self._seconds_max) as connection:
            rows = await current_status.orders_page(connection, before, wanted, query.limit + 1)
        page, onward = cut(rows, query.limit, attrgetter("first_position"))
        orders = [representations.order(row) for row in page]
        return table_answer(request, query, representations.Order, "orders", orders, cursor=onward)

    @Endpoint(
        "GET",
        "/orders/{order_no}",
        representations.Order,
        query=OrderQuery,
        problems=(Kind.UNKNOWN_ORDER, Kind.NOT_KNOWN_THEN, Kind.SET_ASIDE),
        has_etag=True,
    )
    async def show_order(self, request: web.Request, query: OrderQuery) -> web.Response:
        """One order, as it is known now or as it was known at a version or a time."""
        order_no = order_no_of(request)
        if query.version is not None or query.as_of is not None:
            row = await self._order_as_of(order_no, query)
        else:
            if query.after_position is not None:
                await wait_for(self._projectors, query.after_position, current_status.NAME)
            row = await self._current_order(order_no)
            if row.aside_position is not None:
                _refuse_beyond(query, row.aside_position)
        etag = f'"{row.version}"'
        if _has_tag(request.headers.get("If-None-Match", ""), etag):
            return web.Response(status=304, headers={"ETag": etag, "Server": "order-tracking"})
        return answer(representations.order(row), headers={"ETag": etag})

    @Endpoint(
        "GET",
        "/orders/{order_no}/timeline",
        representations.Timeline,
        query=TableQuery,
        problems=(Kind.UNKNOWN_ORDER, Kind.SET_ASIDE),
        media=(JSON, CSV),
    )
    async def show_timeline(self, request: web.Request, query: TableQuery) -> web.Response:
        """A page of what was reported of an order, oldest first, mere repeats folded in."""
        order_no = order_no_of(request)
        await wait_for(self._projectors, query.after_position, timeline.NAME)
        async with borrowed(self._pool, self._seconds_max) as connection:
            aside = await timeline.set_aside(connection, order_no)
            known, status = await timeline.status_of(connection, order_no)
            rows = await timeline.entries_page(connection, order_no, query.cursor or 0, query.limit + 1)
        if aside is not None:
            _refuse_beyond(query, aside.position)
        if not known:
            raise _unknown_order(order_no) if aside is None else _wholly_set_aside(order_no)
        page, onward = cut(rows, query.limit, attrgetter("version"))
        return table_answer(
            request,
            query,
            representations.Entry,
            "entries",
            [representations.entry(row) for row in page],
            path=path_of(order_no, "timeline"),
            cursor=onward,
            order_no=order_no,
            status=status,
            set_aside=aside and representations.set_aside(timeline.NAME, aside.since_version, aside.reason),
        )

    @Endpoint(
        "GET",
        "/orders/{order_no}/events",
        representations.OrderEvents,
        query=EventsQuery,
        problems=(Kind.UNKNOWN_ORDER,),
    )
    async def list_order_events(self, request: web.Request, query: EventsQuery) -> web.Response:
        """A page of an order's recorded events, by version."""
        order_no = order_no_of(request)
        async with borrowed(self._pool, self._seconds_max) as connection:
            page = await event_store.read_stream(connection, order_no, query.after, query.limit)
            if not page and not await event_store.read_stream(connection, order_no, 0, 1):
                raise _unknown_order(order_no)
            more = page and await event_store.read_stream(connection, order_no, page[-1].version, 1)
        return list_answer(
            "events",
            [representations.order_event(event) for event in page],
            path_of(order_no, "events"),
            query,
            after=page[-1].version if more else None,
        )

    @Endpoint(
        "GET",
        "/audit/transitions",
        representations.Transitions,
        query=TransitionsQuery,
        media=(JSON, CSV),
    )
    async def list_transitions(self, request: web.Request, query: TransitionsQuery) -> web.Response:
        """A page of every verdict on every report, in the order of the log."""
        await wait_for(self._projectors, query.after_position, timeline.NAME)
        async with borrowed(self._pool, self._seconds_max) as connection:
            rows = await timeline.transitions_page(
                connection,
                after=query.cursor or 0,
                verdict=query.verdict,
                order_no=query.order_no,
                previous_status=query.from_,
                recognised=query.to,
                since=query.since,
                until=query.until,
                limit=query.limit + 1,
            )
        page, onward = cut(rows, query.limit, attrgetter("position"))
        transitions = [representations.transition(row) for row in page]
        return table_answer(
            request, query, representations.Transition, "transitions", transitions, cursor=onward
        )

    @Endpoint("GET", "/transitions", representations.Rules)
    async def show_rules(self, _request: web.Request, _query: Query) -> web.Response:
        """The vocabulary and the transition table."""
        return answer(representations.RULES)

    @Endpoint("GET", "/statistics", representations.Statistics, query=StatisticsQuery)
    async def show_statistics(self, _request: web.Request, query: StatisticsQuery) -> web.Response:
        """How orders move in general: by status, by transition with the time it took, by day, by odd string."""
        await wait_for(self._projectors, query.after_position, statistics.NAME)
        since = datetime.now(UTC).date() - timedelta(days=query.days - 1)
        async with borrowed(self._pool, self._seconds_max) as connection:
            counted = await statistics.read(connection, since)
        return answer(representations.statistics(counted))

    async def _current_order(self, order_no: str) -> OrderRow:
        await wait_for(self._projectors, None, current_status.NAME)
        row = await self._orders.submit(order_no)
        if row is not None:
            return row
        async with borrowed(self._pool, self._seconds_max) as connection:
            if await current_status.is_set_aside(connection, order_no):
                raise _wholly_set_aside(order_no)
        raise _unknown_order(order_no)

    async def _find_orders(self, order_nos: list[str], due: float) -> Sequence[OrderRow | None]:
        async with asyncio.timeout_at(due), self._held.use() as connection:
            found = await current_status.orders_by_number(connection, order_nos)
        return [found.get(order_no) for order_no in order_nos]

    async def _order_as_of(self, order_no: str, query: OrderQuery) -> OrderRow:
        """Fold an order's events up to a version or a time."""
        if query.version is not None and query.as_of is not None:
            raise ProblemError(Kind.BAD_PARAMETER, "version and as_of exclude each other", parameter="as_of")
        rows: dict[str, Row] = {}
        version = 0
        async with borrowed(self._pool, self._seconds_max) as connection:
            while page := await event_store.read_stream(connection, order_no, version, STREAM_PAGE_EVENTS):
                known = list(takewhile(partial(_is_known, query), map(_decoded, page)))
                current_status.fold(known, rows)
                version += len(known)
                if len(known) < len(page):
                    break
            else:
                if version == 0:
                    raise _unknown_order(order_no)
        if order_no not in rows or (query.version is not None and query.version != version):
            raise ProblemError(Kind.NOT_KNOWN_THEN, f"{order_no} was not known then", order_no=order_no)
        return order_row(rows[order_no])


def _decoded(recorded: RecordedEvent) -> DecodedEvent:
    position, order_no, version, topic, state, _ = recorded
    try:
        return position, event_store.decode_event(order_no, version, topic, state)
    except event_store.UndecodableEventError as error:
        raise unavailable(f"version {version} of {order_no} cannot be decoded: {error}") from None


def _is_known(query: OrderQuery, item: DecodedEvent) -> bool:
    _, event = item
    if query.version is not None:
        return event.originator_version <= query.version
    return query.as_of is not None and event.timestamp <= query.as_of


def _has_tag(if_none_match: str, etag: str) -> bool:
    """Tell whether a list of entity tags has this one; weak ones count as well (RFC 9110, 13.1.2)."""
    tags = {tag.strip().removeprefix("W/") for tag in if_none_match.split(",")}
    return etag in tags or "*" in tags


def _unknown_order(order_no: str) -> ProblemError:
    return ProblemError(Kind.UNKNOWN_ORDER, f"nothing was reported of {order_no}", order_no=order_no)


def _wholly_set_aside(order_no: str) -> ProblemError:
    return set_aside(f"{order_no} is set aside from its first event on; see /projections", order_no=order_no)


def _refuse_beyond(query: ViewQuery, aside_position: int) -> None:
    if query.after_position is not None and query.after_position >= aside_position:
        detail = f"the order is set aside from position {aside_position} on: a replay heals it"
        raise set_aside(detail, position=aside_position)
