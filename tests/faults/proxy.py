"""A proxy between the service and PostgreSQL that delays appends and cuts connections at critical moments."""

import asyncio
import time
from enum import Enum, auto
from pathlib import Path
from typing import Final
from urllib.parse import quote

from service.database.embedded_postgres import NAME
from tests.support.relay import Relay

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


class Proxy(Relay):
    """A relay that listens in ``folder``.

    Attributes:
        dsn: the server's DSN, through the proxy.
        idle_seconds_max: connections that were idle for longer are dropped, as a firewall does: everything that
            either side still sends on them is swallowed.
        append_delay_seconds: how long the response to each append is held back.
    """

    def __init__(self, folder: Path, server_socket: Path) -> None:
        super().__init__(folder, server_socket, lambda: _WatchedLink(self))
        self.dsn = f"postgresql:///{NAME}?host={quote(str(folder), safe='')}&port=5432&user={NAME}"
        self.append_delay_seconds = 0.0
        self.idle_seconds_max = float("inf")
        self._next: Cut | None = None
        self._done = asyncio.Event()

    async def cut(self, where: Cut, seconds_max: float) -> None:
        """Cut the next connection that appends, and return after the cut."""
        self._done.clear()
        self._next = where
        async with asyncio.timeout(seconds_max):
            await self._done.wait()

    def take_cut(self) -> Cut | None:
        """Return the cut that is asked for, to the link that makes it."""
        asked, self._next = self._next, None
        return asked

    def note_cut(self) -> None:
        self._done.set()


class _WatchedLink:
    is_cut = False

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._appends = False
        self._cuts_after_commit = False
        self._answered = b""
        self._is_dropped = False
        self._used_at = time.monotonic()

    async def to_server(self, data: bytes) -> bytes:
        if self._drops():
            return b""
        if APPEND_MARK in data:
            self._appends = True
            where = self._proxy.take_cut()
            if where is Cut.MID_STATEMENT:
                self._cut()
                return data[: len(data) // 2]
            self._cuts_after_commit |= where is Cut.AFTER_COMMIT
        return data

    async def to_client(self, data: bytes) -> bytes:
        if self._drops():
            return b""
        is_end = data.endswith(READY_IDLE)
        if self._cuts_after_commit:
            self._answered += data
            if not is_end:
                return b""
            data, self._answered = self._answered, b""
            if any(mark in data for mark in COMPLETE_MARKS):
                self._cut()
                return b""
        if self._appends and is_end:
            self._appends = False
            if self._proxy.append_delay_seconds:
                await asyncio.sleep(self._proxy.append_delay_seconds)
        return data

    def _drops(self) -> bool:
        """Note that data arrived, and return whether it is swallowed."""
        now = time.monotonic()
        self._is_dropped = self._is_dropped or now - self._used_at > self._proxy.idle_seconds_max
        self._used_at = now
        return self._is_dropped

    def _cut(self) -> None:
        self.is_cut = True
        self._proxy.note_cut()
