"""The end of the log in memory: while there are live readers, it is read once for all of them."""

import asyncio
from bisect import bisect_right
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from contextvars import Context
from time import monotonic
from typing import Final, NamedTuple

from service.background import supervise
from service.database.connections import ConnectionPool
from service.event_log.erasures import Erasure
from service.event_log.follow import (
    START,
    Memory,
    Place,
    PlaceLostError,
    follow,
    read_after,
    read_end,
    rest_unless_full,
)
from service.event_log.store import RecordedEvent

# Events kept in memory for all live readers. A reader that is further behind reads the database.
MEMORY_EVENTS_MAX: Final = 4_096
MEMORY_ERASURES_MAX: Final = 1_024
MEMORY_BYTES_MAX: Final = 16 * 1024 * 1024
# An event that has been erased in the log must not be sent from memory for longer than this.
MEMORY_SECONDS_MAX: Final = 60.0
BATCH_EVENTS_MAX: Final = 1_000
# The pause between two reads while the log grows: all readers share each read, and webhooks get the processor.
IDLE_SECONDS: Final = 0.1
# The longest pause, in case a notification is lost.
POLL_SECONDS: Final = 1.0


class TailClosedError(Exception):
    """No further reader is accepted. ``str()`` is the reason."""


class TailMessage(NamedTuple):
    """An event's message to live readers, and its message to those that may not see its body."""

    whole: bytes
    without_body: bytes


class TailEvent(NamedTuple):
    """An event at the end of the log: its message, and when it was read (monotonic clock)."""

    position: int
    order_no: str
    message: TailMessage
    read_at: float


class TailErasure(NamedTuple):
    """An erasure, and its message to live readers."""

    erasure_id: int
    order_no: str
    message: bytes


class Tail:
    """The end of the log in memory.

    Args:
        pool: the connections to read with.
        memory: hears of erasures.
        encode: returns the message for an event.
        encode_erasure: returns the message for an erasure.
    """

    def __init__(
        self,
        pool: ConnectionPool,
        memory: Memory,
        encode: Callable[[RecordedEvent], TailMessage],
        encode_erasure: Callable[[Erasure], bytes],
    ) -> None:
        self._pool = pool
        self._encode = encode
        self._encode_erasure = encode_erasure
        self._heard = memory
        self._heard_up_to = memory.erasures.up_to
        self.last_erasure_id = 0
        self._erasures: deque[TailErasure] = deque(maxlen=MEMORY_ERASURES_MAX)
        self._memory: list[TailEvent] = []
        self._by_order: dict[str, list[TailEvent]] = {}
        self._bytes = 0
        self._begins_after = 0
        self._last = START
        # Set when the log has grown.
        self.wake = asyncio.Event()
        self._grown = asyncio.Condition()
        self._task: asyncio.Task[None] | None = None
        self._readers = 0
        self.is_ended = False
        # How often the log ended before the tail, since a failover or a restore had lost events.
        self.losses = 0

    @property
    def position(self) -> int:
        """The last position that was read."""
        return self._last.position

    @asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Follow the log until the block ends, together with other readers.

        Raises:
            TailClosedError: the service is stopping.
            StorageUnavailableError: the log's head cannot be read.
        """
        if self.is_ended:
            raise TailClosedError("the service is stopping")
        self._readers += 1
        try:
            if self._task is None:
                await self._heard.hear_in_time(at_once=True)
                async with self._pool.connection() as connection:
                    last = await read_end(connection)
                # Another reader may have been first in the meantime.
                if self._task is None:
                    self._begin(last)
                    # The task outlives the first reader, so it inherits no context.
                    self._task = asyncio.get_running_loop().create_task(
                        supervise("follow the log for live readers", self._follow), context=Context()
                    )
            yield
        finally:
            self._readers -= 1
            if self._readers == 0 and self._task is not None:
                self._task.cancel()
                self._task = None

    def after(self, position: int, order_no: str | None, limit: int) -> Sequence[TailEvent] | None:
        """Return the next events above a position, None if memory may lack some of them, or an erasure.

        Args:
            position: the position.
            order_no: the one order to read, None for all.
            limit: the maximum number of events.
        """
        if position < self._begins_after or (position < self.position and not self._heard.erasures.is_fresh):
            return None
        events = self._memory if order_no is None else self._by_order.get(order_no, ())
        start = bisect_right(events, position, key=lambda event: event.position)
        return events[start : start + limit]

    def erasures_after(self, erasure_id: int, order_no: str | None) -> list[TailErasure]:
        """Return the erasures above an id, of one order or of all."""
        return [
            one for one in self._erasures if one.erasure_id > erasure_id and order_no in (None, one.order_no)
        ]

    async def wait_beyond(self, position: int, seconds_max: float) -> None:
        """Wait until the log has grown beyond a position, the tail has ended, or the time limit is reached."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds_max), self._grown:
                while self.position <= position and not self.is_ended:
                    await self._grown.wait()

    async def end(self) -> None:
        """End all streams. Their readers reconnect, to the next process if this one is stopping."""
        self.is_ended = True
        async with self._grown:
            self._grown.notify_all()

    async def _follow(self) -> None:
        rest = rest_unless_full(BATCH_EVENTS_MAX, IDLE_SECONDS)
        await follow(self._step, self.wake, poll_seconds=POLL_SECONDS, rest=rest)

    async def _step(self) -> int:
        # Before the events, so that none is in memory as it was before an erasure.
        await self._hear()
        async with self._pool.connection() as connection:
            try:
                batch = await read_after(connection, self._last, BATCH_EVENTS_MAX)
            except PlaceLostError:
                self._lose(await read_end(connection))
                return 0
        if batch:
            self._last = Place(batch[-1].position, batch[-1].report_id or "")
            now = monotonic()
            events = [TailEvent(event.position, event.order_no, self._encode(event), now) for event in batch]
            self._bytes += _bytes(events)
            self._memory += events
            for event in events:
                self._by_order.setdefault(event.order_no, []).append(event)
            if len(self._memory) > MEMORY_EVENTS_MAX or self._bytes > MEMORY_BYTES_MAX:
                # Drop half of the events at once, so that this is rare; the newest batch stays.
                self._drop(min(len(self._memory) // 2, len(self._memory) - len(events)))
            async with self._grown:
                self._grown.notify_all()
        oldest = monotonic() - MEMORY_SECONDS_MAX
        self._drop(bisect_right(self._memory, oldest, key=lambda event: event.read_at))
        return len(batch)

    async def _hear(self) -> None:
        await self._heard.hear_in_time(at_once=True)
        erasures = self._heard.erasures.after(self._heard_up_to)
        if erasures is None:
            # A failover has lost some, whose ids others may have by now.
            async with self._pool.connection() as connection:
                self._lose(await read_end(connection))
        elif erasures:
            # Memory may have the events as they were.
            self._begin(self._last)
            for one in erasures:
                self._erasures.append(
                    TailErasure(one["erasure_id"], one["order_no"], self._encode_erasure(one))
                )

    def _lose(self, end: Place) -> None:
        """Begin at the log's end, since it has lost events or erasures. The streams end."""
        self.losses += 1
        self._erasures.clear()
        self._begin(end)

    def _begin(self, last: Place) -> None:
        self._last = last
        self._heard_up_to = self._heard.erasures.up_to
        self.last_erasure_id = self._heard_up_to.erasure_id
        self._begins_after, self._memory, self._by_order, self._bytes = last.position, [], {}, 0

    def _drop(self, count: int) -> None:
        """Drop the oldest events."""
        if not count:
            return
        self._begins_after = self._memory[count - 1].position
        self._bytes -= _bytes(self._memory[:count])
        self._memory = self._memory[count:]
        self._by_order = {}
        for event in self._memory:
            self._by_order.setdefault(event.order_no, []).append(event)


def _bytes(events: Sequence[TailEvent]) -> int:
    return sum(len(event.message.whole) + len(event.message.without_body) for event in events)
