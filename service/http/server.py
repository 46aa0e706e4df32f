"""The HTTP server: the one place that hardens aiohttp's defaults, since any client may connect.

Every response of the service, even to a malformed request, is made here or by a handler that is called here.
"""

import asyncio
import resource
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from time import monotonic
from typing import Any, Final, cast

import structlog
from aiohttp import hdrs, web
from aiohttp.http import HttpVersion10, HttpVersion11

from service.http.addresses import LOOPBACK, Network, subscriber
from service.http.budgets import Budget, OverBudgetError
from service.http.problems import ProblemError, ProblemType, to_problem
from service.http.request_ids import (
    REQUEST_ID_HEADER,
    begin_request,
    caller_request_id,
    request_id,
    route_pattern,
)
from service.http.responses import problem_response

# The time limit for a request's head, from its first byte or from the opening of the connection.
HEAD_SECONDS_MAX: Final = 4.0
# How often slow connections are closed.
SWEEP_SECONDS: Final = 1.0
# How long a connection may be idle between requests. Longer than at a proxy, which must close it first.
KEEP_ALIVE_SECONDS: Final = 75.0
# How long a server that ends waits for its clients' next requests, to close each connection after a response.
DRAIN_SECONDS_MAX: Final = 10.0
# How long the rest of a body is read and dropped after an early response.
LINGER_SECONDS_MAX: Final = 2.0
# The time limit for handlers that still run when the service stops.
SHUTDOWN_SECONDS_MAX: Final = 1.0
# The maximum number of open files, connections included.
OPEN_FILES: Final = 20_000
# Connections that wait to be accepted.
BACKLOG: Final = 1_024
# What the kernel holds of a connection until it is read. By default, it would take the bodies of thousands of
# connections, and the event loop would read all of them before any handler runs.
RECEIVE_BYTES_MAX: Final = 8 * 1024
# After a larger piece, a connection is read on in the next turn of the event loop, when handlers have run.
PIECE_BYTES_MAX: Final = 4 * 1024
# Closed connections are logged at most once in this interval.
LOG_SECONDS: Final = 300.0
# If there are too many connections, one in this number is closed at once.
CLOSED_PART: Final = 50

# Stands for the file number of a server's own socket.
OWN_SOCKET: Final = -1

_VERSIONS: Final = (HttpVersion10, HttpVersion11)

logger = structlog.get_logger()

RequestHandler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
# Receives every response's request, status and duration in seconds.
OnResponse = Callable[[web.BaseRequest, int, float], None]


def raise_open_files_limit() -> None:
    """Allow this process as many open files as the system permits; the usual soft limit is about a thousand."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < target:
        # Some systems have a lower limit than they report.
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))


class Connection(web.RequestHandler):
    """One connection, which records since when it has been waiting for a request, or for its complete head.

    Args:
        all_open: the open connections.
    """

    __slots__ = ("all_open", "arriving_since", "has_ended", "has_more", "holder", "idle_since", "is_handling")

    def __init__(self, all_open: "OpenConnections", *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.all_open = all_open
        # The address that the connection counts for; None for this machine and for proxies, which serve others.
        self.holder: str | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.arriving_since: float | None = monotonic()
        self.idle_since = self.arriving_since
        self.is_handling = False
        # Whether the client has closed its sending side. It may be gone, or still wait for its response.
        self.has_ended = False
        # Whether bytes beyond the body arrived during a request: the beginning of the next one.
        self.has_more = False
        super().connection_made(transport)
        self.all_open.admit(self, cast("asyncio.Transport", transport))

    def connection_lost(self, exc: BaseException | None) -> None:
        self.all_open.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        # aiohttp calls this without data to continue with buffered bytes.
        if data:
            if self.is_handling:
                self.has_more = True
            elif self.arriving_since is None:
                self.arriving_since = monotonic()
            if len(data) > PIECE_BYTES_MAX and self.transport is not None:
                self.transport.pause_reading()
                self._loop.call_soon(self._read_on)
        super().data_received(data)

    def _read_on(self) -> None:
        # aiohttp pauses too: if it holds as much of a body, or as many pipelined requests, as it may.
        if self.transport is not None and not (self._reading_paused or self._buffer_paused):
            self.transport.resume_reading()

    def eof_received(self) -> bool | None:  # type: ignore[override]  # asyncio defines the meaning of the result
        """Respond to a client that has closed its sending side, and only then close the connection."""
        self.has_ended = True
        if self.is_handling or self.arriving_since is not None:
            self.close()
            return True
        return None

    def begin(self) -> None:
        """Mark that a complete head has arrived and its request is being handled."""
        self.arriving_since = None
        self.is_handling = True
        self.has_more = False

    def end(self, now: float) -> None:
        """Mark that the request is answered. Bytes that arrived during it begin the next one."""
        self.is_handling = False
        self.idle_since = now
        self.arriving_since = now if self.has_more else None

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Respond to a malformed request, without a log line for each."""
        if request.writer.output_size > 0:
            raise ConnectionError("the response has already begun")
        # The parser's message quotes the request over several lines, token included.
        del exc, message
        return _closing_response(ProblemError(HTTPStatus(status)), request)


class OpenConnections:
    """The open connections, and their budget.

    Args:
        budget: the budget of connections.
        exempt: the networks whose connections have no share of the budget.

    Attributes:
        is_draining: whether each connection is closed after its next response.
    """

    def __init__(self, budget: Budget, exempt: Sequence[Network]) -> None:
        self.is_draining = False
        self._budget = budget
        self._exempt = exempt
        self._open: set[Connection] = set()
        self._none_left = asyncio.Event()
        self._log_at = 0.0

    async def drain(self) -> None:
        """Close each connection after its next response; return when none is open."""
        self.is_draining = True
        self._none_left.clear()
        if self._open:
            await self._none_left.wait()

    def admit(self, connection: Connection, transport: asyncio.Transport) -> None:
        """Count a new connection. If there are too many, close the longest idle ones, or else the new one."""
        # A client that has left already has no name any more.
        host, *_ = transport.get_extra_info("peername") or ("",)
        connection.holder = subscriber(host, self._exempt)
        if self._budget.is_full():
            self._warn("the longest idle connections are closed: there are too many connections")
            self._close_idle(self._open, max(1, self._budget.maximum // CLOSED_PART))
        elif self._budget.is_full_for(connection.holder):
            self._warn("idle connections of an address are closed: it has too many", address=connection.holder)
            self._close_idle([one for one in self._open if one.holder == connection.holder], 1)
        try:
            self._budget.take(connection.holder)
        except OverBudgetError:
            # The budget has logged it.
            transport.abort()
        else:
            self._open.add(connection)

    def leave(self, connection: Connection) -> None:
        """Note that a connection is closed."""
        if connection in self._open:
            self._open.discard(connection)
            self._budget.give_back(connection.holder)
            if not self._open:
                self._none_left.set()

    def _close_idle(self, candidates: Iterable[Connection], count: int) -> None:
        """Close the longest idle of some connections."""
        # This machine's and the proxies' last: they bring the requests of others.
        idle = sorted(
            (one for one in candidates if not one.is_handling),
            key=lambda one: (one.holder is None, one.idle_since),
        )
        for one in idle[:count]:
            self._budget.refusals += 1
            self.leave(one)
            if one.transport is not None:
                one.transport.abort()

    def _warn(self, message: str, **values: object) -> None:
        if monotonic() >= self._log_at:
            self._log_at = monotonic() + LOG_SECONDS
            logger.warning(message, open=self._budget.held, **values)


def connection(request: web.BaseRequest) -> Connection:
    """Return a request's connection, which the server always makes from this class."""
    return cast("Connection", request.protocol)


def is_gone(request: web.Request) -> bool:
    """Return whether the client of an endless response has left."""
    return request.transport is None or connection(request).has_ended


def _guarded(handler: RequestHandler, on_response: OnResponse) -> RequestHandler:
    """Refuse ambiguous framing that aiohttp's parser accepts, and turn every error into a problem."""

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        began = monotonic()
        connection(request).begin()
        begin_request(request)
        try:
            if (problem := _check_framing(request)) is not None:
                # Not measured, since it has no route.
                return _closing_response(problem, request)
            response = await handler(request)
        except Exception as error:
            if request.writer.output_size > 0:
                _cut_off(request, error)
                raise
            response = problem_response(to_problem(error, request))
        finally:
            now = monotonic()
            connection(request).end(now)
        if not response.prepared and (response.status >= HTTPStatus.BAD_REQUEST or caller_request_id(request)):
            response.headers[REQUEST_ID_HEADER] = request_id(request)
        if connection(request).all_open.is_draining and not response.prepared:
            response.force_close()
        on_response(request, response.status, now - began)
        return response

    return handle


def _cut_off(request: web.BaseRequest, error: Exception) -> None:
    """Abort a partial response: anything sent after it would look like a part of it."""
    # A normal close would wait for a client that reads nothing.
    if request.transport is not None:
        request.transport.abort()
    # A client that has left or reads nothing is not a failure of the service.
    if not isinstance(error, ConnectionResetError):
        status, route = to_problem(error, request).status, route_pattern(request)
        logger.warning("response cut off", method=request.method, route=route, error_status=status)


def _check_framing(request: web.BaseRequest) -> ProblemError | None:
    if request.version not in _VERSIONS:
        # aiohttp would respond in the requested version, and has no public way to choose another.
        request._cache["version"] = HttpVersion11  # noqa: SLF001
        return ProblemError(ProblemType.HTTP_VERSION, "supported versions: HTTP/1.0, HTTP/1.1")
    # The parser decodes only "chunked": with another coding, two readers could disagree about the message.
    coding = request.headers.get(hdrs.TRANSFER_ENCODING)
    if coding is not None and coding.strip().lower() != "chunked":
        return ProblemError(ProblemType.BAD_FRAMING, "the only supported transfer coding is chunked")
    return None


def _closing_response(problem: ProblemError, request: web.BaseRequest) -> web.Response:
    response = problem_response(problem)
    response.headers[REQUEST_ID_HEADER] = request_id(request)
    response.headers[hdrs.CONNECTION] = "close"
    response.force_close()
    return response


class HttpServer:
    """Serves one address. An application can replace the first handler without closing a connection.

    Args:
        handler: handles requests until it is replaced. It may pass a request on, since none is routed yet.
        body_bytes_max: the size limit of request bodies.
        host: the address.
        port: the port, 0 for any free one.
        reuse_port: whether other processes may listen on it too (SO_REUSEPORT).
        on_response: called for every response.
        budget: the budget of connections.
        exempt: the networks whose connections have no share of the budget.
    """

    def __init__(  # noqa: PLR0913 - each is named by its caller
        self,
        handler: RequestHandler,
        body_bytes_max: int,
        host: str,
        port: int,
        *,
        reuse_port: bool,
        on_response: OnResponse,
        budget: Budget,
        exempt: Sequence[Network] = LOOPBACK,
    ) -> None:
        self._connections = OpenConnections(budget, exempt)
        self._on_response = on_response
        self._handler = handler
        # The first one has the connections, and an application without routes that limits bodies.
        self._runners = [_make_runner(web.Application(client_max_size=body_bytes_max))]
        self._address = (host, port)
        self._reuse_port = reuse_port
        self._make_connection: Callable[[], Connection] | None = None
        # By the sockets' file numbers.
        self._listeners: dict[int, asyncio.Server] = {}

    async def start(self) -> int:
        """Listen, and return the port.

        Raises:
            OSError: the server cannot listen on the address.
        """
        make_connection = await self._prepare()
        host, port = self._address
        # None if not requested, since not every platform supports reuse_port.
        listener = await asyncio.get_running_loop().create_server(
            make_connection, host, port, backlog=BACKLOG, reuse_port=self._reuse_port or None
        )
        self._listeners[OWN_SOCKET] = listener
        for listening in listener.sockets:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES_MAX)
        name: tuple[str, int] = listener.sockets[0].getsockname()
        return name[1]

    async def listen_on(self, sockets: Sequence[socket.socket]) -> None:
        """Accept connections from these bound sockets and from no others. The caller keeps the sockets open.

        Raises:
            OSError: the server cannot listen on a socket.
        """
        make_connection = await self._prepare()
        loop = asyncio.get_running_loop()
        for one in sockets:
            if one.fileno() not in self._listeners:
                # A duplicate, since the server closes its socket when it stops listening.
                listener = await loop.create_server(make_connection, sock=one.dup(), backlog=BACKLOG)
                self._listeners[one.fileno()] = listener
        for number in {*self._listeners} - {one.fileno() for one in sockets}:
            self._listeners.pop(number).close()

    async def _prepare(self) -> Callable[[], Connection]:
        if self._make_connection is None:
            server = await _set_up(self._runners[0])
            server.request_handler = _guarded(self.handle, self._measure)
            self._make_connection = partial(
                Connection,
                self._connections,
                server,
                loop=asyncio.get_running_loop(),
                access_log=None,
                keepalive_timeout=KEEP_ALIVE_SECONDS,
                lingering_time=LINGER_SECONDS_MAX,
                auto_decompress=False,
            )
        return self._make_connection

    async def replace(self, app: web.Application, on_response: OnResponse) -> None:
        """Let another application handle every further request, on open connections too.

        Args:
            app: the application, with the same size limit of bodies.
            on_response: called for every response.
        """
        runner = _make_runner(app)
        self._runners.append(runner)
        self._handler = (await _set_up(runner)).request_handler
        self._on_response = on_response

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Pass a request to the present handler."""
        return await self._handler(request)

    def _measure(self, request: web.BaseRequest, status: int, seconds: float) -> None:
        self._on_response(request, status, seconds)

    async def close_slow_connections(self) -> None:
        """Until cancelled, close every connection on which a head takes longer than HEAD_SECONDS_MAX."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            server = self._runners[0].server
            latest = monotonic() - HEAD_SECONDS_MAX
            for each in server.connections if server is not None else ():
                since = getattr(each, "arriving_since", None)
                if since is not None and since < latest:
                    each.force_close()

    def stop_listening(self) -> None:
        """Accept no more connections. Requests on the open ones are still answered."""
        while self._listeners:
            _, listener = self._listeners.popitem()
            listener.close()

    async def drain(self) -> None:
        """Accept no more connections, and close each open one after its next response.

        No client loses a request by that. Return when no connection is open, or after DRAIN_SECONDS_MAX.
        """
        self.stop_listening()
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS_MAX):
                await self._connections.drain()

    async def stop(self) -> None:
        """Close every connection."""
        self.stop_listening()
        for runner in self._runners:
            await runner.cleanup()


def _make_runner(app: web.Application) -> web.AppRunner:
    return web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_SECONDS_MAX)


async def _set_up(runner: web.AppRunner) -> web.Server:
    await runner.setup()
    if runner.server is None:
        raise RuntimeError("aiohttp's runner has no server")
    return runner.server
