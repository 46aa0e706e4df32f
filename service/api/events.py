"""The log over HTTP: in pages, as one long NDJSON response, and live as server-sent events."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from time import monotonic
from typing import Final

import orjson
from aiohttp import hdrs, web
from aiohttp.http import HttpVersion11
from pydantic import Field
from typing_extensions import TypedDict  # pydantic cannot read typing's own before Python 3.12

from projections.postgres_errors import Connection
from projections.windows import POSITION_MAX
from service.api.resumption import place_after, refuse_another_event
from service.database.connections import ConnectionPool
from service.event_log import store
from service.event_log.store import LogEvent, RecordedEvent, to_log_event
from service.event_log.tail import Tail, TailClosedError
from service.http.access import Access
from service.http.endpoints import JSON, NDJSON, SSE, Endpoint
from service.http.pagination import Page, list_response
from service.http.parameters import EventsQuery, Position, Query, Text, parse_order_no
from service.http.problems import (
    ProblemError,
    ProblemType,
    bad_parameter,
    beyond_head,
    unavailable,
)
from service.http.request_ids import REQUEST_ID_HEADER, caller_request_id
from service.http.responses import JSON_OPTIONS, SERVER
from service.http.server import is_gone

BATCH_EVENTS_MAX: Final = 1_000
# A comment at this interval keeps an idle stream open.
HEARTBEAT_SECONDS: Final = 15.0
# How often a stream's API key is checked again.
KEY_SECONDS: Final = 10.0
# How soon a reader's departure is noticed.
CHECK_SECONDS: Final = 1.0
# A reader that accepts nothing for this long is cut off. It can resume after the last position it received.
SEND_SECONDS_MAX: Final = 10.0
# The pause before a reader reconnects, in milliseconds.
RETRY: Final = b"retry: 2000\n\n"
HEARTBEAT: Final = b": heartbeat\n\n"

LAST_EVENT_ID: Final = "Last-Event-ID"
# Python's int() refuses thousands of digits. A position has at most nineteen.
_DIGITS: Final = re.compile(r"\d{1,19}", re.ASCII)
# nginx must not buffer a stream.
STREAM_HEADERS: Final = {**SERVER, "X-Accel-Buffering": "no"}
NDJSON_HEADERS: Final = {**STREAM_HEADERS, hdrs.CONTENT_TYPE: NDJSON}
SSE_HEADERS: Final = {**STREAM_HEADERS, hdrs.CONTENT_TYPE: SSE, hdrs.CACHE_CONTROL: "no-cache"}

# Sends the events above a position, and returns the position up to which all events are sent.
Send = Callable[[web.StreamResponse, int], Awaitable[int]]


class LogEvents(TypedDict):
    """A page of the log."""

    events: list[LogEvent]
    next: str | None


class StreamQuery(Query):
    """Where a stream begins."""

    after: Position | None = Field(
        default=None,
        description="begin after this position, unless Last-Event-ID is sent; by default, with the next event",
    )
    last: Text | None = Field(
        default=None, description="the `report_id` of the event at `after`; 410 if that is another event by now"
    )


class LogStreamQuery(StreamQuery):
    """Where the log's stream begins, and whether it sends events or only positions."""

    brief: bool = Field(default=False, description="send only the log's position, each time the log grows")


def encode_event(event: RecordedEvent) -> bytes:
    """Return an event as a server-sent event. Its id is its position."""
    data = orjson.dumps(to_log_event(event), option=orjson.OPT_UTC_Z)
    return b"id: %d\nevent: status_reported\ndata: %b\n\n" % (event.position, data)


class EventsApi:
    """Serves the log.

    Args:
        pool: the connections to read with.
        access: checks repeatedly during a stream whether its API key is still valid.
    """

    def __init__(self, pool: ConnectionPool, access: Access) -> None:
        self._pool = pool
        self._access = access
        self.tail = Tail(pool, encode_event)

    @Endpoint("GET", "/events", LogEvents, query=EventsQuery, media=(JSON, NDJSON))
    async def list_events(self, request: web.Request, query: EventsQuery) -> web.StreamResponse:
        """A page of the log, by position; as NDJSON, all events up to its head unless `limit` is set."""
        if NDJSON in request.headers.get(hdrs.ACCEPT, "") and request.method == hdrs.METH_GET:
            return await self._all_events(request, query)
        async with self._pool.connection() as connection:
            await _refuse_another_event(connection, query)
            rows = await store.read_log(connection, query.after, query.limit)
            # A page may also end early, at its limit in bytes.
            has_more = rows and await store.read_log(connection, rows[-1].position, 1)
            if not rows and query.after > (head := await store.head_position(connection)):
                raise beyond_head(query.after, head)
        place = place_after(rows[-1], rows[-1].position) if has_more else {}
        page = Page([*map(to_log_event, rows)], place)
        return list_response(request, query, "events", page, request.path)

    @Endpoint("GET", "/events/stream", str, query=LogStreamQuery, media=(SSE,))
    async def stream_events(self, request: web.Request, query: LogStreamQuery) -> web.StreamResponse:
        """The log as it grows, as server-sent events; `Last-Event-ID` resumes without gaps or duplicates."""
        return await self._stream(request, query, self._send_position if query.brief else self._send)

    @Endpoint("GET", "/orders/{order_no}/stream", str, query=StreamQuery, media=(SSE,))
    async def stream_order(self, request: web.Request, query: StreamQuery) -> web.StreamResponse:
        """An order's events as they are recorded, as server-sent events; the order need not have any yet."""
        return await self._stream(request, query, partial(self._send, order_no=parse_order_no(request)))

    async def _all_events(self, request: web.Request, query: EventsQuery) -> web.StreamResponse:
        position = query.after
        _refuse_old_version(request)
        async with self._pool.connection() as connection:
            head = await store.head_position(connection)
            if position > head:
                raise beyond_head(position, head)
            await _refuse_another_event(connection, query)
        response = await _begin(request, NDJSON_HEADERS)
        remaining = query.limit if "limit" in query.model_fields_set else POSITION_MAX
        while position < head and remaining:
            batch = await self._read(position, min(remaining, BATCH_EVENTS_MAX))
            remaining -= len(batch)
            await _write(response, [orjson.dumps(to_log_event(event), option=JSON_OPTIONS) for event in batch])
            position = batch[-1].position if batch else head
        return response

    async def _read(self, position: int, limit: int) -> list[RecordedEvent]:
        async with self._pool.connection() as connection:
            return await store.read_log(connection, position, limit)

    async def _stream(self, request: web.Request, query: StreamQuery, send: Send) -> web.StreamResponse:
        _refuse_old_version(request)
        last_seen = _last_event_id(request)
        after = query.after if last_seen is None else last_seen
        if request.method == hdrs.METH_HEAD:
            return await _begin(request, SSE_HEADERS)
        if after is not None:
            async with self._pool.connection() as connection:
                if after > (head := await store.head_position(connection)):
                    raise beyond_head(after, head)
                if last_seen is None:
                    await _refuse_another_event(connection, query)
        try:
            async with self.tail.following():
                position = self.tail.position if after is None else after
                response = await _begin(request, SSE_HEADERS)
                try:
                    # Proxies may hold back a response without a body, so it begins with a comment.
                    await _write(response, [b": the log after position %d\n" % position, RETRY])
                    await self._follow(request, response, position, send)
                except ProblemError:
                    # The API key is no longer valid. The reader gets this problem when it reconnects.
                    return response
                except ConnectionError:
                    # The reader has left or accepts nothing: a normal close would wait for it.
                    if request.transport is not None:
                        request.transport.abort()
        except TailClosedError as error:
            raise unavailable(str(error)) from None
        return response

    async def _follow(
        self, request: web.Request, response: web.StreamResponse, position: int, send: Send
    ) -> None:
        """Send events until the reader leaves, its key is revoked, events are lost, or the service stops."""
        losses = self.tail.losses
        check_key_at = monotonic() + KEY_SECONDS
        heartbeat_at = monotonic() + HEARTBEAT_SECONDS
        while not self.tail.is_ended and self.tail.losses == losses and not is_gone(request):
            position = await send(response, position)
            await self.tail.wait_beyond(position, min(CHECK_SECONDS, HEARTBEAT_SECONDS))
            if monotonic() >= heartbeat_at:
                await _write(response, [HEARTBEAT])
                heartbeat_at = monotonic() + HEARTBEAT_SECONDS
            if monotonic() >= check_key_at:
                await self._access.admit(request, "read")
                check_key_at = monotonic() + KEY_SECONDS

    async def _send_position(self, response: web.StreamResponse, position: int) -> int:
        """Send the log's position if it is above ``position``."""
        end = self.tail.position
        if end <= position:
            return position
        await _write(response, [b'id: %d\nevent: log_grown\ndata: {"position":%d}\n\n' % (end, end)])
        return end

    async def _send(self, response: web.StreamResponse, position: int, order_no: str | None = None) -> int:
        """Send the events above a position, of one order or of all."""
        end = max(position, self.tail.position)
        events = self.tail.after(position, order_no)
        if events is not None:
            await _write(response, [event.message for event in events])
            return end
        # This reader is behind the tail's memory, so it reads the database.
        if order_no is not None:
            return await self._send_order(response, position, order_no)
        batch = await self._read(position, BATCH_EVENTS_MAX)
        await _write(response, [*map(encode_event, batch)])
        return batch[-1].position if batch else end

    async def _send_order(self, response: web.StreamResponse, position: int, order_no: str) -> int:
        """Send an order's events between a position and the tail's end."""
        end, version = self.tail.position, 0
        while True:
            async with self._pool.connection() as connection:
                batch = await store.read_stream(connection, order_no, version, BATCH_EVENTS_MAX)
            await _write(response, [encode_event(event) for event in batch if position < event.position <= end])
            if not batch:
                return max(position, end)
            version = batch[-1].version


async def _refuse_another_event(connection: Connection, query: EventsQuery | StreamQuery) -> None:
    """Refuse to continue after an event that the log has lost.

    Raises:
        ProblemError: 410.
    """
    if query.last is None or not query.after:
        return
    found = await store.read_log(connection, query.after - 1, 1)
    is_there = found and found[0].position == query.after
    refuse_another_event(query.after, query.last, found[0] if is_there else None)


async def _begin(request: web.Request, headers: dict[str, str]) -> web.StreamResponse:
    """Begin a chunked response, with the caller's own request id if it sent one."""
    response = web.StreamResponse(headers=headers)
    if (own_id := caller_request_id(request)) is not None:
        response.headers[REQUEST_ID_HEADER] = own_id
    response.enable_chunked_encoding()
    await response.prepare(request)
    return response


async def _write(response: web.StreamResponse, messages: Sequence[bytes]) -> None:
    """Write messages.

    Raises:
        ConnectionResetError: the reader has left, or accepts nothing.
    """
    if not messages:
        return
    try:
        async with asyncio.timeout(SEND_SECONDS_MAX):
            await response.write(b"".join(messages))
    except TimeoutError:
        raise ConnectionResetError("the reader accepts nothing") from None


def _refuse_old_version(request: web.Request) -> None:
    # Without chunked encoding, a response that was cut off looks complete.
    if request.version < HttpVersion11:
        raise ProblemError(ProblemType.HTTP_VERSION, "a stream requires HTTP/1.1")


def _last_event_id(request: web.Request) -> int | None:
    text = request.headers.get(LAST_EVENT_ID)
    if text is None:
        return None
    if not _DIGITS.fullmatch(text) or int(text) > POSITION_MAX:
        raise bad_parameter(LAST_EVENT_ID, f"it must be a position in the log, from 0 to {POSITION_MAX}")
    return int(text)
