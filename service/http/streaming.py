"""Long responses to readers that may be slow: for each of them, memory holds a slice and no more."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Final, cast

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from service.http.request_ids import REQUEST_ID_HEADER, caller_request_id

# What is written at once, and what may wait in memory until the reader accepts it. The kernel holds more.
SLICE_BYTES_MAX: Final = 16 * 1024
# How many events are read at a time: a reader that accepts all of them gets more with each read.
BATCH_EVENTS_MIN: Final = 8
BATCH_EVENTS_MAX: Final = 1_000
BATCH_GROWTH: Final = 4
# A reader that accepts nothing for this long is cut off. It can resume after the last position it received.
SEND_SECONDS_MAX: Final = 10.0


class ResponseStream:
    """The body of a response that is written in slices.

    Attributes:
        batch_max: how many events to read for the next write: few at first and after a wait, since the reader
            may accept no more.
    """

    def __init__(
        self, request: web.Request, response: web.StreamResponse, writer: AbstractStreamWriter
    ) -> None:
        self.response = response
        self._protocol = request.protocol
        self._writer = writer
        self.batch_max = BATCH_EVENTS_MIN
        if request.transport is not None:
            request.transport.set_write_buffer_limits(high=SLICE_BYTES_MAX)

    async def write(self, message: bytes) -> None:
        """Write a short message.

        Raises:
            ConnectionResetError: the reader has left, or accepts nothing.
        """
        async with _limited():
            await self._writer.write(message)
            await self._writer.drain()

    async def write_some(self, events: Iterable[tuple[int, bytes]]) -> int | None:
        """Write messages until the reader must be waited for, and wait.

        The caller then drops the other messages and reads them again, so that a waiting reader holds none.

        Args:
            events: positions and messages.

        Returns:
            The position of the last message that was written; None if all were written without a wait.

        Raises:
            ConnectionResetError: the reader has left, or accepts nothing.
        """
        pending: list[bytes] = []
        size = 0
        position = 0
        async with _limited():
            for position, message in events:
                pending.append(message)
                size += len(message)
                if size >= SLICE_BYTES_MAX:
                    if await self._flush(pending):
                        return position
                    pending, size = [], 0
            if pending and await self._flush(pending):
                return position
        self.batch_max = min(BATCH_GROWTH * self.batch_max, BATCH_EVENTS_MAX)
        return None

    async def _flush(self, pending: list[bytes]) -> bool:
        """Write a slice, and return whether the reader had to be waited for."""
        await self._writer.write(b"".join(pending))
        if not self._protocol.writing_paused:
            return False
        self.batch_max = BATCH_EVENTS_MIN
        await self._writer.drain()
        return True


@asynccontextmanager
async def _limited() -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(SEND_SECONDS_MAX):
            yield
    except TimeoutError:
        raise ConnectionResetError("the reader accepts nothing") from None


async def begin_stream(request: web.Request, headers: dict[str, str]) -> ResponseStream:
    """Begin a chunked response, with the caller's own request id if it sent one."""
    response = web.StreamResponse(headers=headers)
    if (own_id := caller_request_id(request)) is not None:
        response.headers[REQUEST_ID_HEADER] = own_id
    response.enable_chunked_encoding()
    # It is None only for a response that has ended.
    writer = cast("AbstractStreamWriter", await response.prepare(request))
    return ResponseStream(request, response, writer)
