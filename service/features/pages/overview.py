"""The data of the overview: orders by status, recent reports, and orders and bodies that need attention."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple
from zoneinfo import ZoneInfo

from domain.statuses import SETTLED, Recognise
from projections import statistics
from projections.order_list import StuckOrder, stuck_orders
from projections.postgres import Connection
from projections.statistics import Statistics
from projections.windows import POSITION_MAX
from service.api.freshness import Lag, read_lag
from service.event_log import store
from service.event_log.contradictions import Contradiction, contradictions_page
from service.ingest import quarantine
from service.ingest.quarantine import QuarantinedBody
from service.projecting.position import ViewPositions

# An order that is not settled counts as stuck after this many days without a report.
STUCK_DAYS: Final = 3
MINUTES_SHOWN: Final = 60
DAYS_SHOWN: Final = 14
MOVES_SHOWN_MAX: Final = 8
LISTED_MAX: Final = 6
# Counting stops here, and the page shows "1,000+".
COUNTED_MAX: Final = 1_000

# The number of open quarantine entries, at most $1.
COUNT_OPEN_ENTRIES: Final = """
    SELECT count(*) FROM (SELECT FROM quarantine WHERE state = 'open' LIMIT $1) AS open_entries
"""


class Overview(NamedTuple):
    """Everything that the overview shows.

    ``minutes`` has report counts by verdict, the oldest minute first. Lists have at most LISTED_MAX rows, and
    ``stuck_count`` and ``quarantine_count`` are at most COUNTED_MAX.
    """

    now: datetime
    head: int
    statistics: Statistics
    minutes: Sequence[tuple[datetime, dict[str, int]]]
    stuck: Sequence[StuckOrder]
    stuck_count: int
    contradictions: Sequence[Contradiction]
    quarantine: Sequence[QuarantinedBody]
    quarantine_count: int
    views: Sequence[Lag]
    outdated: frozenset[str]

    @property
    def orders(self) -> int:
        return sum(count["orders"] for count in self.statistics["statuses"])

    @property
    def moving(self) -> int:
        """The number of orders with a status that is not settled."""
        counts = self.statistics["statuses"]
        return sum(count["orders"] for count in counts if count["status"] and count["status"] not in SETTLED)

    @property
    def lag_seconds(self) -> float:
        return max(view["seconds"] for view in self.views)


async def read_overview(
    connection: Connection,
    positions: ViewPositions,
    zone: ZoneInfo,
    now: datetime,
    recognise: Recognise,
) -> Overview:
    """Read the data of the overview.

    Args:
        connection: a connection.
        positions: how far each view has come.
        zone: the time zone of the days.
        now: the present time.
        recognise: the present vocabulary.
    """
    head = await store.head_position(connection)
    stuck = await stuck_orders(connection, now - timedelta(days=STUCK_DAYS), COUNTED_MAX)
    contradictions, _ = await contradictions_page(connection, POSITION_MAX, LISTED_MAX, handled=False)
    return Overview(
        now=now,
        head=head,
        statistics=await statistics.read_statistics(connection, zone, now, DAYS_SHOWN, recognise),
        minutes=await _read_minutes(connection, now),
        stuck=stuck[:LISTED_MAX],
        stuck_count=len(stuck),
        contradictions=contradictions[:LISTED_MAX],
        quarantine=await quarantine.entries_page(connection, POSITION_MAX, "open", LISTED_MAX),
        quarantine_count=await connection.fetchval(COUNT_OPEN_ENTRIES, COUNTED_MAX),
        views=[await read_lag(connection, position) for position in positions.values()],
        outdated=frozenset(name for name, position in positions.items() if position.is_outdated),
    )


async def _read_minutes(connection: Connection, now: datetime) -> list[tuple[datetime, dict[str, int]]]:
    last = now.astimezone(UTC).replace(second=0, microsecond=0)
    minutes: dict[datetime, dict[str, int]] = {
        last - timedelta(minutes=ago): {} for ago in reversed(range(MINUTES_SHOWN))
    }
    for minute, verdict, reports in await statistics.read_minutes(connection, min(minutes)):
        # The clock of another process may be ahead of this one's.
        if minute in minutes:
            minutes[minute][verdict] = reports
    return [*minutes.items()]
