"""A start by time: the first event that was recorded at or after a time, although times do not always rise.

A clock may be set back, and a failover may lead to a server with another clock. Then some early events have
later times than the events after them. A reader that starts by time must miss none of those.
"""

from datetime import datetime
from typing import Final

from projections.postgres import Connection
from service.database.connections import DedicatedConnection
from service.event_log import store

# The number of positions in a block of the table ``log_times``, whose rows are final: it can never be changed.
# The search reads one block of the log, or the events above the last block: about 10 ms.
BLOCK_POSITIONS: Final = 8_192
# How often the service checks whether the log has grown by a block, and its pause between two blocks.
POLL_SECONDS: Final = 10.0
PAUSE_SECONDS: Final = 0.02

# Adds the next block if the log goes on above it, and returns its number. No event is added to it later, since
# positions rise in the order of the commits.
ADD_BLOCK: Final = """
    INSERT INTO public.log_times (block, latest)
    SELECT block, (
        SELECT coalesce(max(recorded_at), '-infinity') FROM public.order_events
        WHERE notification_id >= block * $1 AND notification_id < (block + 1) * $1)
    FROM (SELECT coalesce(max(block) + 1, 0) AS block FROM public.log_times) AS next
    WHERE (block + 1) * $1 <= (SELECT max(notification_id) FROM public.order_events)
    ON CONFLICT DO NOTHING
    RETURNING block
"""
# The first event that was recorded at or after a time, or none. No block below the one where it begins has any.
FIRST_SINCE: Final = """
    SELECT notification_id FROM public.order_events
    WHERE recorded_at >= $1 AND notification_id >= $2 * coalesce(
        (SELECT min(block) FROM public.log_times WHERE latest >= $1),
        (SELECT max(block) + 1 FROM public.log_times),
        0)
    ORDER BY notification_id LIMIT 1
"""
LAST_BELOW: Final = "SELECT max(notification_id) FROM public.order_events WHERE notification_id < $1"


async def position_before(connection: Connection, time: datetime) -> int:
    """Return the position of the last event before the first one that was recorded at or after a time.

    A reader that continues from there misses no event of that time or later. It may get earlier ones too: those
    that follow an event whose time was too late. Return 0 if there is no such position.
    """
    # Before the search: an event that is recorded during it comes after this position.
    head = await store.head_position(connection)
    first: int | None = await connection.fetchval(FIRST_SINCE, time, BLOCK_POSITIONS)
    return head if first is None else await connection.fetchval(LAST_BELOW, first) or 0


async def add_blocks(dedicated: DedicatedConnection) -> int:
    """Add the next block of times if the log has grown beyond it, and return how many were added."""
    async with dedicated.connection() as connection:
        return await connection.fetchval(ADD_BLOCK, BLOCK_POSITIONS) is not None
