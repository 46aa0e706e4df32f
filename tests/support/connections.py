"""Raw HTTP for load tests: many connections, one request at a time on each, and counts of the responses."""

import asyncio
import re
import time
from collections import Counter
from typing import Final, NamedTuple, cast

from tests.support.waiting import PATIENCE_SECONDS

# Far beyond the time limit of a request: a service that is silent for this long has dropped the request.
ANSWER_SECONDS_MAX: Final = PATIENCE_SECONDS
OK: Final = 200
GONE: Final = 410
UNAVAILABLE: Final = 503
_LENGTH: Final = re.compile(rb"\r\ncontent-length: (\d+)", re.IGNORECASE)
_RETRY_AFTER: Final = re.compile(rb"\r\nretry-after: (\d+)", re.IGNORECASE)


class Answer(NamedTuple):
    """A response, and the seconds until it arrived."""

    status: int
    retry_after_seconds: int | None
    body: bytes
    seconds: float


def put(body: str, key: str = "") -> bytes:
    """Return a report as a raw HTTP request, with an idempotency key unless that is empty."""
    data = body.encode()
    header = f"Idempotency-Key: {key}\r\n".encode() if key else b""
    head = b"PUT /webhook HTTP/1.1\r\nHost: localhost\r\n%bContent-Length: %d\r\n\r\n" % (header, len(data))
    return head + data


def get(path: str) -> bytes:
    """Return a read as a raw HTTP request."""
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


class Connection(asyncio.Protocol):
    """A client connection that carries one request at a time."""

    def __init__(self) -> None:
        self.is_open = False
        self._received = bytearray()
        self._waiting: asyncio.Future[Answer] | None = None
        self._sent_at = 0.0
        self._head: tuple[bytes, int] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not derived from asyncio's.
        self._transport = cast("asyncio.Transport", transport)
        self.is_open = True

    def request(self, message: bytes) -> "asyncio.Future[Answer]":
        """Send a request. The future receives the response, or a ConnectionError if the connection ends."""
        self._waiting = asyncio.get_running_loop().create_future()
        self._sent_at = time.monotonic()
        self._transport.write(message)
        return self._waiting

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._head is None:
            end = self._received.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(self._received[:end])
            length = _LENGTH.search(head)
            self._head = head, end + 4 + (int(length[1]) if length else 0)
        head, whole = self._head
        if len(self._received) < whole:
            return
        body = bytes(self._received[len(head) + 4 : whole])
        self._received.clear()
        self._head = None
        retry_after = _RETRY_AFTER.search(head)
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(
                Answer(
                    int(head[9:12]),
                    int(retry_after[1]) if retry_after else None,
                    body,
                    time.monotonic() - self._sent_at,
                )
            )

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(ConnectionError(str(error)))

    def close(self) -> None:
        """Close the connection at once, even if a request is pending."""
        self._transport.abort()


class Connections:
    """A pool of client connections to one port, with counts of the responses."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.answers: Counter[int] = Counter()
        # The number of 503 responses without Retry-After, and of requests that got no response although their
        # connection stayed open.
        self.bare_refusals = 0
        self.silences = 0
        # The duration of the slowest response to each method, and the first line of its request.
        self.slowest: dict[str, tuple[float, str]] = {}
        self._idle: list[Connection] = []
        self._open: set[Connection] = set()

    async def request(self, message: bytes) -> Answer | None:
        """Send a request and return the response.

        None means that no response arrived, so the outcome of the request is unknown.
        """
        client = None
        try:
            async with asyncio.timeout(ANSWER_SECONDS_MAX):
                client = await self._client()
                answer = await client.request(message)
        except OSError as error:
            self.silences += isinstance(error, TimeoutError) and client is not None
            self._drop(client)
            return None
        except asyncio.CancelledError:
            self._drop(client)
            raise
        self._idle.append(client)
        self.answers[answer.status] += 1
        self.bare_refusals += answer.status == UNAVAILABLE and answer.retry_after_seconds is None
        line = message.partition(b"\r\n")[0].decode()
        method = line.partition(" ")[0]
        self.slowest[method] = max(self.slowest.get(method, (0.0, "")), (answer.seconds, line))
        return answer

    async def open(self, connections: int) -> None:
        """Open connections ahead of the requests."""
        self._idle += [await self._connect() for _ in range(connections)]

    def close(self) -> None:
        """Close every connection."""
        for client in [*self._open]:
            self._drop(client)
        self._idle.clear()

    async def _client(self) -> Connection:
        while self._idle:
            client = self._idle.pop()
            if client.is_open:
                return client
            self._open.discard(client)
        return await self._connect()

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, client = await loop.create_connection(Connection, "127.0.0.1", self.port)
        self._open.add(client)
        return client

    def _drop(self, client: Connection | None) -> None:
        if client is not None:
            self._open.discard(client)
            client.close()
