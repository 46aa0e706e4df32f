"""The log over HTTP: in pages, as one long NDJSON response, and live as server-sent events."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from functools import partial
from operator import attrgetter
from time import monotonic
from typing import Final, NamedTuple

import orjson
from aiohttp import hdrs, web
from pydantic import Field
from typing_extensions import TypedDict  # pydantic cannot read typing's own before Python 3.12

from projections import timeline
from projections.postgres import Connection
from projections.selection import Selection, selected_positions
from projections.windows import POSITION_MAX
from service.api.freshness import beyond, wait_for
from service.api.resumption import place_after
from service.database.connections import READER, ConnectionPool
from service.database.log_identity import LogIdentity
from service.event_log import store
from service.event_log.erasures import Erasure, last_erasure_id, read_erasures
from service.event_log.follow import Memory, Place, PlaceLostError, read_after
from service.event_log.store import LogEvent, RecordedEvent, to_log_event
from service.event_log.tail import Tail, TailClosedError, TailMessage
from service.http.access import Access, has_scope
from service.http.budgets import Budget
from service.http.connections import is_gone
from service.http.endpoints import NDJSON, SSE, Endpoint, Tag
from service.http.pagination import Page, list_response
from service.http.parameters import (
    PAGE_ROWS_DEFAULT,
    LastReport,
    Limit,
    LogId,
    Position,
    Query,
    Statuses,
    Verdicts,
    parse_order_no,
)
from service.http.problems import (
    ProblemError,
    ProblemType,
    another_event,
    bad_parameter,
    unavailable,
)
from service.http.responses import JSON_OPTIONS, LOG_HEADER, STREAM_HEADERS
from service.http.streaming import ResponseStream, begin_stream, refuse_old_version
from service.projecting.position import ViewPositions

# Readers that are behind the tail's memory take turns, so that many of them delay no webhook.
READERS_BEHIND_MAX: Final = 4
# A comment at this interval keeps an idle stream open.
HEARTBEAT_SECONDS: Final = 15.0
# The longest long poll. Proxies often give up after a minute.
WAIT_SECONDS_MAX: Final = 30
# How often a stream's API key is checked again.
KEY_SECONDS: Final = 10.0
# How soon a reader's departure is noticed.
CHECK_SECONDS: Final = 1.0
# The pause before a reader reconnects, in milliseconds.
RETRY: Final = b"retry: 2000\n\n"
HEARTBEAT: Final = b": heartbeat\n\n"

LAST_EVENT_ID: Final = "Last-Event-ID"
# Python's int() refuses thousands of digits. A position has at most nineteen.
_DIGITS: Final = re.compile(r"\d{1,19}", re.ASCII)
NDJSON_HEADERS: Final = {**STREAM_HEADERS, hdrs.CONTENT_TYPE: NDJSON}
SSE_HEADERS: Final = {**STREAM_HEADERS, hdrs.CONTENT_TYPE: SSE}

# Sends events above a position, and returns the position up to which all events are sent.
Send = Callable[[ResponseStream, int], Awaitable[int]]


class LogEventPage(TypedDict):
    """A page of the log. ``next`` can always be followed: an empty page is the end of the log for now."""

    events: list[LogEvent]
    next: str


class EventsQuery(Query):
    """A page of the log after a position, and what it selects."""

    after: Position = Field(default=0, description="begin after this position of the log")
    last: LastReport = None
    log: LogId = None
    limit: Limit = Field(default=PAGE_ROWS_DEFAULT, description="the maximum number of events of the page")
    verdict: Verdicts | None = Field(
        default=None, description="events with this verdict, or with one of several, separated by commas"
    )
    status: Statuses | None = Field(
        default=None,
        description="events after which the order has this status, or one of several, separated by commas",
    )
    wait: int = Field(
        default=0,
        ge=0,
        le=WAIT_SECONDS_MAX,
        description="if the page would be empty, wait for an event for up to so many seconds",
    )


class AllEventsQuery(Query):
    """The log after a position, up to its head."""

    after: Position = Field(default=0, description="begin after this position of the log")
    last: LastReport = None
    log: LogId = None
    limit: int | None = Field(
        default=None,
        ge=1,
        le=POSITION_MAX,
        description="the maximum number of events; by default, all up to the head of the log",
    )


class StreamQuery(Query):
    """Where a stream begins."""

    after: Position | None = Field(
        default=None,
        description="begin after this position, unless Last-Event-ID is sent; by default, with the next event",
    )
    last: LastReport = None
    log: LogId = None


class LogStreamQuery(StreamQuery):
    """Where the log's stream begins, and whether it sends events or only positions."""

    brief: bool = Field(default=False, description="send only the log's position, each time the log grows")


def encode_event(event: RecordedEvent) -> TailMessage:
    """Return an event as a server-sent event. Its id is its position."""
    return TailMessage(*(_encode(event, with_bodies=with_bodies) for with_bodies in (True, False)))


def _encode(event: RecordedEvent, *, with_bodies: bool) -> bytes:
    data = orjson.dumps(to_log_event(event, with_bodies=with_bodies), option=orjson.OPT_UTC_Z)
    return b"id: %d\nevent: status_reported\ndata: %b\n\n" % (event.position, data)


def encode_erasure(erasure: Erasure) -> bytes:
    """Return an erasure as a server-sent event. It has no id, since it has no place in the log."""
    return b"event: order_erased\ndata: %b\n\n" % orjson.dumps(erasure, option=orjson.OPT_UTC_Z)


class ErasuresQuery(Query):
    """Where a page of erasures begins."""

    after: Position = Field(default=0, description="begin after the erasure with this id")
    limit: Limit = Field(default=PAGE_ROWS_DEFAULT, description="the maximum number of rows of the page")


class ErasurePage(TypedDict):
    """A page of erasures."""

    erasures: list[Erasure]
    next: str | None


class _EventsPage(NamedTuple):
    """Events, the position up to which the log was searched for them, and the ``report_id`` of its event."""

    events: list[RecordedEvent]
    reached: int
    last: str | None


class EventsApi:
    """Serves the log.

    Args:
        pool: the connections to read with.
        memory: hears of erasures.
        access: checks repeatedly during a stream whether its API key is still valid.
        streams: the budget of long responses.
        positions: how far each view has come.
        log: the log's id.
    """

    tag = Tag("events", "The log of all orders, in pages, as NDJSON and live, and its erasures.")

    def __init__(  # noqa: PLR0913, PLR0917 - the parts that it connects
        self,
        pool: ConnectionPool,
        memory: Memory,
        access: Access,
        streams: Budget,
        positions: ViewPositions,
        log: LogIdentity,
    ) -> None:
        self._pool = pool
        self._log = log
        self._positions = positions
        self._access = access
        self._streams = streams
        self.tail = Tail(pool, memory, encode_event, encode_erasure)
        self._behind = asyncio.Semaphore(READERS_BEHIND_MAX)

    @Endpoint("GET", "/events", LogEventPage, query=EventsQuery, problems=(ProblemType.OVER_BUDGET,))
    async def list_events(self, request: web.Request, query: EventsQuery) -> web.Response:
        """List the events of all orders, by position: a feed whose `next` can always be followed."""
        log_id = self._log.log_id
        if query.verdict is not None or query.status is not None:
            await wait_for(self._positions, None, timeline.VIEW.name)
        async with self._pool.connection() as connection:
            await _refuse_another_event(connection, query)
            if query.after > (head := await store.head_position(connection)):
                raise beyond(self._positions, query.after, head)
        page = await self._read_page(query, query.after)
        if not page.events and query.wait and request.method == hdrs.METH_GET:
            page = await self._wait_for_page(request, query, page)
        last = query.last if page.reached == query.after else page.last
        place = place_after(log_id, last, after=page.reached)
        with_bodies = has_scope(request, "read:bodies")
        events = [to_log_event(event, with_bodies=with_bodies) for event in page.events]
        return list_response(query, "events", Page(events, place), "/events")

    async def _read_page(self, query: EventsQuery, after: int) -> _EventsPage:
        async with self._pool.connection() as connection:
            if query.verdict is None and query.status is None:
                events = await store.read_log(connection, after, query.limit)
                reached = events[-1].position if events else after
            else:
                selection = Selection(query.verdict, query.status)
                positions, reached = await selected_positions(connection, selection, after, query.limit)
                events = await store.read_positions(connection, positions)
                if len(events) < len(positions):
                    reached = events[-1].position
            if events and events[-1].position == reached:
                return _EventsPage(events, reached, events[-1].report_id)
            found = await store.read_log(connection, reached - 1, 1) if reached else []
            is_there = found and found[0].position == reached
            return _EventsPage(events, reached, found[0].report_id if is_there else None)

    async def _wait_for_page(self, request: web.Request, query: EventsQuery, page: _EventsPage) -> _EventsPage:
        """Wait until a page has an event, its time is over, or the service stops. It counts as a stream."""
        deadline = monotonic() + query.wait
        try:
            with self._streams.hold(READER.get()):
                async with self.tail.following():
                    began_with, seen = (self.tail.losses, self._log.log_id), 0
                    while not (page.events or self.tail.is_ended or is_gone(request)):
                        # At first, and whenever the log has grown.
                        if self.tail.position > seen:
                            seen = self.tail.position
                            await self._positions[timeline.VIEW.name].reach.wait_for(seen, CHECK_SECONDS)
                            page = await self._read_page(query, page.reached)
                        elif (self.tail.losses, self._log.log_id) != began_with or monotonic() >= deadline:
                            break
                        else:
                            seconds = min(CHECK_SECONDS, deadline - monotonic())
                            await self.tail.wait_beyond(seen, max(0.0, seconds))
        except TailClosedError as error:
            raise unavailable(str(error)) from None
        await self._access.admit(request, "read")
        return page

    @Endpoint("GET", "/events.ndjson", str, query=AllEventsQuery, media=NDJSON)
    async def export_events(self, request: web.Request, query: AllEventsQuery) -> web.StreamResponse:
        """Get all events up to the head of the log as NDJSON, one event on each line."""
        refuse_old_version(request)
        if request.method == hdrs.METH_HEAD:
            return (await begin_stream(request, NDJSON_HEADERS, self._log.log_id)).response
        with self._streams.hold(READER.get()):
            return await self._all_events(request, query)

    @Endpoint("GET", "/erasures", ErasurePage, query=ErasuresQuery)
    async def list_erasures(self, request: web.Request, query: ErasuresQuery) -> web.Response:
        """List erasures, oldest first: what your copies of the log must lose too."""
        async with self._pool.connection() as connection:
            rows = await read_erasures(connection, query.after, query.limit + 1)
            if not rows and query.after > (last := await last_erasure_id(connection)):
                raise beyond(self._positions, query.after, last)
        items = rows[: query.limit]
        place = {"after": items[-1]["erasure_id"]} if len(rows) > query.limit else {}
        return list_response(query, "erasures", Page(items, place), request.path)

    @Endpoint("GET", "/events/stream", str, query=LogStreamQuery, media=SSE)
    async def stream_events(self, request: web.Request, query: LogStreamQuery) -> web.StreamResponse:
        """Stream the events of all orders live, as server-sent events.

        `Last-Event-ID` resumes without gaps or duplicates.
        """
        send = partial(self._send, choose=_choose_message(request))
        return await self._stream(request, query, self._send_position if query.brief else send)

    @Endpoint("GET", "/orders/{order_no}/stream", str, query=StreamQuery, media=SSE)
    async def stream_order_events(self, request: web.Request, query: StreamQuery) -> web.StreamResponse:
        """Stream an order's events live, as server-sent events.

        The order need not have any event yet.
        """
        order_no = parse_order_no(request)
        send = partial(self._send, choose=_choose_message(request), order_no=order_no)
        return await self._stream(request, query, send, order_no)

    async def _all_events(self, request: web.Request, query: AllEventsQuery) -> web.StreamResponse:
        place, log_id = Place(query.after, query.last), self._log.log_id
        async with self._pool.connection() as connection:
            head = await store.head_position(connection)
            if place.position > head:
                raise beyond(self._positions, place.position, head)
            await _refuse_another_event(connection, query)
        stream = await begin_stream(request, NDJSON_HEADERS, log_id)
        with_bodies = has_scope(request, "read:bodies")
        remaining = query.limit if query.limit is not None else POSITION_MAX
        while place.position < head and remaining:
            await stream.wait()
            if self._log.log_id != log_id:
                # The events that follow belong to another log, so the response is cut off.
                raise unavailable("the database was replaced during the request")
            place, count = await self._send_lines(stream, place, remaining, with_bodies=with_bodies)
            remaining -= count
        return stream.response

    async def _send_lines(
        self, stream: ResponseStream, after: Place, limit: int, *, with_bodies: bool
    ) -> tuple[Place, int]:
        """Send events above a place, each on a line, and return the place of the last one and their number."""
        async with self._behind:
            async with self._pool.connection() as connection:
                try:
                    batch = await read_after(connection, after, min(limit, stream.batch_max))
                except PlaceLostError:
                    # What follows does not belong to what was sent, so the response is cut off.
                    raise unavailable("the log has lost events during the request") from None
            lines = [
                (one.position, orjson.dumps(to_log_event(one, with_bodies=with_bodies), option=JSON_OPTIONS))
                for one in batch
            ]
        reached = await stream.write_some(lines)
        sent = [one for one in batch if reached is None or one.position <= reached]
        # Positions may have gaps, but the log ends with an event.
        place = Place(sent[-1].position, sent[-1].report_id or "") if sent else Place(POSITION_MAX, None)
        return place, len(sent)

    async def _read(self, position: int, limit: int) -> list[RecordedEvent]:
        async with self._pool.connection() as connection:
            return await store.read_log(connection, position, limit)

    async def _stream(
        self, request: web.Request, query: StreamQuery, send: Send, order_no: str | None = None
    ) -> web.StreamResponse:
        refuse_old_version(request)
        last_seen, log_id = _last_event_id(request), self._log.log_id
        after = query.after if last_seen is None else last_seen
        if request.method == hdrs.METH_HEAD:
            return (await begin_stream(request, SSE_HEADERS, log_id)).response
        if after is not None:
            async with self._pool.connection() as connection:
                if after > (head := await store.head_position(connection)):
                    raise beyond(self._positions, after, head)
                if last_seen is None:
                    await _refuse_another_event(connection, query)
        try:
            with self._streams.hold(READER.get()):
                async with self.tail.following():
                    position = self.tail.position if after is None else after
                    stream = await begin_stream(request, SSE_HEADERS, log_id)
                    try:
                        # Proxies may hold back a response without a body, so it begins with a comment.
                        await stream.write(b": the log after position %d\n%b" % (position, RETRY))
                        await self._follow(request, stream, position, send, order_no)
                    except ProblemError:
                        # The API key is no longer valid. The reader gets this problem when it reconnects.
                        return stream.response
                    except ConnectionError:
                        # The reader has left or accepts nothing: a normal close would wait for it.
                        if request.transport is not None:
                            request.transport.abort()
        except TailClosedError as error:
            raise unavailable(str(error)) from None
        return stream.response

    async def _follow(
        self, request: web.Request, stream: ResponseStream, position: int, send: Send, order_no: str | None
    ) -> None:
        """Send events until the reader leaves, its key is revoked, the log loses events or becomes another one,
        or the service stops.
        """
        began_with = (self.tail.losses, stream.response.headers[LOG_HEADER])
        erasure_id = self.tail.last_erasure_id
        check_key_at = monotonic() + KEY_SECONDS
        heartbeat_at = monotonic() + HEARTBEAT_SECONDS
        while not (self.tail.is_ended or is_gone(request)):
            if (self.tail.losses, self._log.log_id) != began_with:
                break
            await stream.wait()
            position = await send(stream, position)
            for erasure in self.tail.erasures_after(erasure_id, order_no):
                await stream.write(erasure.message)
                erasure_id = erasure.erasure_id
            await self.tail.wait_beyond(position, min(CHECK_SECONDS, HEARTBEAT_SECONDS))
            if monotonic() >= heartbeat_at:
                await stream.write(HEARTBEAT)
                heartbeat_at = monotonic() + HEARTBEAT_SECONDS
            if monotonic() >= check_key_at:
                await self._access.admit(request, "read")
                check_key_at = monotonic() + KEY_SECONDS

    async def _send_position(self, stream: ResponseStream, position: int) -> int:
        """Send the log's position if it is above ``position``."""
        end = self.tail.position
        if end <= position:
            return position
        await stream.write(b'id: %d\nevent: log_grown\ndata: {"position":%d}\n\n' % (end, end))
        return end

    async def _send(
        self,
        stream: ResponseStream,
        position: int,
        choose: Callable[[TailMessage], bytes],
        order_no: str | None = None,
    ) -> int:
        """Send events above a position, of one order or of all; ``choose`` returns what the reader may see."""
        end = max(position, self.tail.position)
        limit = stream.batch_max
        in_memory = self.tail.after(position, order_no, limit)
        if in_memory is not None:
            reached = await stream.write_some((event.position, choose(event.message)) for event in in_memory)
            if reached is None:
                reached = in_memory[-1].position if len(in_memory) == limit else end
            return reached
        # This reader is behind the tail's memory, so it reads the database.
        if order_no is not None:
            return await self._send_order(stream, position, choose, order_no)
        async with self._behind:
            batch = await self._read(position, stream.batch_max)
            messages = [(event.position, choose(encode_event(event))) for event in batch]
        reached = await stream.write_some(messages)
        if reached is None:
            reached = batch[-1].position if batch else end
        return reached

    async def _send_order(
        self, stream: ResponseStream, position: int, choose: Callable[[TailMessage], bytes], order_no: str
    ) -> int:
        """Send an order's events between a position and the tail's end."""
        end = self.tail.position
        async with self._behind, self._pool.connection() as connection:
            version = await store.version_at(connection, order_no, position)
            batch = await store.read_stream(connection, order_no, version, stream.batch_max)
            events = [event for event in batch if position < event.position <= end]
            messages = [(event.position, choose(encode_event(event))) for event in events]
        reached = await stream.write_some(messages)
        if reached is not None:
            return reached
        return events[-1].position if len(events) == len(batch) > 0 else max(position, end)


async def _refuse_another_event(
    connection: Connection, query: EventsQuery | AllEventsQuery | StreamQuery
) -> None:
    """Refuse to continue after an event that the log has lost.

    Raises:
        ProblemError: 410.
    """
    if query.last is not None and query.after:
        try:
            await read_after(connection, Place(query.after, query.last), 1)
        except PlaceLostError:
            raise another_event(position=query.after) from None


def _choose_message(request: web.Request) -> Callable[[TailMessage], bytes]:
    """Return which message of an event the reader may see. A key's scope never changes."""
    return attrgetter("whole" if has_scope(request, "read:bodies") else "without_body")


def _last_event_id(request: web.Request) -> int | None:
    text = request.headers.get(LAST_EVENT_ID)
    if text is None:
        return None
    if not _DIGITS.fullmatch(text) or int(text) > POSITION_MAX:
        raise bad_parameter(LAST_EVENT_ID, f"it must be a position in the log, from 0 to {POSITION_MAX}")
    return int(text)
