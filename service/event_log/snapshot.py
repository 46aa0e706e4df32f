"""The whole log at one moment, order by order: for rebuilds and rejudgements."""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, Final, NamedTuple, cast

from domain.logged import LoggedEvent
from projections.postgres import Connection
from service.database.connections import Connect
from service.event_log.erasures import last_erasure_id
from service.event_log.follow import Place, decode_logged, read_end

# Batches are small, because decoding one blocks the event loop, and smaller if bodies are large.
BATCH_EVENTS_MAX: Final = 2_000
BATCH_BYTES_MAX: Final = 2 * 1024 * 1024
FIRST_BATCH_EVENTS: Final = 100

# The reader may take long to process a batch.
NO_TIMEOUTS: Final = "SET idle_in_transaction_session_timeout = 0"

# In the order of the primary key, through a cursor, so that neither side holds more than a batch. The planner
# scans the key or sorts the log, depending on how much of the log is in memory.
EVENTS_BY_ORDER: Final = """
    SELECT notification_id, originator_id, originator_version, topic, state
    FROM order_events
    WHERE notification_id <= $1
    ORDER BY originator_id, originator_version
"""
COUNT_EVENTS: Final = "SELECT count(*) FROM order_events WHERE notification_id <= $1"


class Snapshot(NamedTuple):
    """The log at one moment.

    Attributes:
        end: the place at its end.
        erasure_id: the id of its last erasure, 0 if there is none.
        total: the number of its events.
        batches: its events in batches, sorted by order number and version.
    """

    end: Place
    erasure_id: int
    total: int
    batches: AsyncGenerator[Sequence[LoggedEvent]]


@asynccontextmanager
async def snapshot(connect: Connect) -> AsyncIterator[Snapshot]:
    """Read the log as it is now until the block ends, on a connection of its own.

    Args:
        connect: opens the connection.
    """
    connection = await connect()
    try:
        await connection.execute(NO_TIMEOUTS)
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            # The first statement takes the snapshot.
            end = await read_end(connection)
            erasure_id = await last_erasure_id(connection)
            total: int = await connection.fetchval(COUNT_EVENTS, end.position)
            async with aclosing(_read_batches(connection, end.position)) as batches:
                yield Snapshot(end, erasure_id, total, batches)
    finally:
        connection.terminate()


async def _read_batches(connection: Connection, head: int) -> AsyncGenerator[Sequence[LoggedEvent]]:
    cursor = await connection.cursor(EVENTS_BY_ORDER, head)
    batch_events = min(FIRST_BATCH_EVENTS, BATCH_EVENTS_MAX)
    while rows := await cursor.fetch(batch_events):
        mean_bytes = sum(len(row["state"]) for row in rows) // len(rows) + 1
        batch_events = max(1, min(BATCH_EVENTS_MAX, BATCH_BYTES_MAX // mean_bytes))
        # A row unpacks like a RecordedEvent. Making one for each would cost a rebuild 4 % of its CPU.
        yield [decode_logged(row) for row in cast("Any", rows)]
