"""HTTP as it comes over a socket that anybody can open: the one place where aiohttp's defaults are mended.

Every answer of this service, also one to bytes that are no request, is made here or by a handler beneath.
"""

import asyncio
import resource
import zlib
from collections.abc import Awaitable, Callable
from contextlib import suppress
from http import HTTPStatus
from time import monotonic
from typing import Final, cast

import structlog
from aiohttp import hdrs, web
from aiohttp.http import HttpVersion10, HttpVersion11

from service.http import request_ids as requests
from service.http.problems import Kind, ProblemError, problem_answer, problem_of
from service.http.request_ids import REQUEST_ID_HEADER, given_id, request_id_of, route_of

# A request's head, from its first byte or from the opening of the connection; whoever is slower is cut off.
HEAD_SECONDS_MAX: Final = 4.0
# A body, from the end of its head: with the head and a sweep, ten seconds at most.
BODY_SECONDS_MAX: Final = 4.5
# Packers write one; each more is copied once for each before it.
GZIP_MEMBERS_MAX: Final = 16
# How often connections are looked at.
SWEEP_SECONDS: Final = 1.0
# Between two requests on a connection: longer than the proxies in front, which must be the ones to close.
KEEP_ALIVE_SECONDS: Final = 75.0
# What follows an answer that did not wait for the body is read and dropped for so long.
LINGER_SECONDS_MAX: Final = 2.0
# For the handlers that still run once everything that was taken is answered.
SHUTDOWN_SECONDS_MAX: Final = 1.0
# Connections and everything else that is a file.
OPEN_FILES: Final = 20_000
# Connections that wait to be accepted.
BACKLOG: Final = 1_024

_VERSIONS: Final = (HttpVersion10, HttpVersion11)
_CODINGS: Final = ("", "identity", "gzip")

log = structlog.get_logger()

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
# Told the status of every answer, and the seconds that it took.
OnAnswer = Callable[[web.BaseRequest, int, float], None]


def allow_open_files() -> None:
    """Let this process have as many connections as the system lets it: the usual limit is a thousand."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        # Some systems have a lower limit than they say.
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def read_body(request: web.Request) -> bytes:
    """Return the body of a request, out of its coding.

    Raises:
        ProblemError: it is too large (413), too slow (408), broken (400), or in an unknown coding (415).
    """
    coding = ",".join(request.headers.getall(hdrs.CONTENT_ENCODING, ())).strip().lower()
    if coding not in _CODINGS:
        headers = {"Accept-Encoding": "gzip"}
        raise ProblemError(Kind.UNKNOWN_CODING, "there are gzip and identity", headers=headers)
    if (request.content_length or 0) > request.client_max_size:
        raise _too_large(request)
    try:
        if request.content.is_eof():
            body = await request.read()
        else:
            async with asyncio.timeout(BODY_SECONDS_MAX):
                body = await request.read()
            _connection_of(request).has_more = False
        return body if coding != "gzip" else _gunzip(body, request)
    except web.HTTPRequestEntityTooLarge:
        raise _too_large(request) from None
    except TimeoutError:
        detail = f"the body took longer than {BODY_SECONDS_MAX:g} s"
        raise ProblemError(Kind.TOO_SLOW, detail, headers={hdrs.CONNECTION: "close"}) from None
    except zlib.error as error:
        raise ProblemError(Kind.BAD_BODY, f"the body is no gzip: {error}") from None
    except (web.RequestPayloadError, ConnectionError):
        # Corrupt in transfer, or the sender is gone; then nobody reads this.
        raise ProblemError(Kind.BAD_BODY, "the body cannot be read to its end") from None


def _gunzip(body: bytes, request: web.Request) -> bytes:
    """Unpack to the end of the last member: aiohttp's own way takes what is cut short for whole."""
    unpacked = b""
    for _ in range(GZIP_MEMBERS_MAX):
        member = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
        unpacked += member.decompress(body, request.client_max_size + 1 - len(unpacked))
        if len(unpacked) > request.client_max_size:
            raise _too_large(request)
        if not member.eof:
            raise zlib.error("it is cut short")
        body = member.unused_data
        if not body:
            return unpacked
    raise zlib.error(f"it has more than {GZIP_MEMBERS_MAX} members")


def is_gone(request: web.Request) -> bool:
    """Tell whether nobody reads an answer without end any more."""
    return request.transport is None or _connection_of(request).has_ended


def _too_large(request: web.Request) -> ProblemError:
    return ProblemError(Kind.TOO_LARGE, f"a body has {request.client_max_size} bytes at most")


class _Connection(web.RequestHandler):
    """One connection; knows since when it has been waiting for a request's head to be whole."""

    __slots__ = ("arriving_since", "has_ended", "has_more", "is_handling")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.arriving_since: float | None = monotonic()
        self.is_handling = False
        # Whether the client has said that it says no more; it may be gone, or wait for its answer.
        self.has_ended = False
        # Whether something came during a request that is not of its body: the beginning of the next one.
        self.has_more = False
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        # aiohttp itself calls this without data, to go on with what it has kept.
        if data:
            if self.is_handling:
                self.has_more = True
            elif self.arriving_since is None:
                self.arriving_since = monotonic()
        super().data_received(data)

    def eof_received(self) -> bool | None:  # type: ignore[override]  # asyncio's own meaning of what it returns
        """Answer a client that has said all it had to say, and only then close."""
        self.has_ended = True
        if self.is_handling or self.arriving_since is not None:
            self.close()
            return True
        return None

    def begin(self) -> None:
        """A head has come whole, and its request is handled."""
        self.arriving_since = None
        self.is_handling = True
        self.has_more = False

    def end(self) -> None:
        """The request is answered; what came meanwhile is the beginning of the next one."""
        self.is_handling = False
        self.arriving_since = monotonic() if self.has_more else None

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
        return _closing(ProblemError(HTTPStatus(status)), request)


def _connection_of(request: web.BaseRequest) -> _Connection:
    # The server makes no others.
    return cast("_Connection", request.protocol)


def _guarded(handler: Handler, on_answer: OnAnswer) -> Handler:
    """Refuse what the parser lets through, and answer every error with a problem."""

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        connection = _connection_of(request)
        began = monotonic()
        connection.begin()
        requests.begin(request)
        try:
            if (problem := _odd_framing(request)) is not None:
                # Not measured: it has come to no route.
                return _closing(problem, request)
            answer = await handler(request)
        except Exception as error:
            if request.writer.output_size > 0:
                _cut_off(request, error)
                raise
            answer = problem_answer(problem_of(error, request))
        finally:
            connection.end()
        if not answer.prepared and (answer.status >= HTTPStatus.BAD_REQUEST or given_id(request)):
            answer.headers[REQUEST_ID_HEADER] = request_id_of(request)
        on_answer(request, answer.status, monotonic() - began)
        return answer

    return handle


def _cut_off(request: web.BaseRequest, error: Exception) -> None:
    """End half an answer: whatever followed would be taken for more of it."""
    # To close it would wait for a client that takes nothing.
    if request.transport is not None:
        request.transport.abort()
    # A client that has gone, or takes nothing, is no failure of this service.
    if not isinstance(error, ConnectionResetError):
        status = problem_of(error, request).status
        log.warning("answer cut off", method=request.method, route=route_of(request), as_if=status)


def _odd_framing(request: web.BaseRequest) -> ProblemError | None:
    if request.version not in _VERSIONS:
        # aiohttp would answer in the version that it was asked in, and has no public way to another.
        request._cache["version"] = HttpVersion11  # noqa: SLF001
        return ProblemError(Kind.HTTP_VERSION, "there are HTTP/1.0 and HTTP/1.1")
    # A coding below "chunked" is passed on by the parser undecoded: two readers of one message would disagree.
    coding = request.headers.get(hdrs.TRANSFER_ENCODING)
    if coding is not None and coding.strip().lower() != "chunked":
        return ProblemError(Kind.BAD_FRAMING, "the one transfer coding is chunked")
    return None


def _closing(problem: ProblemError, request: web.BaseRequest) -> web.Response:
    answer = problem_answer(problem)
    answer.headers[REQUEST_ID_HEADER] = request_id_of(request)
    answer.headers[hdrs.CONNECTION] = "close"
    answer.force_close()
    return answer


class HttpServer:
    """Serves an application on one address.

    Args:
        app: the application.
        host: the address.
        port: the port, 0 for any free one.
        reuse_port: whether other processes may listen on it as well (SO_REUSEPORT).
        on_answer: told of every answer.
    """

    def __init__(
        self, app: web.Application, host: str, port: int, *, reuse_port: bool, on_answer: OnAnswer
    ) -> None:
        self._on_answer = on_answer
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
        server.request_handler = _guarded(server.request_handler, self._on_answer)
        loop = asyncio.get_running_loop()

        def connection() -> _Connection:
            return _Connection(
                server,
                loop=loop,
                access_log=None,  # type: ignore[arg-type]  # as its own runner passes it
                keepalive_timeout=KEEP_ALIVE_SECONDS,
                lingering_time=LINGER_SECONDS_MAX,
                auto_decompress=False,
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
