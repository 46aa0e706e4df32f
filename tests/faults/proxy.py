"""A proxy between the service and PostgreSQL that delays appends and cuts connections at critical moments."""

import asyncio
import contextlib
import time
from enum import Enum, auto
from pathlib import Path
from typing import Final
from urllib.parse import quote

from service.database.embedded_postgres import NAME, SOCKET_NAME

CHUNK_BYTES: Final = 256 * 1024
# Only an append sends the topic of the events.
APPEND_MARK: Final = b"order.status_reported"
# ReadyForQuery without an open transaction: an append with this response is either committed or completely
# refused.
READY_IDLE: Final = b"Z\x00\x00\x00\x05I"
COMPLETE_MARKS: Final = (b"INSERT 0 ", b"COMMIT")


class Cut(Enum):
    """The moment at which a connection is cut."""

    MID_STATEMENT = auto()
    AFTER_COMMIT = auto()


class _Pair:
    """A forwarded connection between the service and the server."""

    def __init__(self) -> None:
        self.appends = False
        self.cut_after_commit = False
        self._is_dropped = False
        self._used_at = time.monotonic()

    def use(self, idle_seconds_max: float) -> bool:
        """Note that data arrived, and return whether it may pass."""
        now = time.monotonic()
        self._is_dropped = self._is_dropped or now - self._used_at > idle_seconds_max
        self._used_at = now
        return not self._is_dropped


class Proxy:
    """Listens on a Unix socket in ``folder``, as PostgreSQL would.

    Attributes:
        dsn: the server's DSN, through the proxy.
        server_socket: the socket that new connections are forwarded to.
        idle_seconds_max: connections that were idle for longer are dropped, as a firewall does: everything that
            either side still sends on them is swallowed.
        append_delay_seconds: how long the response to each append is held back.
    """

    def __init__(self, folder: Path, server_socket: Path) -> None:
        self.dsn = f"postgresql:///{NAME}?host={quote(str(folder), safe='')}&port=5432&user={NAME}"
        self.append_delay_seconds = 0.0
        self.idle_seconds_max = float("inf")
        self._socket = folder / SOCKET_NAME
        self.server_socket = server_socket
        self._next: Cut | None = None
        self._done = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: asyncio.Server | None = None

    async def start(self) -> None:
        self._socket.parent.mkdir(exist_ok=True)
        self._listener = await asyncio.start_unix_server(self._serve, self._socket, limit=CHUNK_BYTES)

    async def stop(self) -> None:
        if self._listener is not None:
            self._listener.close()
        for task in [*self._tasks]:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def cut(self, where: Cut, seconds_max: float) -> None:
        """Cut the next connection that appends, and return after the cut."""
        self._done.clear()
        self._next = where
        async with asyncio.timeout(seconds_max):
            await self._done.wait()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None:
            return
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        with contextlib.suppress(OSError):
            server_reader, server_writer = await asyncio.open_unix_connection(
                self.server_socket, limit=CHUNK_BYTES
            )
            pair = _Pair()
            ways = [
                asyncio.create_task(self._forward(pair, reader, server_writer)),
                asyncio.create_task(self._answer(pair, server_reader, writer)),
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
                server_writer.transport.abort()
        writer.transport.abort()

    async def _forward(
        self, pair: _Pair, reader: asyncio.StreamReader, server_writer: asyncio.StreamWriter
    ) -> None:
        while data := await reader.read(CHUNK_BYTES):
            if not pair.use(self.idle_seconds_max):
                continue
            if APPEND_MARK in data:
                pair.appends = True
                if self._next is Cut.MID_STATEMENT:
                    self._next = None
                    server_writer.write(data[: len(data) // 2])
                    await server_writer.drain()
                    self._done.set()
                    return
                if self._next is Cut.AFTER_COMMIT:
                    self._next = None
                    pair.cut_after_commit = True
            server_writer.write(data)
            await server_writer.drain()

    async def _answer(self, pair: _Pair, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answered = b""
        while data := await reader.read(CHUNK_BYTES):
            if not pair.use(self.idle_seconds_max):
                continue
            is_end = data.endswith(READY_IDLE)
            if pair.cut_after_commit:
                answered += data
                if not is_end:
                    continue
                if any(mark in answered for mark in COMPLETE_MARKS):
                    self._done.set()
                    return
                data, answered = answered, b""
            if pair.appends and is_end:
                pair.appends = False
                if self.append_delay_seconds:
                    await asyncio.sleep(self.append_delay_seconds)
            writer.write(data)
            await writer.drain()
