"""The log as deliverers read it: from memory if this process recorded the events, else from the database.

A failover or a restore may lose events that an endpoint has accepted, and the saved place goes back with them.
So everything that is read comes with the proof that the log still has the place where the last read ended.
"""

from collections.abc import Sequence
from typing import Final

from domain.order import Order
from projections.postgres import Connection
from projections.view import LoggedEvent
from service.database.connections import DedicatedConnection
from service.event_log import store
from service.event_log.erasures import HeardErasures
from service.event_log.feed import Feed, decode_logged
from service.event_log.store import RecordedEvent
from service.features.subscriptions.window import LogPlace

# The events of one order that are read at a time.
ORDER_EVENTS_MAX: Final = 100

# Whether the log has a place. It then has all that was ever read below it, since each report has its own id. If
# the id is unknown, the log must at least reach the position, which may be a gap.
HAS_PLACE: Final = """
    CASE WHEN {report_id}::text IS NULL
         THEN coalesce((SELECT max(notification_id) FROM public.order_events), 0) >= {position}
         ELSE EXISTS (
             SELECT FROM public.order_events
             WHERE notification_id = {position} AND position(convert_to({report_id}, 'UTF8') IN state) > 0
         )
    END
"""


PROVE: Final = f"SELECT {HAS_PLACE.format(position='$1::bigint', report_id='$2')}"


class PlaceLostError(Exception):
    """A failover or a restore has lost the event at a subscription's position. ``str()`` names it."""

    def __init__(self, place: LogPlace) -> None:
        super().__init__(f"the log does not have the event {place.report_id} at position {place.position}")


async def has_place(connection: Connection, place: LogPlace) -> bool:
    """Return whether the log of a connection's server still has a place."""
    return bool(await connection.fetchval(PROVE, *place))


class LogReader:
    """Reads the log for deliverers.

    Args:
        feed: the events that this process has recorded last.
        dedicated: the connection for all others, so that long replays delay no other reader.
    """

    def __init__(self, feed: Feed, dedicated: DedicatedConnection) -> None:
        self._feed = feed
        self._dedicated = dedicated

    @property
    def erasures(self) -> HeardErasures:
        """The latest erasures, after ``hear``."""
        return self._feed.erasures

    async def hear(self, *, at_once: bool = False) -> None:
        """Find out whether there are new erasures, unless that was found out a short time ago."""
        await self._feed.hear_in_time(at_once=at_once)

    async def read(self, after: LogPlace, limit: int) -> Sequence[LoggedEvent]:
        """Return the next events above a place, at most ``limit``.

        Raises:
            PlaceLostError: the log ends before the place, or has another event there.
        """
        await self.hear()
        # Memory proves the place if it has the event there: it holds consecutive events of one log.
        recalled = self._feed.recall(after.position - 1, limit + 1)
        if len(recalled) > 1 and place_of(*recalled[0]) == after:
            return recalled[1:]
        async with self._dedicated.connection() as connection:
            recorded = await _read_above(connection, after, limit)
        return [decode_logged(*event[:5]) for event in recorded]

    async def read_order(self, order_no: str, after: int, place: LogPlace) -> Sequence[LoggedEvent]:
        """Return an order's next events above a version.

        Raises:
            PlaceLostError: the log does not have the place.
        """
        async with self._dedicated.connection() as connection:
            recorded = await store.read_stream(connection, order_no, after, ORDER_EVENTS_MAX)
            # Afterwards: a log that still has the place had it when the events were read.
            if not await has_place(connection, place):
                raise PlaceLostError(place)
        return [decode_logged(*event[:5]) for event in recorded]


def place_of(position: int, event: object) -> LogPlace:
    """Return the place of an event in the log. The id of an undecodable event is unknown."""
    return LogPlace(position, event.report_id if isinstance(event, Order.StatusReported) else None)


async def _read_above(connection: Connection, after: LogPlace, limit: int) -> Sequence[RecordedEvent]:
    """Return the events above a place, and check the one at the place."""
    recorded = await store.read_log(connection, max(0, after.position - 1), limit + 1)
    if recorded and recorded[0].position == after.position:
        if after.report_id not in {None, recorded[0].report_id}:
            raise PlaceLostError(after)
        return recorded[1:]
    # A gap has no event, but the log goes on above it.
    if after.report_id is not None or await store.head_position(connection) < after.position:
        raise PlaceLostError(after)
    return recorded
