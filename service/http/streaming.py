"""Long responses to readers that may be slow: for each of them, memory holds a slice and no more."""

from collections.abc import Iterable
from typing import Final, cast

from aiohttp import web
from aiohttp.http import HttpVersion11, StreamWriter

from service.http.connections import SLICE_BYTES_MAX
from service.http.problems import ProblemError, ProblemType
from service.http.request_ids import REQUEST_ID_HEADER, caller_request_id
from service.http.responses import LOG_HEADER

# How many events are read at a time: a reader that accepts all of them gets more with each read.
BATCH_EVENTS_MIN: Final = 8
BATCH_EVENTS_MAX: Final = 1_000
BATCH_GROWTH: Final = 2


class ResponseStream:
    """The body of a response that is written in slices.

    Attributes:
        batch_max: how many events to read for the next write: few at first and after a wait, since the reader
            may accept no more.
    """

    def __init__(self, request: web.Request, response: web.StreamResponse, writer: StreamWriter) -> None:
        self.response = response
        self._protocol = request.protocol
        self._writer = writer
        self.batch_max = BATCH_EVENTS_MIN

    async def wait(self) -> None:
        """Wait until the reader has accepted what was written before. The caller must hold no events then.

        Raises:
            ConnectionResetError: the reader has left, or was cut off because it accepts nothing.
        """
        await self._writer.drain()

    async def write(self, message: bytes) -> None:
        """Write a short message, after a wait.

        Raises:
            ConnectionResetError: the reader has left, or was cut off because it accepts nothing.
        """
        await self.wait()
        await self._writer.write(message, drain=False)

    async def write_some(self, events: Iterable[tuple[int, bytes]]) -> int | None:
        """Write messages until the reader must be waited for. Call ``wait`` before and after.

        Args:
            events: positions and messages. Those that are not written must be read again.

        Returns:
            The position of the last message that was written; None if all were written.

        Raises:
            ConnectionResetError: the reader has left.
        """
        pending: list[bytes] = []
        size = 0
        position = 0
        for position, message in events:
            pending.append(message)
            size += len(message)
            if size >= SLICE_BYTES_MAX:
                if await self._must_wait_after(pending):
                    return position
                pending, size = [], 0
        if pending and await self._must_wait_after(pending):
            return position
        self.batch_max = min(BATCH_GROWTH * self.batch_max, BATCH_EVENTS_MAX)
        return None

    async def _must_wait_after(self, pending: list[bytes]) -> bool:
        """Write a slice, and return whether the reader must be waited for."""
        await self._writer.write(b"".join(pending), drain=False)
        if self._protocol.writing_paused:
            self.batch_max = BATCH_EVENTS_MIN
        return self._protocol.writing_paused


def refuse_old_version(request: web.Request) -> None:
    """Refuse to stream to a client without chunked encoding: a response that was cut off would look complete.

    Raises:
        ProblemError: 505.
    """
    if request.version < HttpVersion11:
        raise ProblemError(ProblemType.HTTP_VERSION, "a stream requires HTTP/1.1")


async def begin_stream(request: web.Request, headers: dict[str, str], log_id: str) -> ResponseStream:
    """Begin a chunked response with the log's id, and with the caller's own request id if it sent one."""
    response = web.StreamResponse(headers=headers)
    response.headers[LOG_HEADER] = log_id
    if (own_id := caller_request_id(request)) is not None:
        response.headers[REQUEST_ID_HEADER] = own_id
    response.enable_chunked_encoding()
    # It is None only for a response that has ended.
    writer = cast("StreamWriter", await response.prepare(request))
    return ResponseStream(request, response, writer)


async def send_slices(request: web.BaseRequest, response: web.Response) -> None:
    """Send a response in slices, so that its body is not held a second time while it waits for its reader.

    Raises:
        ConnectionResetError: the reader has left, or was cut off because it accepts nothing.
    """
    body = memoryview(cast("bytes", response.body))
    # It is None only for a response that has ended.
    writer = cast("StreamWriter", await response.prepare(request))
    # The response outlives its request: it would keep the body while the connection is idle.
    response.body = None
    for begin in range(0, len(body), SLICE_BYTES_MAX):
        await writer.write(body[begin : begin + SLICE_BYTES_MAX], drain=False)
        await writer.drain()
    await response.write_eof()
