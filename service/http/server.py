"""The HTTP server: the one place that hardens aiohttp's defaults, since any client may connect.

Every response of the service, even to a malformed request, is made here or by a handler that is called here.
"""

import asyncio
import resource
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from time import monotonic
from typing import Final, cast

import structlog
from aiohttp import hdrs, web
from aiohttp.http import HttpVersion10, HttpVersion11

from service.http.addresses import LOOPBACK, Network
from service.http.budgets import RESPONSE_BYTES_FREE, RESPONSES_BYTES_PER_ADDRESS_MAX, Budgets, OverBudgetError
from service.http.connections import (
    LIMITS,
    UNREAD_BYTES_MAX,
    Connection,
    Limits,
    OpenConnections,
    closing_response,
    connection,
)
from service.http.problems import LogLimit, ProblemError, ProblemType, to_problem
from service.http.request_ids import (
    REQUEST_ID_HEADER,
    begin_request,
    caller_request_id,
    request_id,
    route_pattern,
)
from service.http.responses import problem_response
from service.http.streaming import send_slices

# How long a server that ends waits for its clients' next requests, to close each connection after a response.
# Those that arrive in the meantime wait for the next process, or are accepted by another one.
DRAIN_SECONDS_MAX: Final = 1.0
# The time limit for handlers that still run when the service stops.
SHUTDOWN_SECONDS_MAX: Final = 1.0
# The maximum number of open files, connections included.
OPEN_FILES: Final = 20_000
# Connections that wait to be accepted.
BACKLOG: Final = 1_024
# What the kernel holds of a connection until it is read. By default, it would take the bodies of thousands of
# connections, and the event loop would read all of them before any handler runs.
RECEIVE_BYTES_MAX: Final = 8 * 1024
# The same of what is sent: it would accept megabytes for each client that reads nothing.
SEND_BYTES_MAX: Final = 32 * 1024

_VERSIONS: Final = (HttpVersion10, HttpVersion11)

logger = structlog.get_logger()
_cut_responses: Final = LogLimit()

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


def _guarded(handler: RequestHandler, on_response: OnResponse) -> RequestHandler:
    """Refuse heads that aiohttp misreads, turn every error into a problem, and bound large responses."""

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        began = monotonic()
        client = connection(request)
        client.begin()
        begin_request(request)
        size = 0
        try:
            if (problem := _check_head(request)) is not None:
                # Not measured, since it has no route.
                return closing_response(problem, request)
            try:
                response = await handler(request)
                size = _take_size(response, request)
            except Exception as error:
                if request.writer.output_size > 0:
                    _cut_off(request, error)
                    raise
                response = problem_response(to_problem(error, request))
            if not response.prepared and (
                response.status >= HTTPStatus.BAD_REQUEST or caller_request_id(request)
            ):
                response.headers[REQUEST_ID_HEADER] = request_id(request)
            if client.all_open.is_draining and not response.prepared:
                response.force_close()
            on_response(request, response.status, monotonic() - began)
            if size:
                await _send_large(request, cast("web.Response", response))
            return response
        finally:
            if size:
                client.all_open.budgets.responses.give_back(client.holder, size)
            client.end()

    return handle


def _take_size(response: web.StreamResponse, request: web.BaseRequest) -> int:
    """Take a large response's size from the budget, and return it; 0 if the response is small.

    Raises:
        OverBudgetError: too many bytes of responses are being sent (429).
    """
    body = response.body if isinstance(response, web.Response) else None
    if not isinstance(body, bytes) or len(body) <= RESPONSE_BYTES_FREE or request.method == hdrs.METH_HEAD:
        return 0
    # One that is larger than a share is sent too, and counts as much as a share.
    size = min(len(body), RESPONSES_BYTES_PER_ADDRESS_MAX)
    client = connection(request)
    try:
        client.all_open.budgets.responses.take(client.holder, size)
    except OverBudgetError:
        client.close_after_response()
        raise
    return size


async def _send_large(request: web.BaseRequest, response: web.Response) -> None:
    """Send a response, of which the connection then holds nothing while it is idle.

    Raises:
        ConnectionError: the client has left, or takes too long.
    """
    client = connection(request)
    try:
        async with asyncio.timeout(client.all_open.limits.response_seconds_max):
            await send_slices(request, response)
    except TimeoutError:
        client.cut("response_seconds")
        raise ConnectionResetError("the client takes too long") from None


def _cut_off(request: web.BaseRequest, error: Exception) -> None:
    """Abort a partial response: anything sent after it would look like a part of it."""
    # A normal close would wait for a client that reads nothing.
    connection(request).abort()
    # A client that has left or reads nothing is not a failure of the service.
    if not isinstance(error, ConnectionResetError):
        status, route = to_problem(error, request).status, route_pattern(request)
        if (suppressed := _cut_responses.admit((route, type(error)))) is not None:
            logger.warning(
                "response cut off",
                method=request.method,
                route=route,
                error_status=status,
                suppressed=suppressed,
            )


def _check_head(request: web.BaseRequest) -> ProblemError | None:
    """Return the problem of a head that aiohttp would misread or fail on."""
    if request.version not in _VERSIONS:
        # aiohttp would respond in the requested version, and has no public way to choose another.
        request._cache["version"] = HttpVersion11  # noqa: SLF001
        return ProblemError(ProblemType.HTTP_VERSION, "supported versions: HTTP/1.0, HTTP/1.1")
    # The parser decodes only "chunked": with another coding, two readers could disagree about the message.
    coding = request.headers.get(hdrs.TRANSFER_ENCODING)
    if coding is not None and coding.strip().lower() != "chunked":
        return ProblemError(ProblemType.BAD_FRAMING, "the only supported transfer coding is chunked")
    # aiohttp quotes the value in its response, and fails if it is not UTF-8.
    expectation = request.headers.get(hdrs.EXPECT)
    if expectation is not None and expectation.lower() != "100-continue":
        client = connection(request)
        client.all_open.budgets.excesses.count("expectation", client.holder)
        return ProblemError(HTTPStatus.EXPECTATION_FAILED, "the only supported expectation is 100-continue")
    return None


def _limit_kernel(listening: socket.socket) -> None:
    """Limit what the kernel holds for each connection that this socket accepts."""
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES_MAX)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES_MAX)


class HttpServer:
    """Serves one address. An application can replace the first handler without closing a connection.

    Args:
        handler: handles requests until it is replaced. It may pass a request on, since none is routed yet.
        body_bytes_max: the size limit of request bodies.
        host: the address.
        port: the port, 0 for any free one.
        reuse_port: whether other processes may listen on it too (SO_REUSEPORT).
        on_response: called for every response.
        budgets: the budgets of the process.
        limits: the limits of each connection.
        exempt: the networks whose connections have no share of the budgets.
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
        budgets: Budgets,
        limits: Limits = LIMITS,
        exempt: Sequence[Network] = LOOPBACK,
    ) -> None:
        self._connections = OpenConnections(budgets, limits, exempt)
        self._limits = limits
        self._on_response = on_response
        self._handler = handler
        # The first one has the connections, and an application without routes that limits bodies.
        self._runners = [_make_runner(web.Application(client_max_size=body_bytes_max))]
        self._address = (host, port)
        self._reuse_port = reuse_port
        self._listeners: list[asyncio.Server] = []

    async def start(self, inherited: Sequence[socket.socket] = ()) -> int:
        """Listen, and return the port.

        Args:
            inherited: the sockets to accept connections from, instead of one for the address. They stay open.

        Raises:
            OSError: the server cannot listen on the address, or on a socket.
        """
        server = await _set_up(self._runners[0])
        server.request_handler = _guarded(self.handle, self._measure)
        loop = asyncio.get_running_loop()
        make_connection = partial(
            Connection,
            self._connections,
            server,
            loop=loop,
            access_log=None,
            keepalive_timeout=self._limits.idle_seconds_max,
            lingering_time=self._limits.linger_seconds_max,
            read_bufsize=UNREAD_BYTES_MAX,
        )
        host, port = self._address
        self._listeners = [
            # A duplicate, since the server closes its socket when it stops listening.
            await loop.create_server(make_connection, sock=one.dup(), backlog=BACKLOG)
            for one in inherited
        ] or [
            # None if not requested, since not every platform supports reuse_port.
            await loop.create_server(
                make_connection, host, port, backlog=BACKLOG, reuse_port=self._reuse_port or None
            )
        ]
        sockets = [one for listener in self._listeners for one in listener.sockets]
        for one in sockets:
            _limit_kernel(one)
        name: tuple[str, int] = sockets[0].getsockname()
        return name[1]

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
        """Until cancelled, close every connection on which a head or a response takes too long."""
        await self._connections.close_slow()

    def stop_listening(self) -> None:
        """Accept no more connections. Requests on the open ones are still answered."""
        while self._listeners:
            self._listeners.pop().close()

    async def drain(self) -> None:
        """Accept no more connections, and close each open one after its next response.

        A client that goes on sending loses no request by that. Return when no connection is open, or after
        DRAIN_SECONDS_MAX.
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
