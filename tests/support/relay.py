"""A relay to PostgreSQL's Unix socket, which a test lets drop, delay or cut what passes."""

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol
from urllib.parse import quote, unquote

from service.database.embedded_postgres import SOCKET_NAME
from tests.support.folders import temporary_folder

# What a pooler with ``ignore_startup_parameters`` passes on.
PASSED = {b"user", b"database", b"client_encoding", b"application_name"}
CHUNK_BYTES = 256 * 1024


class Link(Protocol):
    """One connection through a relay. It is ended once ``is_cut`` and what was returned is written."""

    is_cut: bool

    async def to_server(self, data: bytes) -> bytes:
        """Return what the server gets of ``data``."""

    async def to_client(self, data: bytes) -> bytes:
        """Return what the client gets of ``data``."""


class Relay:
    """Listens on a Unix socket in ``folder``, as PostgreSQL would, and forwards each connection over a link.

    Attributes:
        server_socket: the socket that new connections are forwarded to.
    """

    def __init__(self, folder: Path, server_socket: Path, link: Callable[[], Link]) -> None:
        self.server_socket = server_socket
        self._socket = folder / SOCKET_NAME
        self._link = link
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

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            with contextlib.suppress(OSError):
                await self._pass_on(reader, writer)
        finally:
            writer.transport.abort()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_unix_connection(self.server_socket, limit=CHUNK_BYTES)
        link = self._link()
        ways = [
            asyncio.create_task(_forward(link, link.to_server, reader, server_writer)),
            asyncio.create_task(_forward(link, link.to_client, server_reader, writer)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            server_writer.transport.abort()


async def _forward(
    link: Link,
    passed: Callable[[bytes], Awaitable[bytes]],
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    while not link.is_cut and (data := await reader.read(CHUNK_BYTES)):
        writer.write(await passed(data))
        await writer.drain()


class Pooler(Relay):
    """Drops settings, as a pooler does, or connections, as a firewall does.

    Attributes:
        dsn: the server's DSN, through the relay.
        drops_settings: whether startup parameters are dropped.
        generation: the connections of an older generation are swallowed.
    """

    def __init__(self, folder: Path, dsn: str, *, drops_settings: bool) -> None:
        host = dsn.partition("host=")[2].partition("&")[0]
        super().__init__(folder, Path(unquote(host)) / SOCKET_NAME, lambda: _PooledLink(self))
        self.dsn = dsn.replace(host, quote(str(folder), safe=""))
        self.drops_settings = drops_settings
        self.generation = 0

    def silence(self) -> None:
        """Drop what is sent from now on over the present connections; new ones work."""
        self.generation += 1


class _PooledLink:
    is_cut = False

    def __init__(self, pooler: Pooler) -> None:
        self._pooler = pooler
        self._generation = pooler.generation
        self._is_starting = True

    async def to_server(self, data: bytes) -> bytes:
        if self._is_starting and self._pooler.drops_settings:
            data = without_settings(data)
        self._is_starting = False
        return await self.to_client(data)

    async def to_client(self, data: bytes) -> bytes:
        return data if self._generation == self._pooler.generation else b""


def without_settings(startup: bytes) -> bytes:
    """Return a startup message with only the parameters that a pooler passes on."""
    words = startup[8:].rstrip(b"\0").split(b"\0")
    passed = [(name, value) for name, value in zip(words[::2], words[1::2], strict=True) if name in PASSED]
    body = startup[4:8] + b"".join(name + b"\0" + value + b"\0" for name, value in passed) + b"\0"
    return struct.pack("!i", len(body) + 4) + body


@asynccontextmanager
async def pooler_of(dsn: str, *, drops_settings: bool = False) -> AsyncIterator[Pooler]:
    """Run a pooler before the server of a DSN."""
    with temporary_folder() as folder:
        pooler = Pooler(folder, dsn, drops_settings=drops_settings)
        await pooler.start()
        try:
            yield pooler
        finally:
            await pooler.stop()
