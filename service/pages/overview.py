"""What the overview shows: how many orders stand where, what came of late, and what somebody should look at."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple

from domain.statuses import SETTLED
from projections import current_status, statistics, timeline
from projections.current_status import OrdersFilter, StuckOrder
from projections.engine import Projector
from projections.statistics import Statistics
from projections.timeline import Contradiction
from service.api.freshness import Lag, view_lag
from service.database.connections import Connection
from service.event_log import store as event_store
from service.http.pagination import POSITION_MAX
from service.ingest import quarantine
from service.ingest.quarantine import QuarantineEntry

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

IN_QUARANTINE: Final = """
    SELECT count(*) FROM (SELECT FROM quarantine WHERE state = 'open' LIMIT $1) AS open_entries
"""


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
    views: Sequence[Lag]
    outdated: frozenset[str]

    @property
    def orders(self) -> int:
        return sum(orders for _, orders in self.statistics.statuses)

    @property
    def moving(self) -> int:
        """How many have a status that is not the last one."""
        return sum(orders for status, orders in self.statistics.statuses if status and status not in SETTLED)

    @property
    def lag_seconds(self) -> float:
        return max(view.seconds for view in self.views)


async def overview(connection: Connection, projectors: Mapping[str, Projector], now: datetime) -> Overview:
    """Read everything that the overview shows."""
    head = await event_store.head_position(connection)
    stuck_before = now - timedelta(days=STUCK_DAYS)
    stuck = await current_status.stuck(connection, stuck_before, COUNTED_MAX)
    refused = OrdersFilter(verdict="refused")
    contradicted = await current_status.orders_page(connection, POSITION_MAX, refused, LISTED_MAX)
    return Overview(
        now=now,
        head=head,
        statistics=await statistics.read(connection, (now - timedelta(days=DAYS_SHOWN - 1)).date()),
        minutes=await _minutes(connection, now),
        stuck=stuck[:LISTED_MAX],
        stuck_count=len(stuck),
        contradictions=await timeline.latest_refused(connection, [row.order_no for row in contradicted]),
        in_quarantine=await connection.fetchval(IN_QUARANTINE, COUNTED_MAX),
        quarantine=await quarantine.entries_page(connection, POSITION_MAX, "open", LISTED_MAX),
        views=[await view_lag(connection, name) for name in projectors],
        outdated=frozenset(name for name, projector in projectors.items() if projector.is_outdated),
    )


async def _minutes(connection: Connection, now: datetime) -> list[tuple[datetime, dict[str, int]]]:
    last = now.astimezone(UTC).replace(second=0, microsecond=0)
    minutes: dict[datetime, dict[str, int]] = {
        last - timedelta(minutes=ago): {} for ago in reversed(range(MINUTES_SHOWN))
    }
    begin = min(minutes)
    for minute, verdict, reports, counted_from in await timeline.recent_by_minute(
        connection, begin, RECENT_REPORTS_MAX
    ):
        begin = max(begin, counted_from) if counted_from is not None else begin
        if minute in minutes:
            minutes[minute][verdict] = reports
    # A minute that is counted in part only would show less than there was.
    return [(minute, counts) for minute, counts in minutes.items() if minute >= begin or minute == last]
