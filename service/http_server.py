"""HTTP as it comes over a socket that anybody can open: the one place where aiohttp's defaults are mended.

Every answer of this service, also one to bytes that are no request, is made here or by a handler beneath.
"""

import asyncio
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from time import monotonic
from typing import Final

from aiohttp import hdrs, web
from aiohttp.http import HttpVersion10, HttpVersion11

from service.problems import ProblemError, problem_answer, problem_of

# A request's head, from its first byte or from the opening of the connection; whoever is slower is cut off.
HEAD_SECONDS_MAX: Final = 7.0
# A body, from the end of its head.
BODY_SECONDS_MAX: Final = 5.0
# How often connections are looked at.
SWEEP_SECONDS: Final = 1.0
# Between two requests on a connection: longer than the proxies in front, which must be the ones to close.
KEEP_ALIVE_SECONDS: Final = 75.0
# What follows an answer that did not wait for the body is read and dropped for so long.
LINGER_SECONDS_MAX: Final = 2.0
# For the handlers that still run once everything that was taken is answered.
SHUTDOWN_SECONDS_MAX: Final = 1.0
# Connections that wait to be accepted.
BACKLOG: Final = 1_024

_VERSIONS: Final = (HttpVersion10, HttpVersion11)
_CODINGS: Final = ("", "identity", "gzip")

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


async def read_body(request: web.Request) -> bytes:
    """Return the body of a request, out of its coding.

    Raises:
        ProblemError: it is too large (413), too slow (408), broken (400), or in an unknown coding (415).
    """
    if request.headers.get(hdrs.CONTENT_ENCODING, "").strip().lower() not in _CODINGS:
        headers = {"Accept-Encoding": "gzip"}
        raise ProblemError(415, "Unknown content coding", "there are gzip and identity", headers=headers)
    if (request.content_length or 0) > request.client_max_size:
        raise _too_large(request)
    try:
        if request.content.is_eof():
            return await request.read()
        async with asyncio.timeout(BODY_SECONDS_MAX):
            return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise _too_large(request) from None
    except TimeoutError:
        detail = f"the body took longer than {BODY_SECONDS_MAX:g} s"
        raise ProblemError(408, "Too slow", detail, headers={hdrs.CONNECTION: "close"}) from None
    except (web.RequestPayloadError, ConnectionError) as error:
        # Corrupt in transfer or in compression, or the sender is gone; then nobody reads this.
        raise ProblemError(400, "Bad body", f"the body cannot be read: {error}") from None


def _too_large(request: web.Request) -> ProblemError:
    return ProblemError(413, "Too large", f"a body has {request.client_max_size} bytes at most")


class _Connection(web.RequestHandler):
    """One connection; knows since when it has been waiting for a request to be whole."""

    __slots__ = ("arriving_since",)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.arriving_since: float | None = monotonic()
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if self.arriving_since is None:
            self.arriving_since = monotonic()
        super().data_received(data)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer bytes that are no request; without a log line for each of them."""
        if request.writer.output_size > 0:
            raise ConnectionError("an answer is on its way already")
        # The parser's message quotes what was sent, token and all, over several lines.
        del exc, message
        answer = problem_answer(ProblemError(status, HTTPStatus(status).phrase))
        answer.force_close()
        return answer


def _guarded(handler: Handler) -> Handler:
    """Refuse what the parser lets through, and answer every error with a problem."""

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        connection = request.protocol
        if isinstance(connection, _Connection):
            connection.arriving_since = None
        try:
            _refuse_odd_framing(request)
            return await handler(request)
        except Exception as error:  # noqa: BLE001 - the outermost place: whatever it is gets an answer
            answer = problem_answer(problem_of(error, request))
            if answer.status in (HTTPStatus.BAD_REQUEST, HTTPStatus.HTTP_VERSION_NOT_SUPPORTED):
                answer.force_close()
            return answer
        finally:
            if isinstance(connection, _Connection):
                connection.arriving_since = None

    return handle


def _refuse_odd_framing(request: web.BaseRequest) -> None:
    if request.version not in _VERSIONS:
        raise ProblemError(505, "HTTP version not supported", "there are HTTP/1.0 and HTTP/1.1")
    # A coding below "chunked" is passed on by the parser undecoded: two readers of one message would disagree.
    coding = request.headers.get(hdrs.TRANSFER_ENCODING)
    if coding is not None and coding.strip().lower() != "chunked":
        raise ProblemError(400, "Bad framing", "the one transfer coding is chunked")


class HttpServer:
    """Serves an application on one address.

    Args:
        app: the application.
        host: the address.
        port: the port, 0 for any free one.
        reuse_port: whether other processes may listen on it as well (SO_REUSEPORT).
    """

    def __init__(self, app: web.Application, host: str, port: int, *, reuse_port: bool) -> None:
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_SECONDS_MAX)
        self._address = (host, port)
        self._reuse_port = reuse_port
        self._listener: asyncio.Server | None = None

    async def start(self) -> int:
        """Listen, and return the port.

        Raises:
            OSError: the address cannot be listened on.
        """
        await self._runner.setup()
        server = self._runner.server
        if server is None:
            raise RuntimeError("the runner has no server")
        server.request_handler = _guarded(server.request_handler)
        loop = asyncio.get_running_loop()

        def connection() -> _Connection:
            return _Connection(
                server,
                loop=loop,
                access_log=None,  # type: ignore[arg-type]  # as its own runner passes it
                keepalive_timeout=KEEP_ALIVE_SECONDS,
                lingering_time=LINGER_SECONDS_MAX,
            )

        host, port = self._address
        # None where it was not asked for: not every platform has it.
        self._listener = await loop.create_server(
            connection, host, port, backlog=BACKLOG, reuse_port=self._reuse_port or None
        )
        name: tuple[str, int] = self._listener.sockets[0].getsockname()
        return name[1]

    async def close_slow_connections(self) -> None:
        """Cut off, for ever, who does not get a request's head across in time."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            server = self._runner.server
            latest = monotonic() - HEAD_SECONDS_MAX
            for connection in server.connections if server is not None else ():
                since = getattr(connection, "arriving_since", None)
                if since is not None and since < latest:
                    connection.force_close()

    def stop_listening(self) -> None:
        """Take no more connections; what came on those that are there is still answered."""
        if self._listener is not None:
            self._listener.close()

    async def stop(self) -> None:
        """End every connection."""
        self.stop_listening()
        await self._runner.cleanup()
