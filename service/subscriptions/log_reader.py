"""The log as deliverers read it: from memory if this process recorded the events, else from the database."""

from collections.abc import Sequence
from typing import Final

from domain.order import Order
from projections.engine import LoggedEvent
from projections.postgres_errors import Connection
from service.database.connections import DedicatedConnection
from service.event_log import store
from service.event_log.feed import Feed, decode_logged
from service.event_log.store import RecordedEvent
from service.subscriptions.window import Place

# The events of one order that are read at a time.
ORDER_EVENTS_MAX: Final = 100


class LogWentBackError(Exception):
    """A failover or a restore has lost the event at a subscription's position. ``str()`` names it."""


class LogReader:
    """Reads the log for deliverers.

    Args:
        feed: the events that this process has recorded last.
        dedicated: the connection for all others, so that long replays delay no other reader.
    """

    def __init__(self, feed: Feed, dedicated: DedicatedConnection) -> None:
        self._feed = feed
        self._dedicated = dedicated

    async def verify(self, place: Place, *, is_other_log: bool) -> None:
        """Check that the log still has a place.

        Args:
            place: the place.
            is_other_log: whether it belongs to a log with another id, as after a restore. The endpoint may have
                seen events that this log lacks.

        Raises:
            LogWentBackError: the log ends before the place, or has another event there, or is another one.
        """
        if is_other_log:
            raise LogWentBackError(f"position {place.position} belongs to another log")
        async with self._dedicated.connection() as connection:
            await _read_above(connection, place, 0)

    async def read(self, after: Place, limit: int) -> Sequence[LoggedEvent]:
        """Return the next events above a place, at most ``limit``.

        Raises:
            LogWentBackError: the log ends before the place, or has another event there.
        """
        if recalled := self._feed.recall(after.position, limit):
            return recalled
        async with self._dedicated.connection() as connection:
            recorded = await _read_above(connection, after, limit)
        return [decode_logged(*event[:5]) for event in recorded]

    async def read_order(self, order_no: str, after: int) -> Sequence[LoggedEvent]:
        """Return an order's next events above a version."""
        async with self._dedicated.connection() as connection:
            recorded = await store.read_stream(connection, order_no, after, ORDER_EVENTS_MAX)
        return [decode_logged(*event[:5]) for event in recorded]


def place_of(position: int, event: object) -> Place:
    """Return the place of an event in the log. The id of an undecodable event is unknown."""
    return Place(position, event.report_id if isinstance(event, Order.StatusReported) else None)


async def _read_above(connection: Connection, after: Place, limit: int) -> Sequence[RecordedEvent]:
    """Return the events above a place, and check the one at the place."""
    recorded = await store.read_log(connection, max(0, after.position - 1), limit + 1)
    if recorded and recorded[0].position == after.position:
        if after.report_id not in {None, recorded[0].report_id}:
            raise LogWentBackError(f"the log has another event at position {after.position}")
        return recorded[1:]
    # A gap has no event, but the log goes on above it.
    if after.report_id is not None or await store.head_position(connection) < after.position:
        raise LogWentBackError(f"the log does not have the event at position {after.position}")
    return recorded
