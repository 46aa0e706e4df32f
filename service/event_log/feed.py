"""The log, decoded for projections: from memory where this process wrote it, else from the database."""

from collections.abc import AsyncGenerator, Sequence
from typing import Final

from domain.order import Order
from projections.engine import DecodedEvent, LoggedEvent, Undecodable
from service.database.connections import Connect, Connection, HeldConnection
from service.event_log import store as event_store

# What was committed last is kept for the projections, which read it milliseconds later.
TAIL_EVENTS_MAX: Final = 4_096
TAIL_CHARACTERS_MAX: Final = 8 * 1024 * 1024

# Small, since the loop stands still while a page is decoded; smaller where bodies are larger than usual.
STREAMS_PAGE_EVENTS: Final = 2_000
STREAMS_PAGE_BYTES: Final = 2 * 1024 * 1024
FIRST_PAGE_EVENTS: Final = 100

# The one who reads may take long for a page.
BE_PATIENT: Final = "SET idle_in_transaction_session_timeout = 0"

# In the order of the primary key; a cursor, so that neither side holds more than a page. Whether by a scan of
# the key or by a sort of the log is the planner's choice: it depends on how much of the log is in memory.
STREAMS: Final = """
    SELECT notification_id, originator_id, originator_version, topic, state
    FROM order_events
    WHERE notification_id <= $1
    ORDER BY originator_id, originator_version
"""
COUNT_EVENTS: Final = "SELECT count(*) FROM order_events WHERE notification_id <= $1"


def decode(position: int, order_no: str, version: int, topic: str, state: bytes) -> LoggedEvent:
    """Return an event as a projection is given it, whatever its bytes are."""
    try:
        event = event_store.decode_event(order_no, version, topic, state)
    except event_store.UndecodableEventError as error:
        return position, Undecodable(order_no, version, str(error))
    return position, event


class LogReader:
    """Reads the log for projections.

    Args:
        held: the connection for reading what is not in memory.
        connect: opens another, for the long reads of a rebuild.
    """

    def __init__(self, held: HeldConnection, connect: Connect) -> None:
        self._held = held
        self._connect = connect
        # Events at consecutive positions, so that nothing of another process can lie between them.
        self._tail: list[DecodedEvent] = []
        self._tail_characters = 0

    def remember(self, events: Sequence[Order.StatusReported], positions: Sequence[int]) -> None:
        """Keep what was just committed, in the order of the log."""
        for event, position in zip(events, positions, strict=True):
            if self._tail and position != self._tail[-1][0] + 1:
                self._forget()
            self._tail.append((position, event))
            self._tail_characters += len(event.body)
        if len(self._tail) > TAIL_EVENTS_MAX or self._tail_characters > TAIL_CHARACTERS_MAX:
            del self._tail[: len(self._tail) // 2]
            self._tail_characters = sum(len(event.body) for _, event in self._tail)

    def _forget(self) -> None:
        self._tail = []
        self._tail_characters = 0

    async def read_log(self, after: int, limit: int) -> Sequence[LoggedEvent]:
        """Return the events above a position, at most ``limit``, in the order of the log."""
        if self._tail:
            start = after + 1 - self._tail[0][0]
            if 0 <= start < len(self._tail):
                return self._tail[start : start + limit]
        async with self._held.use() as connection:
            logged = await event_store.read_log(connection, after, limit)
        return [
            decode(position, order_no, version, topic, state)
            for position, order_no, version, topic, state, _ in logged
        ]

    async def head(self) -> int:
        """Return the highest position, 0 for an empty log."""
        async with self._held.use() as connection:
            return await event_store.head_position(connection)

    async def count(self, head: int) -> int:
        """Return how many events lie up to a position. Nobody else waits for this: it reads all of them."""
        connection = await self._connect()
        try:
            total: int = await connection.fetchval(COUNT_EVENTS, head)
        finally:
            connection.terminate()
        return total

    async def read_streams(self, head: int) -> AsyncGenerator[Sequence[LoggedEvent]]:
        """Yield the events up to a position by order and version, in pages bounded by rows and bytes."""
        connection: Connection = await self._connect()
        try:
            await connection.execute(BE_PATIENT)
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                cursor = await connection.cursor(STREAMS, head)
                wanted = min(FIRST_PAGE_EVENTS, STREAMS_PAGE_EVENTS)
                while rows := await cursor.fetch(wanted):
                    mean_bytes = sum(len(row["state"]) for row in rows) // len(rows) + 1
                    wanted = max(1, min(STREAMS_PAGE_EVENTS, STREAMS_PAGE_BYTES // mean_bytes))
                    yield [decode(*row) for row in rows]
        finally:
            connection.terminate()
