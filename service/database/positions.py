"""The sequence that numbers the log's events, compared with the log itself."""

from typing import Final

from projections.postgres_errors import Connection
from service.database.connections import UnsupportedServerError

# The last number that the sequence has given, its two settings, and the head of the log.
SEQUENCE: Final = """
    SELECT CASE WHEN is_called THEN last_value ELSE last_value - 1 END, seqincrement, seqcache,
        coalesce((SELECT max(notification_id) FROM public.order_events), 0)
    FROM public.order_events_notification_id_seq, pg_sequence
    WHERE seqrelid = 'public.order_events_notification_id_seq'::regclass
"""
# Logical replication does not copy sequences.
ADVANCE: Final = "SELECT setval('order_events_notification_id_seq', max(notification_id)) FROM order_events"
RESET: Final = "ALTER SEQUENCE order_events_notification_id_seq INCREMENT 1 CACHE 1"


async def find_fault(connection: Connection) -> str | None:
    """Return why positions would not rise in the order of the commits, and what to do about it; else None."""
    ((last, increment, cache, head),) = await connection.fetch(SEQUENCE)
    if last < head:
        fault, statement = f"is at {last}, behind the log's head {head}", ADVANCE
    elif (increment, cache) != (1, 1):
        fault, statement = f"has increment {increment} and cache {cache}", RESET
    else:
        return None
    return f"the sequence of positions {fault}: run, as its owner, {statement}"


async def require_rising_positions(connection: Connection) -> None:
    """Check the sequence.

    Raises:
        UnsupportedServerError: positions would not rise in the order of the commits.
    """
    if (fault := await find_fault(connection)) is not None:
        raise UnsupportedServerError(fault)
