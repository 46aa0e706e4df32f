"""A relay to PostgreSQL that drops settings, as a pooler does, or connections, as a firewall does."""

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import quote, unquote

from service.database.embedded_postgres import SOCKET_NAME
from tests.support.folders import temporary_folder

# What a pooler with ``ignore_startup_parameters`` passes on.
PASSED = {b"user", b"database", b"client_encoding", b"application_name"}
CHUNK_BYTES = 65_536


class Relay:
    """Forwards connections to the socket of a server.

    Attributes:
        dsn: the server's DSN, through the relay.
        drops_settings: whether startup parameters are dropped.
        is_silent: set it to swallow all that is sent on the present connections; new ones work.
    """

    def __init__(self, folder: Path, dsn: str, *, drops_settings: bool) -> None:
        host = dsn.partition("host=")[2].partition("&")[0]
        self.dsn = dsn.replace(host, quote(str(folder), safe=""))
        self.drops_settings = drops_settings
        self._server_socket = Path(unquote(host)) / SOCKET_NAME
        self._generation = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def silence(self) -> None:
        """Drop what is sent from now on over the present connections."""
        self._generation += 1

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        server_reader, server_writer = await asyncio.open_unix_connection(self._server_socket)
        generation = self._generation
        ways = [
            asyncio.create_task(self._forward(reader, server_writer, generation, is_startup=True)),
            asyncio.create_task(self._forward(server_reader, writer, generation, is_startup=False)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            server_writer.transport.abort()
            writer.transport.abort()

    async def stop(self) -> None:
        for task in [*self._tasks]:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _forward(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, generation: int, *, is_startup: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                if self._generation != generation:
                    continue
                writer.write(without_settings(data) if is_startup and self.drops_settings else data)
                is_startup = False
                await writer.drain()


def without_settings(startup: bytes) -> bytes:
    """Return a startup message with only the parameters that a pooler passes on."""
    words = startup[8:].rstrip(b"\0").split(b"\0")
    passed = [(name, value) for name, value in zip(words[::2], words[1::2], strict=True) if name in PASSED]
    body = startup[4:8] + b"".join(name + b"\0" + value + b"\0" for name, value in passed) + b"\0"
    return struct.pack("!i", len(body) + 4) + body


@asynccontextmanager
async def relay_to(dsn: str, *, drops_settings: bool = False) -> AsyncIterator[Relay]:
    """Run a relay to the server of a DSN."""
    with temporary_folder() as folder:
        relay = Relay(folder, dsn, drops_settings=drops_settings)
        listener = await asyncio.start_unix_server(relay.serve, folder / SOCKET_NAME)
        try:
            yield relay
        finally:
            listener.close()
            await relay.stop()
