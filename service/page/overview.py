"""What the overview shows: how many orders stand where, what came of late, and what somebody should look at."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple

from domain.statuses import SETTLED
from projections import statistics
from projections.engine import Projector
from projections.statistics import Statistics
from service import event_store, quarantine
from service.database import Connection
from service.lists import POSITION_MAX
from service.quarantine import QuarantineEntry

# Without news for so long, an order that is not settled counts as stuck.
STUCK_DAYS: Final = 3
MINUTES_SHOWN: Final = 60
DAYS_SHOWN: Final = 14
MOVES_SHOWN_MAX: Final = 8
LISTED_MAX: Final = 6
# The reports of the last hour are counted from the log's end on; where there are more, the plot says less.
RECENT_REPORTS_MAX: Final = 20_000
# Counting stops here: "1,000+" is as good a reason to look as any number.
COUNTED_MAX: Final = 1_000
LAG_EVENTS_MAX: Final = 100_000

RECENT: Final = """
    WITH recent AS MATERIALIZED (
        SELECT received_at, verdict FROM timeline.entries ORDER BY position DESC LIMIT $2
    )
    SELECT date_trunc('minute', received_at), verdict, count(*),
        CASE WHEN (SELECT count(*) FROM recent) >= $2 THEN (SELECT min(received_at) FROM recent) END
    FROM recent WHERE received_at >= $1
    GROUP BY 1, 2
"""
# The conditions are those of the partial indexes.
STUCK: Final = """
    SELECT order_no, status, last_reported_at FROM current_status.orders
    WHERE last_reported_at <= $1
      AND (status IS NULL
           OR status NOT IN ('delivered', 'completed', 'returned', 'cancelled', 'lost', 'damaged'))
    ORDER BY last_reported_at
    LIMIT $2
"""
CONTRADICTIONS: Final = """
    SELECT known.order_no, entry.version, entry.recognised, entry.previous_status, entry.received_at
    FROM (SELECT order_no FROM current_status.orders WHERE refused > 0
          ORDER BY first_position DESC LIMIT $1) AS known
    JOIN LATERAL (
        SELECT version, recognised, previous_status, received_at FROM timeline.entries
        WHERE order_no = known.order_no AND verdict = 'refused' ORDER BY version DESC LIMIT 1
    ) AS entry ON true
    ORDER BY entry.received_at DESC
"""
IN_QUARANTINE: Final = """
    SELECT count(*) FROM (SELECT FROM quarantine WHERE state = 'open' LIMIT $1) AS open_entries
"""
POSITIONS: Final = """
    SELECT 'current_status', position, (SELECT count(*) FROM current_status.set_aside)
    FROM current_status.projection
    UNION ALL
    SELECT 'timeline', position, (SELECT count(*) FROM timeline.set_aside) FROM timeline.projection
    UNION ALL
    SELECT 'statistics', position, (SELECT count(*) FROM statistics.set_aside) FROM statistics.projection
"""
OLDEST_AFTER: Final = """
    SELECT recorded_at FROM order_events WHERE notification_id > $1 ORDER BY notification_id LIMIT 1
"""


class StuckOrder(NamedTuple):
    """An order that is not settled and of which nothing was heard for long."""

    order_no: str
    status: str | None
    last_reported_at: datetime


class Contradiction(NamedTuple):
    """The last refused report of an order."""

    order_no: str
    version: int
    recognised: str | None
    previous_status: str | None
    received_at: datetime


class Following(NamedTuple):
    """How far a view has come."""

    view: str
    position: int
    lag_events: int
    lag_seconds: float
    set_aside: int
    is_outdated: bool


class Overview(NamedTuple):
    """All that the overview shows. ``minutes`` are the last ones, oldest first; counts stop at COUNTED_MAX."""

    now: datetime
    head: int
    statistics: Statistics
    minutes: Sequence[tuple[datetime, dict[str, int]]]
    stuck: Sequence[StuckOrder]
    stuck_count: int
    contradictions: Sequence[Contradiction]
    in_quarantine: int
    quarantine: Sequence[QuarantineEntry]
    views: Sequence[Following]

    @property
    def orders(self) -> int:
        return sum(orders for _, orders in self.statistics.statuses)

    @property
    def moving(self) -> int:
        """How many have a status that is not the last one."""
        return sum(orders for status, orders in self.statistics.statuses if status and status not in SETTLED)

    @property
    def lag_seconds(self) -> float:
        return max(view.lag_seconds for view in self.views)


async def overview(connection: Connection, projectors: Mapping[str, Projector], now: datetime) -> Overview:
    """Read everything that the overview shows."""
    head = await event_store.head_position(connection)
    stuck_before = now - timedelta(days=STUCK_DAYS)
    stuck = [StuckOrder(*row) for row in await connection.fetch(STUCK, stuck_before, COUNTED_MAX)]
    contradictions = await connection.fetch(CONTRADICTIONS, LISTED_MAX)
    return Overview(
        now=now,
        head=head,
        statistics=await statistics.read(connection, (now - timedelta(days=DAYS_SHOWN - 1)).date()),
        minutes=await _minutes(connection, now),
        stuck=stuck[:LISTED_MAX],
        stuck_count=len(stuck),
        contradictions=[Contradiction(*row) for row in contradictions],
        in_quarantine=await connection.fetchval(IN_QUARANTINE, COUNTED_MAX),
        quarantine=await quarantine.entries_page(connection, POSITION_MAX, "open", LISTED_MAX),
        views=await _views(connection, projectors, now),
    )


async def _minutes(connection: Connection, now: datetime) -> list[tuple[datetime, dict[str, int]]]:
    last = now.astimezone(UTC).replace(second=0, microsecond=0)
    minutes: dict[datetime, dict[str, int]] = {
        last - timedelta(minutes=ago): {} for ago in reversed(range(MINUTES_SHOWN))
    }
    begin = min(minutes)
    for minute, verdict, reports, oldest in await connection.fetch(RECENT, begin, RECENT_REPORTS_MAX):
        begin = max(begin, oldest) if oldest is not None else begin
        if minute in minutes:
            minutes[minute][verdict] = reports
    # A minute that is counted in part only would show less than there was.
    return [(minute, counts) for minute, counts in minutes.items() if minute >= begin or minute == last]


async def _views(connection: Connection, projectors: Mapping[str, Projector], now: datetime) -> list[Following]:
    views = []
    for name, position, aside in await connection.fetch(POSITIONS):
        oldest = await connection.fetchval(OLDEST_AFTER, position)
        events = await event_store.count_after(connection, position, LAG_EVENTS_MAX) if oldest else 0
        seconds = max(0.0, (now - oldest).total_seconds()) if oldest else 0.0
        views.append(Following(name, position, events, seconds, aside, projectors[name].is_outdated))
    return views
