"""The connections of the server, and what each of them may hold in each of its phases: see docs/SECURITY.md."""

import asyncio
import fcntl
import socket
import struct
import termios
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from time import monotonic
from typing import Any, Final, cast

import structlog
from aiohttp import hdrs, web
from aiohttp.http import HttpRequestParser, RawRequestMessage
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import _ErrInfo  # the parser's own errors reach the loop of requests in this form

from service.http.addresses import Network, subscriber
from service.http.budgets import HEAD_BYTES_FREE, Budgets, Excess, OverBudgetError
from service.http.problems import ProblemError, unavailable
from service.http.request_ids import REQUEST_ID_HEADER, request_id
from service.http.responses import problem_response

# A head in all: its line and its fields. Usual ones have 1 KiB, and 8 KiB with large cookies.
HEAD_BYTES_MAX: Final = 32 * 1024
# The time limit for a request's head, from its first byte or from the opening of the connection.
HEAD_SECONDS_MAX: Final = 4.0
# The time limit for a body, from the end of its head. Head, sweep and body together take at most ten seconds.
BODY_SECONDS_MAX: Final = 4.5
# How much of a body waits until its handler reads it; twice as much pauses the connection.
UNREAD_BYTES_MAX: Final = 4 * 1024
# A client that accepts nothing of a response for this long is cut off.
STALL_SECONDS_MAX: Final = 10.0
# The time limit for a response that is sent in slices, however steadily its client reads. Streams have none.
RESPONSE_SECONDS_MAX: Final = 60.0
# What waits in memory until the client accepts it.
SLICE_BYTES_MAX: Final = 8 * 1024
# How long a connection may be idle between requests. Longer than at a proxy, which must close it first.
IDLE_SECONDS_MAX: Final = 75.0
# How long the rest of a body is read and dropped after an early response.
LINGER_SECONDS_MAX: Final = 2.0
# How often slow connections are closed.
SWEEP_SECONDS: Final = 1.0
# After a larger piece, a connection is read on in the next turn of the event loop, when handlers have run.
PIECE_BYTES_MAX: Final = 4 * 1024
# Closed connections are logged at most once in this interval.
LOG_SECONDS: Final = 300.0
# If there are too many connections, one in this number is closed at once.
CLOSED_PART: Final = 50

# What a parsed head costs: each byte is held encoded and decoded, and each field in a few objects.
BYTE_WEIGHT: Final = 2
FIELD_WEIGHT: Final = 256
END_OF_HEAD: Final = b"\r\n\r\n"
LAST_CHUNK: Final = b"0\r\n\r\n"
# SO_LINGER for no time: the kernel resets the connection.
_RESET: Final = struct.pack("ii", 1, 0)

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of each connection, which only tests change. The constants of the same names explain them."""

    head_bytes_max: int = HEAD_BYTES_MAX
    head_seconds_max: float = HEAD_SECONDS_MAX
    body_seconds_max: float = BODY_SECONDS_MAX
    stall_seconds_max: float = STALL_SECONDS_MAX
    response_seconds_max: float = RESPONSE_SECONDS_MAX
    idle_seconds_max: float = IDLE_SECONDS_MAX
    linger_seconds_max: float = LINGER_SECONDS_MAX
    sweep_seconds: float = SWEEP_SECONDS


LIMITS: Final = Limits()


class Connection(web.RequestHandler):
    """One connection, which parses a request only when the one before it is answered.

    Args:
        all_open: the open connections.
    """

    __slots__ = (
        *("ahead", "all_open", "arriving_since", "behind_head", "carried", "has_ended", "head_bytes"),
        *("head_fields", "head_held", "holder", "idle_since", "is_blind", "is_chunked", "is_handling"),
        *("is_upgrade", "payload", "piece", "progressed_at", "unsent", "weight", "wire"),
    )

    def __init__(self, all_open: "OpenConnections", *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.all_open = all_open
        # The address that the connection counts for; None for this machine and for proxies, which serve others.
        self.holder: str | None = None
        # aiohttp's own parser would emit up to 32 requests at a time.
        self._parser = HttpRequestParser(
            self,
            self._loop,
            UNREAD_BYTES_MAX,
            payload_exception=web.RequestPayloadError,
            auto_decompress=False,
            max_msg_queue_size=1,
        )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.arriving_since: float | None = monotonic()
        self.idle_since = self.arriving_since
        # Whether a request is parsed and not yet answered.
        self.is_handling = False
        # Whether the client has closed its sending side. It may be gone, or still wait for its response.
        self.has_ended = False
        # The body of the last request, the number of bytes that came behind its head, and the last of them.
        self.payload = EMPTY_PAYLOAD
        self.behind_head = 0
        self.piece = b""
        self.is_chunked = self.is_upgrade = False
        # Whether the beginning of the next request is unknown, since bytes came behind a chunked body, or since
        # the parser expects another protocol.
        self.is_blind = False
        # The bytes and fields of a head that is arriving, and what to find its end with: its last bytes, or all
        # that the parser holds of it since the request before it.
        self.head_bytes = self.head_fields = 0
        self.carried = b""
        # What arrived during a request, behind it: the parser has not seen it.
        self.ahead = b""
        # What the last head weighs, and what of it counts for the budget.
        self.weight = self.head_held = 0
        # What the client has not accepted yet, and when it last accepted something.
        self.unsent = 0
        self.progressed_at = 0.0
        # aiohttp drops its reference when it closes the connection, which may then still have to send.
        self.wire = cast("asyncio.Transport", transport)
        self.wire.set_write_buffer_limits(high=SLICE_BYTES_MAX)
        super().connection_made(transport)
        self.all_open.admit(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.all_open.leave(self)
        self._weigh(0)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._close or self._force_close:
            return
        if len(data) > PIECE_BYTES_MAX and self.transport is not None:
            self.transport.pause_reading()
            self._loop.call_soon(self._read_on)
        if not self.payload.is_eof():
            # aiohttp calls this without data to continue with buffered bytes of a body.
            self.behind_head += len(data)
            self.piece = self.piece[1 - len(LAST_CHUNK) :] + data if data else self.piece
            super().data_received(data)
            if self.payload.is_eof():
                self._find_rest()
        elif self.is_handling or self._paused:
            self._hold_back(data)
        else:
            self._parse(data)

    def _parse(self, data: bytes) -> None:
        """Parse a piece of a head, and what follows it up to the end of its request."""
        if self.arriving_since is None:
            self.arriving_since = monotonic()
        super().data_received(data)
        seen = self.carried + data if self.carried else data
        if not self._messages:
            self.head_bytes += len(data)
            self.head_fields += data.count(b"\n")
            self.carried = seen[1 - len(END_OF_HEAD) :]
            if self.head_bytes > self.all_open.limits.head_bytes_max:
                self._refuse_head()
            else:
                self._weigh(BYTE_WEIGHT * self.head_bytes + FIELD_WEIGHT * self.head_fields)
            return
        message, self.payload = self._messages[-1]
        if not isinstance(message, RawRequestMessage):
            # The head is malformed: the connection is closed after the response.
            self._close = True
            return
        self.is_handling = True
        end = seen.find(END_OF_HEAD)
        if end == 0 and not self.head_bytes:
            # Empty lines before a request are skipped.
            end = seen.find(END_OF_HEAD, len(seen) - len(seen.lstrip(b"\r\n")))
        self.behind_head = len(seen) - end - len(END_OF_HEAD)
        self.piece = seen
        self.is_chunked = message.chunked
        self.is_upgrade = message.upgrade
        size = self.head_bytes + len(data) - self.behind_head
        self.head_bytes = self.head_fields = 0
        self.carried = b""
        if size > self.all_open.limits.head_bytes_max:
            self._refuse_head()
            return
        self._weigh(BYTE_WEIGHT * size + FIELD_WEIGHT * len(message.raw_headers))
        if self.payload.is_eof():
            self._find_rest()

    def _find_rest(self) -> None:
        """Note what the parser has received behind a request that is now complete."""
        if self.is_chunked:
            self.is_blind = not self.piece.endswith(LAST_CHUNK)
        elif (rest := self.behind_head - self.payload.total_bytes) > 0:
            # Some clients end a body with an empty line.
            self.carried = self.piece[-rest:].lstrip(b"\r\n")
            self.head_bytes = len(self.carried)
            self.head_fields = self.carried.count(b"\n")
        self.piece = b""
        if not self.is_handling:
            # The rest of a body that no handler wanted.
            self._leave()

    def _hold_back(self, data: bytes) -> None:
        """Keep what arrives behind a request, and read no more until the request is answered."""
        if data and self.transport is not None:
            self.transport.pause_reading()
            self.ahead += data
            self._weigh(self.weight + len(data))

    def _go_on(self) -> None:
        """Parse what arrived behind the last request, now that its response is sent."""
        if (
            self.transport is not None
            and not (self.is_handling or self._paused)
            and (self.carried or self.ahead)
        ):
            data, self.ahead = self.ahead, b""
            self._parse(data)
            self._read_on()

    def _read_on(self) -> None:
        # aiohttp pauses too, if it holds as much of a body as it may.
        if self.transport is not None and not (self.ahead or self._reading_paused or self._buffer_paused):
            self.transport.resume_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.progressed_at = monotonic()
        self._leave()

    def eof_received(self) -> bool | None:  # type: ignore[override]  # asyncio defines the meaning of the result
        """Respond to a client that has closed its sending side, and only then close the connection."""
        self.has_ended = True
        if self.is_handling or self.arriving_since is not None:
            self.close()
            return True
        return None

    def begin(self) -> None:
        """Mark that a request's handler runs."""
        self.arriving_since = None
        self.is_handling = True

    def end(self) -> None:
        """Mark that the request is answered. Bytes that arrived during it begin the next one."""
        self.is_handling = False
        self.idle_since = monotonic()
        self._leave()

    def _leave(self) -> None:
        """Go on behind a request that is answered, when its response is written."""
        if self.is_upgrade:
            # The parser pauses behind such a request, and what it is given next is lost.
            super().data_received(b"")
            self.is_blind = self._upgraded or bool(self.carried)
        if self.is_blind:
            self._close = True
        elif self.carried or self.ahead:
            self._loop.call_soon(self._go_on)

    def _weigh(self, weight: int) -> None:
        """Count for the budget what the head and the bytes behind its request weigh."""
        self.weight = weight
        beyond = weight - HEAD_BYTES_FREE if weight > HEAD_BYTES_FREE else 0
        if beyond == self.head_held:
            return
        heads = self.all_open.budgets.heads
        heads.give_back(self.holder, self.head_held)
        self.head_held = 0
        try:
            heads.take(self.holder, beyond)
            self.head_held = beyond
        except OverBudgetError:
            # The budget has logged it.
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE)

    def _refuse_head(self) -> None:
        self.all_open.budgets.excesses.count("head_bytes", self.holder)
        self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def _refuse(self, status: HTTPStatus) -> None:
        """Refuse the request that is arriving, and close the connection after the response."""
        self._close = True
        self.ahead = b""
        self._messages.clear()
        self._messages.append((_ErrInfo(status, ConnectionError(), ""), EMPTY_PAYLOAD))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def check(self, now: float) -> None:
        """Close the connection if its head takes too long, or if its client accepts nothing."""
        limits = self.all_open.limits
        if self.arriving_since is not None and self.arriving_since < now - limits.head_seconds_max:
            self.arriving_since = None
            if self.head_bytes:
                self.all_open.budgets.excesses.count("head_seconds", self.holder)
            self.force_close()
        unsent = self.wire.get_write_buffer_size()
        if unsent:
            unsent += _count_unsent(self.wire)
            if not self.unsent or unsent < self.unsent:
                self.progressed_at = now
            if self.progressed_at < now - limits.stall_seconds_max:
                self.cut("response_stall")
        self.unsent = unsent

    def cut(self, excess: Excess) -> None:
        """Close the connection at once, since it exceeds a limit: a normal close would wait for its client."""
        self.all_open.budgets.excesses.count(excess, self.holder)
        self.abort()

    def abort(self) -> None:
        """Close the connection at once, and let the kernel forget what its client has not accepted."""
        # Otherwise the kernel would hold it, outside of every limit, for as long as the client lives.
        with suppress(OSError):
            self.wire.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.wire.abort()

    def close_after_response(self) -> None:
        """Close the connection when the present response is sent."""
        self._close = True

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Respond to a malformed or refused request, without a log line for each."""
        if request.writer.output_size > 0:
            raise ConnectionError("the response has already begun")
        # The parser's message quotes the request over several lines, token included.
        del exc, message
        problem = ProblemError(HTTPStatus(status))
        if status == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
            detail = (
                f"the request line and all fields together may have {self.all_open.limits.head_bytes_max} bytes"
            )
            problem = ProblemError(HTTPStatus(status), detail)
        elif status == HTTPStatus.SERVICE_UNAVAILABLE:
            problem = unavailable("too many large heads are arriving")
        return closing_response(problem, request)


class OpenConnections:
    """The open connections, and their budget.

    Args:
        budgets: the budgets of the process.
        limits: the limits of each connection.
        exempt: the networks whose connections have no share of the budgets.

    Attributes:
        is_draining: whether each connection is closed after its next response.
    """

    def __init__(self, budgets: Budgets, limits: Limits, exempt: Sequence[Network]) -> None:
        self.is_draining = False
        self.budgets = budgets
        self.limits = limits
        self._budget = budgets.connections
        self._exempt = exempt
        self._open: set[Connection] = set()
        self._none_left = asyncio.Event()
        self._log_at = 0.0

    async def close_slow(self) -> None:
        """Until cancelled, close every connection on which a head or a response takes too long."""
        while True:
            await asyncio.sleep(self.limits.sweep_seconds)
            now = monotonic()
            for one in [*self._open]:
                one.check(now)

    async def drain(self) -> None:
        """Close each connection after its next response; return when none is open."""
        self.is_draining = True
        self._none_left.clear()
        if self._open:
            await self._none_left.wait()

    def admit(self, connection: Connection) -> None:
        """Count a new connection. If there are too many, close the longest idle ones, or else the new one."""
        # A client that has left already has no name any more.
        host, *_ = connection.wire.get_extra_info("peername") or ("",)
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
            connection.abort()
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
            one.abort()

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


def closing_response(problem: ProblemError, request: web.BaseRequest) -> web.Response:
    """Return the response for a problem after which nothing on the connection can be trusted."""
    response = problem_response(problem)
    response.headers[REQUEST_ID_HEADER] = request_id(request)
    response.headers[hdrs.CONNECTION] = "close"
    response.force_close()
    return response


def _count_unsent(transport: asyncio.Transport) -> int:
    """Return how many bytes the kernel holds for a client; 0 where the system does not tell."""
    try:
        number = transport.get_extra_info("socket").fileno()
        (count,) = struct.unpack("i", fcntl.ioctl(number, termios.TIOCOUTQ, struct.pack("i", 0)))
    except (OSError, ValueError):
        return 0
    return cast("int", count)
