"""The log to read on from where one stopped: by pages, as one long answer, or live, as server-sent events."""

import asyncio
import re
from bisect import bisect_right
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from contextvars import Context
from functools import partial
from time import monotonic
from typing import Final, NamedTuple

import orjson
import structlog
from aiohttp import hdrs, web
from aiohttp.http import HttpVersion11
from aiohttp_sse import EventSourceResponse

from service.api import representations
from service.database.connections import Pool, borrowed
from service.event_log import store as event_store
from service.event_log.store import RecordedEvent
from service.http.access import Access
from service.http.endpoints import JSON, NDJSON, SSE, Endpoint
from service.http.pagination import POSITION_MAX, list_answer
from service.http.parameters import EventsQuery, LogStreamQuery, StreamQuery, order_no_of
from service.http.problems import OPTIONS, Kind, ProblemError, bad_parameter, unavailable
from service.http.request_ids import REQUEST_ID_HEADER, given_id
from service.http.server import is_gone

PAGE_EVENTS: Final = 1_000
# Live readers at once; each has a connection and little else.
READERS_MAX: Final = 2_000
# What was read last is kept for all live readers; whoever is behind it reads the database by itself.
RECENT_EVENTS_MAX: Final = 4_096
RECENT_BYTES_MAX: Final = 16 * 1024 * 1024
# Not for longer: what is erased in the log is not to be sent from memory.
RECENT_SECONDS_MAX: Final = 60.0
# Between two looks at the log while it grows: readers share each, and webhooks have the processor in between.
REST_SECONDS: Final = 0.1
# Beneath the hints that the log has grown.
POLL_SECONDS: Final = 1.0
HEARTBEAT_SECONDS: Final = 15.0
# How often a stream's key is looked at again.
KEY_SECONDS: Final = 10.0
# How soon it is noticed that a reader has gone.
LOOK_SECONDS: Final = 1.0
# A reader that takes nothing for so long is cut off; it goes on from the last position that it saw.
SEND_SECONDS_MAX: Final = 10.0
# How long a reader waits before it comes again, in milliseconds.
RETRY: Final = b"retry: 2000\n\n"

LAST_EVENT_ID: Final = "Last-Event-ID"
# Python reads no number of thousands of digits; a position has nineteen at most.
_DIGITS: Final = re.compile(r"\d{1,19}", re.ASCII)
HEADERS: Final = {"Server": "order-tracking"}
NDJSON_HEADERS: Final = {**HEADERS, "Content-Type": NDJSON, "X-Accel-Buffering": "no"}


# Sends what there is above a position, and returns the position up to which that is all.
Send = Callable[[EventSourceResponse, int], Awaitable[int]]


log = structlog.get_logger()


class Recent(NamedTuple):
    """An event as live readers are sent it, and when it was read, on this process's clock."""

    position: int
    order_no: str
    message: bytes
    read_at: float


def message_of(event: RecordedEvent) -> Recent:
    """Return an event as a server-sent event, its position the id."""
    data = orjson.dumps(representations.log_event(event), option=orjson.OPT_UTC_Z)
    message = b"id: %d\nevent: status_reported\ndata: %b\n\n" % (event.position, data)
    return Recent(event.position, event.order_no, message, monotonic())


class _Tail:
    """The end of the log, read once for all live readers, as long as there are any.

    Args:
        pool: where its connections come from.
        seconds_max: how long one look at the log may take.
    """

    def __init__(self, pool: Pool, seconds_max: float) -> None:
        self._pool = pool
        self._seconds_max = seconds_max
        self._recent: list[Recent] = []
        self._by_order: dict[str, list[Recent]] = {}
        self._bytes = 0
        self._begins_after = 0
        self._woken = asyncio.Event()
        self._grown = asyncio.Condition()
        self._task: asyncio.Task[None] | None = None
        self.readers = 0
        self.is_ended = False

    @property
    def position(self) -> int:
        return self._recent[-1].position if self._recent else self._begins_after

    def wake(self) -> None:
        """Say that the log has grown."""
        self._woken.set()

    @asynccontextmanager
    async def followed(self) -> AsyncIterator[None]:
        """Follow the log for the length of the block, shared with other readers."""
        if self.readers >= READERS_MAX or self.is_ended:
            raise unavailable(
                f"there are {READERS_MAX} live readers" if not self.is_ended else "it is stopping"
            )
        self.readers += 1
        try:
            if self._task is None:
                async with borrowed(self._pool, self._seconds_max) as connection:
                    head = await event_store.head_position(connection)
                # Another reader may have been first meanwhile.
                if self._task is None:
                    self._begins_after, self._recent, self._by_order, self._bytes = head, [], {}, 0
                    # Of no reader: it inherits no context of the first one.
                    self._task = asyncio.get_running_loop().create_task(
                        self._follow(), name="follow the log for live readers", context=Context()
                    )
            yield
        finally:
            self.readers -= 1
            if self.readers == 0 and self._task is not None:
                self._task.cancel()
                self._task = None

    def after(self, position: int, order_no: str | None) -> Sequence[Recent] | None:
        """Return what is known above a position, None where that lies before all that is known.

        Args:
            position: above which.
            order_no: of one order; None of all.
        """
        if position < self._begins_after:
            return None
        recent = self._recent if order_no is None else self._by_order.get(order_no, ())
        return recent[bisect_right(recent, position, key=lambda one: one.position) :]

    async def grown(self, position: int) -> None:
        """Wait until there is something above a position, or it is over."""
        async with self._grown:
            while self.position <= position and not self.is_ended:
                await self._grown.wait()

    async def end(self) -> None:
        """Let every reader go; they come back to whoever serves next."""
        self.is_ended = True
        async with self._grown:
            self._grown.notify_all()

    async def _follow(self) -> None:
        last_failure = ""
        while True:
            self._woken.clear()
            try:
                while await self._read_on():  # noqa: ASYNC110 - it rests between two pages, and waits for nothing
                    await asyncio.sleep(REST_SECONDS)
                last_failure = ""
            except Exception as error:  # noqa: BLE001 - it goes on as long as there are readers, whatever it is
                if repr(error) != last_failure:
                    last_failure = repr(error)
                    log.warning("the log cannot be read for live readers; it goes on trying", error=repr(error))
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await self._woken.wait()

    async def _read_on(self) -> int:
        async with borrowed(self._pool, self._seconds_max) as connection:
            page = await event_store.read_log(connection, self.position, PAGE_EVENTS)
        if page:
            read = [message_of(event) for event in page]
            self._bytes += sum(len(recent.message) for recent in read)
            self._recent += read
            for recent in read:
                self._by_order.setdefault(recent.order_no, []).append(recent)
            if len(self._recent) > RECENT_EVENTS_MAX or self._bytes > RECENT_BYTES_MAX:
                # Whole pages are left, so that dropping is rare; what was just read stays.
                self._drop(min(len(self._recent) // 2, len(self._recent) - len(read)))
            async with self._grown:
                self._grown.notify_all()
        oldest = monotonic() - RECENT_SECONDS_MAX
        self._drop(bisect_right(self._recent, oldest, key=lambda one: one.read_at))
        return len(page)

    def _drop(self, count: int) -> None:
        """Drop the oldest of what is kept."""
        if not count:
            return
        self._begins_after = self._recent[count - 1].position
        self._bytes -= sum(len(recent.message) for recent in self._recent[:count])
        self._recent = self._recent[count:]
        self._by_order = {}
        for recent in self._recent:
            self._by_order.setdefault(recent.order_no, []).append(recent)


class Streams:
    """Serves the log.

    Args:
        pool: where its connections come from.
        access: asked again, while a stream goes on, whether its key is still good.
        seconds_max: how long one page may take.
    """

    def __init__(self, pool: Pool, access: Access, seconds_max: float) -> None:
        self._pool = pool
        self._access = access
        self._seconds_max = seconds_max
        self.tail = _Tail(pool, seconds_max)

    @Endpoint(
        "GET",
        "/events",
        representations.LogEvents,
        query=EventsQuery,
        problems=(Kind.HTTP_VERSION,),
        media=(JSON, NDJSON),
    )
    async def list_events(self, request: web.Request, query: EventsQuery) -> web.StreamResponse:
        """A page of the whole log, by position; as NDJSON, all of it up to the head, if no limit is given."""
        if NDJSON in request.headers.get(hdrs.ACCEPT, "") and request.method == hdrs.METH_GET:
            return await self._all_events(request, query)
        async with borrowed(self._pool, self._seconds_max) as connection:
            page = await event_store.read_log(connection, query.after, query.limit)
            more = page and await event_store.read_log(connection, page[-1].position, 1)
        return list_answer(
            "events",
            [representations.log_event(event) for event in page],
            request.path,
            query,
            after=page[-1].position if more else None,
        )

    @Endpoint("GET", "/events/stream", str, query=LogStreamQuery, problems=(Kind.HTTP_VERSION,), media=(SSE,))
    async def stream_events(self, request: web.Request, query: LogStreamQuery) -> web.StreamResponse:
        """The log as it grows, as server-sent events; `Last-Event-ID` goes on without a gap or a double."""
        return await self._stream(request, query, self._send_position if query.brief else self._send)

    @Endpoint(
        "GET",
        "/orders/{order_no}/stream",
        str,
        query=StreamQuery,
        problems=(Kind.HTTP_VERSION,),
        media=(SSE,),
    )
    async def stream_order(self, request: web.Request, query: StreamQuery) -> web.StreamResponse:
        """An order's events as they come, as server-sent events; of an order never heard of as well."""
        return await self._stream(request, query, partial(self._send, order_no=order_no_of(request)))

    async def _all_events(self, request: web.Request, query: EventsQuery) -> web.StreamResponse:
        position = query.after
        _refuse_old_version(request)
        async with borrowed(self._pool, self._seconds_max) as connection:
            head = await event_store.head_position(connection)
        response = web.StreamResponse(headers={**NDJSON_HEADERS, **_own_id(request)})
        response.enable_chunked_encoding()
        await response.prepare(request)
        left = query.limit if "limit" in query.model_fields_set else POSITION_MAX
        while position < head and left:
            page = await self._page(position, min(left, PAGE_EVENTS))
            left -= len(page)
            lines = [orjson.dumps(representations.log_event(event), option=OPTIONS) for event in page]
            try:
                async with asyncio.timeout(SEND_SECONDS_MAX):
                    await response.write(b"".join(lines))
            except TimeoutError:
                raise ConnectionResetError("the reader takes nothing") from None
            position = page[-1].position if page else head
        return response

    async def _page(self, position: int, limit: int) -> list[RecordedEvent]:
        async with borrowed(self._pool, self._seconds_max) as connection:
            return await event_store.read_log(connection, position, limit)

    async def _stream(self, request: web.Request, query: StreamQuery, send: Send) -> web.StreamResponse:
        _refuse_old_version(request)
        begin = _position_seen(request)
        begin = query.after if begin is None else begin
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.tail.followed())
            position = self.tail.position if begin is None else begin
            response = EventSourceResponse(
                headers={**HEADERS, **_own_id(request)},
                sep="\n",
                ping_interval=HEARTBEAT_SECONDS,
                send_timeout=SEND_SECONDS_MAX,
            )
            await response.prepare(request)
            await stack.enter_async_context(response)
            # A comment and the time to come again: headers alone would wait for company.
            await response.write(b": the log from position %d on\n" % position + RETRY)
            look_at = monotonic() + KEY_SECONDS
            with suppress(ConnectionError, TimeoutError, ProblemError):
                while not self.tail.is_ended and not is_gone(request):
                    position = await send(response, position)
                    await self._wait(position)
                    if monotonic() >= look_at:
                        # A key may have been revoked. Where nobody can tell, the log cannot be read either.
                        await self._access.admit(request, "read")
                        look_at = monotonic() + KEY_SECONDS
        return response

    async def _send_position(self, response: EventSourceResponse, position: int) -> int:
        """Say that the log has come past a position, and how far; return that."""
        end = self.tail.position
        if end <= position:
            return position
        await _write(response, [b'id: %d\nevent: log_grown\ndata: {"position":%d}\n\n' % (end, end)])
        return end

    async def _send(self, response: EventSourceResponse, position: int, order_no: str | None = None) -> int:
        """Send the events above a position, of one order or of all."""
        end = max(position, self.tail.position)
        recent = self.tail.after(position, order_no)
        if recent is None and order_no is not None:
            return await self._send_order(response, position, order_no)
        if recent is None:
            # Behind what is kept in memory: read like anybody who comes late.
            recent = [message_of(event) for event in await self._page(position, PAGE_EVENTS)]
            end = recent[-1].position if recent else end
        await _write(response, [one.message for one in recent])
        return end

    async def _send_order(self, response: EventSourceResponse, position: int, order_no: str) -> int:
        """Send an order's events between a position and the end of the log as it is known to all readers."""
        end, version = self.tail.position, 0
        while True:
            async with borrowed(self._pool, self._seconds_max) as connection:
                page = await event_store.read_stream(connection, order_no, version, PAGE_EVENTS)
            await _write(
                response, [message_of(event).message for event in page if position < event.position <= end]
            )
            if not page:
                return max(position, end)
            version = page[-1].version

    async def _wait(self, position: int) -> None:
        """Wait until there is more, and no longer than a reader that has gone may go unnoticed."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LOOK_SECONDS):
                await self.tail.grown(position)


async def _write(response: EventSourceResponse, messages: Sequence[bytes]) -> None:
    if not messages:
        return
    try:
        async with asyncio.timeout(SEND_SECONDS_MAX):
            await response.write(b"".join(messages))
    except TimeoutError:
        # What it does not take would be waited for.
        response.stop_streaming()
        raise


def _own_id(request: web.Request) -> dict[str, str]:
    """Return the header of the id that the caller gave, before the answer has begun."""
    given = given_id(request)
    return {REQUEST_ID_HEADER: given} if given is not None else {}


def _refuse_old_version(request: web.Request) -> None:
    # Without chunks, one that was cut off looks like a whole one.
    if request.version < HttpVersion11:
        raise ProblemError(Kind.HTTP_VERSION, "a stream needs HTTP/1.1")


def _position_seen(request: web.Request) -> int | None:
    given = request.headers.get(LAST_EVENT_ID)
    if given is None:
        return None
    if not _DIGITS.fullmatch(given) or int(given) > POSITION_MAX:
        raise bad_parameter(LAST_EVENT_ID, "it must be a position")
    return int(given)
