"""The log for projections: decoded, from memory if this process wrote the events, else from the database."""

from bisect import bisect_right
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from operator import itemgetter
from time import monotonic
from typing import Final

from domain.order import Order
from projections.postgres import Connection
from projections.rebuild import Snapshot
from projections.view import DecodedEvent, FailedEvent, LoggedEvent
from service.database.connections import Connect, DedicatedConnection
from service.event_log import store
from service.event_log.codec import UndecodableEventError, decode_event
from service.event_log.erasures import HeardErasures, last_erasure_id

# The last committed events stay in memory: the projections read them milliseconds later.
MEMORY_EVENTS_MAX: Final = 4_096
MEMORY_CHARACTERS_MAX: Final = 8 * 1024 * 1024

# Batches are small, because decoding one blocks the event loop, and smaller if bodies are large.
STREAMS_BATCH_EVENTS: Final = 2_000
STREAMS_BATCH_BYTES: Final = 2 * 1024 * 1024
FIRST_BATCH_EVENTS: Final = 100

# The consumer may take long to process a batch.
NO_TIMEOUTS: Final = "SET idle_in_transaction_session_timeout = 0"

# In the order of the primary key, through a cursor, so that neither side holds more than a batch. The planner
# scans the key or sorts the log, depending on how much of the log is in memory.
STREAMS: Final = """
    SELECT notification_id, originator_id, originator_version, topic, state
    FROM order_events
    WHERE notification_id <= $1
    ORDER BY originator_id, originator_version
"""
COUNT_EVENTS: Final = "SELECT count(*) FROM order_events WHERE notification_id <= $1"


def decode_logged(position: int, order_no: str, version: int, topic: str, state: bytes) -> LoggedEvent:
    """Return a position and its event for a projection, a FailedEvent if the event cannot be decoded."""
    try:
        return position, decode_event(order_no, version, topic, state)
    except UndecodableEventError as error:
        return position, FailedEvent(order_no, version, str(error))


class Feed:
    """Reads the log for projections.

    Args:
        dedicated: the connection for events that are not in memory.
        connect: opens another connection, for the long reads of a rebuild.

    Attributes:
        erasures: the latest erasures, which the memory has applied.
    """

    def __init__(self, dedicated: DedicatedConnection, connect: Connect) -> None:
        self._dedicated = dedicated
        self._connect = connect
        self.erasures = HeardErasures()
        # Events at consecutive positions, so that no event of another process lies between them.
        self._memory: list[DecodedEvent] = []
        self._memory_characters = 0
        # The events that were read last, above a position: the views read the same ones one after the other.
        self._batch_after = 0
        self._batch: Sequence[LoggedEvent] = ()

    def remember(self, events: Sequence[Order.StatusReported], positions: Sequence[int]) -> None:
        """Keep events that were just committed, in the order of the log."""
        for event, position in zip(events, positions, strict=True):
            if self.erasures.has_erased(event.originator_id, event.originator_version):
                # It was erased before this process heard of its commit.
                self._drop()
                continue
            if self._memory and position != self._memory[-1][0] + 1:
                self._drop()
            self._memory.append((position, event))
            self._memory_characters += len(event.body)
        if len(self._memory) > MEMORY_EVENTS_MAX or self._memory_characters > MEMORY_CHARACTERS_MAX:
            del self._memory[: len(self._memory) // 2]
            self._memory_characters = sum(len(event.body) for _, event in self._memory)

    def forget(self) -> None:
        """Drop the events in memory, because their commits may have been lost, and perhaps erasures too."""
        self._drop()
        self._batch = ()
        self.erasures.forget()

    def _drop(self) -> None:
        self._memory, self._memory_characters = [], 0

    async def hear(self, erasure_id: int, at: float) -> None:
        """Let out no event from memory as it was before an erasure; see ``projections.engine.Log``."""
        if erasure_id != self.erasures.last_id:
            await self._read_erasures()
        self.erasures.confirm(at)

    async def hear_in_time(self, *, at_once: bool = False) -> None:
        """Find out whether there are new erasures, unless that was found out a short time ago."""
        if at_once or not self.erasures.is_fresh:
            began = monotonic()
            await self._read_erasures()
            self.erasures.confirm(began)

    async def _read_erasures(self) -> None:
        # While this connection is held, no read of the log from before an erasure can end after it.
        async with self._dedicated.connection() as connection:
            erased = await self.erasures.read(connection)
        if erased == {}:
            return
        self._batch = ()
        if erased is None or any(
            event.originator_version <= erased.get(event.originator_id, 0) for _, event in self._memory
        ):
            self._drop()

    def recall(self, after: int, limit: int) -> Sequence[DecodedEvent]:
        """Return the events above a position from memory, empty if memory may lack some of them, or an erasure.

        Call ``hear`` or ``hear_in_time`` before.
        """
        if self._memory and self.erasures.is_fresh:
            start = after + 1 - self._memory[0][0]
            if 0 <= start < len(self._memory):
                return self._memory[start : start + limit]
        return ()

    async def read_log(self, after: int, limit: int) -> Sequence[LoggedEvent]:
        """Return the events above a position, at most ``limit``, in the order of the log."""
        if recalled := self.recall(after, limit):
            return recalled
        async with self._dedicated.connection() as connection:
            # The views wake together. While this one waited for its turn, another may have read the same ones.
            if self._batch and self._batch_after <= after < self._batch[-1][0]:
                start = bisect_right(self._batch, after, key=itemgetter(0))
                return self._batch[start : start + limit]
            recorded = await store.read_log(connection, after, limit)
            batch = [decode_logged(*event[:5]) for event in recorded]
            if batch:
                self._batch_after, self._batch = after, batch
            return batch

    async def read_order(self, order_no: str, after: int) -> Sequence[LoggedEvent]:
        """Return one order's events above a version, at most FIRST_BATCH_EVENTS."""
        async with self._dedicated.connection() as connection:
            recorded = await store.read_stream(connection, order_no, after, FIRST_BATCH_EVENTS)
        return [decode_logged(*event[:5]) for event in recorded]

    async def head(self) -> int:
        """Return the highest position, 0 for an empty log."""
        async with self._dedicated.connection() as connection:
            return await store.head_position(connection)

    async def count(self, head: int) -> int:
        """Return the number of events up to a position. This reads all of them, on a separate connection."""
        connection = await self._connect()
        try:
            total: int = await connection.fetchval(COUNT_EVENTS, head)
        finally:
            connection.terminate()
        return total

    async def read_streams(self, head: int) -> AsyncGenerator[Sequence[LoggedEvent]]:
        """Yield the events up to a position by order and version, in batches of limited rows and bytes."""
        async with self._read_transaction() as connection:
            async for batch in _read_streams(connection, head):
                yield batch

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[Snapshot]:
        """Read the log as it is now until the block ends, on a separate connection."""
        async with self._read_transaction() as connection:
            # The first statement takes the snapshot.
            head = await store.head_position(connection)
            erasure_id = await last_erasure_id(connection)
            recorded = await store.read_log(connection, head - 1, 1)
            last = decode_logged(*recorded[0][:5]) if recorded else None
            total: int = await connection.fetchval(COUNT_EVENTS, head)
            async with aclosing(_read_streams(connection, head)) as batches:
                yield Snapshot(last, erasure_id, total, batches)

    @asynccontextmanager
    async def _read_transaction(self) -> AsyncIterator[Connection]:
        connection = await self._connect()
        try:
            await connection.execute(NO_TIMEOUTS)
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                yield connection
        finally:
            connection.terminate()


async def _read_streams(connection: Connection, head: int) -> AsyncGenerator[Sequence[LoggedEvent]]:
    cursor = await connection.cursor(STREAMS, head)
    batch_events = min(FIRST_BATCH_EVENTS, STREAMS_BATCH_EVENTS)
    while rows := await cursor.fetch(batch_events):
        mean_bytes = sum(len(row["state"]) for row in rows) // len(rows) + 1
        batch_events = max(1, min(STREAMS_BATCH_EVENTS, STREAMS_BATCH_BYTES // mean_bytes))
        yield [decode_logged(*row) for row in rows]
