"""The channel between the supervisor and one of its processes: JSON messages over a socket pair."""

import asyncio
import json
import socket
from typing import Any, Final, TypeAlias

# A process's metrics, the largest message, take about 100 KB.
MESSAGE_BYTES_MAX: Final = 16 * 1024 * 1024

# "type" names the kind of message; the other members depend on it.
Message: TypeAlias = dict[str, Any]


class Channel:
    """One end of the channel. The other end notices at once when this process ends.

    Args:
        reader: receives from the other end.
        writer: sends to the other end.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, end: socket.socket) -> "Channel":
        """Return the channel over one end of a socket pair, which it owns from now on."""
        end.setblocking(False)  # noqa: FBT003 - the standard library's signature
        return cls(*await asyncio.open_connection(sock=end, limit=MESSAGE_BYTES_MAX))

    def send(self, kind: str, **members: Any) -> None:
        """Send a message. If the other end is gone, drop it: ``receive`` returns None then."""
        if not self._writer.is_closing():
            self._writer.write(json.dumps({"type": kind, **members}).encode() + b"\n")

    async def receive(self) -> Message | None:
        """Return the next message, or None when the other end is gone."""
        try:
            line = await self._reader.readline()
        except (OSError, ValueError):
            return None
        if not line.endswith(b"\n"):
            return None
        message: Message = json.loads(line)
        return message

    async def close(self) -> None:
        """Send what is waiting, and close the channel."""
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except OSError:
            # The other end is gone.
            return
